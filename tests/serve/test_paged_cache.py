"""A cache in pages that kernels read gives the tokens that XLA's gives, wherever the pages are."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import compiling_for
from serve import cache as cache_module
from serve.cache import KVCache, allocate, batch_attend, slot_attend, with_table
from serve.paged_cache import PagedKVCache, suits_pages
from serve.pages import PAGE, SCRATCH
from serve.request import SamplingParams
from serve.runner import Runner
from spear_jax.config import ModelConfig
from spear_jax.models.decoder import Decoder, unstack
from spear_jax.testing import random_weights, tiny_config

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
CONFIG = tiny_config(tie_embeddings=False)


def allocated(**changes):
    options = {"pages": 5, "dtype": jnp.bfloat16, "stacked": False}
    return allocate(tiny_config(**({"head_dim": 64} | changes.pop("config", {}))), **(options | changes))


def tokens_of(layout: str, config: ModelConfig = CONFIG, *, moved: bool = False) -> list[list[int]]:
    """Tokens of three slots: prompts of several chunks, one slot idle for a while, one used twice.

    With `moved`, slots have pages anywhere, no more than they need, and get others when they are used again.
    """
    model = Decoder.from_weights(config, random_weights(config), dtype=jnp.float32)
    model = unstack(model) if layout == "separate" else model
    runner = Runner(model, slots=3, context=150, buckets=(8, 16), lone_program=False, pages=20 if moved else None)
    rng, out = np.random.default_rng(0), []
    places, table = np.random.default_rng(1).permutation(np.arange(1, 20)).tolist(), np.zeros((3, 3), np.int32)

    def start(slot: int, length: int) -> None:
        if moved:
            needed = -(-(length + 50) // PAGE)
            table[slot] = [places.pop() if i < needed else SCRATCH for i in range(3)]
            runner.use_table(table)
        prompt = rng.integers(0, 96, length).tolist()
        for done in range(0, length, 16):
            part, last = prompt[done : done + 16], done + 16 >= length
            runner.prefill(part, slot=slot, start=done, bucket=16 if len(part) > 8 else 8, last=last, params=GREEDY)

    def decode(active: list[bool], steps: int) -> None:
        for _ in range(steps):
            token = np.asarray(runner.decode(np.array(active)))
            out.append(np.where(active, token, -1).tolist())

    start(1, 60)
    decode([False, True, False], 8)
    start(0, 9)
    start(2, 100)
    decode([True, True, True], 40)
    start(1, 20)
    decode([True, True, False], 10)
    return out


@pytest.mark.parametrize("layout", ["stacked", "separate"])
def test_tokens_are_the_same_wherever_the_pages_are(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokens_of(layout)
    assert tokens_of(layout, moved=True) == expected
    monkeypatch.setattr(cache_module, "suits_pages", lambda *_: True)
    assert tokens_of(layout, moved=True) == expected


@pytest.mark.parametrize("layout", [pytest.param("stacked", marks=pytest.mark.slow), "separate"])
def test_tokens_are_the_same_with_heads_side_by_side_and_windows(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight heads of 16 fill the width of a TPU's page, of which a model of three uses as many."""
    counts = {"num_heads": 6, "num_kv_heads": 3}
    config = tiny_config(tie_embeddings=False, sliding_window=20, layer_is_global=(False, True, False), **counts)
    expected = tokens_of(layout, config)
    monkeypatch.setattr(cache_module, "suits_pages", lambda *_: True)
    with compiling_for("tpu"):
        shape = allocate(config, pages=1, dtype=jnp.float32, stacked=True).k.shape
        assert shape == (3, 1, 64, 128)
        assert tokens_of(layout, config) == expected


def log_likelihoods(model: Decoder, tokens: list[int], *, int8: bool) -> np.ndarray:
    """Give the log-probability of each token but the first, by a cache that is filled in chunks and then one by one."""
    cache = allocate(model.config, pages=8, dtype=model.dtype, stacked=False, int8=int8)
    table = jnp.asarray([[5, 2, 7, 1], [0, 0, 0, 0]], jnp.int32)

    @jax.jit
    def chunk(model: Decoder, cache: Any, part: jax.Array, start: jax.Array) -> Any:
        positions = start + jnp.arange(part.shape[0], dtype=jnp.int32)[None]
        attend = slot_attend(jnp.int32(0), positions)
        hidden, cache = model(part[None], positions, attend=attend, cache=with_table(cache, table))
        return jax.nn.log_softmax(model.logits(hidden[0])), with_table(cache, None)

    @jax.jit
    def step(model: Decoder, cache: Any, token: jax.Array, position: jax.Array) -> Any:
        positions = jnp.stack([position, jnp.int32(255)])
        attend = batch_attend(positions, jnp.array([True, False]))
        hidden, cache = model(
            jnp.stack([token, token])[:, None], positions[:, None], attend=attend, cache=with_table(cache, table)
        )
        return jax.nn.log_softmax(model.logits(hidden[:1, 0])), with_table(cache, None)

    given, out = np.array(tokens, np.int32), []
    for start in range(0, 120, 40):
        rows, cache = chunk(model, cache, given[start : start + 40], np.int32(start))
        out.append(rows)
    for position in range(120, len(tokens)):
        rows, cache = step(model, cache, given[position], np.int32(position))
        out.append(rows)
    return np.take_along_axis(np.concatenate(out)[:-1], given[1:, None], axis=1)[:, 0]


def test_an_int8_cache_changes_perplexity_by_less_than_one_in_a_thousand() -> None:
    model = unstack(Decoder.from_weights(CONFIG, random_weights(CONFIG), dtype=jnp.float32))
    tokens = np.random.default_rng(0).integers(0, 96, 160).tolist()
    exact, rounded = (log_likelihoods(model, tokens, int8=int8) for int8 in (False, True))
    whole = jax.nn.log_softmax(model.logits(jax.jit(lambda m, t: m(t)[0])(model, jnp.asarray([tokens]))[0]))
    np.testing.assert_allclose(exact, np.asarray(whole)[np.arange(159), tokens[1:]], rtol=1e-4, atol=1e-4)
    change = rounded - exact
    assert 0 < np.abs(change).max() < 0.05
    assert abs(np.expm1(-change.mean())) < 1e-3


def test_an_int8_cache_takes_little_over_a_quarter_and_kernels_have_none() -> None:
    config = tiny_config(head_dim=64)
    whole, small = (
        sum(
            leaf.nbytes
            for leaf in jax.tree.leaves(allocate(config, pages=3, dtype=jnp.float32, stacked=True, int8=int8))
        )
        for int8 in (False, True)
    )
    assert small / whole == (64 + 4) / (64 * 4)
    with compiling_for("gpu"), pytest.raises(ValueError, match="int8 KV cache"):
        allocated(int8=True)


def test_pages_are_for_accelerators_alone() -> None:
    assert all(isinstance(cache, KVCache) for cache in allocated())
    with compiling_for("gpu"):
        for stacked in (True, False):
            whole = allocated(stacked=stacked)
            assert isinstance(whole, PagedKVCache)
            assert whole.k.shape == (3 * 5, 2, 64, 64)
        assert isinstance(allocated(dtype=jnp.float32)[0], KVCache)
        assert isinstance(allocated(config={"sliding_window": 20})[0], KVCache)
    with compiling_for("tpu"):
        windowed = allocated(config={"sliding_window": 20})
        assert isinstance(windowed, PagedKVCache)
        assert windowed.windowed
        assert windowed.k.shape == (3 * 5, 1, 64, 128)
        assert isinstance(allocated(config={"head_dim": 96})[0], KVCache)


@pytest.mark.parametrize(
    ("head_dim", "platforms"),
    [(64, {"gpu", "tpu"}), (128, {"gpu", "tpu"}), (192, {"gpu"}), (256, {"gpu", "tpu"}), (80, set()), (384, set())],
)
def test_heads_that_the_kernels_take(head_dim: int, platforms: set[str]) -> None:
    for platform in ("gpu", "tpu", "cpu"):
        with compiling_for(platform):
            suits = suits_pages(dataclasses.replace(CONFIG, head_dim=head_dim), jnp.dtype(jnp.bfloat16))
        assert suits == (platform in platforms)
