"""The KV cache of fixed slots, and attention over it that costs the live length only."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from serve.paged_cache import PagedKVCache, suits_pages
from spear_jax.config import ModelConfig
from spear_jax.nn.attention import Index
from spear_jax.nn.rope import Rope, apply_rope
from spear_jax.nn.row_parallel import PeerCache

BLOCK = 128
"""Keys attended to at once; the length of a cache without pages is a multiple of it."""

_MASKED = float(jnp.finfo(jnp.float32).min)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of S slots, `k` and `v`: [L, S, K, T, H] for layers that are scanned, [S, K, T, H] for one layer.

    T lies inside of K so that a head's keys are one piece of memory and the products with them need no transposed copy.
    (A leading axis of one layer would make XLA's CPU back end copy the cache in every step.)
    """

    k: Any
    v: Any

    @property
    def length(self) -> int:
        """T: positions a slot has room for."""
        return self.k.shape[-2]

    def attend_slot(
        self, slot: Int[Array, ""], positions: Int[Array, "1 T"], q: Array, k: Array, v: Array, **where: Any
    ) -> tuple[Float[Array, "1 T N H"], "KVCache"]:
        """Write keys and values at rising contiguous `positions` of a slot, and attend to that slot."""

        def write(array: Float[Array, "S K T H"], new: Float[Array, "1 T K H"]) -> Array:
            return jax.lax.dynamic_update_slice(
                array, jnp.swapaxes(new, 1, 2).astype(array.dtype), (slot, 0, positions[0, 0], 0)
            )

        def read(array: Float[Array, "S K T H"], start: Array) -> Float[Array, "1 K BLOCK H"]:
            return jax.lax.dynamic_slice(array, (slot, 0, start, 0), (1, array.shape[1], BLOCK, array.shape[3]))

        return _attend(write, read, positions, None, q, k, v, self, **where)

    def attend_batch(
        self, positions: Int[Array, " S"], live: Bool[Array, " S"], q: Array, k: Array, v: Array, **where: Any
    ) -> tuple[Float[Array, "S 1 N H"], "KVCache"]:
        """Write one key and value a slot, and attend with all slots; the cost follows the longest that is `live`."""

        def write(array: Float[Array, "S K T H"], new: Float[Array, "S 1 K H"]) -> Array:
            def one(slot: Array, row: Array, position: Array) -> Array:
                return jax.lax.dynamic_update_slice(slot, row, (0, position, 0))

            return jax.vmap(one)(array, jnp.swapaxes(new, 1, 2).astype(array.dtype), positions)

        def read(array: Float[Array, "S K T H"], start: Array) -> Float[Array, "S K BLOCK H"]:
            return jax.lax.dynamic_slice_in_dim(array, start, BLOCK, axis=2)

        return _attend(write, read, positions[:, None], live, q, k, v, self, **where)


type Cache = KVCache | PagedKVCache


def allocate(
    config: ModelConfig, *, slots: int, context: int, padding: int, dtype: Any, stacked: bool
) -> Cache | tuple[Cache, ...]:
    """Make an empty cache for `context` tokens a slot: one for all layers, or one for each where not `stacked`.

    For a Hopper GPU or a TPU it is in pages, one for all layers, where the model is one that the attention kernel can
    do. A padded prompt chunk may write `padding` positions past the context, and idle slots write to the very last
    position; neither is ever read, and neither may be moved back onto live keys as `dynamic_update_slice` would at the
    end.
    """
    length = context + padding + 1
    if suits_pages(config, dtype):
        return PagedKVCache.zeros(config, layers=config.num_layers, slots=slots, length=length, dtype=dtype)

    def zeros(layers: int | None) -> KVCache:
        shape = (slots, config.num_kv_heads, -(-length // BLOCK) * BLOCK, config.head_dim)
        shape = shape if layers is None else (layers, *shape)
        return KVCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))

    return zeros(config.num_layers) if stacked else tuple(zeros(None) for _ in range(config.num_layers))


def last_position(cache: Cache | tuple[Cache, ...] | PeerCache) -> int:
    """Give the position that no request reaches."""
    if isinstance(cache, PeerCache):
        return last_position(cache.cache)
    return (cache[0] if isinstance(cache, tuple) else cache).length - 1


def slot_attend(slot: Int[Array, ""], positions: Int[Array, "1 T"]) -> Partial:
    """Attend from rising contiguous `positions` of one slot to that slot's keys, up to each position itself."""
    return Partial(_slot_attend, slot, positions)


def batch_attend(positions: Int[Array, " S"], live: Bool[Array, " S"]) -> Partial:
    """Attend from one position a slot, all slots at once; the cost follows the longest slot that is `live`."""
    return Partial(_batch_attend, positions, live)


def _slot_attend(
    slot: Array, positions: Array, q: Array, k: Array, v: Array, cache: Cache, **where: Any
) -> tuple[Array, Cache]:
    return cache.attend_slot(slot, positions, q, k, v, **where)


def _batch_attend(
    positions: Array, live: Array, q: Array, k: Array, v: Array, cache: Cache, **where: Any
) -> tuple[Array, Cache]:
    return cache.attend_batch(positions, live, q, k, v, **where)


def _attend(
    write: Callable[[Array, Array], Array],
    read: Callable[[Array, Array], Array],
    positions: Int[Array, "B T"],
    live: Array | None,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cache: KVCache,
    *,
    layer: Index,
    window: Index,
    scale: float,
    rope: Rope,
) -> tuple[Float[Array, "B T N H"], KVCache]:
    """Write a layer's new keys and values with `write`, and go over its blocks with `read`."""
    q, k = apply_rope(q, rope), apply_rope(k, rope)
    with jax.named_scope("cache_write"):
        keys, values = write(_layer(cache.k, layer), k), write(_layer(cache.v, layer), v)
    with jax.named_scope("cached_attention"):
        out = _online_attention(q, keys, values, positions, read, window=window, scale=scale, live=live)
    return out, KVCache(k=_with_layer(cache.k, layer, keys), v=_with_layer(cache.v, layer, values))


def _layer(array: Array, layer: Index) -> Array:
    return array if array.ndim == 4 else jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)


def _with_layer(array: Array, layer: Index, new: Array) -> Array:
    return new if array.ndim == 4 else jax.lax.dynamic_update_index_in_dim(array, new, layer, axis=0)


def _online_attention(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "S K C H"],
    values: Float[Array, "S K C H"],
    positions: Int[Array, "B T"],
    read: Callable[[Array, Array], Float[Array, "B K BLOCK H"]],
    *,
    window: Index,
    scale: float,
    live: Array | None,
) -> Float[Array, "B T N H"]:
    """Go over the blocks that some live query sees, keeping a running maximum and sum in float32.

    Source: online softmax, Milakov and Gimelshein, arXiv 1805.02867.
    """
    b, t, n, h = q.shape
    heads = keys.shape[1]
    grouped = jnp.swapaxes(q.reshape(b, t, heads, n // heads, h), 1, 2).reshape(b, heads, t * (n // heads), h)
    grouped = (grouped * scale).astype(keys.dtype)
    used = jnp.ones((b, 1), bool) if live is None else live[:, None]
    last = jnp.max(jnp.where(used, positions, 0))
    first = jnp.maximum(jnp.min(jnp.where(used, positions, jnp.iinfo(jnp.int32).max)) - window + 1, 0)

    def block(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = carry
        index = (i * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32))[None, None]
        back = positions[..., None] - index
        seen = jnp.repeat((back >= 0) & (back < window), n // heads, axis=1)[:, None]
        scores = jnp.einsum("bkqh,bksh->bkqs", grouped, read(keys, i * BLOCK), preferred_element_type=jnp.float32)
        scores = jnp.where(seen, scores, _MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)
        fade = jnp.exp(top - new_top)
        products = jnp.einsum(
            "bkqs,bksh->bkqh", weights.astype(values.dtype), read(values, i * BLOCK), preferred_element_type=jnp.float32
        )
        return new_top, total * fade + weights.sum(-1), out * fade[..., None] + products

    shape = grouped.shape[:-1]
    start = (jnp.full(shape, _MASKED), jnp.zeros(shape, jnp.float32), jnp.zeros(grouped.shape, jnp.float32))
    _, total, out = jax.lax.fori_loop(first // BLOCK, last // BLOCK + 1, block, start)
    out = out / jnp.where(total > 0, total, 1.0)[..., None]
    return jnp.swapaxes(out.reshape(b, heads, t, n // heads, h), 1, 2).reshape(b, t, n, h).astype(q.dtype)
