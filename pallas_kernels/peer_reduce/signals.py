"""Flags in the memory of several GPUs: how a warpgroup says that its part has been written, and waits for others'.

A flag holds the number of the sum whose part it stands for. It is stored with release semantics of the whole system
after the part has been written, by threads that have met all those that wrote; who reads it with acquire semantics, and
all who meet that thread, see the part. Nothing is added remotely: atomics on peers' memory are atomic within a GPU only.
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

from pallas_kernels.peer_reduce.inbox import FLAG_COLUMNS, FLAG_ROWS

PATIENCE = 10_000_000_000
"""Nanoseconds that a part is waited for: longer than a host is ever kept from launching the next kernel."""

_THREADS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where flags of one sum lie: in `parity`'s half, those of N columns, and one more of the coordinates."""

    parity: Any
    columns: int

    @property
    def tiles(self) -> int:
        """Tiles of columns that have a flag each."""
        return self.columns // FLAG_COLUMNS

    def index(self, row_block: Any, tile: Any) -> Any:
        """Give the number of the flag of eight rows and a tile of columns; `tiles` is that of the coordinates."""
        return row_block * (self.tiles + 1) + tile


def generation_of(generation) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
    """Give the number of a sum, and which half of the inbox it uses."""
    number = generation[0]
    return number, lax.rem(number, jnp.int32(2))


def everybody(ref, *, axis: str, devices: int) -> list:
    """Give a reference to the same place in the memory of every device: one's own, then those after it, in turn."""
    me = lax.axis_index(axis)
    peers = [lax.rem(me + jnp.int32(step), jnp.int32(devices)) for step in range(1, devices)]
    return [ref, *(plgpu.remote_ref(ref, peer) for peer in peers)]


def signal(
    flags: list, place: Place, me, generation, row_block, tile, *, row_blocks: int = 1, interpret: bool
) -> None:
    """Tell every device that this one's part of a tile, of consecutive blocks of eight rows, has been written.

    Called by a warpgroup whose writes have been completed and that has met at a barrier since.
    """
    if interpret:
        for ref in flags:
            for i in range(row_blocks):
                ref[place.parity, me, place.index(row_block + i, tile)] = generation
        return
    first, devices, size = place.index(row_block, tile), len(flags), flags[0].shape[-1]

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * devices, *(_SCALAR,) * 4))
    def store(_, *args):
        *refs, parity, sender, number, first = args
        pointers = [mgpu.utils.memref_ptr(ref) for ref in refs]
        parity, sender, number, first = (_word(value) for value in (parity, sender, number, first))
        thread = _thread()
        target = _remainder(thread, devices)
        pointer = pointers[0]
        for i, other in enumerate(pointers[1:], 1):
            chosen = arith.cmpi(arith.CmpIPredicate.eq, target, _constant(i))
            pointer = arith.select(chosen, other, pointer)
        block = arith.divui(thread, _constant(devices))
        line = arith.addi(arith.muli(parity, _constant(devices)), sender)
        offset = arith.addi(first, arith.muli(block, _constant(place.tiles + 1)))
        offset = arith.addi(arith.muli(line, _constant(size)), offset)
        pointer = mgpu.utils.getelementptr(pointer, [offset], _i32())
        mine = arith.cmpi(arith.CmpIPredicate.ult, thread, _constant(devices * row_blocks))
        _assembly("{ @$2 st.release.sys.global.u32 [$0], $1; }", "l,r,b", [pointer, number, mine])

    store(*flags, place.parity, me, generation, first)


def wait(
    flags,
    fault,
    place: Place,
    me,
    generation,
    row_block,
    first_tile,
    *,
    tiles: int,
    coordinates: bool,
    devices: int,
    patience: int = PATIENCE,
    interpret: bool,
) -> None:
    """Let a warpgroup wait for all devices' parts of up to `tiles` tiles that there are, and of the coordinates.

    After `patience` nanoseconds it writes into `fault` whom it waited for, and goes on, as do all that find that there.
    """
    parts = tiles + coordinates
    if interpret:
        _wait_in_jax(flags, place, generation, row_block, first_tile, tiles, coordinates, devices)
        return
    assert parts * devices <= _THREADS, (parts, devices)
    size = flags.shape[-1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), *(_SCALAR,) * 5))
    def poll(_, flags, fault, *scalars):
        parity, number, first, tile, me = (_word(value) for value in scalars)
        thread = _thread()
        sender, part = arith.divui(thread, _constant(parts)), _remainder(thread, parts)
        tile = arith.addi(tile, part)
        there = arith.cmpi(arith.CmpIPredicate.ult, tile, _constant(place.tiles))
        if coordinates:
            last = arith.cmpi(arith.CmpIPredicate.eq, part, _constant(tiles))
            tile = arith.select(last, _constant(place.tiles), tile)
            there = arith.ori(there, last)
        there = arith.andi(there, arith.cmpi(arith.CmpIPredicate.ult, thread, _constant(parts * devices)))
        line = arith.addi(arith.muli(parity, _constant(devices)), sender)
        offset = arith.addi(arith.muli(line, _constant(size)), arith.addi(first, tile))
        pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(flags), [offset], _i32())
        _assembly(
            _POLL,
            "l,l,r,r,r,b,l",
            [pointer, mgpu.utils.memref_ptr(fault), number, me, sender, there, _constant(patience, 64)],
        )
        mgpu.utils.warpgroup_barrier()

    poll(flags, fault, place.parity, generation, place.index(row_block, 0), first_tile, me)


def meet(*, interpret: bool) -> None:
    """Let the threads of a warpgroup meet, as `signal` needs."""
    if not interpret:
        plgpu.inline_mgpu()(lambda _: mgpu.utils.warpgroup_barrier())()


# Labels are local to the braces. A thread without a flag of its own leaves at once.
_POLL = """{
    .reg .pred here, early;
    .reg .u64 start, now;
    .reg .u32 seen, one;
    mov.u64 start, %globaltimer;
    not.pred here, $5;
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
    setp.lt.u64 early, now, $6;
    @early bra AGAIN;
    mov.u32 one, 1;
    st.global.v4.u32 [$1], {one, $2, $3, $4};
DONE:
}"""


def _wait_in_jax(flags, place, generation, row_block, first_tile, tiles, coordinates, devices) -> None:
    # What the assembly does, for the interpreter, where a lost device is the test's time limit.
    def until(tile) -> None:
        for sender in range(devices):
            at = (place.parity, sender, place.index(row_block, tile))
            lax.while_loop(lambda seen: seen != generation, lambda _, at=at: flags[at], flags[at])

    for i in range(tiles):
        pl.when(first_tile + i < place.tiles)(lambda i=i: until(first_tile + i))
    if coordinates:
        until(place.tiles)


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
