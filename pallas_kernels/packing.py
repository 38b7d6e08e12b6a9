"""Two int4 codes in one int8: how every backend here stores four-bit weights.

Packed int8 rather than `jnp.int4`, because slicing one layer out of a stack typed int4 copies it before a kernel runs,
while a slice of packed int8 fuses with the kernel's read.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int8


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
