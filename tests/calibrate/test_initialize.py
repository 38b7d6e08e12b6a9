"""The whitened SVD is the optimum, for wide and tall errors, dense and by subspace, full and deficient moments."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from calibrate.initialize import whitened_svd


def problem(rows: int, inputs: int, *, seed: int = 0, samples: int | None = None) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples or 4 * inputs, inputs)) * np.geomspace(1, 30, inputs)
    x = x @ np.linalg.qr(rng.standard_normal((inputs, inputs)))[0]
    return (0.01 * rng.standard_normal((rows, inputs))).astype(np.float32), (x.T @ x / len(x)).astype(np.float32)


def remaining(error, moment, term) -> float:
    left = error.astype(np.float64) - term
    return float(np.sum(left @ moment.astype(np.float64) * left))


def exact_energies(error, moment) -> np.ndarray:
    values, vectors = np.linalg.eigh(moment.astype(np.float64))
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    return np.linalg.svd(error.astype(np.float64) @ root, compute_uv=False) ** 2


@pytest.mark.parametrize(("rows", "inputs"), [(20, 32), (32, 20), (24, 24)])
@pytest.mark.parametrize("samples", [None, 6])
def test_residual_is_the_tail_of_the_exact_spectrum(rows, inputs, samples):
    error, moment = problem(rows, inputs, samples=samples)
    exact = exact_energies(error, moment)
    found = whitened_svd(error, moment, rank=5)
    assert found.a.shape == (5, inputs)
    assert found.b.shape == (rows, 5)
    np.testing.assert_allclose(found.energies, exact, rtol=1e-3, atol=1e-4 * exact[0])
    np.testing.assert_allclose(found.total, exact.sum(), rtol=1e-4)
    term = np.asarray(found.b, np.float64) @ np.asarray(found.a, np.float64)
    assert remaining(error, moment, term) == pytest.approx(exact[5:].sum(), rel=1e-3, abs=1e-4 * exact.sum())
    np.testing.assert_allclose(found.residuals()[:6], exact.sum() - np.append(0, np.cumsum(exact[:5])), rtol=1e-3,
                               atol=1e-4 * exact.sum())  # fmt: skip


def test_white_inputs_give_the_plain_svd():
    error, _ = problem(20, 32)
    left, singular, right = np.linalg.svd(error)
    found = whitened_svd(error, np.eye(32, dtype=np.float32), rank=4)
    np.testing.assert_allclose(found.b @ found.a, (left[:, :4] * singular[:4]) @ right[:4], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.b, axis=0), np.linalg.norm(found.a, axis=1), rtol=1e-3)


def test_no_small_change_of_the_factors_does_better():
    error, moment = problem(20, 32)
    found = whitened_svd(error, moment, rank=3)
    a, b = np.asarray(found.a, np.float64), np.asarray(found.b, np.float64)
    best = remaining(error, moment, b @ a)
    rng = np.random.default_rng(1)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(50):
            changed_a = a + size * np.std(a) * rng.standard_normal(a.shape)
            changed_b = b + size * np.std(b) * rng.standard_normal(b.shape)
            assert remaining(error, moment, changed_b @ changed_a) >= best * (1 - 1e-6)


@pytest.mark.parametrize(("rows", "inputs"), [(96, 160), (160, 96)])
def test_the_subspace_agrees_with_the_dense_solution(rows, inputs):
    error, moment = problem(rows, inputs)
    dense, quick = (whitened_svd(error, moment, rank=4, dense=d) for d in (True, False))
    assert quick.energies.shape == (4,)
    np.testing.assert_allclose(quick.energies, dense.energies[:4], rtol=1e-3)
    left = [remaining(error, moment, np.asarray(f.b, np.float64) @ np.asarray(f.a)) for f in (dense, quick)]
    assert left[1] == pytest.approx(left[0], rel=1e-3)


def test_stacks_truncation_and_zero_errors():
    errors, moments = map(np.stack, zip(*(problem(20, 32, seed=s) for s in range(3)), strict=True))
    errors[1] = 0
    found = whitened_svd(errors, moments, rank=6)
    assert found.energies.shape == (3, 20)
    assert np.all(np.isfinite(found.a))
    assert not np.any(found.b[1])
    for i in (0, 2):
        alone = whitened_svd(errors[i], moments[i], rank=2)
        lower = found.truncate(2)
        np.testing.assert_allclose(lower.b[i] @ lower.a[i], alone.b @ alone.a, atol=1e-5)


def test_scale_of_the_moment_does_not_matter():
    error, moment = problem(20, 32)
    plain = whitened_svd(error, moment, rank=3)
    for factor in (1e-10, 1e8):
        scaled = whitened_svd(error, (moment * factor).astype(np.float32), rank=3)
        np.testing.assert_allclose(scaled.b @ scaled.a, plain.b @ plain.a, atol=1e-5)
        np.testing.assert_allclose(scaled.energies[:3], plain.energies[:3] * factor, rtol=1e-3)


def test_bad_input_is_named():
    error, moment = problem(20, 32)
    with pytest.raises(ValueError, match=r"rank 21 is not between 1 and 20"):
        whitened_svd(error, moment, rank=21)
    with pytest.raises(ValueError, match=r"^error of shape"):
        whitened_svd(jnp.asarray(error).at[0, 0].set(jnp.nan), moment, rank=2)
    with pytest.raises(ValueError, match=r"^second_moment of shape"):
        whitened_svd(error, jnp.asarray(moment).at[0, 0].set(jnp.inf), rank=2)
    with pytest.raises(ValueError, match="rank 9 is not between 1 and the 2"):
        whitened_svd(error, moment, rank=2).truncate(9)
