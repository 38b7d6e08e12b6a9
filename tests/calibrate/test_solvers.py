"""The solvers lower `e R e^T` in the order they promise, and refuse what they cannot solve."""

import jax.numpy as jnp
import numpy as np
import pytest

from calibrate.solvers import (
    Grid,
    Rounded,
    gptq,
    gptq_search,
    learn_clip,
    min_max_grid,
    refine,
    round_to_grid,
    row_error,
    scale_channels,
    search_channel_scales,
    search_scales,
)
from spear_jax.quant import QuantSpec, round_to_nearest

SPECS = [QuantSpec(group_size=g, symmetric=s) for g in (-1, 32) for s in (True, False)]
spec_of = pytest.mark.parametrize(
    "spec", SPECS, ids=lambda s: f"group{s.group_size}-{'sym' if s.symmetric else 'asym'}"
)


def problem(rows: int = 24, inputs: int = 96, *, layers: tuple[int, ...] = (), seed: int = 0):
    """Draw weights with heavy tails and inputs whose spectrum falls off as a power law, some channels far larger."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(5, (*layers, rows, inputs)).astype(np.float32) * 0.02
    basis, _ = np.linalg.qr(rng.standard_normal((*layers, inputs, inputs)))
    spectrum = np.arange(1, inputs + 1) ** -1.0
    moment = (basis * spectrum) @ np.swapaxes(basis, -1, -2)
    size = np.exp(rng.standard_normal((*layers, inputs)))
    moment = moment * size[..., :, None] * size[..., None, :]
    return jnp.asarray(weight), jnp.asarray(moment, jnp.float32)


def loss(weight, moment, rounded):
    return np.asarray(row_error(weight - rounded.dequantize(), moment))


def nearest(weight, grid):
    return Rounded(codes=round_to_grid(weight, grid), grid=grid)


@spec_of
def test_min_max_grid_is_that_of_round_to_nearest(spec):
    weight, _ = problem(layers=(2,))
    ours, theirs = nearest(weight, min_max_grid(weight, spec)).to_tensor(), round_to_nearest(weight, spec)
    np.testing.assert_array_equal(ours.codes(), theirs.codes())
    np.testing.assert_array_equal(ours.dequantize(), theirs.dequantize())


@spec_of
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_of_uncorrelated_inputs_rounds_to_nearest(spec, act_order):
    weight, _ = problem(inputs=160)
    grid = min_max_grid(weight, spec)
    rounded = gptq(weight, jnp.eye(160), grid, act_order=act_order)
    np.testing.assert_array_equal(rounded.codes, round_to_grid(weight, grid))


def test_gptq_matches_the_inverse_hessian_form_in_float64():
    weight, moment = problem(rows=8, inputs=160)
    grid = min_max_grid(weight, QuantSpec())
    w, scale = np.array(weight, np.float64), np.asarray(grid.scale, np.float64)[:, 0]
    hessian = np.asarray(moment, np.float64)
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(160)
    order = np.argsort(-np.diag(hessian), kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(hessian[order][:, order])).T
    w = w[:, order]
    codes = np.zeros_like(w)
    for j in range(160):
        codes[:, j] = np.clip(np.round(w[:, j] / scale), -8, 7)
        left = (w[:, j] - scale * codes[:, j]) / upper[j, j]
        w[:, j:] -= left[:, None] * upper[j, j:]
    ours = np.asarray(gptq(weight, moment, grid, damping=0.01).codes)[:, order]
    assert np.mean(ours == codes) > 0.995


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[3]], ids=["rows", "groups"])
def test_each_solver_improves_on_the_one_before(spec):
    weight, moment = problem(layers=(2,))
    spec_grid = min_max_grid(weight, spec)
    clipped = search_scales(weight, moment, spec)
    rtn = loss(weight, moment, nearest(weight, spec_grid))
    clip = loss(weight, moment, nearest(weight, clipped))
    assert np.all(clip <= rtn * (1 + 1e-4))
    assert clip.sum() < 0.95 * rtn.sum()
    assert loss(weight, moment, gptq(weight, moment, spec_grid)).sum() < rtn.sum()

    start = gptq(weight, moment, clipped, damping=1e-4)
    searched = gptq_search(weight, moment, clipped, damping=1e-4)
    refined = refine(weight, moment, searched, sweeps=4, damping=1e-4)
    totals = [loss(weight, moment, r).sum() for r in (nearest(weight, clipped), start, searched, refined)]
    assert totals == sorted(totals, reverse=True), totals
    assert totals[-1] < 0.97 * totals[1]


@spec_of
def test_refine_never_raises_the_error_of_a_row(spec):
    weight, moment = problem()
    damped = moment + 0.01 * jnp.mean(jnp.diagonal(moment)) * jnp.eye(moment.shape[0])
    state = nearest(weight, min_max_grid(weight, spec))
    before = loss(weight, damped, state)
    for refit in (False, True):
        state = refine(weight, moment, state, sweeps=1, refit=refit, damping=0.01)
        after = loss(weight, damped, state)
        assert np.all(after <= before * (1 + 1e-4))
        before = after


def test_refit_scale_is_the_least_squares_one():
    weight, moment = problem(rows=4)
    state = refine(weight, moment, nearest(weight, min_max_grid(weight, QuantSpec())), sweeps=2, damping=1e-6)
    q, w, r = (np.asarray(x, np.float64) for x in (state.codes, weight, moment))
    expected = np.einsum("nk,kj,nj->n", w, r, q) / np.einsum("nk,kj,nj->n", q, r, q)
    np.testing.assert_allclose(state.grid.scale[:, 0], expected, rtol=1e-3)


@spec_of
def test_learned_clipping_is_never_worse_than_min_max(spec):
    weight, moment = problem()
    rtn = loss(weight, moment, nearest(weight, min_max_grid(weight, spec)))
    learned = loss(weight, moment, nearest(weight, learn_clip(weight, moment, spec, steps=60, learning_rate=0.05)))
    assert np.all(learned <= rtn * (1 + 1e-4))
    assert learned.sum() < 0.98 * rtn.sum()


@spec_of
def test_awq_spares_large_channels_and_keeps_the_module(spec):
    weight, moment = problem(layers=(2,))
    channel = search_channel_scales(weight, moment, spec)
    scaled, scaled_moment = scale_channels(weight, moment, channel)
    rtn = loss(weight, moment, nearest(weight, min_max_grid(weight, spec))).sum(-1)
    awq = loss(scaled, scaled_moment, nearest(scaled, min_max_grid(scaled, spec))).sum(-1)
    assert channel.shape == (2, 96)
    assert np.all(awq <= rtn * (1 + 1e-4))
    x = np.random.default_rng(1).standard_normal((2, 96, 3)).astype(np.float32)
    np.testing.assert_allclose(weight @ x, scaled @ (x / channel[..., None]), rtol=1e-3, atol=1e-5)


def test_stacked_layers_give_what_single_layers_give():
    weight, moment = problem(layers=(3,), rows=8)
    grid = search_scales(weight, moment, QuantSpec())
    both = refine(weight, moment, gptq(weight, moment, grid), sweeps=2)
    for i in range(3):
        one_grid = Grid(scale=grid.scale[i])
        one = refine(weight[i], moment[i], gptq(weight[i], moment[i], one_grid), sweeps=2)
        assert np.mean(np.asarray(one.codes) == np.asarray(both.codes[i])) > 0.99


def test_dead_inputs_and_zero_rows_stay_finite():
    weight, moment = problem()
    weight = weight.at[3].set(0.0)
    moment = moment.at[5].set(0.0).at[:, 5].set(0.0)
    for second in (moment, jnp.zeros_like(moment)):
        grid = search_scales(weight, second, QuantSpec())
        state = refine(weight, second, gptq_search(weight, second, grid), sweeps=2)
        assert np.all(np.isfinite(state.dequantize()))
        assert np.all(np.asarray(state.codes[3]) == 0)
        assert np.all(np.isfinite(search_channel_scales(weight, second, QuantSpec())))


def test_a_moment_of_low_rank_does_not_break_the_factor():
    weight, _ = problem(inputs=256)
    few = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32) * np.geomspace(1, 1e3, 256)
    moment = jnp.asarray(few.T @ few, jnp.float32)
    grid = min_max_grid(weight, QuantSpec())
    rounded = gptq(weight, moment, grid, damping=1e-9)
    assert loss(weight, moment, rounded).sum() < loss(weight, moment, nearest(weight, grid)).sum()


@pytest.mark.parametrize("broken", ["weight", "second_moment"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named(broken, value):
    weight, moment = problem()
    grid = min_max_grid(weight, QuantSpec())
    if broken == "weight":
        weight = weight.at[0, 0].set(value)
    else:
        moment = moment.at[0, 0].set(value)
    start = Rounded(codes=jnp.zeros(weight.shape, jnp.int8), grid=grid)
    for call in (
        lambda: gptq(weight, moment, grid),
        lambda: gptq_search(weight, moment, grid),
        lambda: refine(weight, moment, start),
        lambda: search_scales(weight, moment, QuantSpec()),
        lambda: learn_clip(weight, moment, QuantSpec()),
        lambda: search_channel_scales(weight, moment, QuantSpec()),
    ):
        with pytest.raises(ValueError, match=rf"^{broken} .* 1 values that are NaN or infinite"):
            call()


def test_shapes_and_options_that_make_no_sense_are_refused():
    weight, moment = problem()
    grid = min_max_grid(weight, QuantSpec())
    with pytest.raises(ValueError, match=r"needs \(96, 96\)"):
        gptq(weight, moment[:4, :4], grid)
    with pytest.raises(ValueError, match="scale has shape"):
        gptq(weight, moment, Grid(scale=grid.scale[:3]))
    with pytest.raises(ValueError, match=r"damping 0.0 must be positive"):
        gptq(weight, moment, grid, damping=0.0)
    with pytest.raises(ValueError, match="factors"):
        gptq_search(weight, moment, grid, factors=(0.0,))
    with pytest.raises(ValueError, match="64"):
        search_scales(weight, moment, QuantSpec(group_size=64))
    with pytest.raises(ValueError, match="steps 1"):
        search_scales(weight, moment, QuantSpec(), steps=1)
    with pytest.raises(ValueError, match="positive"):
        scale_channels(weight, moment, jnp.zeros(96))
