"""CKA against its formula and its invariances; entropy, coverage and scores."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibrate.diagnose import CkaMoments, coverage, damage_shares, diagnose, entropy, latency_scores, linear_cka


def features(rows: int = 200, width: int = 12, *, seed: int = 0, noise: float = 0.3) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, width)) @ rng.standard_normal((width, width)) + 5 * rng.standard_normal(width)
    return x.astype(np.float32), (x + noise * rng.standard_normal(x.shape)).astype(np.float32)


def by_gram(x: np.ndarray, y: np.ndarray) -> float:
    """CKA as HSIC of the two centred Gram matrices: rows x rows instead of columns x columns."""
    centre = np.eye(len(x)) - 1 / len(x)
    k, j = (centre @ (f.astype(np.float64) @ f.T.astype(np.float64)) @ centre for f in (x, y))
    return float(np.sum(k * j) / np.sqrt(np.sum(k * k) * np.sum(j * j)))


def test_linear_cka_is_the_normalised_hsic_of_gram_matrices():
    x, y = features()
    assert linear_cka(x, y[:, :7]) == pytest.approx(by_gram(x, y[:, :7]), rel=1e-9)


def test_linear_cka_ignores_rotation_scale_and_shift_but_not_linear_maps():
    x, y = features()
    rng = np.random.default_rng(1)
    rotation, _ = np.linalg.qr(rng.standard_normal((12, 12)))
    base = linear_cka(x, y)
    assert base < 0.999
    assert linear_cka(x, 3.7 * y @ rotation + 11) == pytest.approx(base, rel=1e-6)
    assert linear_cka(y, x) == pytest.approx(base, rel=1e-9)
    assert linear_cka(x, x) == pytest.approx(1.0, abs=1e-12)
    assert abs(linear_cka(x, y @ np.diag(np.geomspace(0.01, 10, 12))) - base) > 1e-3


@pytest.mark.parametrize("noise", [1e-3, 0.3])
def test_moments_of_batches_give_the_cka_of_all_rows(noise):
    x, y = features(noise=noise)
    moments = CkaMoments.zeros(12)
    for start, stop in ((0, 7), (7, 8), (8, 130), (130, 200)):
        moments = jax.jit(CkaMoments.add)(moments, x[start:stop], y[start:stop])
    # At noise 1e-3 the damage is about 1e-7: float32 moments of y alone would be lost in rounding.
    assert moments.damage() == pytest.approx(1 - linear_cka(x, y), rel=2e-2)
    assert moments.damage() > 0


def test_moments_take_token_batches_and_stack_under_vmap():
    x, y = features(rows=24)
    tokens = jnp.asarray(x).reshape(2, 12, 12)
    changed = jnp.stack([jnp.asarray(y).reshape(2, 12, 12), tokens])
    stacked = jax.vmap(lambda one: CkaMoments.zeros(12).add(tokens, one))(changed)
    damaged, same = (jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(2))
    assert damaged.damage() == pytest.approx(1 - linear_cka(x, y), rel=1e-3)
    assert same.damage() == 0.0


def test_entropy_and_coverage_read_the_spread_of_the_damage():
    assert entropy(np.full(8, 1 / 8)) == pytest.approx(np.log(8))
    assert coverage(np.full(8, 1 / 8)) == 8
    assert coverage(np.array([1.0, 0, 0])) == 1
    assert coverage(np.array([0.5, 0.5, 0, 0])) == 2
    assert coverage(np.array([0.9, 0.05, 0.05])) == 2
    for count in range(1, 400):
        assert coverage(np.full(count, 1 / count)) == count


def test_diagnosis_ranks_by_score_and_chooses_as_many_as_are_covered():
    result = diagnose(np.array([1e-4, 8e-3, 4e-3, 1e-5]))
    assert result.chosen.tolist() == [1, 2]
    assert result.coverage == 2
    np.testing.assert_allclose(result.shares.sum(), 1)
    slow = diagnose(np.array([1e-4, 8e-3, 4e-3, 1e-5]), np.array([1.0, 9.0, 1.0, 1.0]))
    assert slow.chosen.tolist() == [2, 1]
    np.testing.assert_allclose(latency_scores(result.shares, np.full(4, 3.0)), result.shares)
    np.testing.assert_allclose(damage_shares(np.zeros(4)), 0.25)


def test_bad_input_is_named():
    x, y = features()
    with pytest.raises(ValueError, match=r"^y of shape \(200, 12\)"):
        linear_cka(x, np.where(y > 3, np.nan, y))
    with pytest.raises(ValueError, match="same rows"):
        linear_cka(x, y[:50])
    with pytest.raises(ValueError, match="undefined"):
        linear_cka(x, np.ones_like(y))
    with pytest.raises(ValueError, match="at least 2 rows"):
        CkaMoments.zeros(12).add(x[:1], y[:1]).damage()
    with pytest.raises(ValueError, match="quantized hidden states hold NaN"):
        CkaMoments.zeros(12).add(x, np.where(y > 3, np.nan, y)).damage()
    with pytest.raises(ValueError, match="reference hidden states hold NaN"):
        CkaMoments.zeros(12).add(np.where(x > 3, np.inf, x), y).damage()
    with pytest.raises(ValueError, match="module 1 is nan"):
        diagnose(np.array([0.1, np.nan]))
    with pytest.raises(ValueError, match="latency of module 0 is 0"):
        latency_scores(np.array([0.5, 0.5]), np.array([0.0, 1.0]))
