import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibrate.loss import distillation_loss
from calibrate.nonfinite import broken_gradients
from calibrate.student import GateConfig, Student, initial_compensators, zero_byte_params
from calibrate.train import Standing, TrainConfig, Trainer, TrainingDiverged
from calibrate.weights import weight_errors
from pallas_kernels.dispatch import compiling_for
from spear_jax.models.decoder import Decoder
from spear_jax.models.quantize import quantize_model
from spear_jax.nn.linear import Linear, RMSNorm
from spear_jax.quant import QuantSpec, QuantTensor
from spear_jax.testing import random_weights, tiny_config

TOKENS = np.random.default_rng(0).integers(0, 96, (10, 12)).astype(np.int32)
CONFIG = TrainConfig(steps=4, batch_size=4, evaluate_every=2, held_out=0.2, scale_rate=1e-2, norm_rate=1e-2)


def make_trainer(**changes) -> tuple[Trainer, dict]:
    config = tiny_config(num_layers=2)
    reference = Decoder.from_weights(config, random_weights(config), dtype=jnp.float32)
    base = quantize_model(reference, QuantSpec())
    student = Student(ranks={}, gate=GateConfig(form="static"))
    trainer = Trainer(reference, base, student, TOKENS, dataclasses.replace(CONFIG, **changes))
    return trainer, zero_byte_params(base, reference, ("scales", "norms"))


def summary(params) -> list[float]:
    return [float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(params)]


def test_loss_is_zero_against_oneself_and_positive_otherwise():
    config = tiny_config(num_layers=1)
    model = Decoder.from_weights(config, random_weights(config), dtype=jnp.float32)
    hidden = model(jnp.asarray(TOKENS))[0]
    kl, relative = distillation_loss(model, model, hidden, hidden)
    assert abs(float(kl)) < 1e-6
    assert float(relative) == 0
    other = hidden * 1.1
    kl, relative = distillation_loss(model, model, hidden, other)
    wanted, got = (jax.nn.log_softmax(model.logits(h)) for h in (hidden, other))
    np.testing.assert_allclose(float(kl), jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - got), axis=-1)), rtol=1e-4)
    np.testing.assert_allclose(float(relative), 0.01, rtol=1e-3)


def test_no_kernel_is_differentiated():
    """Those for TPUs take any number of rows, but have no gradient and are not divided among devices."""
    config = tiny_config(num_layers=1, hidden_size=128)
    reference = Decoder.from_weights(config, random_weights(config), dtype=jnp.bfloat16)
    base = quantize_model(reference, QuantSpec())
    trainer = Trainer(reference, base, Student(ranks={}, gate=GateConfig(form="static")), TOKENS, CONFIG)
    params = zero_byte_params(base, reference, ("scales", "norms"))
    with compiling_for("tpu", kind="TPU v6 lite"):
        losses = jax.make_jaxpr(lambda params: trainer._losses(trainer.frozen, params, jnp.arange(4))[0])
        gradient = jax.make_jaxpr(jax.grad(lambda params: trainer._losses(trainer.frozen, params, jnp.arange(4))[0]))
        assert "pallas_call" in str(jax.make_jaxpr(lambda x: reference(x)[0])(TOKENS))
        assert "pallas_call" not in str(losses(params)) + str(gradient(params))


def test_training_lowers_the_held_out_loss_and_resumes_to_the_same_end():
    trainer, params = make_trainer(steps=8)
    at = {}
    end = trainer.run(params, on_point=lambda standing: at.update({standing.curve[-1].step: jax.device_get(standing)}))
    assert [point.step for point in end.curve] == [0, 2, 4, 6, 8]
    first, last = (point.held_out_kl + point.held_out_hidden for point in (end.curve[0], end.curve[-1]))
    assert last < 0.97 * first
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(end.best))

    state, best, curve = at[4]
    again = trainer.run(params, resume=Standing(*jax.tree.map(jnp.asarray, (state, best)), curve))
    assert [point.step for point in again.curve] == [0, 2, 4, 6, 8]
    assert [(p.loss, p.held_out_kl) for p in again.curve] == [(p.loss, p.held_out_kl) for p in end.curve]
    jax.tree.map(np.testing.assert_array_equal, again.best, end.best)


def test_compensators_from_zero_start_as_the_base_and_take_steps_of_the_size_of_the_svd():
    plain, _ = make_trainer()
    reference, base, dense, *_ = plain.frozen
    moments = {name: jnp.broadcast_to(jnp.eye(w.shape[2]), (2, *w.shape[2:] * 2)) for name, w in dense.items()}
    student = Student(ranks=dict.fromkeys(dense, (1, 2)), gate=GateConfig(form="static"))
    errors = weight_errors(reference, dense)
    params = initial_compensators(errors, moments, student.ranks, student.gate, key=jax.random.key(0))
    given, units = jax.tree.map(np.array, params), student.units(params)["factors"]
    trainer = Trainer(reference, base, student, TOKENS, dataclasses.replace(CONFIG, initial="zero"))
    end = trainer.run(params)
    jax.tree.map(np.testing.assert_array_equal, params, given)
    losses = [(point.held_out_kl, point.held_out_hidden) for point in end.curve]
    assert losses[0] == pytest.approx(plain.held_out_losses({}), rel=1e-5)
    assert sum(losses[-1]) < sum(losses[0])
    # A first step of Adam has the size of the rate, which warm-up is at its peak of: one step of four.
    after = trainer._step(trainer.start(params), trainer.frozen, jnp.arange(4)).params["factors"]
    for name, factors in after.items():
        np.testing.assert_allclose(factors["a"], given["factors"][name]["a"])
        np.testing.assert_allclose(np.abs(factors["bt"]) / units[name]["bt"], CONFIG.factor_rate, rtol=1e-3)


def test_training_stops_early_and_keeps_the_best():
    # Steps of ten times a gain's size make each evaluation worse than the start.
    trainer, params = make_trainer(steps=40, evaluate_every=1, patience=3, scale_rate=10.0, norm_rate=10.0)
    end = trainer.run(params)
    assert [point.step for point in end.curve] == [0, 1, 2, 3]
    jax.tree.map(np.testing.assert_array_equal, end.best, params)
    assert trainer.run(params, resume=end).curve == end.curve
    patient, _ = make_trainer(steps=5, evaluate_every=1, scale_rate=10.0, norm_rate=10.0)
    assert len(patient.run(params).curve) == 6


def test_a_step_that_is_not_finite_changes_nothing_nor_does_any_after_it():
    trainer, params = make_trainer()
    reference, base, dense, tokens, target = trainer.frozen
    index = jnp.arange(4)
    good = jax.device_get(trainer._step(trainer.start(params), trainer.frozen, index))
    broken = reference, base, dense, tokens, target.at[1, 3, 5].set(jnp.nan)
    state = trainer._step(jax.tree.map(jnp.asarray, good), broken, index)
    state = trainer._step(state, trainer.frozen, index)
    jax.tree.map(np.testing.assert_array_equal, state.params, good.params)
    assert (int(state.step), int(state.broken)) == (3, 1)


def poisoned(trainer: Trainer, place: str) -> tuple:
    """Put one infinite value into what steps read."""
    reference, base, dense, tokens, target = trainer.frozen
    if place == "target":
        return reference, base, dense, tokens, target.at[:, 3, 5].set(jnp.nan)
    if place == "final_norm":
        norm = RMSNorm(base.final_norm.weight[...].at[3].set(jnp.inf), eps=base.final_norm.eps)
        return reference, base.replace(final_norm=norm), dense, tokens, target
    layers = jax.tree.map(lambda leaf: leaf, base.layers)
    if place == "mlp_norm":
        layers.mlp_norm = RMSNorm(layers.mlp_norm.weight[...].at[1, 3].set(jnp.inf), eps=layers.mlp_norm.eps)
        return reference, base.replace(layers=layers), dense, tokens, target
    name, layer = place
    weight = getattr(layers, name).weight
    scale = weight.scale.at[layer, 0, 0].set(jnp.inf)
    setattr(layers, name, Linear(QuantTensor.from_codes(weight.codes(), scale, weight.zero)))
    return reference, base.replace(layers=layers), dense, tokens, target


@pytest.mark.parametrize(
    ("place", "named"),
    [
        (("qkv", 0), "layer 0, qkv"),
        (("down", 1), "layer 1, down"),
        ("mlp_norm", "layer 1, mlp_norm"),
        ("final_norm", "final_norm"),
        ("target", "the reference's last hidden states"),
    ],
)
def test_training_stops_with_the_module_named_and_the_best_parameters_kept(place, named):
    trainer, params = make_trainer()
    seen = []

    def poison(standing: Standing) -> None:
        seen.append(standing)
        trainer.frozen = poisoned(trainer, place)

    with pytest.raises(
        TrainingDiverged, match=rf"stopped at step 1: NaN or infinite values in {named};.* lower the"
    ) as stopped:
        trainer.run(params, on_point=poison)
    assert "the state of step 0 is kept" in str(stopped.value)
    assert len(seen) == 1
    jax.tree.map(np.testing.assert_array_equal, stopped.value.params, params)
    with pytest.raises(TrainingDiverged, match=rf"evaluation after 0 steps: NaN or infinite values in {named}$"):
        trainer.run(params)


def test_gradients_that_are_not_finite_are_named_from_the_last_layer():
    gradient = {
        "scales": {"qkv": jnp.ones((3, 4)).at[0, 1].set(jnp.nan), "down": jnp.ones((3, 4)).at[1, 1].set(jnp.inf)},
        "factors": {"o": {"a": jnp.ones((5, 4)).at[3, 2].set(jnp.nan), "bt": jnp.ones((5, 4))}},
    }
    ranks = {"qkv": (1, 1, 1), "o": (2, 1, 2), "down": (1, 0, 2)}
    assert broken_gradients(gradient, ranks) == "layer 2, the gradient of factors.o.a"
    assert broken_gradients({"scales": gradient["scales"]}, ranks) == "layer 1, the gradient of scales.down"
    gates = {"gates": {"o": {"w_in": jnp.ones((5, 4)).at[2].set(jnp.nan), "b_in": jnp.ones((3, 4)).at[0].set(jnp.nan)}}}
    assert broken_gradients(gates, ranks) == "layer 1, the gradient of gates.o.w_in"
    assert broken_gradients({"norms": {"final_norm": jnp.full(4, jnp.nan)}}, {}) == "the gradient of norms.final_norm"
    assert broken_gradients({"factors": {"o": {"a": jnp.ones((5, 4))}}}, ranks) is None


def test_each_pass_visits_every_sequence_once():
    trainer, _ = make_trainer()
    rows = np.concatenate([trainer._rows(step) for step in range(2)])
    assert sorted(rows) == list(range(8))
    assert not np.array_equal(rows[:4], trainer._rows(2))


def test_two_sequences_are_the_least():
    config = tiny_config(num_layers=1)
    model = Decoder.from_weights(config, random_weights(config), dtype=jnp.float32)
    student = Student(ranks={}, gate=GateConfig(form="static"))
    with pytest.raises(ValueError, match="1 sequences: expected at least 2"):
        Trainer(model, quantize_model(model, QuantSpec()), student, TOKENS[:1], CONFIG)


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"batch_size": 0}, {"ema": 1.0}, {"held_out": 0.0}, {"patience": -1}, {"initial": "none"}]
)
def test_settings_that_make_no_sense(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        TrainConfig(**changes)


@pytest.mark.slow
def test_two_devices_train_as_one_does():
    code = (
        f"import json, sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import jax; import test_train as t;"
        "trainer, params = t.make_trainer(); end = trainer.run(params);"
        "print(json.dumps([jax.device_count(), trainer.mesh is not None, t.summary(end.best),"
        " [p.held_out_kl for p in end.curve]]))"
    )
    found = []
    for count in (1, 2):
        flags = f"--xla_force_host_platform_device_count={count}"
        env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert [row[:2] for row in found] == [[1, False], [2, True]]
    np.testing.assert_allclose(found[0][2], found[1][2], rtol=1e-3)
    np.testing.assert_allclose(found[0][3], found[1][3], rtol=1e-4)
