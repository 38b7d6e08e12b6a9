"""Scales that minimise the error of a module's output: by search, and by gradient as OmniQuant learns them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from calibrate.solvers.grid import (
    CODE_MAX,
    CODE_MIN,
    HIGHEST,
    Grid,
    check_problem,
    dequantize,
    expand,
    over_layers,
    round_to_grid,
    row_error,
)
from spear_jax.quant import QuantSpec

_TINY = 1e-12
"""Smallest scale, as in round to nearest: an all-zero group gets this one."""
_GOLDEN = (5**0.5 - 1) / 2


def _range(groups: Float[Array, "... S"], spec: QuantSpec) -> tuple[Array, Array]:
    low, high = jnp.minimum(jnp.min(groups, axis=-1), 0.0), jnp.maximum(jnp.max(groups, axis=-1), 0.0)
    return (-jnp.maximum(-low, high), jnp.maximum(-low, high)) if spec.symmetric else (low, high)


def _grid_between(low: Array, high: Array, spec: QuantSpec) -> Grid:
    """Return the grid whose codes span [low, high]; at the min and max of a group that of round to nearest."""
    span = high / CODE_MAX if spec.symmetric else (high - low) / (CODE_MAX - CODE_MIN)
    scale = jnp.maximum(span, _TINY).astype(spec.scale_dtype)
    if spec.symmetric:
        return Grid(scale=scale)
    zero = jnp.clip(CODE_MIN - jnp.round(low / scale.astype(jnp.float32)), CODE_MIN, CODE_MAX)
    return Grid(scale=scale, zero=zero.astype(jnp.int8))


def search_scales(
    weight: Float[Array, "*L N K"],
    second_moment: Float[Array, "*L K K"],
    spec: QuantSpec,
    *,
    steps: int = 24,
    smallest: float = 0.3,
    golden_steps: int = 4,
    sweeps: int = 2,
) -> Grid:
    """Return, for each group of each row, the shrunken min-max range that minimises `e R e^T` under plain rounding.

    `steps` ratios from 1 to `smallest`, then `golden_steps` golden sections about the best of them. Groups of a row
    are searched one after the other against the errors of the rest, `sweeps` times over; one group a row needs one.
    Never worse than min-max, row by row.

    Raises:
        ValueError: shapes that disagree, values that are not finite, or a search without a step.
    """
    check_problem(weight, second_moment)
    if steps < 2 or not 0 < smallest < 1:
        raise ValueError(f"steps {steps} must be at least 2, and smallest {smallest} between 0 and 1")
    sweeps = sweeps if spec.groups(weight.shape[-1]) > 1 else 1
    return _search_scales(
        weight, second_moment, spec=spec, steps=steps, smallest=smallest, golden_steps=golden_steps, sweeps=sweeps
    )


@functools.partial(jax.jit, static_argnames=("spec", "steps", "smallest", "golden_steps", "sweeps"))
def _search_scales(
    weight: Any, second_moment: Any, *, spec: QuantSpec, steps: int, smallest: float, golden_steps: int, sweeps: int
) -> Grid:
    ratios = jnp.linspace(1.0, smallest, steps)
    stride = (1.0 - smallest) / (steps - 1)

    def solve(weight: Array, second_moment: Array) -> Grid:
        rows, inputs = weight.shape
        groups = spec.groups(inputs)
        size = inputs // groups
        low, high = _range(weight.reshape(rows, groups, size), spec)

        def search(group: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            error, ratio = state
            take = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, group * size, size, axis=axis)  # noqa: E731
            own_weight, own_error, to_own = take(weight, 1), take(error, 1), take(second_moment, 1)
            own_moment = take(to_own, 0)
            pull = jnp.matmul(error, to_own, precision=HIGHEST) - jnp.matmul(own_error, own_moment, precision=HIGHEST)

            def left(ratio: Float[Array, " N"]) -> Float[Array, "N S"]:
                grid = _grid_between(low[:, group, None] * ratio[:, None], high[:, group, None] * ratio[:, None], spec)
                return own_weight - dequantize(round_to_grid(own_weight, grid), grid)

            def loss(ratio: Float[Array, " N"]) -> Float[Array, " N"]:
                new = left(ratio)
                return row_error(new, own_moment) + 2 * jnp.sum(new * pull, axis=1)

            best = _search_rows(loss, ratio[:, group], ratios, stride, golden_steps)
            error = jax.lax.dynamic_update_slice_in_dim(error, left(best), group * size, axis=1)
            return error, ratio.at[:, group].set(best)

        def turn(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            return jax.lax.fori_loop(0, groups, search, state)

        start = _grid_between(low, high, spec)
        error = weight - dequantize(round_to_grid(weight, start), start)
        _, ratio = jax.lax.fori_loop(0, sweeps, turn, (error, jnp.ones_like(low)))
        return _grid_between(low * ratio, high * ratio, spec)

    with jax.named_scope("search_scales"):
        return over_layers(solve, weight.astype(jnp.float32), second_moment)


def _search_rows(
    loss: Callable[[Array], Array], start: Float[Array, " N"], ratios: Array, stride: float, golden_steps: int
) -> Float[Array, " N"]:
    """Return the ratio of least `loss` for each row: `start`, the grid, then golden section about the best.

    The loss is rough at the scale of one code, so the golden section is a local refinement: the best value seen wins.
    """
    rows = start.shape[0]

    def keep(best: tuple[Array, Array], ratio: Array) -> tuple[Array, Array]:
        value = loss(ratio)
        better = value < best[0]
        return jnp.where(better, value, best[0]), jnp.where(better, ratio, best[1])

    best = jax.lax.fori_loop(
        0, ratios.shape[0], lambda i, best: keep(best, jnp.full((rows,), ratios[i])), (loss(start), start)
    )
    left, right = jnp.maximum(best[1] - stride, stride / 4), jnp.minimum(best[1] + stride, 1.0)

    def section(_: Array, state: tuple[tuple[Array, Array], Array, Array]) -> tuple[tuple[Array, Array], Array, Array]:
        best, left, right = state
        inner, outer = right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
        at_inner, at_outer = loss(inner), loss(outer)
        for value, ratio in ((at_inner, inner), (at_outer, outer)):
            better = value < best[0]
            best = jnp.where(better, value, best[0]), jnp.where(better, ratio, best[1])
        lower = at_inner < at_outer
        return best, jnp.where(lower, left, inner), jnp.where(lower, outer, right)

    return jax.lax.fori_loop(0, golden_steps, section, (best, left, right))[0][1]


def learn_clip(
    weight: Float[Array, "*L N K"],
    second_moment: Float[Array, "*L K K"],
    spec: QuantSpec,
    *,
    steps: int = 200,
    learning_rate: float = 0.01,
) -> Grid:
    """Return the range of each group learned by gradient, as OmniQuant's learnable weight clipping does.

    The ends of a group's range are `sigmoid(gamma) max` and `sigmoid(beta) min` (arXiv 2308.13137, eq. 2), both logits
    starting at 4; on a symmetric grid gamma serves both ends. Rounding passes gradients straight through. Adam lowers
    `e R e^T` relative to that of min-max, and each row keeps its best step; never worse than min-max, row by row.

    Raises:
        ValueError: shapes that disagree, values that are not finite, no step, or a learning rate that is not positive.
    """
    check_problem(weight, second_moment)
    if steps < 1 or not learning_rate > 0:
        raise ValueError(f"steps {steps} must be at least 1, and learning_rate {learning_rate} positive")
    spec.groups(weight.shape[-1])
    return _learn_clip(weight, second_moment, spec=spec, steps=steps, learning_rate=learning_rate)


@functools.partial(jax.jit, static_argnames=("spec", "steps", "learning_rate"))
def _learn_clip(weight: Any, second_moment: Any, *, spec: QuantSpec, steps: int, learning_rate: float) -> Grid:
    optimizer = optax.adam(learning_rate)

    def solve(weight: Array, second_moment: Array) -> Grid:
        rows, inputs = weight.shape
        low, high = _range(weight.reshape(rows, spec.groups(inputs), -1), spec)
        reference = _plain_error(weight, second_moment, _grid_between(low, high, spec))

        def ends(logits: tuple[Array, Array]) -> tuple[Array, Array]:
            above = high * jax.nn.sigmoid(logits[1])
            return (-above if spec.symmetric else low * jax.nn.sigmoid(logits[0])), above

        def straight_through(logits: tuple[Array, Array]) -> tuple[Array, Array]:
            below, above = ends(logits)
            span = above / CODE_MAX if spec.symmetric else (above - below) / (CODE_MAX - CODE_MIN)
            scale = expand(jnp.maximum(span, _TINY), inputs)
            zero = jnp.zeros_like(scale)
            if not spec.symmetric:
                exact = CODE_MIN - expand(below, inputs) / scale
                zero = jnp.clip(_round_through(exact), CODE_MIN, CODE_MAX)
            codes = jnp.clip(_round_through(weight / scale + zero), CODE_MIN, CODE_MAX)
            rows_error = row_error(weight - scale * (codes - zero), second_moment)
            return jnp.sum(rows_error / jnp.maximum(reference, _TINY)), rows_error

        def step(_: Array, state: Any) -> Any:
            logits, moments, best_error, best = state
            (_, error), slope = jax.value_and_grad(straight_through, has_aux=True)(logits)
            better = error < best_error
            best = jax.tree.map(lambda new, old: jnp.where(better[:, None], new, old), ends(logits), best)
            # optax raises a float to its int32 step count, which strict promotion refuses.
            with jax.numpy_dtype_promotion("standard"):
                updates, moments = optimizer.update(slope, moments)
            logits = jax.tree.map(jnp.add, logits, updates)
            return logits, moments, jnp.minimum(error, best_error), best

        logits = (jnp.full_like(low, 4.0), jnp.full_like(high, 4.0))
        state = logits, optimizer.init(logits), reference, (low, high)
        below, above = jax.lax.fori_loop(0, steps, step, state)[3]
        learned = _grid_between(below, above, spec)
        # The gradient does not see scales rounded to their stored type, so the rows are compared once more.
        better = _plain_error(weight, second_moment, learned) <= reference
        return jax.tree.map(
            lambda new, old: jnp.where(better[:, None], new, old), learned, _grid_between(low, high, spec)
        )

    with jax.named_scope("learn_clip"):
        return over_layers(solve, weight.astype(jnp.float32), second_moment)


def _round_through(values: Array) -> Array:
    return values + jax.lax.stop_gradient(jnp.round(values) - values)


def _plain_error(weight: Float[Array, "N K"], second_moment: Float[Array, "K K"], grid: Grid) -> Float[Array, " N"]:
    return row_error(weight - dequantize(round_to_grid(weight, grid), grid), second_moment)
