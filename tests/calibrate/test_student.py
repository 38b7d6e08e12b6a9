import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibrate.initialize import whitened_svd
from calibrate.student import GateConfig, Student, factor_bytes, initial_compensators, zero_byte_params
from calibrate.weights import dense_weights, weight_errors
from spear_jax.models.decoder import MODULES, Decoder
from spear_jax.models.quantize import expand_model, quantize_model
from spear_jax.quant import QuantSpec
from spear_jax.testing import assert_close, random_weights, tiny_config

RANKS = {"qkv": (2, 0, 1), "o": (0, 0, 0), "gate_up": (1, 1, 1), "down": (0, 3, 2)}
GATES = [
    GateConfig(form="published"),
    GateConfig(form="linear", rms=True),
    GateConfig(form="shift", hidden=6, probes=2, rms=True),
]
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 96, (2, 10)), jnp.int32)


@pytest.fixture(scope="module")
def reference() -> Decoder:
    config = tiny_config()
    return Decoder.from_weights(config, random_weights(config), dtype=jnp.float32)


@pytest.fixture(scope="module")
def base(reference) -> Decoder:
    return quantize_model(reference, QuantSpec())


@pytest.fixture(scope="module")
def problem(reference, base):
    """Weight errors, and moments of full rank."""
    rng = np.random.default_rng(2)
    moments = {}
    for name, (_, k) in reference.config.module_shapes().items():
        rows = rng.standard_normal((3, 2 * k, k)) * rng.uniform(0.2, 3, k)
        moments[name] = jnp.asarray(np.einsum("lsi,lsj->lij", rows, rows) / (2 * k), jnp.float32)
    return weight_errors(reference, dense_weights(base)), moments


def make(problem, gate: GateConfig, **changes):
    params = initial_compensators(*problem, RANKS, gate, key=jax.random.key(0))
    return params, Student(ranks=RANKS, gate=gate, **changes)


def test_static_factors_start_as_the_whitened_svd(problem):
    params, student = make(problem, GateConfig(form="static"), int8=False)
    banks = student.banks(params)
    assert banks.keys() == {"qkv", "gate_up", "down"}
    errors, moments = problem
    for name, bank in banks.items():
        low = whitened_svd(errors[name], moments[name], rank=max(RANKS[name]))
        for layer, rank in enumerate(RANKS[name]):
            if rank == 0:
                assert bank.at(layer) is None
                continue
            part = bank.at(layer)
            assert_close(part.bt.T @ part.a, low.b[layer, :, :rank] @ low.a[layer, :rank], relative=1e-4)
            power = jnp.einsum("rk,kj,rj->r", part.a, moments[name][layer], part.a)
            np.testing.assert_allclose(power, 1.0, rtol=1e-3)


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.form)
def test_a_gate_starts_as_the_static_compensator(problem, base, gate):
    models = []
    for config in (gate, GateConfig(form="static")):
        params, student = make(problem, config)
        models.append(student.assemble(base, dense_weights(base), params))
    states = [model(TOKENS)[0] for model in models]
    assert_close(states[0], states[1], relative=1e-5)
    assert not np.allclose(states[1], expand_model(base, jnp.float32)(TOKENS)[0], atol=1e-3)


@pytest.mark.parametrize(("gate", "bits"), [*((gate, 8) for gate in GATES), (GATES[2], 4)], ids=str)
def test_what_is_trained_is_what_is_stored(problem, base, reference, gate, bits):
    params, student = make(problem, gate, bits=bits)
    params |= zero_byte_params(base, reference, ("scales", "norms", "codes"))
    rng = np.random.default_rng(4)
    params = jax.tree.map(lambda x: x + jnp.asarray(0.02 * rng.standard_normal(x.shape), x.dtype), params)
    trained = student.assemble(base, dense_weights(base), params)
    stored = student.finish(base, params)
    # Gates are stored in bfloat16, all else exactly.
    assert_close(stored(TOKENS)[0], trained(TOKENS)[0], relative=5e-3)
    assert stored.compensators["down"].a.dtype == jnp.int8
    for name, bank in stored.compensators.items():
        factors = sum(r * factor_bytes(base.config.module_shapes(), bits=bits)[name] for r in RANKS[name])
        gates = sum(RANKS[name]) * gate.rank_bytes + 3 * gate.layer_bytes(base.config.module_shapes()[name][1])
        assert bank.nbytes == factors + gates


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_values_in_training_are_those_stored(problem, bits):
    params, student = make(problem, GateConfig(form="static"), bits=bits)
    for name, bank in student.banks(params).items():
        stored = bank.to_int8(bits=bits)
        top = 2 ** (bits - 1) - 1
        assert np.abs(stored.a[...]).max() == np.abs(stored.bt[...]).max() == top
        np.testing.assert_allclose(
            stored.a[...].astype(jnp.float32) * stored.a_scale[...][:, None], bank.a[...], rtol=1e-6, atol=1e-9
        )
        exact = params["factors"][name]["a"]
        step = np.abs(exact).max(axis=1, keepdims=True) / top
        assert (np.abs(bank.a[...] - exact) <= 0.5001 * step).all()


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(group_size=32, symmetric=False)], ids=str)
def test_zero_byte_parameters_start_as_the_base(reference, spec):
    base = quantize_model(reference, spec)
    student = Student(ranks={}, gate=GateConfig(form="static"))
    params = zero_byte_params(base, reference, ("scales", "norms", "codes"))
    stored = student.finish(base, params)
    for name in MODULES:
        np.testing.assert_array_equal(
            getattr(stored.layers, name).weight.packed, getattr(base.layers, name).weight.packed
        )
    trained = student.assemble(base, dense_weights(base), params)
    assert_close(trained(TOKENS)[0], expand_model(base, jnp.float32)(TOKENS)[0], relative=1e-4)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(stored)) == sum(leaf.nbytes for leaf in jax.tree.leaves(base))


def test_unknown_groups_are_named(base, reference):
    with pytest.raises(ValueError, match="'weights'"):
        zero_byte_params(base, reference, ("weights",))
