"""Two int4 codes in one int8: how every backend here stores four-bit weights.

Packed int8 rather than `jnp.int4`, because slicing one layer out of a stack typed int4 copies it before a kernel runs,
while a slice of packed int8 fuses with the kernel's read.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

SIDE = 64
"""Rows and columns of a block of `to_fragments`."""

RANK_STEP = 16
"""Ranks of compensators are filled up to multiples of this beside such blocks: the columns of one wgmma."""


def pack_int4(codes: Int8[Array, "*B K"]) -> Int8[Array, "*B K/2"]:
    """Pack codes in [-8, 7] two to a byte, code 2i in the low nibble of byte i.

    Raises:
        ValueError: The last axis is odd.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"int4 codes are packed in pairs: the last axis must be even, got shape {codes.shape}")
    codes = codes.astype(jnp.int8)
    return (codes[..., 0::2] & jnp.int8(0x0F)) | (codes[..., 1::2] << jnp.int8(4))


def unpack_int4(packed: Int8[Array, "*B K/2"]) -> Int8[Array, "*B K"]:
    """Give the codes in [-8, 7] that `pack_int4` packed."""
    four = jnp.int8(4)
    low = (packed << four) >> four  # arithmetic shift: the sign of the nibble is spread
    return jnp.stack([low, packed >> four], axis=-1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def to_fragments(packed: Int8[Array, "*L N K/2"]) -> Int8[Array, "*L N K/2"]:
    """Reorder codes packed by row for Hopper's tensor cores; the shape stays, the bytes move.

    A block of 64 rows and 64 columns becomes 2,048 consecutive bytes: 16 for each of the 128 threads of a warpgroup, in
    thread order, so that one load brings a thread the four words that it needs. Word s holds the thread's share of the
    left operand of the wgmma over columns 16 s to 16 s + 15 (PTX ISA, register fragments of wgmma.mma_async.m64nNk16):
    registers a0 to a3 are rows (g, g + 8) by column pairs (2 c, 2 c + 8), where g = lane / 4 and c = lane % 4. Register
    a_i has its first code, plus eight, in nibble i of the word and its second in nibble i + 4.

    Raises:
        ValueError: N or K is not a multiple of 64.
    """
    *lead, n, half = packed.shape
    _check_sides(n, 2 * half)
    codes = unpack_int4(packed).reshape(*lead, n // SIDE, 4, 2, 8, 2 * half // SIDE, 4, 2, 4, 2)
    # tile, warp, h, g, block, step, j, c, b -> tile, block, warp, g, c, step, and the nibble b j h
    base = len(lead)
    order = [base + axis for axis in (0, 4, 1, 3, 7, 5, 8, 6, 2)]
    nibbles = codes.transpose(*range(base), *order).reshape(*lead, n // SIDE, 2 * half // SIDE, -1)
    # Plus eight is a flip of the sign bit of a nibble.
    return (pack_int4(nibbles) ^ jnp.int8(-0x78)).reshape(packed.shape)


def from_fragments(packed: Int8[Array, "*L N K/2"]) -> Int8[Array, "*L N K/2"]:
    """Undo `to_fragments`."""
    *lead, n, half = packed.shape
    _check_sides(n, 2 * half)
    nibbles = unpack_int4(packed ^ jnp.int8(-0x78))
    nibbles = nibbles.reshape(*lead, n // SIDE, 2 * half // SIDE, 4, 8, 4, 4, 2, 2, 2)
    base = len(lead)
    order = [base + axis for axis in (0, 2, 8, 3, 1, 5, 7, 4, 6)]
    return pack_int4(nibbles.transpose(*range(base), *order).reshape(*lead, n, 2 * half))


def factor_to_fragments(a: Float[Array, "*L R K"]) -> Float[Array, "*L R*K/64 64"]:
    """Reorder a factor of low rank for Hopper's tensor cores, as it is the left operand of wgmma.

    Of 64 columns come first those of rows 0 to 15: for each step of 16 columns, the registers a0 to a3 (see
    `to_fragments`) of lane after lane of a warp. A warp reads 16 bytes a lane and step.

    Raises:
        ValueError: R is not 16, 32, 48 or 64, or K is not a multiple of 64.
    """
    *lead, rank, k = a.shape
    if rank % RANK_STEP or not 0 < rank <= SIDE or k % SIDE:
        raise ValueError(f"a factor must have a multiple of 16 rows up to 64, and of 64 columns, got [{rank}, {k}]")
    base = len(lead)
    # slab, h, g, block, step, j, c, pair -> block, slab, step, g, c, j, h, pair
    pieces = a.reshape(*lead, rank // RANK_STEP, 2, 8, k // SIDE, 4, 2, 4, 2)
    order = [base + axis for axis in (3, 0, 4, 2, 6, 5, 1, 7)]
    return pieces.transpose(*range(base), *order).reshape(*lead, -1, SIDE)


def factor_from_fragments(fragments: Float[Array, "*L R*K/64 64"], *, rank: int) -> Float[Array, "*L R K"]:
    """Undo `factor_to_fragments`."""
    *lead, lines, _ = fragments.shape
    base = len(lead)
    pieces = fragments.reshape(*lead, lines // rank, rank // RANK_STEP, 4, 8, 4, 2, 2, 2)
    order = [base + axis for axis in (1, 6, 3, 0, 2, 5, 4, 7)]
    return pieces.transpose(*range(base), *order).reshape(*lead, rank, lines * SIDE // rank)


def _check_sides(n: int, k: int) -> None:
    if n % SIDE or k % SIDE:
        raise ValueError(
            f"blocks of codes are {SIDE} x {SIDE}: both sides of a weight must be multiples, got [{n}, {k}]"
        )
