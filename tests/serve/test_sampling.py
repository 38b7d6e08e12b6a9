"""The sampler keeps what the definitions keep, draws in proportion, and does not look at its neighbours."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.request import MAX_BIASES, BadParameterError, SamplingParams
from serve.sampling import (
    SamplingState,
    changed_logits,
    filtered_weights,
    log_probabilities,
    sample,
    with_prompt,
)

VOCAB = 300
_sample_jitted = jax.jit(sample)
_filtered = jax.jit(filtered_weights)
_changed = jax.jit(changed_logits)


def _sample(logits: Any, state: SamplingState, position: Any, history: Any = None) -> jax.Array:
    return _sample_jitted(logits, state, position, np.zeros(logits.shape, np.int32) if history is None else history)


def params(**values: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 1} | values))


def reference(logits: np.ndarray, p: SamplingParams) -> np.ndarray:
    """Filter by sorting, in float64."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / p.temperature)
    weights[weights < p.min_p] = 0
    order = np.argsort(-weights, kind="stable")
    if p.top_k:
        weights[order[p.top_k :]] = 0
    if p.top_p < 1:
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[before >= p.top_p * weights.sum()]] = 0
    return weights


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 7, 299, 300, 5000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_filters_keep_what_sorting_keeps(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    p = params(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = np.random.default_rng(seed).normal(scale=3, size=(3, VOCAB)).astype(np.float32)
    kept = np.asarray(_filtered(logits, SamplingState.of([p] * 3)))
    expected = np.stack([reference(row, p) for row in logits])
    # The last token kept hangs on a rounding where the share meets p exactly; allow it nothing else.
    assert (np.abs((kept > 0).sum(-1) - (expected > 0).sum(-1)) <= (top_p < 1)).all()
    both = (kept > 0) & (expected > 0)
    np.testing.assert_allclose(kept[both], expected[both], rtol=1e-4)


@pytest.mark.parametrize("vocab", [5, 256, 300, 1024])
def test_draws_follow_the_weights(vocab: int) -> None:
    logits = np.random.default_rng(0).normal(scale=1.5, size=vocab).astype(np.float32)
    count = 20_000
    state = SamplingState.of([params(seed=3, top_p=0.8)])
    none = jnp.zeros((1, vocab), jnp.int32)
    draw = jax.jit(jax.vmap(lambda position: sample(jnp.asarray(logits)[None], state, position[None], none)[0]))
    frequency = np.bincount(np.asarray(draw(jnp.arange(count))), minlength=vocab) / count
    expected = reference(logits, params(top_p=0.8))
    expected /= expected.sum()
    assert (frequency[expected == 0] == 0).all()
    assert np.abs(frequency - expected).max() < 5 * np.sqrt(expected.max() / count)


def test_zero_temperature_is_the_likeliest_token_whatever_the_filters() -> None:
    logits = np.random.default_rng(1).normal(size=(2, VOCAB)).astype(np.float32)
    state = SamplingState.of([params(temperature=0.0, top_k=5, top_p=0.5), params(temperature=0.0)])
    assert np.asarray(_sample(logits, state, np.zeros(2, np.int32))).tolist() == logits.argmax(-1).tolist()


@settings(max_examples=20, deadline=None)
@given(row=st.integers(0, 3), seed=st.integers(-(2**63), 2**63 - 1), others=st.integers(0, 1000))
def test_a_row_does_not_depend_on_its_neighbours(row: int, seed: int, others: int) -> None:
    rng = np.random.default_rng(others)
    mine = np.random.default_rng(7).normal(scale=2, size=VOCAB).astype(np.float32)
    alone = _sample(np.tile(mine, (4, 1)), SamplingState.of([params(seed=seed, top_k=50)] * 4), np.full(4, 9, np.int32))
    logits = rng.normal(scale=5, size=(4, VOCAB)).astype(np.float32)
    logits[row] = mine
    batch = [params(temperature=float(rng.uniform(0, 2)), top_p=0.3, seed=i) for i in range(4)]
    batch[row] = params(seed=seed, top_k=50)
    position = rng.integers(0, 100, 4).astype(np.int32)
    position[row] = 9
    assert _sample(logits, SamplingState.of(batch), position)[row] == alone[row]


def test_seed_and_position_change_the_draw() -> None:
    logits = np.zeros((1, VOCAB), np.float32)
    drawn = {
        int(_sample(logits, SamplingState.of([params(seed=seed)]), np.array([position], np.int32))[0])
        for seed in (0, 1, 2**40, -1)
        for position in range(5)
    }
    assert len(drawn) > 15


def test_extreme_logits_give_a_token() -> None:
    logits = np.full((2, VOCAB), -1e30, np.float32)
    logits[0, 17], logits[1, 3:5] = 1e30, 80.0
    state = SamplingState.of([params(temperature=2.0), params(temperature=0.01, top_p=0.01)])
    for position in range(20):
        first, second = np.asarray(_sample(logits, state, np.full(2, position, np.int32)))
        assert first == 17
        assert second in (3, 4)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    presence=st.sampled_from([0.0, -2.0, 0.7]),
    frequency=st.sampled_from([0.0, -0.5, 2.0]),
    repetition=st.sampled_from([1.0, 0.5, 1.3]),
    biased=st.sampled_from([0, 1, MAX_BIASES]),
)
def test_penalties_and_biases(seed: int, presence: float, frequency: float, repetition: float, biased: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(2, VOCAB)).astype(np.float32)
    prompt, answer = rng.integers(0, VOCAB, 40), rng.integers(0, VOCAB, 60)
    biases = {int(token): float(rng.uniform(-100, 100)) for token in rng.choice(VOCAB, biased, replace=False)}
    p = params(
        presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition,
        logit_bias=tuple(biases.items()),
    )  # fmt: skip
    history = np.array(
        with_prompt(
            np.full(VOCAB, 5, np.int32), prompt.astype(np.int32), 30, answered=np.int32(0), first=np.bool_(True)
        )
    )
    np.add.at(history, answer, 1)
    changed = _changed(logits, SamplingState.of([params(), p]), np.stack([history, history]))
    np.testing.assert_array_equal(changed[0], logits[0])
    expected = logits[1].astype(np.float64)
    for token in {*prompt[:30].tolist(), *answer.tolist()}:
        expected[token] *= 1 / repetition if expected[token] > 0 else repetition
    for token in set(answer.tolist()):
        expected[token] -= presence + frequency * (answer == token).sum()
    for token, bias in biases.items():
        expected[token] += bias
    np.testing.assert_allclose(changed[1], expected, rtol=1e-5, atol=1e-5)
    greedy = SamplingState.of([params(temperature=0.0), dataclasses.replace(p, temperature=0.0)])
    chosen = _sample(logits, greedy, np.zeros(2, np.int32), np.stack([history, history]))
    assert chosen.tolist() == [logits[0].argmax(), expected.argmax()]


@pytest.mark.parametrize("vocab", [5, 96, 300, 512, 7000])
@pytest.mark.parametrize("ties", [False, True])
def test_log_probabilities_are_what_sorting_gives(vocab: int, ties: bool) -> None:
    logits = np.random.default_rng(vocab).normal(scale=4, size=(3, vocab)).astype(np.float32)
    logits = np.round(logits) if ties else logits
    chosen = np.array([0, vocab - 1, vocab // 2], np.int32)
    found = jax.device_get(jax.jit(log_probabilities)(logits, chosen))
    exact = logits.astype(np.float64)
    expected = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    order = np.argsort(-expected, axis=-1, kind="stable")[:, :20]
    np.testing.assert_array_equal(found.token, order)
    np.testing.assert_allclose(found.top, np.take_along_axis(expected, order, axis=-1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.chosen, expected[np.arange(3), chosen], rtol=1e-5, atol=1e-5)


def test_idle_slots_ask_for_nothing() -> None:
    wild = params(presence_penalty=1.0, frequency_penalty=1.0, repetition_penalty=2.0, logit_bias=((3, 50.0),))
    state = SamplingState.of([wild, wild]).active_only(jnp.array([True, False]))
    history = np.ones((2, VOCAB), np.int32)
    logits = np.random.default_rng(0).normal(size=(2, VOCAB)).astype(np.float32)
    changed = _changed(logits, state, history)
    assert not np.allclose(changed[0], logits[0])
    np.testing.assert_array_equal(changed[1], logits[1])
    assert float(state.temperature[1]) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("repetition_penalty", 0.0), ("logit_bias", ((1, 101.0),)),
     ("logit_bias", ((1, 0.0),) * 65), ("temperature", -0.1),
     ("temperature", 2.1), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.5),
     ("top_k", -2), ("top_k", 10**400), ("min_p", 1.1), ("max_tokens", -1), ("seed", 2**63), ("stop", ("",)),
     ("logprobs", 21)],
)  # fmt: skip
def test_bad_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(BadParameterError, match=name) as error:
        SamplingParams(**({"max_tokens": 1} | {name: value}))  # type: ignore[arg-type]
    assert error.value.param == name
