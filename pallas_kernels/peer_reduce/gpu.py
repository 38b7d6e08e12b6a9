"""`peer_reduce` and `row_parallel` on Hopper GPUs: bring operands into the kernels' form."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.hopper import whole_rows
from pallas_kernels.int4_matmul import Compensator
from pallas_kernels.packing import RANK_STEP, SIDE
from pallas_kernels.peer_reduce.hopper import Factors, peer_tail_hopper
from pallas_kernels.peer_reduce.inbox import FLAG_ROWS, Inbox
from pallas_kernels.peer_reduce.signals import PATIENCE
from pallas_kernels.tails.gpu import _projection


def peer_reduce_mosaic_gpu(
    y: Float[Array, "*B N"],
    z: Float[Array, "*B R"] | None,
    residual: Float[Array, "*B N"],
    weight: Float[Array, " N"],
    inbox: Inbox,
    *,
    axis: str,
    eps: float,
    compensator: Compensator | None = None,
    following: Compensator | None = None,
    patience: int = PATIENCE,
    interpret: plgpu.InterpretGPUParams | bool = False,
) -> tuple[Float[Array, "*B N"], Float[Array, "*B N"], Float[Array, "*B R2"] | None, Inbox]:
    """Compute what `peer_reduce` documents: parts are pushed, and summed, by one kernel.

    `patience` is in nanoseconds.

    Raises:
        NotImplementedError: Activations are not bfloat16, the GPU is no Hopper, or the shape does not suit the kernels.
    """
    _check(residual, inbox, axis)
    n = residual.shape[-1]
    y = _whole_blocks(y.reshape(-1, n))
    if z is not None:
        z = _whole_blocks(z.reshape(-1, z.shape[-1]))
        z = jnp.pad(z, ((0, 0), (0, -z.shape[1] % RANK_STEP)))
    with _Refs(inbox) as refs:
        out = _tail(refs, residual, weight, compensator, following, own=(y, z), axis=axis, eps=eps,
                    patience=patience, interpret=interpret)  # fmt: skip
    return *out, refs.inbox


def _whole_blocks(rows: Float[Array, "M N"]) -> Float[Array, "P N"]:
    return jnp.pad(rows.astype(jnp.float32), ((0, -rows.shape[0] % FLAG_ROWS), (0, 0)))


def _check(residual: Array, inbox: Inbox, axis: str) -> None:
    if residual.dtype != jnp.bfloat16:
        raise NotImplementedError(f"the GPU kernel is for bfloat16, got {residual.dtype}")
    dispatch.refuse_other_gpus()
    if (size := jax.lax.axis_size(axis)) != inbox.devices:
        raise ValueError(f"the inbox is for {inbox.devices} devices, and the axis {axis!r} has {size}")


class _Refs:
    """An inbox as references that kernels write through, inside of a `with`; afterwards its new state, as `inbox`."""

    def __init__(self, inbox: Inbox):
        self.old = inbox

    def __enter__(self) -> "_Refs":
        names = ("y", "z", "flags", "fault")
        self.arrays = {name: jax.new_ref(getattr(self.old, name)) for name in names}
        self.generation = self.old.generation
        return self

    def __exit__(self, *failure: object) -> None:
        if failure[0] is None:
            frozen = {name: jax.freeze(ref) for name, ref in self.arrays.items()}
            self.inbox = Inbox(**frozen, generation=self.generation)


def _tail(
    refs: _Refs,
    residual: Float[Array, "*B N"],
    weight: Float[Array, " N"],
    compensator: Compensator | None,
    following: Compensator | None,
    *,
    interpret: plgpu.InterpretGPUParams | bool,
    **options: Any,
) -> tuple[Float[Array, "*B N"], Float[Array, "*B N"], Float[Array, "*B R2"] | None]:
    n = residual.shape[-1]
    rows = residual.reshape(-1, n)
    m = rows.shape[0]
    rows = jnp.pad(rows, ((0, whole_rows(m) - m), (0, 0)))
    projection = {}
    if following is not None:
        if following.gate is not None:
            raise NotImplementedError("coordinates of the next product are gated elsewhere")
        done = following.bt_scale is None
        projection = _projection(following) | {"z_dtype": jnp.bfloat16 if done else jnp.float32}
    out = peer_tail_hopper(
        **refs.arrays,
        generation=refs.generation,
        residual=rows,
        weight=weight.astype(jnp.float32),
        factors=None if compensator is None else factors_of(compensator),
        **projection,
        interpret=interpret,
        **options,
    )
    refs.generation = out["generation"]
    x, h = (out[name][:m].reshape(residual.shape) for name in ("x", "h"))
    z = None
    if following is not None:
        z = out["z"][:m, : following.a.shape[0]].reshape(*residual.shape[:-1], -1)
    return x, h, z


def factors_of(compensator: Compensator) -> Factors:
    """Bring B and the gate into the kernel's form.

    Raises:
        NotImplementedError: The gate's network is wider than 64.
    """
    b = compensator.bt.T if compensator.b is None else compensator.b
    b = b if b.dtype == jnp.int8 else b.astype(jnp.bfloat16)
    more = -b.shape[1] % RANK_STEP
    scale = compensator.bt_scale
    scale = None if scale is None else jnp.pad(scale.astype(jnp.float32), (0, more))
    gate, network = compensator.gate, {}
    if gate is not None:
        if max(b.shape[1], gate.b_in.shape[0]) > SIDE:
            raise NotImplementedError(f"a gate has up to {SIDE} hidden units and coordinates")

        def fill(array: Array, *shape: int) -> Array:
            return jnp.pad(array, [(0, full - size) for size, full in zip(array.shape, shape, strict=True)])

        network = {
            "w_in": fill(gate.w_in.T, SIDE, b.shape[1] + more).astype(jnp.bfloat16),
            "b_in": fill(gate.b_in, SIDE).astype(jnp.float32),
            "w_out": fill(gate.w_out, SIDE, SIDE).astype(jnp.bfloat16),
            "b_out": fill(gate.b_out, SIDE).astype(jnp.float32),
            "form": gate.form,
        }
    return Factors(b=jnp.pad(b, ((0, 0), (0, more))), scale=scale, **network)
