"""An embedding table in int8, one scale a row."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Rows:
    """A table [V, D] held as `scale * code` with int8 codes [V, D] and one float32 scale a row [V].

    `dtype` is the type of the table it stands for, and so of what `take` gives.
    """

    codes: Any
    scale: Any
    dtype: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_dense(cls, table: Float[Array, "V D"]) -> Self:
        """Round each value to the nearest of its row's 255 codes, scale = max|row| / 127."""
        rows = table.astype(jnp.float32)
        scale = jnp.maximum(jnp.max(jnp.abs(rows), axis=-1) / 127, 1e-12)
        return cls(codes=jnp.round(rows / scale[:, None]).astype(jnp.int8), scale=scale, dtype=table.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the table that this stands for."""
        return self.codes.shape

    def take(self, rows: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """Give some of the rows."""
        return (self.codes[rows].astype(jnp.float32) * self.scale[rows][..., None]).astype(self.dtype)

    def matmul(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Compute x times the transposed table, in float32."""
        codes = self.codes.astype(x.dtype)
        return jnp.einsum("...d,vd->...v", x, codes, preferred_element_type=jnp.float32) * self.scale

    def dequantize(self, dtype: Any) -> Float[Array, "V D"]:
        """Give the table in `dtype`."""
        return (self.codes.astype(jnp.float32) * self.scale[:, None]).astype(dtype)


nnx.register_data_type(Int8Rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DividedRows:
    """A table [V, D] of which each device along `axis` holds an equal share of the rows, in order.

    `rows` is this device's share, dense or `Int8Rows`. What it gives is whole, the same on all devices.
    """

    rows: Any
    axis: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of this device's share."""
        return self.rows.shape

    @property
    def dtype(self) -> Any:
        """Type of the table."""
        return self.rows.dtype

    def take(self, rows: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """Give some of the rows."""
        count = self.shape[0]
        own = rows - jax.lax.axis_index(self.axis) * count
        place = jnp.clip(own, 0, count - 1)
        found = self.rows.take(place) if isinstance(self.rows, Int8Rows) else self.rows[...][place]
        here = ((own >= 0) & (own < count))[..., None]
        return jax.lax.psum(jnp.where(here, found, jnp.zeros_like(found)), self.axis)

    def matmul(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Compute x times the transposed table, in float32."""
        if isinstance(self.rows, Int8Rows):
            own = self.rows.matmul(x)
        else:
            own = jnp.einsum("...d,vd->...v", x, self.rows[...], preferred_element_type=jnp.float32)
        return jax.lax.all_gather(own, self.axis, axis=own.ndim - 1, tiled=True)


nnx.register_data_type(DividedRows)
