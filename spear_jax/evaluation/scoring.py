"""Log-probabilities of given tokens, computed without ever holding all logits at once."""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

type ReportProgress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

_LOGITS_BYTES = 128 * 2**20
"""Float32 logits held at a time: a window of 1,024 tokens has 200 MB with a vocabulary of 49k, 1.1 GB with 262k."""


class LanguageModel(Protocol):
    """What scoring needs of a model: a pytree that gives final hidden states, and logits of any rows of them."""

    def __call__(
        self, tokens: Int32[Array, "B T"], positions: Int32[Array, "B T"], /
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Give the hidden states after the last norm (causal attention), and a cache that is ignored."""
        ...

    def logits(self, hidden: Float[Array, "*rows D"], /) -> Float32[Array, "*rows V"]:
        """Give the logits of hidden states."""
        ...


def token_logprobs(
    model: LanguageModel, hidden: Float[Array, "R D"], targets: Int32[Array, " R"], *, chunk: int | None = None
) -> tuple[Float32[Array, " R"], Bool[Array, " R"]]:
    """Give ln p(target) of each row of hidden states, and whether the target is the most likely token.

    The head and the float32 softmax run over `chunk` rows at a time; None takes what keeps the logits within 128 MiB.
    """
    rows, width = hidden.shape
    if chunk is None:
        vocab_size = jax.eval_shape(model.logits, hidden).shape[-1]
        chunk = max(1, _LOGITS_BYTES // (4 * vocab_size))
    steps = -(-rows // chunk)
    chunk = -(-rows // steps)
    padding = steps * chunk - rows

    def score(step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, targets = step
        logits = model.logits(hidden).astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets

    with jax.named_scope("token_logprobs"):
        hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(steps, chunk, width)
        targets = jnp.pad(targets, (0, padding)).reshape(steps, chunk)
        logprobs, greedy = jax.lax.map(score, (hidden, targets))
        return logprobs.reshape(-1)[:rows], greedy.reshape(-1)[:rows]


@functools.partial(jax.jit, static_argnames=("span", "chunk"))
def sequence_logprobs(
    model: LanguageModel,
    tokens: Int32[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    span: int | None = None,
    chunk: int | None = None,
) -> tuple[Float32[Array, " B"], Bool[Array, " B"]]:
    """Sum ln p(token | tokens before it) over the tokens where `mask` is set, and say whether all of them are greedy.

    Padding goes to the right, where causal attention keeps it from the tokens that count. The first token has nothing
    before it and is never scored. `span` bounds how many tokens of a row are scored (None: T - 1): the head runs on
    that many only, which saves much where continuations are short. Tokens beyond it would be missed, so the caller
    answers for it. `chunk` as in `token_logprobs`.
    """
    batch, length = tokens.shape
    span = length - 1 if span is None else min(span, length - 1)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    hidden, _ = model(tokens, positions)
    scored = mask[:, 1:]
    where = jnp.argsort(~scored, axis=1, stable=True)[:, :span]
    hidden = jnp.take_along_axis(hidden[:, :-1], where[..., None], axis=1)
    targets = jnp.take_along_axis(tokens[:, 1:], where, axis=1)
    logprobs, greedy = token_logprobs(
        model, hidden.reshape(batch * span, -1), targets.reshape(batch * span), chunk=chunk
    )
    counted = jnp.take_along_axis(scored, where, axis=1)
    return (
        jnp.where(counted, logprobs.reshape(batch, span), 0.0).sum(axis=1),
        jnp.where(counted, greedy.reshape(batch, span), True).all(axis=1),
    )
