"""What a calibration gained: perplexity of each arm, error of each token, and a first look at the device's speed."""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from calibrate.capture import hidden_states
from calibrate.results import DECILES, DecileErrors
from spear_jax.evaluation import Example, run_task
from spear_jax.models.decoder import Decoder
from spear_jax.nn.attention import Attend, causal_attend

_LOGITS_BYTES = 2**28
"""Float32 logits of each model held at a time."""


def task_accuracies(
    model: Decoder,
    tokenizer: Any,
    examples: Mapping[str, Sequence[Example]],
    *,
    max_length: int,
    bos_id: int | None,
    batch_size: int,
) -> dict[str, float]:
    """Score zero-shot tasks by name; the model is dense, and runs `batch_size` times 1,024 tokens together."""
    scored = {
        task: run_task(
            model, tokenizer, task, chosen, max_length=max_length, bos_id=bos_id, batch_tokens=1024 * batch_size
        )
        for task, chosen in examples.items()
    }
    return {task: result.metrics["acc"] for task, result in scored.items()}


def token_errors(
    reference: Decoder,
    model: Decoder,
    tokens: Int[np.ndarray, "S T"],
    *,
    batch_size: int = 1,
    attend: Attend = causal_attend,
    progress: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, "S T"]:
    """Measure KL(reference || model) of the next-token distribution after each token, in nats; both models dense."""
    rows = []
    for start in range(0, len(tokens), batch_size):
        batch = jnp.asarray(tokens[start : start + batch_size])
        rows.append(np.asarray(_token_kl(reference, model, batch, attend=attend)))
        if progress:
            progress(min(start + batch_size, len(tokens)), len(tokens))
    return np.concatenate(rows)


@functools.partial(jax.jit, static_argnames=("attend",))
def _token_kl(reference: Decoder, model: Decoder, tokens: Array, *, attend: Attend) -> Float[Array, "B T"]:
    states = [hidden_states(m, tokens, attend=attend).reshape(-1, m.config.hidden_size) for m in (reference, model)]

    def divergence(pair: tuple[Array, Array]) -> Array:
        wanted, got = (jax.nn.log_softmax(m.logits(h)) for m, h in zip((reference, model), pair, strict=True))
        return jnp.sum(jnp.exp(wanted) * (wanted - got))

    batch = max(1, min(states[0].shape[0], _LOGITS_BYTES // (4 * model.config.vocab_size)))
    with jax.named_scope("token_kl"):
        return jax.lax.map(divergence, (states[0], states[1]), batch_size=batch).reshape(tokens.shape)


def decile_errors(before: Float[np.ndarray, "S T"], after: Float[np.ndarray, "S T"]) -> DecileErrors | None:
    """Average errors over tenths of the tokens, sorted by `before`; None for fewer than ten tokens."""
    order = np.argsort(before, axis=None, kind="stable")
    if len(order) < DECILES:
        return None
    tenths = np.array_split(order, DECILES)

    def means(errors: np.ndarray) -> tuple[float, ...]:
        flat = errors.astype(np.float64).ravel()
        return tuple(float(flat[tenth].mean()) for tenth in tenths)

    return DecileErrors(before=means(before), after=means(after))


def matmul_speed(dtype: jnp.dtype) -> float:
    """Measure floating point operations a second, in a matrix product of a layer's size."""
    size = 1024 if jax.default_backend() == "cpu" else 4096
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(x, x))
    repeats, begin = 0, time.perf_counter()
    while (seconds := time.perf_counter() - begin) < 0.2:
        jax.block_until_ready(product(x, x))
        repeats += 1
    return 2 * math.pow(size, 3) * repeats / seconds
