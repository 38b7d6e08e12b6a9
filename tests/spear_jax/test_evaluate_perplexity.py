import math

import jax
import numpy as np
import pytest

from spear_jax.evaluation import perplexity, sequence_logprobs, token_logprobs
from spear_jax.evaluation.perplexity import Perplexity, split_windows
from spear_jax.models.decoder import Decoder
from spear_jax.testing import random_weights, tiny_config

VOCAB = 96


@pytest.fixture(scope="module")
def model() -> Decoder:
    config = tiny_config()
    weights = random_weights(config)
    weights["final_norm.weight"] = weights["final_norm.weight"] * 0.1  # logits of order one: no saturated softmax
    return Decoder.from_weights(config, weights, dtype=np.float32)


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB, 75)


@jax.jit
def forward(model: Decoder, tokens: jax.Array):
    return model(tokens)


def reference_nlls(model: Decoder, tokens: np.ndarray) -> np.ndarray:
    """-ln p of each token but the first, from all logits at once, in float64 numpy."""
    padded = np.pad(np.asarray(tokens, np.int32), (0, 24 - len(tokens)))  # one shape to compile; causal, so harmless
    hidden = np.asarray(forward(model, padded[None])[0], np.float64)[0, : len(tokens)]
    logits = hidden @ np.asarray(model.embed[...], np.float64).T
    logits = logits - logits.max(-1, keepdims=True)
    normalised = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.array([-normalised[i, token] for i, token in enumerate(tokens[1:])])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_is_the_mean_over_all_predictions_and_counts_the_tail(model, text, batch_size):
    measured = perplexity(model, text, window=16, batch_size=batch_size)
    expected = np.concatenate([reference_nlls(model, text[i : i + 16]) for i in range(0, 75, 16)])
    assert (measured.windows, measured.predictions, measured.tokens) == (5, 70, 75)
    assert measured.nll == pytest.approx(expected.mean(), rel=1e-5)
    assert measured.value == pytest.approx(math.exp(expected.mean()), rel=1e-4)


def test_perplexity_with_bos_predicts_every_token(model, text):
    measured = perplexity(model, text, window=16, bos_id=2, max_windows=2)
    windows = [np.concatenate([[2], text[i : i + 16]]) for i in (0, 16)]
    assert (measured.windows, measured.predictions, measured.tokens) == (2, 32, 32)
    expected = np.concatenate([reference_nlls(model, w) for w in windows]).mean()
    assert measured.nll == pytest.approx(expected, rel=1e-5)


def test_perplexity_reports_progress_in_windows(model, text):
    steps = []
    perplexity(model, text, window=16, batch_size=2, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(2, 5), (4, 5), (5, 5)]


def test_bad_sizes_are_refused_with_the_number_of_tokens(model, text):
    with pytest.raises(ValueError, match="75 tokens, fewer than one window"):
        perplexity(model, text, window=76)
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        perplexity(model, text, window=1)
    with pytest.raises(ValueError, match="batch size must be at least 1, got 0"):
        perplexity(model, text, batch_size=0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        perplexity(model, text, window=16, max_windows=0)


def test_overflowing_perplexity_is_infinite():
    assert Perplexity(nll=1e4, predictions=1, windows=1, tokens=2).value == math.inf


@pytest.mark.parametrize(
    ("size", "bos_id", "windows", "predictions"),
    [(32, None, 2, 30), (33, None, 2, 30), (34, None, 3, 31), (32, 2, 2, 32), (33, 2, 3, 33)],
)
def test_a_tail_counts_where_it_has_a_prediction_to_make(size, bos_id, windows, predictions):
    rows, mask = split_windows(np.arange(1, size + 1), window=16, bos_id=bos_id)
    assert (len(rows), mask.sum()) == (windows, predictions)
    assert not mask[:, 0].any()
    # Predicted tokens are those of the text, in order, without the first of each window unless BOS stands there.
    expected = [t for t in range(1, size + 1) if bos_id is not None or (t - 1) % 16]
    np.testing.assert_array_equal(rows[mask], expected)


@pytest.mark.parametrize("chunk", [1, 7, 20, 64])
def test_head_in_chunks_equals_head_at_once(model, chunk):
    rng = np.random.default_rng(2)
    hidden = rng.standard_normal((20, 64)).astype(np.float32)
    targets = rng.integers(0, VOCAB, 20).astype(np.int32)
    targets[3] = int(np.argmax(model.logits(hidden)[3]))
    logprobs, greedy = token_logprobs(model, hidden, targets, chunk=chunk)
    expected = jax.nn.log_softmax(model.logits(hidden), axis=-1)[np.arange(20), targets]
    np.testing.assert_allclose(logprobs, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(greedy, np.argmax(model.logits(hidden), axis=-1) == targets)
    assert greedy[3]


def test_only_masked_tokens_are_scored_whatever_the_padding(model, text):
    tokens = np.zeros((2, 24), np.int32)
    tokens[0, :20], tokens[1, :9] = text[:20], text[20:29]
    tokens[1, 9:] = 5
    mask = np.zeros((2, 24), np.bool_)
    mask[0, [4, 11, 19]] = True
    mask[1, 6:9] = True
    first = -reference_nlls(model, text[:20])[[3, 10, 18]].sum()
    second = -reference_nlls(model, text[20:29])[5:8].sum()
    for span in (None, 3):
        logprobs, _ = sequence_logprobs(model, tokens, mask, span=span)
        np.testing.assert_allclose(logprobs, [first, second], rtol=1e-5)


def test_a_sequence_is_greedy_only_if_all_its_scored_tokens_are(model):
    tokens = [7]
    for _ in range(5):
        hidden, _ = forward(model, np.pad(np.array([tokens], np.int32), ((0, 0), (0, 24 - len(tokens)))))
        tokens.append(int(np.argmax(model.logits(hidden[0, len(tokens) - 1]))))
    wrong = [*tokens[:-1], (tokens[-1] + 1) % VOCAB]
    mask = np.array([[False] * 3 + [True] * 3] * 2)
    _, greedy = sequence_logprobs(model, np.array([tokens, wrong], np.int32), mask)
    assert greedy.tolist() == [True, False]
