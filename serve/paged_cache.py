"""The KV cache of fixed slots as pages, which the attention kernel for Hopper reads where they are."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from pallas_kernels.paged_attention import paged_attention
from spear_jax.config import ModelConfig
from spear_jax.nn.attention import Index

PAGE = 64
"""Tokens of a page: what the kernel fetches at a time."""

_WIDEST_HEAD = 256


def suits_pages(config: ModelConfig, dtype: Any) -> bool:
    """Say whether the kernel for Hopper can attend for a model: bfloat16, heads that it takes, no window."""
    heads = config.head_dim % 64 == 0 and config.head_dim <= _WIDEST_HEAD
    return dtype == jnp.bfloat16 and heads and config.sliding_window is None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedKVCache:
    """Keys and values of `slots` slots of `pages` pages each, `k` and `v`: [L * slots * pages, K, PAGE, H].

    Page j of slot s in layer i is number `(i * slots + s) * pages + j`, so that the table of pages is counted off and
    a scanned layer needs no slice of its own; L is 1 where each layer has a cache of its own.
    """

    k: Any
    v: Any
    slots: int = dataclasses.field(metadata={"static": True})
    pages: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def zeros(cls, config: ModelConfig, *, layers: int, slots: int, length: int, dtype: Any) -> "PagedKVCache":
        """Make an empty cache of `length` tokens or a few more a slot."""
        pages = -(-length // PAGE)
        shape = (layers * slots * pages, config.num_kv_heads, PAGE, config.head_dim)
        return cls(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), slots=slots, pages=pages)

    @property
    def length(self) -> int:
        """Positions a slot has room for."""
        return self.pages * PAGE

    def attend_slot(
        self,
        slot: Int[Array, ""],
        positions: Int[Array, "1 T"],
        q: Float[Array, "1 T N H"],
        k: Float[Array, "1 T K H"],
        v: Float[Array, "1 T K H"],
        *,
        layer: Index,
        window: Index,
        scale: float,
    ) -> tuple[Float[Array, "1 T N H"], "PagedKVCache"]:
        """Write keys and values at rising contiguous `positions` of a slot, and attend to that slot."""
        del window
        slots = jnp.asarray(slot, jnp.int32)[None]
        return self._attend(slots, positions, positions[:, -1] + 1, q, k, v, layer=layer, scale=scale)

    def attend_batch(
        self,
        positions: Int[Array, " S"],
        live: Bool[Array, " S"],
        q: Float[Array, "S 1 N H"],
        k: Float[Array, "S 1 K H"],
        v: Float[Array, "S 1 K H"],
        *,
        layer: Index,
        window: Index,
        scale: float,
    ) -> tuple[Float[Array, "S 1 N H"], "PagedKVCache"]:
        """Write one key and value a slot, and attend with every slot that is `live`; the others get zeros."""
        del window
        slots = jnp.arange(self.slots, dtype=jnp.int32)
        lengths = jnp.where(live, positions + 1, 0)
        return self._attend(slots, positions[:, None], lengths, q, k, v, layer=layer, scale=scale)

    def _attend(
        self,
        slots: Int32[Array, " B"],
        positions: Int32[Array, "B T"],
        lengths: Int32[Array, " B"],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        *,
        layer: Index,
        scale: float,
    ) -> tuple[Float[Array, "B T N H"], "PagedKVCache"]:
        first = (layer * self.slots + slots) * self.pages
        numbers, rows = first[:, None] + positions // PAGE, positions % PAGE

        def write(pages: Float[Array, "P K page H"], new: Float[Array, "B T K H"]) -> Float[Array, "P K page H"]:
            where = pages.at[numbers, :, rows]
            return where.set(new.astype(pages.dtype), mode="promise_in_bounds", unique_indices=True)

        with jax.named_scope("cache_write"):
            cache = dataclasses.replace(self, k=write(self.k, k), v=write(self.v, v))
        out = paged_attention(
            *(q, cache.k, cache.v, first[:, None] + jnp.arange(self.pages, dtype=jnp.int32), lengths),
            starts=positions[:, 0],
            scale=scale,
        )
        return out, cache
