"""Local training lowers the module's own error over factors as they are stored."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibrate.local import LocalProblem, local_errors, train_locally
from calibrate.student import GateConfig, Student, initial_compensators

SHAPES = {"qkv": (40, 24), "down": (24, 48)}
RANKS = {"qkv": (3, 0, 2), "o": (0, 0, 0), "down": (1, 4, 1)}


def problem() -> tuple[dict, dict]:
    """Errors, and moments of inputs of which a few are thirty times as large as the rest, as in real models."""
    rng = np.random.default_rng(0)
    errors, moments = {}, {}
    for name, (rows, inputs) in SHAPES.items():
        x = rng.standard_normal((3, 400, inputs)) * np.where(np.arange(inputs) % 11, 1, 30)
        x = x @ (np.eye(inputs) + 0.3 * rng.standard_normal((inputs, inputs)))
        errors[name] = jnp.asarray(0.01 * rng.standard_normal((3, rows, inputs)), jnp.float32)
        moments[name] = jnp.asarray(np.swapaxes(x, 1, 2) @ x / 400, jnp.float32)
    return errors, moments


def start(errors: dict, moments: dict, gate: GateConfig) -> dict:
    ranks = {name: RANKS[name] for name in SHAPES}
    return initial_compensators(errors, moments, ranks, gate, key=jax.random.key(0))


def exact_errors(errors: dict, moments: dict, student: Student, params: dict) -> dict[str, np.ndarray]:
    """Give what `local_errors` gives, from whole matrices in float64."""
    left = {}
    for name, bank in student.banks({"factors": params["factors"]}).items():
        ends = np.cumsum((0, *bank.ranks))
        a, bt = (np.asarray(rows[...], np.float64) for rows in (bank.a, bank.bt))
        shares = []
        for layer, (first, last) in enumerate(itertools.pairwise(ends)):
            error, moment = (np.asarray(part[name][layer], np.float64) for part in (errors, moments))
            rest = error - bt[first:last].T @ a[first:last]
            shares.append(np.sum(rest @ moment * rest) / np.sum(error @ moment * error))
        left[name] = np.asarray(shares)
    return left


@pytest.mark.parametrize("int8", [False, True])
def test_the_local_error_is_that_of_whole_matrices(int8):
    errors, moments = problem()
    student = Student(ranks=RANKS, gate=GateConfig(form="static"), int8=int8)
    params = start(errors, moments, student.gate)
    problems = {name: LocalProblem.of(errors[name], moments[name]) for name in errors}
    found = local_errors(problems, student, params)
    for name, expected in exact_errors(errors, moments, student, params).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-6)
    assert float(found["qkv"][1]) == 1.0


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_factors_mend_more_after_local_training(bits):
    errors, moments = problem()
    student = Student(ranks=RANKS, gate=GateConfig(form="static"), bits=bits)
    whole = Student(ranks=RANKS, gate=GateConfig(form="static"), int8=False)
    params = start(errors, moments, student.gate)
    told = []
    trained = train_locally(
        errors, moments, student, params, steps=200, progress=lambda done, total: told.append((done, total))
    )
    assert told[-1] == (200, 200)
    floor = exact_errors(errors, moments, whole, params)
    before, after = (exact_errors(errors, moments, student, p) for p in (params, trained))
    for name in SHAPES:
        assert np.all(after[name] <= before[name] * (1 + 1e-6))
        assert np.all(after[name] >= floor[name] * (1 - 1e-6)), "nothing of this rank is better than the whitened SVD"
    cost = [sum(float(np.sum(left[name] - floor[name])) for name in SHAPES) for left in (before, after)]
    assert cost[1] < 0.95 * cost[0]


def test_gates_stay_and_the_caller_keeps_what_it_gave():
    errors, moments = problem()
    student = Student(ranks=RANKS, gate=GateConfig(form="published", hidden=2))
    params = start(errors, moments, student.gate)
    before = jax.tree.map(np.asarray, params)
    trained = train_locally(errors, moments, student, params, steps=5)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    jax.tree.map(np.testing.assert_array_equal, trained["gates"], before["gates"])
    assert any(np.any(new != old) for new, old in zip(*map(jax.tree.leaves, (trained, before)), strict=True))


def test_no_steps_are_refused():
    errors, moments = problem()
    student = Student(ranks=RANKS, gate=GateConfig(form="static"))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        train_locally(errors, moments, student, start(errors, moments, student.gate), steps=0)
