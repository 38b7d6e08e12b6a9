"""Choosing the next token on the device, each slot by its own parameters and its own random stream."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from serve.request import SamplingParams

_BLOCK = 256
"""Vocabulary entries summed at once when drawing: two short cumulative sums instead of one long one."""

_ONE_BITS = 0x3F800000
"""float32 1.0 as an integer; the bits of floats in [0, 1] rise with their value and can be bisected."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingState:
    """Sampling parameters of B slots: float32 `temperature`, `top_p`, `min_p`, int32 `top_k`, uint32 `seed` [B, 2].

    `temperature` 0 is greedy, `top_k` 0 keeps all. `seed` is the raw threefry key (high word, low word).
    """

    temperature: Any
    top_p: Any
    min_p: Any
    top_k: Any
    seed: Any

    @classmethod
    def of(cls, requests: Sequence[SamplingParams]) -> "SamplingState":
        """Lay the parameters of requests side by side, as numpy arrays."""

        def column(name: str, dtype: type) -> np.ndarray:
            return np.array([getattr(request, name) for request in requests], dtype)

        words = [(request.seed >> 32 & 0xFFFFFFFF, request.seed & 0xFFFFFFFF) for request in requests]
        return cls(
            temperature=column("temperature", np.float32),
            top_p=column("top_p", np.float32),
            min_p=column("min_p", np.float32),
            top_k=column("top_k", np.int32),
            seed=np.array(words, np.uint32).reshape(-1, 2),
        )


def likeliest(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Choose the likeliest token of each row."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def sample(logits: Float[Array, "B V"], state: SamplingState, position: Int[Array, " B"]) -> Int[Array, " B"]:
    """Choose one token a row.

    A row's choice depends on its logits, parameters, seed and position alone. The random parts are skipped when all
    rows are greedy, and each filter when no row uses it.
    """
    with jax.named_scope("sample"):
        greedy = likeliest(logits)
        random = state.temperature > 0

        def draw_random() -> Int[Array, " B"]:
            return jnp.where(random, _draw(filtered_weights(logits, state), state.seed, position), greedy)

        return jax.lax.cond(jnp.any(random), draw_random, lambda: greedy)


def filtered_weights(logits: Float[Array, "B V"], state: SamplingState) -> Float[Array, "B V"]:
    """Give unnormalized probabilities in [0, 1] after temperature, min-p, top-k and top-p, in this order.

    Top-p keeps the smallest set of likeliest tokens whose share of what top-k left reaches p; tokens equal to the
    last one kept stay as well, in both filters. No sort: the threshold is bisected on the bits of the weights,
    exactly.
    """
    logits = logits.astype(jnp.float32)
    temperature = jnp.where(state.temperature > 0, state.temperature, 1.0)[:, None]
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    weights = jnp.where(scaled >= jnp.log(state.min_p)[:, None], jnp.exp(scaled), 0.0)
    uses_top_k = (state.top_k > 0) & (state.top_k < logits.shape[-1]) & (state.temperature > 0)
    uses_top_p = (state.top_p < 1) & (state.temperature > 0)

    def top_k(weights: Float[Array, "B V"]) -> Float[Array, "B V"]:
        enough = lambda kept: jnp.sum(kept, axis=-1, dtype=jnp.int32) >= state.top_k  # noqa: E731
        return jnp.where(uses_top_k[:, None] & ~_keep(weights, enough), 0.0, weights)

    def top_p(weights: Float[Array, "B V"]) -> Float[Array, "B V"]:
        share = state.top_p * jnp.sum(weights, axis=-1)
        enough = lambda kept: jnp.sum(jnp.where(kept, weights, 0.0), axis=-1) >= share  # noqa: E731
        return jnp.where(uses_top_p[:, None] & ~_keep(weights, enough), 0.0, weights)

    weights = jax.lax.cond(jnp.any(uses_top_k), top_k, lambda w: w, weights)
    return jax.lax.cond(jnp.any(uses_top_p), top_p, lambda w: w, weights)


def _keep(
    weights: Float[Array, "B V"], enough: Callable[[Bool[Array, "B V"]], Bool[Array, " B"]]
) -> Bool[Array, "B V"]:
    """Keep each row's weights at or above the highest threshold that still keeps `enough`."""
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32)

    def halve(_: int, bounds: tuple[Int[Array, " B"], Int[Array, " B"]]) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        low, high = bounds
        middle = low + (high - low) // 2
        holds = enough(bits >= middle[:, None])
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    rows = weights.shape[0]
    low, _ = jax.lax.fori_loop(0, 30, halve, (jnp.zeros(rows, jnp.int32), jnp.full(rows, _ONE_BITS + 1, jnp.int32)))
    return bits >= low[:, None]


def _draw(weights: Float[Array, "B V"], seed: Array, position: Int[Array, " B"]) -> Int[Array, " B"]:
    """Draw an index a row with probability in proportion to its weight: one uniform number a row, by inversion."""
    rows, vocab = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % _BLOCK))).reshape(rows, -1, _BLOCK)

    def uniform(words: Array, position: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), position))

    sums = jnp.sum(blocks, axis=-1)
    target = jax.vmap(uniform)(seed, position) * jnp.sum(sums, axis=-1)
    block, rest = _invert(sums, target)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    index, _ = _invert(inside, rest)
    return block * _BLOCK + index


def _invert(weights: Float[Array, "B n"], target: Float[Array, " B"]) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Give the index whose step of the cumulative sum holds `target`, and how far into that step it lies.

    Rounding may put `target` past the end; the last index with a weight is taken then.
    """
    ends = jnp.cumsum(weights, axis=-1)
    last = weights.shape[-1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)
    index = jnp.minimum(jnp.sum(ends <= target[:, None], axis=-1), last).astype(jnp.int32)
    before = jnp.take_along_axis(ends - weights, index[:, None], axis=-1)[:, 0]
    return index, target - before
