import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibrate.capture import all_hidden_states, hidden_states, second_moments
from calibrate.weights import check_weights
from spear_jax.models.decoder import MODULES, Decoder
from spear_jax.testing import assert_close, random_weights, tiny_config


@pytest.fixture(scope="module")
def model() -> Decoder:
    config = tiny_config()
    return Decoder.from_weights(config, random_weights(config), dtype=jnp.float32)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 96, (5, 12)).astype(np.int32)


@pytest.mark.parametrize("remat", ["none", "dots", "all"])
def test_hidden_states_are_the_models_own(model, tokens, remat):
    hidden = hidden_states(model, jnp.asarray(tokens), remat=remat)
    assert_close(hidden, model(jnp.asarray(tokens))[0], relative=1e-5)


def test_batches_make_no_difference(model, tokens):
    assert_close(all_hidden_states(model, tokens, batch_size=2), model(jnp.asarray(tokens))[0], relative=1e-5)


def test_moments_are_those_of_what_enters_each_linear(model, tokens):
    found = second_moments(model, tokens, batch_size=2)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x, ropes = model.embedded(jnp.asarray(tokens)), model.ropes(positions)
    for index, window in enumerate(model.config.windows):
        seen = {}
        x, _ = model.layer(index)(x, ropes, layer=index, window=window, tap=seen.__setitem__)
        assert seen.keys() == set(MODULES)
        for name, value in seen.items():
            rows = np.asarray(value, np.float64).reshape(-1, value.shape[-1])
            assert_close(found[name][index], rows.T @ rows / len(rows), relative=1e-5)


def test_a_weight_that_is_not_a_number_is_named(model, tokens):
    broken = model.replace(layers=jax.tree.map(lambda leaf: leaf, model.layers))
    broken.layers.down.weight = broken.layers.down.weight[...].at[1, 2, 3].set(jnp.nan)
    with pytest.raises(ValueError, match=r"m\.gguf: layers\.down\.weight in layer 1 holds NaN"):
        check_weights(broken, source="m.gguf")
    with pytest.raises(ValueError, match=r"layer 2, \w+: inputs on the calibration text are not finite"):
        second_moments(broken, tokens)
