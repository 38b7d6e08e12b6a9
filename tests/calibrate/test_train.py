import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibrate.student import GateConfig, Student, zero_byte_params
from calibrate.train import TrainConfig, Trainer, TrainingDiverged, distillation_loss
from spear_jax.models.decoder import Decoder
from spear_jax.models.quantize import quantize_model
from spear_jax.quant import QuantSpec
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


def test_training_lowers_the_held_out_loss_and_resumes_to_the_same_end():
    trainer, params = make_trainer(steps=8)
    states = {}
    best, curve = trainer.run(params, on_point=lambda point, state: states.update({point.step: jax.device_get(state)}))
    assert [point.step for point in curve] == [0, 2, 4, 6, 8]
    first, last = (point.held_out_kl + point.held_out_hidden for point in (curve[0], curve[-1]))
    assert last < 0.97 * first
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(best))

    halfway = jax.tree.map(jnp.asarray, states[4])._replace(loss_sum=jnp.zeros(()))
    _, rest = trainer.run(params, state=halfway)
    assert [point.step for point in rest] == [6, 8]
    assert rest[-1].held_out_kl == curve[-1].held_out_kl
    assert rest[-1].loss == curve[-1].loss


def test_a_step_that_is_not_finite_changes_nothing_and_training_stops_with_the_parameters_named():
    trainer, params = make_trainer()
    state = trainer.start(params)
    target = trainer.target
    index = jnp.arange(4)
    good = jax.device_get(trainer._step(state, trainer.frozen, index))
    trainer.target = target.at[1, 3, 5].set(jnp.nan)
    bad = trainer._step(jax.tree.map(jnp.asarray, good), trainer.frozen, index)
    for before, after in zip(jax.tree.leaves(good.params), jax.tree.leaves(bad.params), strict=True):
        np.testing.assert_array_equal(before, after)
    assert int(bad.step) == 2
    with pytest.raises(TrainingDiverged, match=r"NaN or infinite \(.*scales") as stopped:
        trainer.run(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stopped.value.params))


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


@pytest.mark.parametrize("changes", [{"steps": 0}, {"batch_size": 0}, {"ema": 1.0}, {"held_out": 0.0}])
def test_settings_that_make_no_sense(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        TrainConfig(**changes)


@pytest.mark.slow
def test_two_devices_train_as_one_does():
    code = (
        f"import json, sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import jax; import test_train as t;"
        "trainer, params = t.make_trainer(); best, curve = trainer.run(params);"
        "print(json.dumps([jax.device_count(), trainer.mesh is not None, t.summary(best),"
        " [p.held_out_kl for p in curve]]))"
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
