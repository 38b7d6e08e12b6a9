"""Flags in the memory of several GPUs: how a warpgroup says that its part has been written, and waits for others'.

A flag holds the number of the sum whose part it stands for. It is stored with release semantics of the whole system
after the part has been written, by threads that have met all those that wrote; who reads it with acquire semantics,
and all who meet that thread, see the part. Nothing is added remotely: atomics on peers' memory are atomic within a GPU.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Int32

from pallas_kernels.packing import SIDE

PATIENCE = 10_000_000_000
"""Nanoseconds that a part is waited for: longer than a host is ever kept from launching the next kernel."""

_THREADS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peers:
    """The inboxes of all devices along a mesh axis, as kernels write and read them.

    References to this device's `y` [2 P, M, N], `z` [2 P, M, 64] and `flags` [2 P, F], in which what device p sends for
    sum g lies in line (g % 2) P + p, and the array `generation` [1] with the number of the next sum.
    """

    y: Any
    z: Any
    flags: Any
    generation: Any
    axis: str

    @property
    def devices(self) -> int:
        """Devices that write, P."""
        return self.y.shape[0] // 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sum:
    """A sum inside of a kernel: its number, over how many devices along which axis, and of how many columns."""

    number: Int32[Array, ""]
    axis: str
    devices: int
    columns: int

    @property
    def me(self) -> Int32[Array, ""]:
        """Number of this device."""
        return lax.axis_index(self.axis)

    @property
    def tiles(self) -> int:
        """Tiles of columns that have a flag each; the flag after those is that of the coordinates."""
        return self.columns // SIDE

    def line(self, sender: Any) -> Any:
        """Give the line of an inbox that a device writes."""
        return lax.rem(self.number, jnp.int32(2)) * self.devices + sender

    def flag(self, row_block: Any, tile: Any) -> Any:
        """Give the place of the flag of eight rows and a tile of columns in a line."""
        return row_block * (self.tiles + 1) + tile

    def everybody(self, ref) -> list:
        """Give a reference to the same place in every device's memory: one's own, then those after it, in turn."""
        return [ref, *(plgpu.remote_ref(ref, lax.rem(self.me + i, self.devices)) for i in range(1, self.devices))]


def signal(flags, sum_: Sum, row_block, tile, *, row_blocks: int = 1, interpret: bool) -> None:
    """Tell every device that this one's part of a tile, of consecutive blocks of eight rows, has been written.

    Called by a warpgroup whose writes have been completed and that has met at a barrier since.
    """
    line, first, devices, size = sum_.line(sum_.me), sum_.flag(row_block, tile), sum_.devices, flags.shape[-1]
    if interpret:
        for ref in sum_.everybody(flags):
            for i in range(row_blocks):
                ref[line, sum_.flag(row_block + i, tile)] = sum_.number
        return

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * devices, *(_SCALAR,) * 3))
    def store(_, *args):
        *refs, line, number, first = args
        pointers = [mgpu.utils.memref_ptr(ref) for ref in refs]
        line, number, first = (_word(value) for value in (line, number, first))
        thread = _thread()
        target = _remainder(thread, devices)
        pointer = pointers[0]
        for i, other in enumerate(pointers[1:], 1):
            chosen = arith.cmpi(arith.CmpIPredicate.eq, target, _constant(i))
            pointer = arith.select(chosen, other, pointer)
        block = arith.divui(thread, _constant(devices))
        offset = arith.addi(first, arith.muli(block, _constant(sum_.tiles + 1)))
        offset = arith.addi(arith.muli(line, _constant(size)), offset)
        pointer = mgpu.utils.getelementptr(pointer, [offset], _i32())
        mine = arith.cmpi(arith.CmpIPredicate.ult, thread, _constant(devices * row_blocks))
        _assembly("{ @$2 st.release.sys.global.u32 [$0], $1; }", "l,r,b", [pointer, number, mine])

    store(*sum_.everybody(flags), line, sum_.number, first)


def wait(
    flags,
    fault,
    sum_: Sum,
    row_block,
    first_tile,
    *,
    tiles: int,
    coordinates: bool,
    patience: int,
    interpret: bool,
) -> None:
    """Let a warpgroup wait for all devices' parts of up to `tiles` tiles that there are, and of the coordinates.

    After `patience` nanoseconds it writes into `fault` whom it waited for, and goes on, as do all that find that there;
    interpreted, after so many looks. It does not ask for this device's number: a kernel that does so is launched with
    all devices' threads meeting on the host.
    """
    devices, parts, size = sum_.devices, tiles + coordinates, flags.shape[-1]
    if interpret:
        _wait_in_jax(flags, fault, sum_, row_block, first_tile, tiles, coordinates, patience)
        return
    assert parts * devices <= _THREADS, (parts, devices)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), *(_SCALAR,) * 4))
    def poll(_, flags, fault, *scalars):
        line, number, first, tile = (_word(value) for value in scalars)
        thread = _thread()
        sender, part = arith.divui(thread, _constant(parts)), _remainder(thread, parts)
        tile = arith.addi(tile, part)
        there = arith.cmpi(arith.CmpIPredicate.ult, tile, _constant(sum_.tiles))
        if coordinates:
            last = arith.cmpi(arith.CmpIPredicate.eq, part, _constant(tiles))
            tile = arith.select(last, _constant(sum_.tiles), tile)
            there = arith.ori(there, last)
        there = arith.andi(there, arith.cmpi(arith.CmpIPredicate.ult, thread, _constant(parts * devices)))
        line = arith.addi(line, sender)
        offset = arith.addi(arith.muli(line, _constant(size)), arith.addi(first, tile))
        pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(flags), [offset], _i32())
        _assembly(
            _POLL,
            "l,l,r,r,b,l",
            [pointer, mgpu.utils.memref_ptr(fault), number, sender, there, _constant(patience, 64)],
        )
        mgpu.utils.warpgroup_barrier()

    poll(flags, fault, sum_.line(0), sum_.number, sum_.flag(row_block, 0), first_tile)


def meet(*, interpret: bool) -> None:
    """Let the threads of a warpgroup meet, as `signal` needs."""
    if not interpret:
        plgpu.inline_mgpu()(lambda _: mgpu.utils.warpgroup_barrier())()


# Labels are local to the braces. A thread without a flag of its own leaves at once.
_POLL = """{
    .reg .pred here, early;
    .reg .u64 start, now;
    .reg .u32 seen, one, none;
    mov.u64 start, %globaltimer;
    not.pred here, $4;
    @here bra DONE;
AGAIN:
    ld.acquire.sys.global.u32 seen, [$0];
    setp.eq.u32 here, seen, $2;
    @here bra DONE;
    ld.relaxed.sys.global.u32 seen, [$1];
    setp.ne.u32 here, seen, 0;
    @here bra DONE;
    mov.u64 now, %globaltimer;
    sub.u64 now, now, start;
    setp.lt.u64 early, now, $5;
    @early bra AGAIN;
    mov.u32 one, 1;
    mov.u32 none, 0;
    st.global.v4.u32 [$1], {one, $2, $3, none};
DONE:
}"""


def _wait_in_jax(flags, fault, sum_: Sum, row_block, first_tile, tiles: int, coordinates: bool, patience: int) -> None:
    # What the assembly does, for the interpreter, which has no clock.
    most = jnp.int32(min(patience, jnp.iinfo(jnp.int32).max))

    def until(tile) -> None:
        for sender in range(sum_.devices):
            at = (sum_.line(sender), sum_.flag(row_block, tile))
            start = (jnp.int32(0), flags[at], fault[0])
            _, seen, failed = lax.while_loop(
                lambda state: (state[0] < most) & (state[1] != sum_.number) & (state[2] == 0),
                lambda state, at=at: (state[0] + 1, flags[at], fault[0]),
                start,
            )

            @pl.when((seen != sum_.number) & (failed == 0))
            def _(sender=sender):
                for i, value in enumerate((jnp.int32(1), sum_.number, jnp.int32(sender))):
                    fault[i] = value

    for i in range(tiles):
        pl.when(first_tile + i < sum_.tiles)(lambda i=i: until(first_tile + i))
    if coordinates:
        until(sum_.tiles)


_SCALAR = plgpu.Layout.WG_SPLAT(())


def _i32():
    return ir.IntegerType.get_signless(32)


def _constant(value: int, bits: int = 32):
    return arith.constant(ir.IntegerType.get_signless(bits), value)


def _thread():
    return _remainder(mgpu.utils.thread_idx(), _THREADS)


def _remainder(value, divisor: int):
    return arith.remui(value, _constant(divisor))


def _word(scalar):
    """Give the one register of a scalar."""
    return scalar.registers.flat[0]


def _assembly(code: str, constraints: str, operands: list) -> None:
    llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, code, constraints, has_side_effects=True)
