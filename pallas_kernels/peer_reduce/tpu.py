"""`peer_reduce` and `row_parallel` on TPUs: each device writes its part into the vector memory of all, over ICI.

A kernel's semaphores and vector memory are its own, so that devices meet at the start of each sum: a barrier that waits
for the slowest device, as the sum must. (Semaphores that outlive a kernel, so that a program could do with one barrier,
are an operand that libtpu 0.0.48 crashes at and the interpreter refuses.) No barrier is needed behind it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int8

from pallas_kernels.int4_matmul import Compensator, int4_matmul
from pallas_kernels.int4_matmul.operands import Layout
from pallas_kernels.int4_matmul.tpu_kernel import LANES, dot, gated
from pallas_kernels.peer_reduce.inbox import Inbox
from pallas_kernels.peer_reduce.operands import PeerCompensator
from pallas_kernels.peer_reduce.reference import partial_coordinates
from pallas_kernels.tails.tpu import coordinate_operands, coordinates, gate_operands, normalised
from pallas_kernels.tpus import Generation, generation

_F32 = jnp.float32
_BLOCKS_M = (128, 64, 32, 16, 8)
_COLLECTIVE = 11
"""Number of the barrier that these kernels use."""


def peer_reduce_mosaic_tpu(
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
    interpret: pltpu.InterpretParams | bool = False,
) -> tuple[Float[Array, "*B N"], Float[Array, "*B N"], Float[Array, "*B R2"] | None, Inbox]:
    """Compute what `peer_reduce` documents; parts meet in vector memory, and the inbox is given back as it is.

    Raises:
        NotImplementedError: Activations are not bfloat16, the TPU is not known, N is no multiple of 128, a gate of
            `following` sees more of x than z, or eight rows do not fit into vector memory.
    """
    *batch, n = residual.shape
    devices = inbox.devices
    if residual.dtype != jnp.bfloat16 or n % LANES:
        raise NotImplementedError(
            f"the TPU kernel takes bfloat16 and a multiple of {LANES} columns, got {residual.dtype} with {n}"
        )
    compensator = _unprepared(compensator)
    seen = None if following is None else following.gate
    if seen is not None and (seen.probe is not None or seen.w_rms is not None):
        raise NotImplementedError("the TPU kernel computes no gate that sees more of x than z")
    chip = generation()
    own = {"y": y.reshape(-1, n).astype(_F32)}
    if z is not None:
        own["z"] = z.reshape(-1, z.shape[-1]).astype(_F32)
    m = own["y"].shape[0]
    bm = _block_rows(m, n, devices, chip)
    blocks = pl.cdiv(m, bm)

    def of_rows(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((bm, width), lambda i: (i, 0))

    in_rows = own | {"residual": residual.reshape(m, n)}
    fixed = {"weight": weight.astype(_F32)[None]}
    if compensator is not None:
        fixed |= {f"update_{name}": array for name, array in _update_operands(compensator).items()}
    out = {name: jax.ShapeDtypeStruct((m, n), residual.dtype) for name in ("x", "h")}
    if following is not None:
        fixed |= coordinate_operands(following)
        out["z"] = jax.ShapeDtypeStruct((m, following.rank), _F32)
    slots = min(blocks, 2)
    scratch = {
        **{f"{name}_inbox": pltpu.VMEM((slots, devices, bm, array.shape[1]), _F32) for name, array in own.items()},
        "sent": pltpu.SemaphoreType.DMA((len(own), devices - 1)),
        "received": pltpu.SemaphoreType.DMA((slots, len(own), devices - 1)),
    }
    names = [*in_rows, *fixed, *(f"{name}_out" for name in out), *scratch]
    forms = [None if one is None or one.gate is None else one.gate.form for one in (compensator, following)]
    kernel = functools.partial(_kernel, axis=axis, devices=devices, slots=slots, eps=eps, forms=forms)
    results = pl.pallas_call(
        lambda *refs: kernel(dict(zip(names, refs, strict=True))),
        grid=(blocks,),
        in_specs=[
            *(of_rows(array.shape[1]) for array in in_rows.values()),
            *(pl.BlockSpec(array.shape, lambda i: (0, 0)) for array in fixed.values()),
        ],
        out_specs=[of_rows(array.shape[1]) for array in out.values()],
        out_shape=list(out.values()),
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), collective_id=_COLLECTIVE, vmem_limit_bytes=chip.vmem * 3 // 4
        ),
        cost_estimate=pl.CostEstimate(
            flops=m * n * (devices + 8),
            bytes_accessed=10 * m * n,
            transcendentals=m,
            remote_bytes_transferred=4 * m * n * (devices - 1),
        ),
        name="peer_reduce",
        interpret=interpret,
    )(*in_rows.values(), *fixed.values())
    x, h, *following_z = (array.reshape(*batch, array.shape[1]) for array in results)
    return x, h, following_z[0] if following_z else None, inbox


def row_parallel_mosaic_tpu(
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
    interpret: pltpu.InterpretParams | bool = False,
) -> tuple[Float[Array, "*B N"], Float[Array, "*B N"], Float[Array, "*B R2"] | None, Inbox]:
    """Compute what `row_parallel` documents: the product, then one kernel that exchanges, sums and finishes.

    Raises:
        NotImplementedError: As `int4_matmul_mosaic_tpu` and `peer_reduce_mosaic_tpu`.
    """
    options = {"zero": zero, "layout": layout, "out_dtype": _F32}
    compensator = _unprepared(compensator)
    y = int4_matmul(x, packed, scale, **options, implementation="mosaic_tpu")
    z = None if compensator is None else partial_coordinates(x, compensator)
    further = {"compensator": compensator, "following": following, "interpret": interpret}
    return peer_reduce_mosaic_tpu(y, z, residual, weight, inbox, axis=axis, eps=eps, **further)


def _unprepared(compensator: Compensator | PeerCompensator | None) -> Compensator | None:
    if isinstance(compensator, PeerCompensator):
        raise NotImplementedError("the TPU kernel takes compensators as they are, and this one is in the form for GPUs")
    return compensator


def _block_rows(m: int, n: int, devices: int, chip: Generation) -> int:
    """Give the rows of a block: two places for every device's part, and what comes in and goes out twice."""
    for bm in _BLOCKS_M:
        if (bm == _BLOCKS_M[-1] or bm < 2 * m) and 4 * bm * n * (2 * devices + 8) <= chip.vmem // 2:
            return min(bm, m)
    raise NotImplementedError(f"{_BLOCKS_M[-1]} rows of {n} columns of {devices} devices do not fit into vector memory")


def _update_operands(compensator: Compensator) -> dict[str, Array]:
    bt = compensator.bt if compensator.b is None else compensator.b.T
    operands = {"bt": bt if bt.dtype == jnp.int8 else bt.astype(jnp.bfloat16)}
    if compensator.bt_scale is not None:
        operands["bt_scale"] = compensator.bt_scale.astype(_F32)[None]
    return operands | gate_operands(compensator.gate)


def _kernel(refs: dict[str, Any], *, axis: str, devices: int, slots: int, eps: float, forms: list[str | None]) -> None:
    """Send a block of rows to all devices, sum what they sent, and finish it.

    A device sends block i + 2 into the place of block i. By then it has seen all parts of block i + 1, which each
    device sends when it is done with block i.
    """
    block, me = pl.program_id(0), lax.axis_index(axis)
    place = lax.rem(block, slots)
    peers = [lax.rem(me + distance, devices) for distance in range(1, devices)]

    @pl.when(block == 0)
    def _() -> None:
        barrier = pltpu.get_barrier_semaphore()
        for peer in peers:
            pl.semaphore_signal(barrier, 1, device_id={axis: peer})
        pl.semaphore_wait(barrier, devices - 1)

    parts = [(refs[name], refs[f"{name}_inbox"]) for name in ("y", "z") if name in refs]
    # What comes from the device at a distance behind arrives by the semaphore of that distance, as what is sent does.
    copies = [
        pltpu.make_async_remote_copy(
            *(own, inbox.at[place, me], refs["sent"].at[i, j], refs["received"].at[place, i, j]), device_id={axis: peer}
        )
        for j, peer in enumerate(peers)
        for i, (own, inbox) in enumerate(parts)
    ]
    for copy in copies:
        copy.start()
    for own, inbox in parts:
        inbox[place, me] = own[...]
    for copy in copies:
        copy.wait_recv()
    y, *z = (functools.reduce(jnp.add, [inbox[place, device] for device in range(devices)]) for _, inbox in parts)
    update_form, form = forms
    if z:
        total = z[0]
        if update_form is not None:
            network = (refs[f"update_{name}"][...] for name in ("w_in", "b_in", "w_out", "b_out"))
            total = gated(total, *network, form=update_form)
        if "update_bt_scale" in refs:
            total = total * refs["update_bt_scale"][...]
        y = y + dot(total.astype(jnp.bfloat16), refs["update_bt"][...].astype(jnp.bfloat16))
    dtype = refs["h_out"].dtype
    h = (refs["residual"][...].astype(_F32) + y.astype(dtype).astype(_F32)).astype(dtype)
    refs["h_out"][...] = h
    x = normalised(h.astype(_F32), refs["weight"][...], eps=eps).astype(dtype)
    refs["x_out"][...] = x
    if "a" in refs:
        refs["z_out"][...] = coordinates(x, refs["a"], refs.get("a_scale"), refs, form=form or "tanh")
    for copy in copies:
        copy.wait_send()
