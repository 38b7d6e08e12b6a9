"""The KV cache in pages, and attention over them in XLA that costs the live length only."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Int32

from serve.paged_cache import PagedKVCache, suits_pages
from serve.pages import PAGE, SCRATCH
from spear_jax.config import ModelConfig
from spear_jax.nn.attention import Index
from spear_jax.nn.rope import Rope, apply_rope
from spear_jax.nn.row_parallel import PeerCache

_MASKED = float(jnp.finfo(jnp.float32).min)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values in P pages, `k` and `v`: [L, P, K, PAGE, H] for layers that are scanned, [P, K, PAGE, H] for one.

    In int8 they have float32 factors for each token and head, `k_scale` and `v_scale`, of the same shape but for H: 1.
    `table`, int32 [S, M], has the pages of S slots in order; it is there only during a step. Tokens lie inside of K so
    that a head's keys are one piece of memory and the products with them need no transposed copy. (A leading axis of
    one layer would make XLA's CPU back end copy the cache in every step.)
    """

    k: Any
    v: Any
    k_scale: Any = None
    v_scale: Any = None
    table: Any = None

    def attend_slot(
        self, slot: Int[Array, ""], positions: Int[Array, "1 T"], q: Array, k: Array, v: Array, **where: Any
    ) -> tuple[Float[Array, "1 T N H"], "KVCache"]:
        """Write keys and values at rising contiguous `positions` of a slot, and attend to that slot."""
        row, start, count = self.table[slot], positions[0, 0], positions.shape[1]

        def write(pages: Float[Array, "P K PAGE H"], new: Float[Array, "1 T K H"]) -> Array:
            rows = jnp.swapaxes(new[0], 0, 1).astype(pages.dtype)
            if count == 1:
                return jax.lax.dynamic_update_slice(pages, rows[None], (row[start // PAGE], 0, start % PAGE, 0))
            # Page by page: a scatter is a loop over tokens on CPU.
            rows = jnp.pad(rows, ((0, 0), (PAGE, PAGE), (0, 0)))
            for i in range(-(-(count - 1) // PAGE) + 1):
                first = (start // PAGE + i) * PAGE - start  # the page's first row, counted from `start`
                number, inside = row[start // PAGE + i], first + jnp.arange(PAGE, dtype=jnp.int32)
                fresh = jax.lax.dynamic_slice_in_dim(rows, first + PAGE, PAGE, axis=1)
                old = jax.lax.dynamic_index_in_dim(pages, number, keepdims=False)
                merged = jnp.where(((inside >= 0) & (inside < count))[:, None], fresh, old)
                # Behind the barrier, or XLA takes what was there from a copy of all pages.
                pages, merged = jax.lax.optimization_barrier((pages, merged))
                pages = jax.lax.dynamic_update_index_in_dim(pages, merged, number, axis=0)
            return pages

        def read(pages: Float[Array, "P K PAGE H"], i: Array) -> Float[Array, "1 K PAGE H"]:
            return jax.lax.dynamic_index_in_dim(pages, row[i])

        return _attend(write, read, positions, None, q, k, v, self, **where)

    def attend_batch(
        self, positions: Int[Array, " S"], live: Bool[Array, " S"], q: Array, k: Array, v: Array, **where: Any
    ) -> tuple[Float[Array, "S 1 N H"], "KVCache"]:
        """Write one key and value a slot, and attend with all slots; the cost follows the longest that is `live`."""

        def write(pages: Float[Array, "P K PAGE H"], new: Float[Array, "S 1 K H"]) -> Array:
            numbers = jnp.take_along_axis(self.table, positions[:, None] // PAGE, axis=1)[:, 0]
            return pages.at[numbers, :, positions % PAGE].set(new[:, 0].astype(pages.dtype), mode="promise_in_bounds")

        def read(pages: Float[Array, "P K PAGE H"], i: Array) -> Float[Array, "S K PAGE H"]:
            numbers = jax.lax.dynamic_index_in_dim(self.table, i, axis=1, keepdims=False)
            return pages.at[numbers].get(mode="promise_in_bounds")

        return _attend(write, read, positions[:, None], live, q, k, v, self, **where)


type Cache = KVCache | PagedKVCache
type AnyCache = Cache | tuple[Cache, ...] | PeerCache


def allocate(
    config: ModelConfig, *, pages: int, dtype: Any, stacked: bool, int8: bool = False
) -> Cache | tuple[Cache, ...]:
    """Make an empty cache of `pages` pages a layer: one for all layers, or one for each where not `stacked`.

    For a Hopper GPU or a TPU it is one for all layers where the model is one that the attention kernel can do.

    Raises:
        ValueError: It is to be in `int8`, and the kernel that writes to it cannot do that.
    """
    if int8 and suits_pages(config, dtype):
        raise ValueError("an int8 KV cache is for CPUs: the attention kernels of GPUs and TPUs write bfloat16")
    if suits_pages(config, dtype):
        return PagedKVCache.zeros(config, layers=config.num_layers, pages=pages, dtype=dtype)

    def zeros(layers: int | None) -> KVCache:
        shape = (pages, config.num_kv_heads, PAGE)
        shape = shape if layers is None else (layers, *shape)
        names = {"k": jnp.int8, "v": jnp.int8, "k_scale": jnp.float32, "v_scale": jnp.float32}
        names = names if int8 else {"k": dtype, "v": dtype}
        ends = {name: (1,) if name.endswith("scale") else (config.head_dim,) for name in names}
        return KVCache(**{name: jnp.zeros((*shape, *ends[name]), kind) for name, kind in names.items()})

    return zeros(config.num_layers) if stacked else tuple(zeros(None) for _ in range(config.num_layers))


def table_columns(*, context: int, padding: int) -> int:
    """Give M, the pages that a row of the table has: a padded prompt chunk may go `padding` positions past the context.

    The very last position is past them, for idle slots to write to: no request reaches it.
    """
    return -(-(context + padding + 1) // PAGE)


def whole_table(*, slots: int, context: int, padding: int, pages: int) -> Int32[np.ndarray, "S M"]:
    """Give a table in which every slot has pages for its whole context, in order; they share them where too few."""
    own, columns = -(-context // PAGE), table_columns(context=context, padding=padding)
    numbers = 1 + np.arange(slots * own, dtype=np.int32) % (pages - 1)
    return np.pad(numbers.reshape(slots, own), ((0, 0), (0, columns - own)), constant_values=SCRATCH)


def with_table(cache: AnyCache, table: Int32[Array, "S M"] | None) -> Any:
    """Give a cache with the table that a step goes by, or with None as it is kept between steps."""
    if isinstance(cache, PeerCache):
        return dataclasses.replace(cache, cache=with_table(cache.cache, table))
    if isinstance(cache, tuple):
        return tuple(with_table(one, table) for one in cache)
    return dataclasses.replace(cache, table=table)


def last_position(table: Int32[Array, "S M"]) -> int:
    """Give the position that no request reaches."""
    return table.shape[1] * PAGE - 1


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
    """Write a layer's new keys and values with `write`, and go over its pages with `read`."""
    q, k = apply_rope(q, rope), apply_rope(k, rope)
    new = {"k": k, "v": v}
    if cache.k_scale is not None:
        (codes, k_scale), (others, v_scale) = _to_int8(k), _to_int8(v)
        new = {"k": codes, "v": others, "k_scale": k_scale, "v_scale": v_scale}
    with jax.named_scope("cache_write"):
        held = {name: write(_layer(getattr(cache, name), layer), rows) for name, rows in new.items()}

    def fetch(name: str, i: Array) -> Float[Array, "B K PAGE H"]:
        page, scale = read(held[name], i), held.get(f"{name}_scale")
        return page if scale is None else page.astype(q.dtype) * read(scale, i).astype(q.dtype)

    with jax.named_scope("cached_attention"):
        keys, values = functools.partial(fetch, "k"), functools.partial(fetch, "v")
        out = _online_attention(q, keys, values, positions, heads=k.shape[2], window=window, scale=scale, live=live)
    whole = {name: _with_layer(getattr(cache, name), layer, array) for name, array in held.items()}
    return out, dataclasses.replace(cache, **whole)


def _to_int8(rows: Float[Array, "B T K H"]) -> tuple[Int[Array, "B T K H"], Float[Array, "B T K 1"]]:
    """Round to int8 with a scale for each token and head."""
    rows = rows.astype(jnp.float32)
    scale = jnp.max(jnp.abs(rows), axis=-1, keepdims=True) / 127
    return jnp.round(rows / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale


def _layer(array: Array, layer: Index) -> Array:
    return array if array.ndim == 4 else jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)


def _with_layer(array: Array, layer: Index, new: Array) -> Array:
    return new if array.ndim == 4 else jax.lax.dynamic_update_index_in_dim(array, new, layer, axis=0)


def _online_attention(
    q: Float[Array, "B T N H"],
    keys: Callable[[Array], Float[Array, "B K PAGE H"]],
    values: Callable[[Array], Float[Array, "B K PAGE H"]],
    positions: Int[Array, "B T"],
    *,
    heads: int,
    window: Index,
    scale: float,
    live: Array | None,
) -> Float[Array, "B T N H"]:
    """Go over the pages that some live query sees, keeping a running maximum and sum in float32.

    Source: online softmax, Milakov and Gimelshein, arXiv 1805.02867.
    """
    b, t, n, h = q.shape
    grouped = jnp.swapaxes(q.reshape(b, t, heads, n // heads, h), 1, 2).reshape(b, heads, t * (n // heads), h)
    grouped = (grouped * scale).astype(q.dtype)
    used = jnp.ones((b, 1), bool) if live is None else live[:, None]
    last = jnp.max(jnp.where(used, positions, 0))
    first = jnp.maximum(jnp.min(jnp.where(used, positions, jnp.iinfo(jnp.int32).max)) - window + 1, 0)

    def page(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = carry
        index = (i * PAGE + jnp.arange(PAGE, dtype=jnp.int32))[None, None]
        back = positions[..., None] - index
        seen = jnp.repeat((back >= 0) & (back < window), n // heads, axis=1)[:, None]
        scores = jnp.einsum("bkqh,bksh->bkqs", grouped, keys(i), preferred_element_type=jnp.float32)
        scores = jnp.where(seen, scores, _MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)
        fade = jnp.exp(top - new_top)
        products = jnp.einsum("bkqs,bksh->bkqh", weights.astype(q.dtype), values(i), preferred_element_type=jnp.float32)
        return new_top, total * fade + weights.sum(-1), out * fade[..., None] + products

    shape = grouped.shape[:-1]
    start = (jnp.full(shape, _MASKED), jnp.zeros(shape, jnp.float32), jnp.zeros(grouped.shape, jnp.float32))
    _, total, out = jax.lax.fori_loop(first // PAGE, last // PAGE + 1, page, start)
    out = out / jnp.where(total > 0, total, 1.0)[..., None]
    return jnp.swapaxes(out.reshape(b, heads, t, n // heads, h), 1, 2).reshape(b, t, n, h).astype(q.dtype)
