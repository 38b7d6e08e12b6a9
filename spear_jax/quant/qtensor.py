"""An int4 weight: codes packed two a byte, scales, zero points."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8

from pallas_kernels.int4_matmul import Layout, dequantize
from pallas_kernels.packing import from_fragments, pack_int4, to_fragments, unpack_int4

GROUP_SIZES = (-1, 32, 64, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How a weight is quantized to int4: one scale per output channel (`group_size` -1) or per 32, 64 or 128 columns.

    Symmetric codes lie in [-7, 7] around zero; asymmetric ones in [-8, 7] around a zero point.
    """

    group_size: int = -1
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group size must be one of {GROUP_SIZES} (-1: per output channel), got {self.group_size}")

    def groups(self, k: int, *, name: str = "weight") -> int:
        """Give how many groups K columns fall into.

        Raises:
            ValueError: The group size does not divide K, or K is odd.
        """
        if k % 2:
            raise ValueError(f"{name} has {k} input columns: int4 codes are packed in pairs, so the count must be even")
        if self.group_size == -1:
            return 1
        if k % self.group_size:
            raise ValueError(f"{name} has {k} input columns, which groups of {self.group_size} do not divide")
        return k // self.group_size

    @property
    def scale_dtype(self) -> jnp.dtype:
        """Type that scales are stored in: float32 per channel; bfloat16 per group, where there are many of them."""
        return jnp.dtype(jnp.float32 if self.group_size == -1 else jnp.bfloat16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantTensor:
    """A weight [..., N, K] held as `scale * (code - zero)` with four-bit codes.

    Invariants: `packed` is int8 [..., N, K/2], low nibble first; `scale` is floating [..., N, G] with G dividing K;
    `zero` is int8 [..., N, G] in units of codes, or None for a symmetric weight. Leading axes (a stack of layers) are
    shared by all three, so that slicing every leaf slices the weight. Two further layouts are forms to run and not to
    store, with scale and zero as [..., G, N]: in "fragments" codes are ordered as Hopper's tensor cores take them
    (`pallas_kernels.packing.to_fragments`); in "columns", for TPUs, `packed` is transposed, [..., K/2, N].
    """

    packed: Any
    scale: Any
    zero: Any = None
    layout: Layout = dataclasses.field(default="rows", metadata={"static": True})

    @classmethod
    def from_codes(
        cls, codes: Int8[Array, "*L N K"], scale: Float[Array, "*L N G"], zero: Int8[Array, "*L N G"] | None = None
    ) -> Self:
        """Pack codes in [-8, 7] with their scales and zero points."""
        if codes.shape[:-1] != scale.shape[:-1] or codes.shape[-1] % scale.shape[-1]:
            raise ValueError(f"codes {list(codes.shape)} and scale {list(scale.shape)} do not fit together")
        return cls(packed=pack_int4(codes), scale=scale, zero=zero)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that this stands for: [..., N, K]."""
        *lead, n, half = self.packed.shape
        if self.layout == "columns":
            n, half = half, n
        return (*lead, n, 2 * half)

    @property
    def group_size(self) -> int:
        """Columns that share a scale; -1 where all of a row do."""
        groups = self.scale.shape[-1 if self.layout == "rows" else -2]
        return -1 if groups == 1 else self.shape[-1] // groups

    @property
    def nbytes(self) -> int:
        """Bytes as stored: codes, scales and zero points."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def codes(self) -> Int8[Array, "*L N K"]:
        """Give the codes in [-8, 7], one a byte."""
        return unpack_int4(self.in_rows().packed)

    def dequantize(self, dtype: jnp.dtype | type = jnp.float32) -> Float[Array, "*L N K"]:
        """Give the weight in `dtype`."""
        rows = self.in_rows()
        return dequantize(rows.packed, rows.scale, rows.zero, dtype=dtype)

    def in_fragments(self) -> Self:
        """Give the weight in the layout that the kernel for Hopper reads.

        Raises:
            ValueError: N or K is not a multiple of 64.
        """
        if self.layout == "fragments":
            return self
        rows = self.in_rows()
        return rows._laid_out("fragments", to_fragments(rows.packed))

    def in_columns(self) -> Self:
        """Give the weight in the layout that the kernel for TPUs reads."""
        if self.layout == "columns":
            return self
        rows = self.in_rows()
        return rows._laid_out("columns", jnp.swapaxes(rows.packed, -1, -2))

    def in_rows(self) -> Self:
        """Give the weight in the layout that is stored."""
        match self.layout:
            case "rows":
                return self
            case "fragments":
                return self._laid_out("rows", from_fragments(self.packed))
            case "columns":
                return self._laid_out("rows", jnp.swapaxes(self.packed, -1, -2))

    def _laid_out(self, layout: Layout, packed: Array) -> Self:
        def turned(values: Array | None) -> Array | None:
            return None if values is None else jnp.swapaxes(values, -1, -2)

        return dataclasses.replace(self, packed=packed, scale=turned(self.scale), zero=turned(self.zero), layout=layout)


nnx.register_data_type(QuantTensor)
