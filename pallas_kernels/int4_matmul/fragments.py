"""How a Hopper warpgroup reads int4 codes in the order of `packing.to_fragments`, and turns them into bfloat16.

A nibble holds its code plus eight, so that for the register a_i of a wgmma's left operand

    (word >> 4 i) & 0x000f000f | 0x43004300

is the bfloat16 pair (128 + 8 + code): 128 has seven bits of mantissa to spare. Subtracting 136 (and the zero point) in
bfloat16 is exact.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, BFloat16, Float32, Int32

from pallas_kernels.hopper import ROWS
from pallas_kernels.packing import RANK_STEP, SIDE, factor_from_fragments

CODE_BYTES = 128
CODE_ROWS = SIDE * SIDE // 2 // CODE_BYTES
"""A block of 64 x 64 codes is that many rows of `CODE_BYTES`: the copy engine takes at most 256 elements a side."""

_BLOCK_WORDS = SIDE * SIDE // 8
_THREADS = 128
_WARP = 32


def read_words(ref, blocks: int, *, interpret: bool) -> Int32[Array, " W"]:
    """Load consecutive blocks from shared memory: 16 bytes of each a thread, one after the other."""
    if interpret:
        return jax.lax.bitcast_convert_type(ref[...].reshape(-1, 4), jnp.int32)
    layout = _words(blocks)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((_BLOCK_WORDS * blocks,), jnp.int32, layout=layout),
    )
    def load(_, source):
        i32 = _i32()
        pointer = mgpu.utils.memref_ptr(source)
        thread = arith.remui(mgpu.utils.thread_idx(), arith.constant(i32, _THREADS))
        vector_type = ir.VectorType.get((4,), i32)
        registers = np.empty((blocks,), dtype=object)
        for block in range(blocks):
            index = arith.addi(thread, arith.constant(i32, block * _THREADS))
            registers[block] = llvm.load(vector_type, mgpu.utils.getelementptr(pointer, [index], vector_type))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=True)

    return load(ref)  # pyright: ignore[reportCallIssue]


def read_factor(ref, blocks: int, rank: int, *, interpret: bool) -> BFloat16[Array, "64 {blocks}*64"]:
    """Load consecutive blocks of `factor_to_fragments` from shared memory, as a left operand of wgmma.

    Rows from `rank` on repeat those before: a warp holds 16 rows, and each reads some.
    """
    slabs = rank // RANK_STEP
    if interpret:
        rows = factor_from_fragments(ref[...], rank=rank).reshape(slabs, RANK_STEP, -1)
        return rows[jnp.arange(4) % slabs].reshape(SIDE, -1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((SIDE, SIDE * blocks), jnp.bfloat16, layout=plgpu.Layout.WGMMA),
    )
    def load(_, source):
        i32 = _i32()
        pointer = mgpu.utils.memref_ptr(source)
        thread = arith.remui(mgpu.utils.thread_idx(), arith.constant(i32, _THREADS))
        lane = arith.remui(thread, arith.constant(i32, _WARP))
        slab = arith.remui(arith.divui(thread, arith.constant(i32, _WARP)), arith.constant(i32, slabs))
        first = arith.addi(arith.muli(slab, arith.constant(i32, 4 * _WARP)), lane)
        vector_type, pair = ir.VectorType.get((4,), i32), ir.VectorType.get((2,), ir.BF16Type.get())
        pairs = []
        for block in range(blocks):
            for step in range(4):
                index = arith.addi(first, arith.constant(i32, (4 * slabs * block + step) * _WARP))
                words = llvm.load(vector_type, mgpu.utils.getelementptr(pointer, [index], vector_type))
                words = [vector.extract(words, [], ir.DenseI64ArrayAttr.get([i])) for i in range(4)]
                pairs += [llvm.bitcast(pair, word) for word in words]
        return _fragment(pairs, SIDE * blocks)

    return load(ref)  # pyright: ignore[reportCallIssue]


def unpack_words(
    words: Int32[Array, " W"],
    *,
    columns: int,
    zeros: Sequence[Int32[Array, "64"]] = (),
    scales: Sequence[Float32[Array, "64"]] = (),
    interpret: bool,
) -> list[BFloat16[Array, "64 {columns}"]]:
    """Give the weights of consecutive blocks in pieces of `columns` columns, as left operands of wgmma.

    `zeros`, a zero point for each row of each piece, is subtracted from the codes, exactly. `scales`, likewise, is
    rounded to bfloat16 and multiplied with the difference, which rounds once more.
    """
    blocks = words.size // _BLOCK_WORDS
    pieces = blocks * SIDE // columns
    if interpret:
        return _unpack_in_jax(words, columns, zeros, scales)
    result = tuple(
        plgpu.ShapeDtypeStruct((SIDE, columns), jnp.bfloat16, layout=plgpu.Layout.WGMMA) for _ in range(pieces)
    )

    @plgpu.inline_mgpu(arg_types=(_words(blocks), (ROWS,) * len(zeros), (ROWS,) * len(scales)), return_type=result)
    def convert(_, words, zeros, scales):
        pairs = []
        offsets = [_offset_words(zero) for zero in zeros] or [(arith.constant(_i32(), 0x43084308),) * 2] * pieces
        factors = [_factor_words(scale) for scale in scales]
        for register in words.registers.flat:
            for step in range(4):
                piece = len(pairs) * 4 // columns  # a pair register is a fourth of a step of 16 columns
                word = vector.extract(register, [], ir.DenseI64ArrayAttr.get([step]))
                factor = factors[piece] if factors else ()
                pairs += _convert_word(word, offsets[piece], factor)
        size = len(pairs) // pieces
        return tuple(_fragment(pairs[i * size : (i + 1) * size], columns) for i in range(pieces))

    return list(convert(words, tuple(zeros), tuple(scales)))  # pyright: ignore[reportCallIssue]


def _unpack_in_jax(words, columns, zeros, scales) -> list[jax.Array]:
    # What the assembly does, for the interpreter.
    blocks = words.size // _BLOCK_WORDS
    nibbles = (words.reshape(blocks, 4, 8, 4, 4)[..., None] >> (4 * jnp.arange(8))) & 15
    codes = nibbles.reshape(blocks, 4, 8, 4, 4, 2, 2, 2) - 8  # block, warp, g, c, step, b, j, h
    codes = codes.transpose(1, 7, 2, 0, 4, 6, 3, 5).reshape(SIDE, blocks * SIDE)
    out = []
    for piece in range(blocks * SIDE // columns):
        part = codes[:, piece * columns : (piece + 1) * columns]
        if zeros:
            part = part - zeros[piece][:, None]
        part = part.astype(jnp.bfloat16)
        if scales:
            part = part * scales[piece].astype(jnp.bfloat16)[:, None]
        out.append(part)
    return out


def _words(blocks: int) -> Any:
    return plgpu.Layout.WG_STRIDED((_BLOCK_WORDS * blocks,), vec_size=4)


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _assemble(count: int, operands: list, text: str, constraints: str) -> list:
    """Emit assembly with `count` 32-bit results."""
    i32 = _i32()
    struct = ir.Type.parse(f"!llvm.struct<({', '.join(['i32'] * count)})>")
    results = llvm.inline_asm(struct, operands, text, constraints, has_side_effects=False)
    return [llvm.extractvalue(i32, results, ir.DenseI64ArrayAttr.get([i])) for i in range(count)]


def _convert_word(word, offsets: tuple, factors: tuple) -> list:
    """Turn a word into registers a0 to a3; even ones are of the first row, odd ones of the second."""
    lines = ["{", ".reg .b32 t;"]
    for i in range(4):
        source = "$4" if i == 0 else "t"
        if i:
            lines.append(f"shr.u32 t, $4, {4 * i};")
        lines.append(f"lop3.b32 ${i}, {source}, 0x000f000f, 0x43004300, 0xea;")
    for i in range(4):
        lines.append(f"sub.rn.bf16x2 ${i}, ${i}, ${5 + i % 2};")
    for i in range(4 if factors else 0):
        lines.append(f"mul.rn.bf16x2 ${i}, ${i}, ${7 + i % 2};")
    lines.append("}")
    operands = [word, *offsets, *factors]
    constraints = ",".join(["=&r"] * 4 + ["r"] * len(operands))
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    return [llvm.bitcast(pair, value) for value in _assemble(4, operands, "\n".join(lines), constraints)]


def _per_row(array) -> list:
    """Give a thread's values of its two rows."""
    values = [
        vector.extract(register, [], ir.DenseI64ArrayAttr.get([0]))
        if isinstance(register.type, ir.VectorType)
        else register
        for register in array.registers.flat
    ]
    assert len(values) == 2, len(values)
    return values


def _offset_words(zero) -> tuple:
    # The bits of the pair (136 + zero): 128 + v is 0x4300 + v, for v below 128.
    i32 = _i32()
    twice = arith.constant(i32, 0x00010001)
    base = arith.constant(i32, 0x43084308)
    return tuple(arith.addi(base, arith.muli(value, twice)) for value in _per_row(zero))


def _factor_words(scale) -> tuple:
    return tuple(
        llvm.inline_asm(_i32(), [value], "cvt.rn.bf16x2.f32 $0, $1, $1;", "=r,f", has_side_effects=False)
        for value in _per_row(scale)
    )


def _fragment(pairs: list, columns: int):
    layout = plgpu.Layout.WGMMA.to_mgpu()
    registers = np.empty(layout.registers_shape((SIDE, columns)), dtype=object)
    # In order: column tiles of eight, then the two halves of 16 rows, as a0 to a3 of each step are.
    registers.reshape(-1)[:] = pairs
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
