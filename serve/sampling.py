"""Choosing the next token on the device, each slot by its own parameters and its own random stream."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from serve.request import MAX_BIASES, MAX_LOGPROBS, SamplingParams, TokenLogprobs

_BLOCK = 256
"""Vocabulary entries looked at together: two short cumulative sums, or two short sorts, instead of one long one."""

_ONE_BITS = 0x3F800000
"""float32 1.0 as an integer; the bits of floats in [0, 1] rise with their value and can be bisected."""


_PROMPT = 1 << 24
"""What a history holds of a token in the prompt; below are the times it was generated."""

_NO_TOKEN = 2**31 - 1
"""Token of a bias that is not there: beyond any vocabulary, and dropped."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingState:
    """Sampling parameters of B slots: float32 `temperature`, `top_p`, `min_p`, int32 `top_k`, uint32 `seed` [B, 2].

    `temperature` 0 is greedy, `top_k` 0 keeps all. `seed` is the raw threefry key (high word, low word). float32
    `presence`, `frequency` and `repetition` [B] are penalties; `bias` [B, MAX_BIASES] is added to the logits of
    `bias_token`.
    """

    temperature: Any
    top_p: Any
    min_p: Any
    top_k: Any
    seed: Any
    presence: Any
    frequency: Any
    repetition: Any
    bias_token: Any
    bias: Any

    @classmethod
    def of(cls, requests: Sequence[SamplingParams]) -> "SamplingState":
        """Lay the parameters of requests side by side, as numpy arrays."""

        def column(name: str, dtype: type) -> np.ndarray:
            return np.array([getattr(request, name) for request in requests], dtype)

        biases = [
            (*request.logit_bias, *[(_NO_TOKEN, 0.0)] * (MAX_BIASES - len(request.logit_bias))) for request in requests
        ]
        words = [(request.seed >> 32 & 0xFFFFFFFF, request.seed & 0xFFFFFFFF) for request in requests]
        return cls(
            temperature=column("temperature", np.float32),
            top_p=column("top_p", np.float32),
            min_p=column("min_p", np.float32),
            top_k=column("top_k", np.int32),
            seed=np.array(words, np.uint32).reshape(-1, 2),
            presence=column("presence_penalty", np.float32),
            frequency=column("frequency_penalty", np.float32),
            repetition=column("repetition_penalty", np.float32),
            bias_token=np.array([[token for token, _ in row] for row in biases], np.int32),
            bias=np.array([[bias for _, bias in row] for row in biases], np.float32),
        )

    def active_only(self, active: Bool[Array, " B"]) -> "SamplingState":
        """Make idle slots greedy and their logits the model's, so that what they last asked for costs nothing."""
        return dataclasses.replace(
            self,
            temperature=jnp.where(active, self.temperature, 0.0),
            presence=jnp.where(active, self.presence, 0.0),
            frequency=jnp.where(active, self.frequency, 0.0),
            repetition=jnp.where(active, self.repetition, 1.0),
            bias=jnp.where(active[:, None], self.bias, 0.0),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Logprobs:
    """Logarithms of probabilities for B slots: float32 `chosen` [B] of their tokens, and the highest there were.

    Those are float32 `top` [B, MAX_LOGPROBS], falling, of the int32 tokens `token` [B, MAX_LOGPROBS].
    """

    chosen: Any
    top: Any
    token: Any

    def of(self, slot: int, *, token: int, count: int, offset: int) -> TokenLogprobs:
        """Give what a slot's request is told of its token, from numpy arrays.

        As from OpenAI -9999 stands for all that is less likely, 0 included, which has no logarithm in JSON. A token
        among the likeliest has the very number that it has there: clients look by it whether it is the likeliest.
        """
        told = np.fmax(np.stack([self.chosen[slot], *self.top[slot, :count]]), -9999.0).tolist()
        pairs = tuple(zip(self.token[slot, :count].tolist(), told[1:], strict=True))
        return TokenLogprobs(token=token, logprob=dict(pairs).get(token, told[0]), top=pairs, offset=offset)


def log_probabilities(logits: Float[Array, "B V"], chosen: Int[Array, " B"]) -> Logprobs:
    """Judge the tokens that were chosen, and the likeliest, by the model's own logits: without penalties and biases."""
    with jax.named_scope("logprobs"):
        top, token = _highest(logits, min(MAX_LOGPROBS, logits.shape[-1]))
        total = jax.nn.logsumexp(logits, axis=-1)
        own = jnp.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0]
        return Logprobs(chosen=own - total, top=top - total[:, None], token=token)


def _highest(logits: Float[Array, "B V"], count: int) -> tuple[Float[Array, "B n"], Int[Array, "B n"]]:
    """Give what `jax.lax.top_k` does, which on a GPU sorts whole rows if `count` is above 16.

    The highest are in the `count` blocks with the highest maxima: a search among 5% of a vocabulary of 128k.
    """
    blocks = _in_blocks(logits, fill=-jnp.inf)
    _, best = jax.lax.top_k(jnp.max(blocks, axis=-1), min(count, blocks.shape[1]))
    best = jnp.sort(best, axis=-1)  # of equals the first token is taken
    values = jnp.take_along_axis(blocks, best[:, :, None], axis=1).reshape(logits.shape[0], -1)
    top, index = jax.lax.top_k(values, count)
    return top, jnp.take_along_axis(best, index // _BLOCK, axis=-1) * _BLOCK + index % _BLOCK


def _in_blocks(rows: Float[Array, "B V"], *, fill: float) -> Float[Array, "B n b"]:
    padding = ((0, 0), (0, -rows.shape[1] % _BLOCK))
    return jnp.pad(rows, padding, constant_values=fill).reshape(rows.shape[0], -1, _BLOCK)


def likeliest(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Choose the likeliest token of each row."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def with_prompt(
    history: Int[Array, " V"],
    tokens: Int[Array, " T"],
    length: Int[Array, ""],
    *,
    answered: Int[Array, ""],
    first: Bool[Array, ""],
) -> Int[Array, " V"]:
    """Note the first `length` tokens of a chunk in the history of a slot; with `first` it begins anew.

    The last `answered` of them were generated before, in a slot that was taken away.
    """
    index = jnp.arange(tokens.shape[0])
    prompt = jnp.where(index < length - answered, tokens, _NO_TOKEN)
    answer = jnp.where((index >= length - answered) & (index < length), tokens, _NO_TOKEN)
    return jnp.where(first, 0, history).at[prompt].max(_PROMPT, mode="drop").at[answer].add(1, mode="drop")


def changed_logits(
    logits: Float[Array, "B V"], state: SamplingState, history: Int[Array, "B V"]
) -> Float[Array, "B V"]:
    """Apply penalties and biases; a history counts how often each token was generated, and knows those of the prompt.

    Skipped where no row has any.
    """
    penalties = (state.presence != 0) | (state.frequency != 0) | (state.repetition != 1)

    def change(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        count = (history & (_PROMPT - 1)).astype(jnp.float32)
        repetition = jnp.where(history > 0, state.repetition[:, None], 1.0)
        logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
        logits -= count * state.frequency[:, None] + jnp.where(count > 0, state.presence[:, None], 0.0)
        rows = jnp.arange(logits.shape[0])[:, None]
        return logits.at[rows, state.bias_token].add(state.bias, mode="drop")

    return jax.lax.cond(jnp.any(penalties) | jnp.any(state.bias != 0), change, lambda same: same, logits)


def sample(
    logits: Float[Array, "B V"], state: SamplingState, position: Int[Array, " B"], history: Int[Array, "B V"]
) -> Int[Array, " B"]:
    """Choose one token a row.

    A row's choice depends on its logits, parameters, seed, position and history alone. The random parts are skipped
    when all rows are greedy, and each filter when no row uses it.
    """
    with jax.named_scope("sample"):
        logits = changed_logits(logits.astype(jnp.float32), state, history)
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
    blocks = _in_blocks(weights, fill=0.0)

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
