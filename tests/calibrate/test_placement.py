"""Ranks under a byte budget: never over it, and best where the best can be counted out."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from calibrate.placement import Candidate, place_by_gain, place_randomly, place_uniformly

falling = st.lists(st.floats(0.0, 100.0, allow_nan=False), min_size=1, max_size=4).map(
    lambda g: sorted(g, reverse=True)
)


def candidates(gains, rank_bytes=None, setup_bytes=None) -> list[Candidate]:
    return [
        Candidate(name=f"m{i}", gains=g, rank_bytes=(rank_bytes or [10] * len(gains))[i],
                  setup_bytes=(setup_bytes or [0] * len(gains))[i])
        for i, g in enumerate(gains)
    ]  # fmt: skip


def best_gain(modules: list[Candidate], budget: int) -> float:
    options = itertools.product(*(range(m.max_rank + 1) for m in modules))
    affordable = (
        sum(sum(m.gains[:r]) for m, r in zip(modules, ranks, strict=True))
        for ranks in options
        if sum(m.cost(r) for m, r in zip(modules, ranks, strict=True)) <= budget
    )
    return max(affordable)


@settings(max_examples=100, deadline=None)
@given(st.lists(falling, min_size=1, max_size=4), st.integers(10, 130))
def test_greedy_is_optimal_where_ranks_cost_the_same(gains, budget):
    modules = candidates(gains)
    placed = place_by_gain(modules, budget)
    assert placed.nbytes <= budget
    assert placed.gain == pytest.approx(best_gain(modules, budget), abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(falling, st.integers(1, 30), st.integers(0, 20)), min_size=1, max_size=4), st.integers(50, 200)
)
@example([([1.0, 5e-324], 2, 0)], 50)
def test_greedy_with_unequal_prices_loses_at_most_one_piece(modules, budget):
    built = candidates(*map(list, zip(*modules, strict=True)))
    placed = place_by_gain(built, budget)
    assert placed.nbytes <= budget
    assert placed.nbytes == sum(m.cost(r) for m, r in zip(built, placed.ranks, strict=True))
    assert placed.gain >= best_gain(built, budget) - max(sum(m.gains) for m in built) - 1e-9
    left = budget - placed.nbytes
    for module, rank in zip(built, placed.ranks, strict=True):
        gains_more = any(gain > 0 for gain in module.gains[rank:])
        assert not gains_more or module.cost(rank + 1) - module.cost(rank) > left


def test_set_up_bytes_are_paid_once_and_weighed():
    modules = candidates([[5.0] * 4, [6.0, 0.0, 0.0, 0.0]], [10, 10], [0, 30])
    assert place_by_gain(modules, 40).ranks == (4, 0)
    assert place_by_gain(modules, 80).ranks == (4, 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(falling, st.integers(1, 30)), min_size=1, max_size=6), st.integers(30, 300), st.integers(0, 9)
)
def test_uniform_and_random_placements_keep_the_budget(modules, budget, seed):
    built = candidates(*map(list, zip(*modules, strict=True)))
    for placed in (place_uniformly(built, budget), place_randomly(built, budget, seed=seed)):
        assert 0 < placed.nbytes <= budget
        assert all(0 <= r <= m.max_rank for m, r in zip(built, placed.ranks, strict=True))
    spent = place_randomly(built, budget, seed=seed)
    assert spent == place_randomly(built, budget, seed=seed)


def test_uniform_ranks_differ_by_at_most_one_and_spread_evenly():
    modules = candidates([[1.0] * 9] * 10)
    placed = place_uniformly(modules, 250)
    assert placed.nbytes == 250
    assert sorted(placed.ranks) == [2] * 5 + [3] * 5
    extra = np.flatnonzero(np.array(placed.ranks) == 3)
    assert np.max(np.diff(extra)) <= 3


def test_modules_without_gain_get_no_rank():
    assert place_by_gain(candidates([[0.0] * 4, [2.0, 1.0, 0.0, 0.0]]), 1000).ranks == (0, 2)


def test_max_rank_caps_every_placement():
    modules = candidates([[9.0] * 8, [1.0] * 8])
    assert place_by_gain(modules, 1000, max_rank=3).ranks == (3, 3)
    assert place_uniformly(modules, 1000, max_rank=3).ranks == (3, 3)
    assert place_randomly(modules, 1000, seed=0, max_rank=3).ranks == (3, 3)


def test_bad_input_is_named_with_its_numbers():
    modules = candidates([[1.0], [1.0]], [50, 40], [5, 7])
    for place in (place_by_gain, place_uniformly, lambda c, b: place_randomly(c, b, seed=0)):
        with pytest.raises(ValueError, match=r"budget of 46 bytes .* m1, takes 47 bytes"):
            place(modules, 46)
    with pytest.raises(ValueError, match="no module"):
        place_by_gain([], 100)
    with pytest.raises(ValueError, match="max_rank 0"):
        place_by_gain(modules, 100, max_rank=0)
    for wrong in (np.nan, np.inf, -1.0):
        with pytest.raises(ValueError, match=r"^m: gains must be finite"):
            Candidate(name="m", gains=[1.0, wrong], rank_bytes=1)
    with pytest.raises(ValueError, match="got 0 and 0"):
        Candidate(name="m", gains=[1.0], rank_bytes=0)
