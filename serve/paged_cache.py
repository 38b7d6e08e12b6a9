"""The KV cache as the attention kernels for Hopper and for TPUs read it: the pages of all layers in one array."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from pallas_kernels.dispatch import is_hopper, platform
from pallas_kernels.paged_attention import paged_attention, paged_decode, paged_write
from serve.pages import PAGE
from spear_jax.config import UNLIMITED_WINDOW, ModelConfig
from spear_jax.nn.attention import Index
from spear_jax.nn.rope import Rope, apply_rope

_WIDEST_HEAD = 256

_LANES = 128
"""Columns of a TPU's tiles: it keeps two heads of 64 side by side."""


def suits_pages(config: ModelConfig, dtype: Any) -> bool:
    """Say whether a kernel of this platform can attend for a model: bfloat16, heads that it takes; windows on TPUs."""
    if dtype != jnp.bfloat16 or config.head_dim > _WIDEST_HEAD:
        return False
    if platform() == "tpu":
        return config.head_dim % _LANES == 0 or 2 * config.head_dim == _LANES
    return is_hopper() and config.head_dim % 64 == 0 and config.sliding_window is None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedKVCache:
    """Keys and values of `layers` layers in P pages each, `k` and `v`: [layers * P, K, PAGE, H].

    Page p of layer i is number `i * P + p`, so that no layer needs a slice of its own, and a program two arrays for all
    of them. `table`, int32 [S, M], has the pages of S slots in order; it is there only during a step, and in what
    `of_layer` gives it has that layer's numbers. Where a page is twice as wide as a head, two key heads share it, side
    by side. `windowed`: some layer has a window.
    """

    k: Any
    v: Any
    table: Any = None
    layers: int = dataclasses.field(metadata={"static": True})
    windowed: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def zeros(cls, config: ModelConfig, *, layers: int, pages: int, dtype: Any) -> "PagedKVCache":
        """Make an empty cache of `pages` pages a layer."""
        beside = _LANES // config.head_dim if platform() == "tpu" and config.head_dim < _LANES else 1
        heads = -(-config.num_kv_heads // beside)
        shape = (layers * pages, heads, PAGE, beside * config.head_dim)
        windowed = config.sliding_window is not None
        return cls(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), layers=layers, windowed=windowed)

    def of_layer(self, layer: int) -> "PagedKVCache":
        """Give the cache with the page numbers of one layer; `with_layer` takes back what became of it.

        The sums for all layers have one operand, and XLA makes one launch of them.
        """
        return dataclasses.replace(self, table=self._table(layer))

    def with_layer(self, part: "PagedKVCache") -> "PagedKVCache":
        """Give this cache with the pages as a layer left them."""
        return dataclasses.replace(self, k=part.k, v=part.v)

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
        table = self._table(layer)[slot][None]
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        (q, k, v), split = self._side_by_side(q, k, v)
        with jax.named_scope("cache_write"):
            keys, values = paged_write(k[0], v[0], self.k, self.v, table[0], positions[0, 0])
        where = {"starts": positions[:, 0], "window": self._window(window)}
        out = paged_attention(q, keys, values, table, positions[:, -1] + 1, **where, scale=scale)
        return split(out), dataclasses.replace(self, k=keys, v=values)

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
        cos, sin = rope
        rotation = jnp.stack([jnp.tile(cos[:, 0], 2), jnp.concatenate([-sin[:, 0], sin[:, 0]], axis=-1)], axis=1)
        if self.k.shape[-1] > q.shape[-1]:  # what is side by side is turned before
            q, k = apply_rope(q, rope), apply_rope(k, rope)
            still = jnp.stack([jnp.ones(self.k.shape[-1]), jnp.zeros(self.k.shape[-1])]).astype(rotation.dtype)
            rotation = jnp.broadcast_to(still, (rotation.shape[0], *still.shape))
        (q, k, v), split = self._side_by_side(q, k, v)
        # They are slices of one product: XLA puts them together again without a copy.
        qkv = jnp.concatenate([q, k, v], axis=2)[:, 0]
        lengths = jnp.where(live, positions + 1, 0)
        options = {"scale": scale, "window": self._window(window)}
        out, keys, values = paged_decode(qkv, rotation, self.k, self.v, self._table(layer), lengths, **options)
        return split(out[:, None]), dataclasses.replace(self, k=keys, v=values)

    def _table(self, layer: Index) -> Int32[Array, "S M"]:
        return self.table + layer * (self.k.shape[0] // self.layers)

    def _window(self, window: Index) -> Index | None:
        """Give a layer's window, or None where it is known to be none."""
        return None if not self.windowed or (isinstance(window, int) and window >= UNLIMITED_WINDOW) else window

    def _side_by_side(
        self, q: Array, k: Array, v: Array
    ) -> tuple[tuple[Array, Array, Array], Callable[[Array], Array]]:
        """Bring heads together as pages hold them; also give what takes their results apart.

        A query has zeros beside it, where the key of another head lies, and takes its own part of the values.
        """
        (*lead, n, h), heads = q.shape, k.shape[-2]
        kept, width = self.k.shape[1], self.k.shape[-1]
        beside, group = width // h, n // heads
        if beside == 1:
            return (q, k, v), lambda out: out
        own = jnp.eye(beside, dtype=bool)[:, None, :, None]

        def pairs(x: Array, parts: int) -> Array:
            """Put `parts` query heads or one key head of each key head in pairs, [..., pair, member, parts, H]."""
            x = x.reshape(*lead, heads, parts, h)
            filled = jnp.pad(x, (*((0, 0),) * len(lead), (0, beside * kept - heads), (0, 0), (0, 0)))
            return filled.reshape(*lead, kept, beside, parts, h)

        wide = jnp.where(own, pairs(q, group)[..., None, :], 0).reshape(*lead, -1, width)
        k, v = (pairs(x, 1).reshape(*lead, kept, width) for x in (k, v))

        def split(out: Array) -> Array:
            parts = out.reshape(*lead, kept, beside, group, beside, h)
            mine = jnp.where(own, parts, 0).sum(axis=-2, dtype=out.dtype)
            return mine.reshape(*lead, -1, h)[..., :n, :]

        return (wide, k, v), split
