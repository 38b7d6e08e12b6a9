"""Public operations: they check their operands, then hand them to a backend."""

from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.int4_matmul.operands import Compensator
from pallas_kernels.tails.reference import Activation, glu_project_xla, rmsnorm_project_xla

__all__ = ["glu_project", "rmsnorm_project"]


def _norm_mosaic_gpu(*args: Any, **kwargs: Any) -> Any:
    # Imported when first called: a program that never runs on a GPU does not wait for Mosaic.
    from pallas_kernels.tails.gpu import rmsnorm_project_mosaic_gpu

    return rmsnorm_project_mosaic_gpu(*args, **kwargs)


def _glu_mosaic_gpu(*args: Any, **kwargs: Any) -> Any:
    from pallas_kernels.tails.gpu import glu_project_mosaic_gpu

    return glu_project_mosaic_gpu(*args, **kwargs)


def _norm_mosaic_tpu(*args: Any, **kwargs: Any) -> Any:
    from pallas_kernels.tails.tpu import rmsnorm_project_mosaic_tpu

    return rmsnorm_project_mosaic_tpu(*args, **kwargs)


def _glu_mosaic_tpu(*args: Any, **kwargs: Any) -> Any:
    from pallas_kernels.tails.tpu import glu_project_mosaic_tpu

    return glu_project_mosaic_tpu(*args, **kwargs)


_NORM_BACKENDS = {"mosaic_gpu": _norm_mosaic_gpu, "mosaic_tpu": _norm_mosaic_tpu, "xla": rmsnorm_project_xla}
_GLU_BACKENDS = {"mosaic_gpu": _glu_mosaic_gpu, "mosaic_tpu": _glu_mosaic_tpu, "xla": glu_project_xla}


def rmsnorm_project(
    residual: Float[Array, "*B K"],
    update: Float[Array, "*B K"] | None,
    weight: Float[Array, " K"],
    *,
    eps: float,
    compensator: Compensator | None = None,
    implementation: dispatch.Implementation | None = None,
) -> tuple[Float[Array, "*B K"], Float[Array, "*B K"], Float[Array, "*B R"] | None]:
    """Compute `h = residual + update`, its norm x, and the gated coordinates z that a compensator makes of x.

    Args:
        residual: Activations; any leading axes.
        update: Added to them, likewise; None where there is nothing to add.
        weight: Factors on the normalised columns.
        eps: Added to the mean square.
        compensator: Of the product that takes x; only what makes coordinates is looked at.
        implementation: Backend; by default the best one for this platform that can do the case.

    Returns:
        x and h in residual's type, and z as `int4_matmul` takes it, or None without a compensator. A kernel may take
        the x that z is made of before it is rounded, or with the rounding elsewhere: z differs by 2^-8 of the sum of
        its terms' sizes at most.

    Raises:
        ValueError: Shapes or types do not fit together; says which and what was expected.
        NotImplementedError: The backend that was asked for cannot do this case.
    """
    k = residual.shape[-1]
    if not jnp.issubdtype(residual.dtype, jnp.floating):
        raise ValueError(f"rmsnorm_project: residual must be floating, got {residual.dtype}")
    if update is not None and (update.shape != residual.shape or update.dtype != residual.dtype):
        got, expected = (f"{array.dtype}{list(array.shape)}" for array in (update, residual))
        raise ValueError(f"rmsnorm_project: update must be {expected} as residual is, got {got}")
    if weight.shape != (k,):
        raise ValueError(f"rmsnorm_project: weight must have shape [{k}], got {list(weight.shape)}")
    _check_columns("rmsnorm_project", compensator, k)
    with jax.named_scope("rmsnorm_project"):
        return dispatch.call(
            "rmsnorm_project", _NORM_BACKENDS, implementation, residual, update, weight, compensator, eps=eps
        )


def glu_project(
    gate_up: Float[Array, "*B 2*K"],
    *,
    activation: Activation,
    compensator: Compensator | None = None,
    implementation: dispatch.Implementation | None = None,
) -> tuple[Float[Array, "*B K"], Float[Array, "*B R"] | None]:
    """Compute `x = activation(gate) * up`, and the gated coordinates z that a compensator makes of x.

    Args:
        gate_up: The gate's columns, then those of up; any leading axes.
        activation: "silu", or "gelu_tanh", the approximation of GELU by a tanh.
        compensator: Of the product that takes x; only what makes coordinates is looked at.
        implementation: Backend; by default the best one for this platform that can do the case.

    Returns:
        x in gate_up's type, and z as `int4_matmul` takes it, or None without a compensator.

    Raises:
        ValueError: Shapes or types do not fit together; says which and what was expected.
        NotImplementedError: The backend that was asked for cannot do this case.
    """
    if activation not in get_args(Activation):
        raise ValueError(f"glu_project: activation must be one of {get_args(Activation)}, got {activation!r}")
    if gate_up.shape[-1] % 2 or not jnp.issubdtype(gate_up.dtype, jnp.floating):
        got = f"{gate_up.dtype}{list(gate_up.shape)}"
        raise ValueError(f"glu_project: gate_up must be floating with an even last axis, got {got}")
    _check_columns("glu_project", compensator, gate_up.shape[-1] // 2)
    with jax.named_scope("glu_project"):
        return dispatch.call("glu_project", _GLU_BACKENDS, implementation, gate_up, compensator, activation=activation)


def _check_columns(op: str, compensator: Compensator | None, k: int) -> None:
    if compensator is not None and compensator.a.shape[-1] != k:
        raise ValueError(f"{op}: compensator.a must have shape [R, {k}], got {list(compensator.a.shape)}")
