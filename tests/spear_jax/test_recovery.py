import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibrate.recover import recovery_arrays, save_params
from calibrate.student import GateConfig, Student, initial_compensators, zero_byte_params
from calibrate.weights import dense_weights
from spear_jax.models.decoder import MODULES, Decoder
from spear_jax.models.quantize import quantize_model, weight_bytes
from spear_jax.quant import QuantSpec
from spear_jax.recovery import DEMO_FILE, hash_of_codes, recover, recovery_details, with_parameters, write_recovery
from spear_jax.testing import random_weights, tiny_config


@pytest.fixture(scope="module")
def exact() -> Decoder:
    config = tiny_config()
    return Decoder.from_weights(config, random_weights(config), dtype=jnp.float32)


@pytest.fixture(scope="module")
def trained(exact: Decoder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, dict[str, np.ndarray]]:
    """Give a student's finished model with trained-looking ranges, norms and factors, and what `ablate` saves of it."""
    base, keys = quantize_model(exact, QuantSpec()), iter(jax.random.split(jax.random.key(0), 99))
    ranks = {"qkv": (1, 0, 2), "down": (0, 3, 1)}
    moments = {n: jnp.tile(jnp.eye(getattr(exact.layers, n).weight.shape[-1]), (3, 1, 1)) for n in MODULES}
    dense = dense_weights(base)
    errors = {name: getattr(exact.layers, name).weight[...] - dense[name] for name in MODULES}
    student = Student(ranks=ranks, gate=GateConfig(form="static"))
    params = initial_compensators(errors, moments, ranks, student.gate, key=next(keys))
    params |= zero_byte_params(base, exact, ("ranges", "norms"))
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), params)
    model = student.finish(base, params, exact=exact)
    path = tmp_path_factory.mktemp("saves") / "arm.npz"
    save_params(path, params, ranks | {"o": (0, 0, 0), "gate_up": (0, 0, 0)}, model)
    with np.load(path) as stored:
        return model, {name: stored[name] for name in stored.files}


def test_a_recovery_is_the_model_that_was_trained(exact, trained, tmp_path: Path):
    model, saved = trained
    path = tmp_path / "sub" / "r.npz"
    write_recovery(path, with_parameters(exact, recovery_arrays(exact, saved)), {"reference": "tiny"})
    found = recover(exact, path)
    assert hash_of_codes(found) == hash_of_codes(model)
    assert {name: bank.ranks for name, bank in found.compensators.items()} == {"qkv": (1, 0, 2), "down": (0, 3, 1)}
    tokens = jnp.arange(2, 18)[None]
    logits, wanted = (m.logits(m(tokens)[0]) for m in (found, model))
    np.testing.assert_allclose(logits, wanted, rtol=1e-6, atol=1e-6)
    assert recovery_details(path)["reference"] == "tiny"
    assert weight_bytes(found) == weight_bytes(model)


def test_a_recovery_of_other_weights_is_refused(exact, trained, tmp_path: Path):
    _, saved = trained
    write_recovery(path := tmp_path / "r.npz", with_parameters(exact, recovery_arrays(exact, saved)), {})
    config = tiny_config()
    weights = random_weights(config)
    weights["layers.qkv.weight"] = np.array(weights["layers.qkv.weight"])
    weights["layers.qkv.weight"][1, 2, 3] += 1.0
    with pytest.raises(ValueError, match=r"made for other weights.*--quantize rtn"):
        recover(Decoder.from_weights(config, weights, dtype=jnp.float32), path)
    wider = tiny_config(intermediate_size=2 * config.intermediate_size)
    with pytest.raises(ValueError, match=r"does not fit the model: gate_up\.scale is"):
        recover(Decoder.from_weights(wider, random_weights(wider), dtype=jnp.float32), path)


def test_only_static_compensators_on_trained_ranges_can_be_recovered(exact, trained):
    _, saved = trained
    with pytest.raises(ValueError, match="gated, expected static"):
        recovery_arrays(exact, saved | {"gates.qkv.w_in": np.zeros(3)})
    with pytest.raises(ValueError, match="no trained ranges of o"):
        recovery_arrays(exact, {name: array for name, array in saved.items() if name != "ranges.o"})


def test_the_demos_recovery_is_small_and_says_what_it_is():
    assert DEMO_FILE.stat().st_size < 2_000_000
    details = recovery_details()
    assert details["reference"] == "demo"
    assert json.dumps(details["zero_byte"]) == '["ranges", "norms"]'
    assert len(details["codes_sha256"]) == 64
