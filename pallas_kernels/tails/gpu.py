"""`rmsnorm_project` and `glu_project` on a Hopper GPU: bring operands into the kernel's form."""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import dispatch, tuning
from pallas_kernels.int4_matmul.gpu import coordinates
from pallas_kernels.int4_matmul.operands import Compensator
from pallas_kernels.int4_matmul.reference import gated_coordinates
from pallas_kernels.packing import RANK_STEP
from pallas_kernels.tails.hopper import Kind, tail_hopper
from pallas_kernels.tails.reference import Activation


def rmsnorm_project_mosaic_gpu(
    residual: Float[Array, "*B K"],
    update: Float[Array, "*B K"] | None,
    weight: Float[Array, " K"],
    compensator: Compensator | None,
    *,
    eps: float,
    interpret: plgpu.InterpretGPUParams | bool = False,
) -> tuple[Float[Array, "*B K"], Float[Array, "*B K"], Float[Array, "*B R"] | None]:
    """Compute what `rmsnorm_project` documents; z is made of weight * h, rounded, and scaled by rows at the end.

    Raises:
        NotImplementedError: Activations are not bfloat16, the GPU is no Hopper, or `tail_hopper` refuses the shape.
    """
    k = residual.shape[-1]
    operands = {
        "first": residual.reshape(-1, k),
        "update": None if update is None else update.reshape(-1, k),
        "weight": weight.astype(jnp.float32),
    }
    out, z = _run("norm", operands, compensator, eps=eps, interpret=interpret)
    x, h = out["x"].reshape(residual.shape), residual if update is None else out["h"].reshape(residual.shape)
    return x, h, None if z is None else z.reshape(*residual.shape[:-1], -1)


def glu_project_mosaic_gpu(
    gate_up: Float[Array, "*B 2*K"],
    compensator: Compensator | None,
    *,
    activation: Activation,
    interpret: plgpu.InterpretGPUParams | bool = False,
) -> tuple[Float[Array, "*B K"], Float[Array, "*B R"] | None]:
    """Compute what `glu_project` documents; x is rounded once.

    Raises:
        NotImplementedError: Activations are not bfloat16, the GPU is no Hopper, or `tail_hopper` refuses the shape.
    """
    *batch, columns = gate_up.shape
    out, z = _run(
        "glu", {"first": gate_up.reshape(-1, columns)}, compensator, activation=activation, interpret=interpret
    )
    return out["x"].reshape(*batch, -1), None if z is None else z.reshape(*batch, -1)


def _run(kind: Kind, operands: dict[str, Any], compensator: Compensator | None, **options: Any) -> tuple[dict, Any]:
    """Run the kernel, with A where it can take it; where it cannot, coordinates take one of their own."""
    if operands["first"].dtype != jnp.bfloat16:
        raise NotImplementedError(f"the GPU kernel is for bfloat16, got {operands['first'].dtype}")
    dispatch.refuse_other_gpus()
    gate = None if compensator is None else compensator.gate
    if compensator is not None and (gate is None or gate.probe is None):
        # Where nothing more happens to z it is rounded at once, for the product with B.
        done = gate is None and compensator.bt_scale is None
        z_dtype = jnp.bfloat16 if done else jnp.float32
        try:
            projection = _projection(compensator)
            out = tail_hopper(
                kind, **operands, **projection, z_dtype=z_dtype, **_cut(kind, operands, projection["a"]), **options
            )
        except NotImplementedError:
            pass  # without A it may do
        else:
            z = out["z"][:, : compensator.a.shape[0]]
            return out, z if gate is None else gated_coordinates(out["x"], z, None, gate)
    out = tail_hopper(kind, **operands, **_cut(kind, operands, None), **options)
    return out, None if compensator is None else coordinates(out["x"], compensator, options["interpret"])


def _cut(kind: Kind, operands: dict[str, Any], a: Array | None) -> dict[str, int]:
    """Give the blocks and warpgroups that proved fastest on this device for a norm; nothing where it was not timed."""
    if kind != "norm":
        return {}
    m, k = operands["first"].shape
    return tuning.lookup("rmsnorm_project", {"m": m, "k": k, "ranks": 0 if a is None else a.shape[0]}) or {}


def _projection(compensator: Compensator) -> dict[str, Array | None]:
    """Give A and its scale at a rank that the kernel takes."""
    a = compensator.a if compensator.a.dtype == jnp.int8 else compensator.a.astype(jnp.bfloat16)
    scale = None if compensator.a_scale is None else compensator.a_scale.astype(jnp.float32)
    more = -a.shape[0] % RANK_STEP
    if more:
        a = jnp.pad(a, ((0, more), (0, 0)))
        scale = None if scale is None else jnp.pad(scale, (0, more))
    return {"a": a, "a_scale": scale}
