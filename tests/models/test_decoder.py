"""Separate layers are the scanned ones: traced once for all of a window, whatever the ranks of their compensators."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.int4_matmul import Gate
from spear_jax.models.decoder import Decoder, unstack
from spear_jax.models.quantize import quantize_model
from spear_jax.nn.attention import causal_attend
from spear_jax.quant import CompensatorBank, QuantSpec
from spear_jax.testing import assert_close, random_weights, tiny_config

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12))
ROUNDING = 2e-6
"""What programs that XLA fuses differently may differ by: 1.06e-6 on a CPU with AVX-512, below 1e-6 on others."""
RANKS = {"qkv": (2, 0, 3), "o": (0, 0, 4), "gate_up": (1, 5, 2), "down": (0, 0, 0)}


def ragged_model(form: Any = None, **changes: Any) -> Decoder:
    config = tiny_config(**changes)
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) * 0.3, jnp.float32)

    model = quantize_model(Decoder.from_weights(config, random_weights(config), dtype=jnp.float32), QuantSpec())
    for name, (n, k) in config.module_shapes().items():
        total, hidden = sum(RANKS[name]), 4
        gate = form and Gate(
            w_in=draw(total, hidden), b_in=draw(3, hidden), w_out=draw(total, hidden), b_out=draw(total), form=form,
            probe=draw(3, 2, k), w_probe=draw(3, 2, hidden), w_rms=draw(3, hidden),
        )  # fmt: skip
        bank = CompensatorBank(RANKS[name], draw(total, k), draw(total, n), gate=gate or None)
        model.compensators[name] = bank.to_int8() if total else bank
    return model


def by_hand(model: Decoder) -> jax.Array:
    """Run layer by layer, each with compensators of exactly its own rank and none where that is zero."""
    x, ropes = model.embedded(jnp.asarray(TOKENS)), model.ropes(jnp.broadcast_to(jnp.arange(12), (2, 12)))
    for i, window in enumerate(model.config.windows):
        own = {name: bank.at(i) for name, bank in model.compensators.items()}
        assert {name: 0 if c is None else c.a.shape[0] for name, c in own.items()} == {
            n: r[i] for n, r in RANKS.items()
        }
        x, _ = model.layer(i)(x, ropes, layer=i, window=window, compensators=own)
    return model.final_norm(x)


@pytest.mark.parametrize("form", [None, "tanh", "linear", "shift"])
def test_ragged_compensators_are_one_traced_layer_and_give_the_same(form: Any) -> None:
    model = ragged_model(form)
    windows = []

    def attend(*qkv_cache: Any, **where: Any) -> Any:
        windows.append(where["window"])
        return causal_attend(*qkv_cache, **where)

    separate = unstack(model)
    hidden, cache = jax.jit(lambda m: m(TOKENS, attend=attend))(separate)
    assert len(windows) == 1
    assert cache is None
    expected = jax.jit(by_hand)(model)
    assert_close(hidden, expected, relative=1e-6)
    separate.compensators = nnx.Dict()
    assert float(jnp.linalg.norm(separate(TOKENS)[0] - expected)) > 0.1


def test_layers_of_two_windows_are_traced_twice() -> None:
    config = {"sliding_window": 5, "layer_is_global": (False, True, False)}
    model, windows = ragged_model("tanh", **config), []

    def attend(*qkv_cache: Any, **where: Any) -> Any:
        windows.append(where["window"])
        return causal_attend(*qkv_cache, **where)

    hidden, _ = jax.jit(lambda m: m(TOKENS, attend=attend))(unstack(model))
    assert sorted(windows) == sorted(set(model.config.windows))
    assert_close(hidden, jax.jit(by_hand)(model), relative=ROUNDING)
