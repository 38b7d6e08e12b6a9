"""`peer_reduce` and `row_parallel` on Hopper GPUs: bring operands into the kernels' form."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int8

from pallas_kernels import dispatch
from pallas_kernels.hopper import whole_rows
from pallas_kernels.int4_matmul import Compensator, gated_coordinates
from pallas_kernels.int4_matmul.gpu import choose_config
from pallas_kernels.int4_matmul.hopper import int4_matmul_hopper
from pallas_kernels.int4_matmul.operands import Layout
from pallas_kernels.int4_matmul.plan import MOST_PROJECTED_ROWS, HopperConfig
from pallas_kernels.packing import RANK_STEP, SIDE, to_fragments
from pallas_kernels.peer_reduce.hopper import peer_tail_hopper
from pallas_kernels.peer_reduce.inbox import FLAG_ROWS, Inbox
from pallas_kernels.peer_reduce.operands import PeerCompensator, prepare
from pallas_kernels.signals import PATIENCE, Peers
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
    compensator: Compensator | PeerCompensator | None = None,
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
    if isinstance(compensator, Compensator):
        compensator = prepare(compensator, projects=False)
    y = _whole_blocks(y.reshape(-1, n))
    if z is not None:
        z = _whole_blocks(z.reshape(-1, z.shape[-1]))
        z = jnp.pad(z, ((0, 0), (0, -z.shape[1] % RANK_STEP)))
    peers, fault = _open(inbox, axis)
    options = {"eps": eps, "patience": patience, "interpret": interpret}
    x, h, following_z, generation = _tail(peers, fault, residual, weight, compensator, following, own=(y, z), **options)
    return x, h, following_z, _closed(inbox, peers, fault, generation)


def row_parallel_mosaic_gpu(
    x: Float[Array, "*B K"],
    packed: Int8[Array, "N K/2"],
    scale: Float[Array, "N G"],
    residual: Float[Array, "*B N"],
    weight: Float[Array, " N"],
    inbox: Inbox,
    *,
    axis: str,
    eps: float,
    zero: Int8[Array, "N G"] | None = None,
    layout: Layout = "rows",
    compensator: Compensator | PeerCompensator | None = None,
    following: Compensator | None = None,
    config: HopperConfig | None = None,
    patience: int = PATIENCE,
    interpret: plgpu.InterpretGPUParams | bool = False,
) -> tuple[Float[Array, "*B N"], Float[Array, "*B N"], Float[Array, "*B R2"] | None, Inbox]:
    """Compute what `row_parallel` documents: the product pushes its parts, and a kernel after it sums them.

    Weights laid out by rows are reordered at every call, and so is an A that is not in fragments.

    Raises:
        NotImplementedError: x is not bfloat16, the GPU is no Hopper, or the shape does not suit the kernels.
    """
    _check(residual, inbox, axis)
    if x.dtype != jnp.bfloat16 or layout == "columns":
        raise NotImplementedError(f"the GPU kernel takes bfloat16 with rows or fragments, got {x.dtype} with {layout}")
    k, n = x.shape[-1], residual.shape[-1]
    if n % SIDE or k % SIDE:
        raise NotImplementedError(f"both sides of the weight must be multiples of {SIDE}, got [{n}, {k}]")
    rows = x.reshape(-1, k)
    m = rows.shape[0]
    if m > MOST_PROJECTED_ROWS:
        raise NotImplementedError(f"{m} rows are more than {MOST_PROJECTED_ROWS}")
    rows = jnp.pad(rows, ((0, whole_rows(m) - m), (0, 0)))
    if layout == "rows":
        packed, scale, zero = to_fragments(packed), scale.T, None if zero is None else zero.T
    if isinstance(compensator, Compensator):
        compensator = prepare(compensator)
    a = None if compensator is None else compensator.a
    if config is None:
        rank = 0 if a is None else a.size // k
        config, _ = choose_config(m, n, k, groups=scale.shape[0], rank=rank, wide=True)
    if (written := -(-m // config.tile_m) * config.tile_m) > (room := inbox.y.shape[2]):
        raise ValueError(f"the inbox is for {room} rows, and tiles of {config.tile_m} for {m} rows write {written}")
    peers, fault = _open(inbox, axis)
    int4_matmul_hopper(
        *(rows, packed, scale, zero, None, None, None, a),
        config=config,
        out_dtype=jnp.dtype(jnp.float32),
        peers=peers,
        interpret=interpret,
    )
    options = {"eps": eps, "patience": patience, "interpret": interpret}
    x, h, following_z, generation = _tail(peers, fault, residual, weight, compensator, following, **options)
    return x, h, following_z, _closed(inbox, peers, fault, generation)


def _whole_blocks(rows: Float[Array, "M N"]) -> Float[Array, "P N"]:
    return jnp.pad(rows.astype(jnp.float32), ((0, -rows.shape[0] % FLAG_ROWS), (0, 0)))


def _check(residual: Array, inbox: Inbox, axis: str) -> None:
    if residual.dtype != jnp.bfloat16:
        raise NotImplementedError(f"the GPU kernel is for bfloat16, got {residual.dtype}")
    dispatch.refuse_other_gpus()
    if (size := jax.lax.axis_size(axis)) != inbox.devices:
        raise ValueError(f"the inbox is for {inbox.devices} devices, and the axis {axis!r} has {size}")


def _open(inbox: Inbox, axis: str) -> tuple[Peers, jax.Ref]:
    """Give an inbox as references that kernels write through."""
    lines = {name: _lines(getattr(inbox, name)) for name in ("y", "z", "flags")}
    refs = {name: jax.new_ref(array) for name, array in lines.items()}
    return Peers(**refs, generation=inbox.generation, axis=axis), jax.new_ref(inbox.fault)


def _lines(array: Array) -> Array:
    return array.reshape(-1, *array.shape[2:])


def _closed(old: Inbox, peers: Peers, fault: jax.Ref, generation: Array) -> Inbox:
    """Give an inbox in its new state."""
    new = {name: jax.freeze(getattr(peers, name)).reshape(getattr(old, name).shape) for name in ("y", "z", "flags")}
    return Inbox(**new, fault=jax.freeze(fault), generation=generation)


def _tail(
    peers: Peers,
    fault: jax.Ref,
    residual: Float[Array, "*B N"],
    weight: Float[Array, " N"],
    compensator: PeerCompensator | None,
    following: Compensator | None,
    *,
    interpret: plgpu.InterpretGPUParams | bool,
    **options: Any,
) -> tuple[Float[Array, "*B N"], Float[Array, "*B N"], Float[Array, "*B R2"] | None, Array]:
    n = residual.shape[-1]
    rows = residual.reshape(-1, n)
    m = rows.shape[0]
    rows = jnp.pad(rows, ((0, whole_rows(m) - m), (0, 0)))
    projection = {}
    if following is not None:
        gate = following.gate
        if gate is not None and gate.probe is not None:
            raise NotImplementedError("the tail makes no projections of a gate's own")
        done = gate is None and following.bt_scale is None
        projection = _projection(following) | {"z_dtype": jnp.bfloat16 if done else jnp.float32}
    out = peer_tail_hopper(
        *(peers, fault, rows, weight.astype(jnp.float32)),
        compensator=compensator,
        **projection,
        interpret=interpret,
        **options,
    )
    x, h = (out[name][:m].reshape(residual.shape) for name in ("x", "h"))
    z = None
    if following is not None:
        z = out["z"][:m, : following.a.shape[0]].reshape(*residual.shape[:-1], -1)
        if following.gate is not None:
            z = gated_coordinates(x, z, None, following.gate)
    return x, h, z, out["generation"]
