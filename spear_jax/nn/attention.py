"""Attention over keys and values, and the protocol by which a decoder reaches its cache."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spear_jax.nn.rope import Rope, apply_rope

type Index = int | Int[Array, ""]

_QUERY_BLOCK = 128


class Attend(Protocol):
    """How a layer attends: writes its new keys and values to a cache, and reads what it may see.

    `q` and `k` come normalised but not rotated, which is left to who attends, by `rope`: a kernel may do it as it reads
    them. `cache` is any pytree: that of all layers in a scan, where the traced
    `layer` picks this layer's part, or the layer's own where layers are separate, and then `layer` is 0. A query sees
    at most `window` keys, itself included.
    """

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        cache: Any,
        *,
        layer: Index,
        window: Index,
        scale: float,
        rope: Rope,
    ) -> tuple[Float[Array, "B T N H"], Any]:
        """Give what the queries attend to, and the cache with the new keys and values in it."""
        ...


def masked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "#B T S"],
    *,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Attend with grouped queries where `mask` is True; scores and softmax in float32, products in q's type.

    A query that sees nothing gives the mean of the values, not NaN.
    """
    b, t, n, h = q.shape
    grouped = q.reshape(b, t, k.shape[2], n // k.shape[2], h)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(b, t, n, h).astype(q.dtype)


def causal_mask(t: int, window: Index) -> Bool[Array, "1 T T"]:
    """Say which of t contiguous keys each of t queries sees: those before it and itself, `window` at most."""
    back = jnp.arange(t)[:, None] - jnp.arange(t)[None, :]
    return ((back >= 0) & (back < window))[None]


def causal_attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cache: Any,
    *,
    layer: Index,
    window: Index,
    scale: float,
    rope: Rope,
) -> tuple[Float[Array, "B T N H"], Any]:
    """Attend causally over the T tokens of the call alone; an `Attend` that keeps no cache.

    Queries go in blocks of 128, each with the keys up to its end only: half the work of a full square of scores, in
    pieces that fit a CPU's cache.
    """
    del layer
    q, k = apply_rope(q, rope), apply_rope(k, rope)
    out = []
    for start in range(0, q.shape[1], _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, q.shape[1])
        mask = causal_mask(end, window)[:, start:]
        out.append(masked_attention(q[:, start:end], k[:, :end], v[:, :end], mask, scale=scale))
    return jnp.concatenate(out, axis=1), cache
