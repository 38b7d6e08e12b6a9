"""Damage of each module alone, and the ranks that follow from damage, energies and latency."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibrate.capture import hidden_states
from calibrate.damage import choose_ranks, module_damage
from calibrate.diagnose import linear_cka
from calibrate.latency import compensator_latency
from calibrate.student import GateConfig
from calibrate.weights import dense_weights, with_weights
from spear_jax.models.decoder import MODULES, Decoder
from spear_jax.models.quantize import quantize_model
from spear_jax.quant import QuantSpec
from spear_jax.testing import random_weights, tiny_config

TOKENS = np.random.default_rng(0).integers(0, 96, (4, 12)).astype(np.int32)
STATIC = GateConfig(form="static")


@pytest.fixture(scope="module")
def model() -> Decoder:
    config = tiny_config(num_layers=2)
    return Decoder.from_weights(config, random_weights(config), dtype=jnp.float32)


def test_damage_is_that_of_whole_forward_passes(model):
    dense = dense_weights(quantize_model(model, QuantSpec()))
    found = module_damage(model, dense, TOKENS, batch_size=2)
    assert found.shape == (2, 4)
    reference = hidden_states(model, jnp.asarray(TOKENS)).reshape(-1, 64)
    for layer, column in ((0, 0), (1, 1), (0, 3), (1, 2)):
        name = MODULES[column]
        stack = getattr(model.layers, name).weight[...].at[layer].set(dense[name][layer])
        changed = model.replace(layers=with_weights(model.layers, {name: stack}))
        other = hidden_states(changed, jnp.asarray(TOKENS)).reshape(-1, 64)
        assert found[layer, column] == pytest.approx(1 - linear_cka(reference, other), rel=1e-3, abs=1e-7)


def ranks_of(damage, *, strategy="gain", latency=None, budget=2000) -> dict[str, tuple[int, ...]]:
    """Give ranks where all modules are of one shape and have the same error and inputs."""
    error = jax.random.normal(jax.random.key(0), (24, 24))
    errors, moments = (dict.fromkeys(MODULES, jnp.broadcast_to(part, (2, 24, 24))) for part in (error, jnp.eye(24)))
    damage = np.asarray(damage, np.float64)
    ranks, placed, _ = choose_ranks(
        errors, moments, damage, budget=budget, strategy=strategy, gate=STATIC, flatten=0.5, latency=latency
    )
    assert placed.nbytes <= budget
    return ranks


def test_ranks_follow_damage():
    ranks = ranks_of([[8, 1, 1, 1], [1, 1, 1, 8]])
    table = np.asarray([ranks[name] for name in MODULES]).T
    assert abs(table[0, 0] - table[1, 3]) <= 1, "what is left of the budget may pay for one of two alike"
    assert min(table[0, 0], table[1, 3]) > max(table[0, 1:].max(), table[1, :3].max())


def test_entropy_bounds_the_modules_that_get_rank():
    damage = [[100, 100, 1e-3, 1e-3], [1e-3, 1e-3, 1e-3, 1e-3]]
    ranks = ranks_of(damage, strategy="cka", budget=4000)
    # exp(entropy) is a little over two: three modules are covered.
    assert sum(rank > 0 for own in ranks.values() for rank in own) == 3
    assert all(ranks[name][0] for name in ("qkv", "o"))
    everywhere = ranks_of(damage, strategy="gain", budget=4000)
    assert sum(rank > 0 for own in everywhere.values() for rank in own) > 3


@pytest.mark.parametrize("strategy", ["gain", "cka"])
def test_slow_modules_get_less_rank(strategy):
    even = np.ones((2, 4))
    usual = ranks_of(even, strategy=strategy)
    assert ranks_of(even, strategy=strategy, latency=np.full(4, 3e-6)) == usual
    slow = ranks_of(even, strategy=strategy, latency=np.asarray([8e-6, 1e-6, 1e-6, 1e-6]))
    assert sum(slow["qkv"]) < sum(usual["qkv"])
    assert sum(slow["down"]) > sum(usual["down"])


def test_latency_is_measured_for_each_module(model):
    latency = compensator_latency(quantize_model(model, QuantSpec()))
    assert latency.shape == (4,)
    assert np.all(latency > 0)
    assert np.all(latency < 1)
