"""What Mosaic GPU kernels for Hopper have in common: sizes, layouts, shared memory, and the roles of warpgroups."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector
from jaxtyping import Array, Float32

SHARED_BYTES = 232_448
"""Shared memory that a block may have."""

_REGISTERS = 65_536

WGMMA = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)
"""Layout of one value a row of a 64-row tile."""

Accumulator: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
_tiling: Any = plgpu.TilingTransform
_swizzle: Any = plgpu.SwizzleTransform


def shared_tile(shape: tuple[int, ...], dtype, *, row: int | None = None):
    """Declare shared memory whose last axis is cut into the widest swizzled pieces that divide `row` bytes.

    By default `row` is the whole last axis.
    """
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = math.gcd(128, shape[-1] * itemsize if row is None else row)
    return plgpu.SMEM(shape, dtype, transforms=(_tiling((8, swizzle // itemsize)), _swizzle(swizzle)))


def whole_rows(m: int) -> int:
    """Give the rows that an operand of m rows is filled up to: the copy engine takes fewer than eight, or eights."""
    return m if m <= 8 else -(-m // 8) * 8


def row_values(ref) -> jax.Array:
    """Load one value a row of a 64-row tile."""
    return plgpu.load(ref, layout=ROWS, optimized=False)


def thread_registers(warpgroups: int) -> int:
    """Give the registers that each thread of a block of so many warpgroups starts with."""
    return _REGISTERS // (128 * warpgroups) // 8 * 8


def computing_registers(compute: int, *, feeder: int) -> int:
    """Give the registers that a thread of `compute` warpgroups may have when a further one keeps `feeder` of its own.

    What is taken and given must balance within the registers that the block starts with: a warpgroup that asks for
    more than there are waits for ever.
    """
    start = thread_registers(compute + 1)
    return min(240, (start * (compute + 1) - feeder) // compute // 8 * 8)


def feed_and_compute(
    feed: Callable[[], None], work: Callable[[jax.Array], None], *, compute: int, feeder: int | None
) -> None:
    """Let `compute` warpgroups run `work(warpgroup)`, and one after them `feed()`, with `feeder` registers a thread.

    The others get the rest; None leaves all with what they start with.
    """
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == compute)
    def _():
        if feeder is not None:
            plgpu.set_max_registers(feeder, action="decrease")
        feed()

    @pl.when(warpgroup < compute)
    def _():
        if feeder is not None:
            plgpu.set_max_registers(computing_registers(compute, feeder=feeder), action="increase")
        work(warpgroup)


def hold(accumulator: Float32[Array, "64 M"], *, interpret: bool) -> Float32[Array, "64 M"]:
    """Give an accumulator as it is after the wait for it.

    LLVM otherwise moves the packing of pairs of its registers to before the wait, and ptxas then runs one wgmma at a
    time (C7514).
    """
    if interpret:
        return accumulator
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(
        arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(accumulator.shape, jnp.float32, layout=layout)
    )
    def touch(_, array):
        f32 = ir.F32Type.get()
        registers = np.empty(array.registers.shape, dtype=object)
        for place, register in np.ndenumerate(array.registers):
            pair = [vector.extract(register, [], ir.DenseI64ArrayAttr.get([i])) for i in range(2)]
            pair = [llvm.inline_asm(f32, [value], "", "=f,0", has_side_effects=True) for value in pair]
            registers[place] = vector.from_elements(ir.VectorType.get((2,), f32), pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

    return touch(accumulator)  # pyright: ignore[reportCallIssue]
