"""Compensators of row-parallel products as the kernels for Hopper read them."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float

from pallas_kernels.int4_matmul import Compensator
from pallas_kernels.packing import RANK_STEP, SIDE, factor_to_fragments


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["a", "b", "scale", "w_in", "b_in", "w_out", "b_out"],
    meta_fields=["form"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PeerCompensator:
    """A compensator of rank R, filled up to a multiple of 16: made by `prepare`, once at load.

    a, with its scales in it, is in the order of `factor_to_fragments`, or None where a kernel is given coordinates; b
    is [N, R], int8 or bfloat16; scale [R] or None is for the gated coordinates. The gate, of `form` or None, has w_in
    [2, 64, R], w_out [2, 64, H], b_in [64] and b_out [64], filled up with zeros, H a multiple of 16. Its weights are
    two bfloat16 parts that add up to them: a gate may open and close steeply.
    """

    a: Any
    b: Any
    scale: Any = None
    w_in: Any = None
    b_in: Any = None
    w_out: Any = None
    b_out: Any = None
    form: Literal["tanh", "linear", "shift"] | None = None

    @property
    def rank(self) -> int:
        """Coordinates, with those that were filled in."""
        return self.b.shape[1]

    def factors(self) -> dict[str, Array]:
        """Give the arrays that are there and come after the sum, by name."""
        arrays = {name: value for name, value in vars(self).items() if name not in ("a", "form")}
        return {f"factor_{name}": value for name, value in arrays.items() if value is not None}


def prepare(compensator: Compensator, *, projects: bool = True) -> PeerCompensator:
    """Bring a compensator into the kernels' form; without `projects` its A is left out.

    Raises:
        NotImplementedError: The rank or the gate's network is more than 64, or the gate sees more of x than z.
    """
    gate = compensator.gate
    if compensator.rank > SIDE or (gate is not None and gate.b_in.shape[0] > SIDE):
        raise NotImplementedError(f"the GPU kernel takes up to {SIDE} coordinates and hidden units of a gate")
    if gate is not None and (gate.probe is not None or gate.w_rms is not None):
        raise NotImplementedError("gates that see more of x than z are not divided among devices")
    b = compensator.bt.T if compensator.b is None else compensator.b
    b = b if b.dtype == jnp.int8 else b.astype(jnp.bfloat16)
    more = -b.shape[1] % RANK_STEP
    scale = compensator.bt_scale
    fields: dict[str, Any] = {
        "a": _fragments_of_a(compensator) if projects else None,
        "b": jnp.pad(b, ((0, 0), (0, more))),
        "scale": None if scale is None else jnp.pad(scale.astype(jnp.float32), (0, more)),
    }
    if gate is not None:
        hidden = gate.b_in.shape[0]
        fields |= {
            "w_in": _halves(_filled(gate.w_in.T, SIDE, b.shape[1] + more)),
            "b_in": _filled(gate.b_in, SIDE).astype(jnp.float32),
            "w_out": _halves(_filled(gate.w_out, SIDE, hidden + -hidden % RANK_STEP)),
            "b_out": _filled(gate.b_out, SIDE).astype(jnp.float32),
            "form": gate.form,
        }
    return PeerCompensator(**fields)


def _fragments_of_a(compensator: Compensator) -> BFloat16[Array, "R*K/64 64"]:
    if compensator.a_fragments is not None:
        return compensator.a_fragments
    a, scale = compensator.a.astype(jnp.float32), compensator.a_scale
    a = a if scale is None else a * scale.astype(jnp.float32)[:, None]
    return factor_to_fragments(jnp.pad(a, ((0, -a.shape[0] % RANK_STEP), (0, 0))).astype(jnp.bfloat16))


def _filled(array: Array, *shape: int) -> Array:
    return jnp.pad(array, [(0, full - size) for size, full in zip(array.shape, shape, strict=True)])


def _halves(array: Float[Array, "H R"]) -> BFloat16[Array, "2 H R"]:
    wide = array.astype(jnp.float32)
    high = wide.astype(jnp.bfloat16)
    return jnp.stack([high, (wide - high.astype(jnp.float32)).astype(jnp.bfloat16)])
