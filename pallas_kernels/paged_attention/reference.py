"""The specification of `paged_attention`, in plain XLA; every other backend is tested against it."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped


def paged_attention_xla(
    q: Float[Array, "B T N H"],
    k_pages: Shaped[Array, "P K page H"],
    v_pages: Shaped[Array, "P K page H"],
    k_scale: Float[Array, "P K page"] | None,
    v_scale: Float[Array, "P K page"] | None,
    page_table: Int32[Array, "B M"],
    lengths: Int32[Array, " B"],
    starts: Int32[Array, " B"],
    window: Int32[Array, ""] | None,
    *,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Compute what `paged_attention` documents, everything in float32.

    It gathers all M pages of every sequence, whatever the lengths: memory for B x M x page keys and values is needed.
    """
    b, t, n, h = q.shape
    keys = jnp.arange(page_table.shape[1] * k_pages.shape[2])
    positions = starts[:, None] + jnp.arange(t)
    seen = (keys <= positions[..., None]) & (keys < lengths[:, None, None])
    if window is not None:
        seen = seen & (keys > positions[..., None] - window)
    used = seen.any(axis=1)

    def gather(pages: Array, factors: Array | None) -> Float[Array, "B S K H"]:
        array = pages[page_table].astype(jnp.float32)
        if factors is not None:
            array = array * factors[page_table].astype(jnp.float32)[..., None]
        array = jnp.swapaxes(array, 2, 3).reshape(b, keys.size, pages.shape[1], h)
        return jnp.where(used[..., None, None], array, 0)

    k, v = gather(k_pages, k_scale), gather(v_pages, v_scale)
    grouped = q.astype(jnp.float32).reshape(b, t, k.shape[2], -1, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k) * scale
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    top = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0, top))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, n, h).astype(q.dtype)


def rotated(
    qkv: Float[Array, "B N+2K H"], rotation: Float32[Array, "B 2 H"], *, kv_heads: int
) -> tuple[Float[Array, "B N H"], Float32[Array, "B K H"]]:
    """Give rotated queries in qkv's type, and rotated keys."""
    x = qkv[:, :-kv_heads].astype(jnp.float32)
    turned = x * rotation[:, :1] + jnp.roll(x, x.shape[-1] // 2, axis=-1) * rotation[:, 1:]
    return turned[:, :-kv_heads].astype(qkv.dtype), turned[:, -kv_heads:]


def append_xla(
    qkv: Float[Array, "B N+2K H"],
    rotation: Float32[Array, "B 2 H"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    page_table: Int32[Array, "B M"],
    lengths: Int32[Array, " B"],
) -> tuple[Float[Array, "B N H"], Float[Array, "P K page H"], Float[Array, "P K page H"]]:
    """Give rotated queries, and pages with the rotated key and the value of one token a sequence written to them."""
    kv_heads, page = k_pages.shape[1:3]
    q, k = rotated(qkv, rotation, kv_heads=kv_heads)
    position = jnp.maximum(lengths - 1, 0)
    number = jnp.take_along_axis(page_table, position[:, None] // page, axis=1)[:, 0]
    number = jnp.where(lengths > 0, number, k_pages.shape[0])

    def write(pages: Array, new: Array) -> Array:
        return pages.at[number, :, position % page].set(new.astype(pages.dtype), mode="drop")

    return q, write(k_pages, k), write(v_pages, qkv[:, -kv_heads:])


def paged_decode_xla(
    qkv: Float[Array, "B N+2K H"],
    rotation: Float32[Array, "B 2 H"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    page_table: Int32[Array, "B M"],
    lengths: Int32[Array, " B"],
    window: Int32[Array, ""] | None,
    *,
    scale: float,
) -> tuple[Float[Array, "B N H"], Float[Array, "P K page H"], Float[Array, "P K page H"]]:
    """Compute what `paged_decode` documents."""
    q, k_pages, v_pages = append_xla(qkv, rotation, k_pages, v_pages, page_table, lengths)
    where = (None, None, page_table, lengths, lengths - 1, window)
    return paged_attention_xla(q[:, None], k_pages, v_pages, *where, scale=scale)[:, 0], k_pages, v_pages


def paged_write_xla(
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    table: Int32[Array, " M"],
    start: Int32[Array, ""],
) -> tuple[Float[Array, "P K page H"], Float[Array, "P K page H"]]:
    """Compute what `paged_write` documents."""
    page = k_pages.shape[2]
    positions = start + jnp.arange(k.shape[0], dtype=jnp.int32)
    numbers, rows = table[positions // page], positions % page

    def write(pages: Array, new: Array) -> Array:
        where = pages.at[numbers, :, rows]
        return where.set(new.astype(pages.dtype), mode="promise_in_bounds", unique_indices=True)

    return write(k_pages, k), write(v_pages, v)
