"""Public int4 matmul: checks its operands, then hands them to a backend."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from pallas_kernels import dispatch
from pallas_kernels.int4_matmul.operands import Activation, Activations, Compensator, Gate, Layout
from pallas_kernels.int4_matmul.reference import int4_matmul_xla
from pallas_kernels.packing import SIDE

__all__ = ["Activation", "Compensator", "Gate", "Layout", "int4_matmul"]


def _mosaic_gpu(*args: Any, **kwargs: Any) -> Array:
    # Imported when first called: a program that never runs on a GPU does not wait for Mosaic.
    from pallas_kernels.int4_matmul.gpu import int4_matmul_mosaic_gpu

    return int4_matmul_mosaic_gpu(*args, **kwargs)


def _mosaic_tpu(*args: Any, **kwargs: Any) -> Array:
    from pallas_kernels.int4_matmul.tpu import int4_matmul_mosaic_tpu

    return int4_matmul_mosaic_tpu(*args, **kwargs)


_BACKENDS = {"mosaic_gpu": _mosaic_gpu, "mosaic_tpu": _mosaic_tpu, "xla": int4_matmul_xla}


def int4_matmul(
    x: Float[Array, "*B K"],
    packed: Int8[Array, "N K/2"],
    scale: Float[Array, "N G"],
    *,
    zero: Int8[Array, "N G"] | None = None,
    bias: Float[Array, " N"] | None = None,
    compensator: Compensator | None = None,
    z: Float[Array, "*B R"] | None = None,
    out_dtype: jnp.dtype | type | None = None,
    layout: Layout = "rows",
    activation: Activation | None = None,
    activations: Activations = "as they are",
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "*B N"]:
    """Compute `x W^T + bias + (g * A x) B^T` with int4 `W = scale * (code - zero)`, accumulating in float32.

    Args:
        x: Activations; any leading axes.
        packed: Codes, two a byte, low nibble first (`pallas_kernels.packing`).
        scale: One scale per output channel (G = 1) or per group of K / G columns.
        zero: Zero points in units of codes, for asymmetric weights.
        bias: Added after the scales.
        compensator: Low-rank term of rank R added in the epilogue (SPEAR, section 2).
        z: The gated coordinates `g * A x` where they are already known, as when several products share one `A`.
        out_dtype: Type of the result; x's by default.
        layout: "rows"; "fragments", codes as `packing.to_fragments` orders them; or "columns", packed as [K/2, N]. With
            the last two, scale and zero are [G, N].
        activation: "silu": output channels alternate in blocks of 64, and `silu(even) * odd`, [..., N / 2], is given.
        activations: "int8" rounds x to 255 codes a row, for the product and for `A x`, which v5e, v5p and v6e multiply
            at twice the peak rate. On rows drawn from a normal distribution the product is off by 0.8% of its norm;
            rows with outliers lose more.
        implementation: Backend; by default the best one for this platform that can do the case.

    Raises:
        ValueError: Shapes or types do not fit together; says which and what was expected.
        NotImplementedError: The backend that was asked for cannot do this case.
    """
    if layout not in ("rows", "fragments", "columns"):
        raise ValueError(f"int4_matmul: layout must be rows, fragments or columns, got {layout!r}")
    if activations not in ("as they are", "int8"):
        raise ValueError(f'int4_matmul: activations must be "as they are" or "int8", got {activations!r}')
    _check(x, packed, scale, layout, zero=zero, bias=bias, compensator=compensator, z=z)
    channels = packed.shape[layout == "columns"]
    if activation is not None and (activation != "silu" or channels % (2 * SIDE)):
        raise ValueError(
            f"int4_matmul: activation must be silu, over a multiple of {2 * SIDE} output channels, got {activation!r}"
            f" over {channels}"
        )
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    with jax.named_scope("int4_matmul"):
        return dispatch.call(
            "int4_matmul",
            _BACKENDS,
            implementation,
            *(x, packed, scale, zero, bias, compensator, z, out_dtype),
            layout=layout,
            activation=activation,
            activations=activations,
        )


def _check(x, packed, scale, layout, *, zero, bias, compensator, z) -> None:
    if packed.ndim != 2 or packed.dtype != jnp.int8:
        shape = "[K/2, N]" if layout == "columns" else "[N, K/2]"
        raise ValueError(f"int4_matmul: packed must be int8 {shape}, got {packed.dtype}{list(packed.shape)}")
    n, half = packed.shape[::-1] if layout == "columns" else packed.shape
    k = 2 * half
    if x.shape[-1] != k or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"int4_matmul: x must be floating [..., {k}] for this weight, got {x.dtype}{list(x.shape)}")
    channels, groups = (0, 1) if layout == "rows" else (1, 0)
    if scale.ndim != 2 or scale.shape[channels] != n or k % scale.shape[groups]:
        expected = f"[{n}, G]" if layout == "rows" else f"[G, {n}]"
        raise ValueError(f"int4_matmul: scale must be {expected} with G dividing {k}, got {list(scale.shape)}")
    expected = {"zero": (zero, scale.shape), "bias": (bias, (n,))}
    if z is not None and compensator is None:
        raise ValueError("int4_matmul: z was given without a compensator to apply it")
    if compensator is not None:
        if (compensator.bt is None) == (compensator.b is None):
            raise ValueError("int4_matmul: a compensator has either bt or b")
        if (compensator.a is None) == (compensator.a_fragments is None):
            raise ValueError("int4_matmul: a compensator has either a or a_fragments")
        rank = compensator.rank
        expected |= {
            "compensator.a": (compensator.a, (rank, k)),
            "compensator.a_fragments": (compensator.a_fragments, (rank * k // SIDE, SIDE)),
            "compensator.bt": (compensator.bt, (rank, n)),
            "compensator.b": (compensator.b, (n, rank)),
            "compensator.a_scale": (compensator.a_scale, (rank,)),
            "compensator.bt_scale": (compensator.bt_scale, (rank,)),
            "z": (z, (*x.shape[:-1], rank)),
        }
    for name, (operand, shape) in expected.items():
        if operand is not None and tuple(operand.shape) != tuple(shape):
            raise ValueError(f"int4_matmul: {name} must have shape {list(shape)}, got {list(operand.shape)}")
