"""The KV cache of fixed slots as pages, which the attention kernel for Hopper reads where they are."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from pallas_kernels.paged_attention import paged_attention, paged_decode
from spear_jax.config import ModelConfig
from spear_jax.nn.attention import Index
from spear_jax.nn.rope import Rope, apply_rope

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
    """Keys and values of `slots` slots of `pages` pages each, `k` and `v`: [layers * slots * pages, K, PAGE, H].

    Page j of slot s in layer i is number `(i * slots + s) * pages + j`, so that no layer needs a slice of its own, and
    a program two arrays for all of them. `table`, int32 [slots, pages], is there only in what `of_layer` gives.
    """

    k: Any
    v: Any
    table: Any = None
    layers: int = dataclasses.field(metadata={"static": True})
    slots: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def zeros(cls, config: ModelConfig, *, layers: int, slots: int, length: int, dtype: Any) -> "PagedKVCache":
        """Make an empty cache of `length` tokens or a few more a slot."""
        pages = -(-length // PAGE)
        shape = (layers * slots * pages, config.num_kv_heads, PAGE, config.head_dim)
        return cls(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), layers=layers, slots=slots)

    @property
    def length(self) -> int:
        """Positions a slot has room for."""
        return self.k.shape[0] // (self.layers * self.slots) * PAGE

    def of_layer(self, layer: int | None) -> "PagedKVCache":
        """Give the cache with the page numbers of one layer as a constant, or with None without them again.

        Adding them up in the program would be a launch in each layer.
        """
        return dataclasses.replace(self, table=None if layer is None else self._numbers + layer * self._numbers.size)

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
        rope: Rope,
    ) -> tuple[Float[Array, "1 T N H"], "PagedKVCache"]:
        """Write keys and values at rising contiguous `positions` of a slot, and attend to that slot."""
        del window
        table = self._table(layer)[slot][None]
        numbers, rows = table[0, positions[0] // PAGE], positions[0] % PAGE

        def write(pages: Float[Array, "P K page H"], new: Float[Array, "1 T K H"]) -> Float[Array, "P K page H"]:
            where = pages.at[numbers, :, rows]
            return where.set(new[0].astype(pages.dtype), mode="promise_in_bounds", unique_indices=True)

        with jax.named_scope("cache_write"):
            cache = dataclasses.replace(self, k=write(self.k, apply_rope(k, rope)), v=write(self.v, v))
        out = paged_attention(
            *(apply_rope(q, rope), cache.k, cache.v, table, positions[:, -1] + 1), starts=positions[:, 0], scale=scale
        )
        return out, cache

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
        rope: Rope,
    ) -> tuple[Float[Array, "S 1 N H"], "PagedKVCache"]:
        """Write one key and value a slot, and attend, with every slot that is `live`; the others get zeros."""
        del window
        # They are slices of one product: XLA puts them together again without a copy.
        qkv = jnp.concatenate([q, k, v], axis=2)[:, 0]
        cos, sin = rope
        rotation = jnp.stack([jnp.tile(cos[:, 0], 2), jnp.concatenate([-sin[:, 0], sin[:, 0]], axis=-1)], axis=1)
        lengths = jnp.where(live, positions + 1, 0)
        out, keys, values = paged_decode(qkv, rotation, self.k, self.v, self._table(layer), lengths, scale=scale)
        return out[:, None], dataclasses.replace(self, k=keys, v=values)

    @property
    def _numbers(self) -> Int32[np.ndarray, "S M"]:
        return np.arange(self.k.shape[0] // self.layers, dtype=np.int32).reshape(self.slots, -1)

    def _table(self, layer: Index) -> Int32[Array, "S M"]:
        return jnp.asarray(self._numbers + layer * self._numbers.size if self.table is None else self.table)
