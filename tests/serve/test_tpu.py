"""A server's steps as a TPU runs them, every kernel interpreted, give the tokens that XLA gives on a CPU."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import compiling_for
from serve.bench_step import random_model
from serve.paged_cache import PagedKVCache
from serve.request import SamplingParams
from serve.runner import Runner
from serve.tpu import lay_out_for_tpu
from spear_jax.models.decoder import Decoder, unstack
from spear_jax.quant import QuantSpec
from spear_jax.testing import tiny_config

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_layers": 2, "tie_embeddings": False}
CONFIGS = {
    "full": tiny_config(**SIZES),
    "sliding": tiny_config(**SIZES, sliding_window=20, layer_is_global=(False, True)),
}


@functools.cache
def model_of(name: str) -> Decoder:
    return random_model(CONFIGS[name], spec=QuantSpec(), rank=5, dtype=jnp.dtype(jnp.bfloat16))


def tokens_of(model: Decoder) -> tuple[list[list[int]], Runner]:
    """Tokens of two slots, one of which begins later: prompts of one chunk and of several."""
    runner = Runner(model, slots=2, context=90, buckets=(32,), lone_program=False)
    rng, out = np.random.default_rng(0), []
    for slot, length, steps in ((1, 70, 3), (0, 9, 5)):
        prompt = rng.integers(0, 96, length).tolist()
        for done in range(0, length, 32):
            part, last = prompt[done : done + 32], done + 32 >= length
            token = runner.prefill(part, slot=slot, start=done, bucket=32, last=last, params=GREEDY)
        out.append([int(np.asarray(token))])
        active = np.array([slot == 0, True])
        out += [np.where(active, np.asarray(runner.decode(active)), -1).tolist() for _ in range(steps)]
    return out, runner


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_a_cpu(name: str) -> None:
    expected, _ = tokens_of(unstack(model_of(name)))
    with compiling_for("tpu", kind="TPU v6 lite"), pltpu.force_tpu_interpret_mode():
        got, runner = tokens_of(lay_out_for_tpu(model_of(name)))
    assert isinstance(runner._state.cache, PagedKVCache)
    assert got == expected
