"""The integer grid a weight is rounded to, and the quadratic error that every solver lowers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int8, Num

from spear_jax.quant import QuantSpec, QuantTensor, round_to_nearest

CODE_MIN, CODE_MAX = -8, 7
HIGHEST = jax.lax.Precision.HIGHEST

# What one chunk of stacked layers may take on the device: a few copies of each weight and second moment.
_CHUNK_BYTES = 1 << 30


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Grid:
    """Scales and zero points of an int4 grid: the value of code `q` is `scale * (q - zero)`.

    `scale` is [*L, N, G] in the type it is stored in, never zero, and may be negative: a symmetric row whose longer
    tail is positive then has the code -8 for it. `zero` is int8 [*L, N, G] in [-8, 7], or None on a symmetric grid.
    """

    scale: Any
    zero: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A weight on its grid: `codes` int8 [*L, N, K] in [-8, 7] and the `grid` they count on."""

    codes: Any
    grid: Grid

    def dequantize(self) -> Float[Array, "*L N K"]:
        """Return the float32 weight that the codes stand for."""
        return dequantize(self.codes, self.grid)

    def to_tensor(self) -> QuantTensor:
        """Return the packed form that models and checkpoints hold."""
        return QuantTensor.from_codes(self.codes, self.grid.scale, self.grid.zero)


def min_max_grid(weight: Float[Array, "*L N K"], spec: QuantSpec) -> Grid:
    """Return the grid of round to nearest, which reaches the largest weight of each group.

    Raises:
        ValueError: the group size does not divide the inputs, or a weight is not finite.
    """
    check_finite(weight=weight)
    tensor = round_to_nearest(jnp.asarray(weight), spec)
    return Grid(scale=tensor.scale, zero=tensor.zero)


def expand(per_group: Num[Array, "*L N G"], inputs: int) -> Float[Array, "*L N K"]:
    """Repeat one value a group to one float32 value an input."""
    return jnp.repeat(per_group.astype(jnp.float32), inputs // per_group.shape[-1], axis=-1)


def dequantize(codes: Int8[Array, "*L N K"], grid: Grid) -> Float[Array, "*L N K"]:
    """Return `scale * (codes - zero)` in float32."""
    values = codes.astype(jnp.float32)
    if grid.zero is not None:
        values = values - expand(grid.zero, codes.shape[-1])
    return expand(grid.scale, codes.shape[-1]) * values


def round_to_grid(weight: Float[Array, "*L N K"], grid: Grid) -> Int8[Array, "*L N K"]:
    """Return the code nearest to each weight."""
    values = weight / expand(grid.scale, weight.shape[-1])
    if grid.zero is not None:
        values = values + expand(grid.zero, weight.shape[-1])
    return jnp.clip(jnp.round(values), CODE_MIN, CODE_MAX).astype(jnp.int8)


def row_error(error: Float[Array, "*L N K"], second_moment: Float[Array, "*L K K"]) -> Float[Array, "*L N"]:
    """Return `e R e^T` of each row: the mean squared error that the row adds to the module's output."""
    return jnp.sum(jnp.matmul(error, second_moment, precision=HIGHEST) * error, axis=-1)


def check_finite(**arrays: ArrayLike) -> None:
    """Refuse NaN and infinity, by the argument's name.

    Raises:
        ValueError: an array holds a value that is not finite.
    """
    for name, array in arrays.items():
        bad = int(jnp.sum(~jnp.isfinite(jnp.asarray(array))))
        if bad:
            raise ValueError(f"{name} of shape {np.shape(array)} holds {bad} values that are NaN or infinite")


def check_problem(weight: ArrayLike, second_moment: ArrayLike, *, grid: Grid | None = None) -> None:
    """Refuse a weight, a second moment and a grid that do not belong together.

    Raises:
        ValueError: the shapes disagree, or a value is not finite.
    """
    shape = np.shape(weight)
    moment = (*shape[:-2], shape[-1], shape[-1])
    if np.shape(second_moment) != moment:
        raise ValueError(f"second_moment has shape {np.shape(second_moment)}, but weight {shape} needs {moment}")
    check_finite(weight=weight, second_moment=second_moment)
    if grid is not None:
        groups = grid.scale.shape[-1]
        if grid.scale.shape[:-1] != shape[:-1] or shape[-1] % groups:
            raise ValueError(f"scale has shape {grid.scale.shape}, which does not fit weight {shape}")
        check_finite(scale=grid.scale)


def over_layers(solve: Callable[..., Any], *stacked: Any) -> Any:
    """Apply `solve` to one layer, or to every layer of a stack, as many at once as fit in 1 GiB.

    `stacked` are pytrees whose first leaf is [*L, N, K] and whose leaves all lead with `*L`.
    """
    first = jax.tree.leaves(stacked)[0]
    lead = first.shape[:-2]
    if not lead:
        return solve(*stacked)
    # Six float32 copies: weight, error, scale, pull, codes and a candidate are alive at once.
    layer_bytes = 4 * sum(leaf.size // max(1, int(np.prod(lead))) for leaf in jax.tree.leaves(stacked)) * 6
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(lead) :]), stacked)
    chunk = max(1, min(int(np.prod(lead)), _CHUNK_BYTES // layer_bytes))
    out = jax.lax.map(lambda layer: solve(*layer), flat, batch_size=chunk)
    return jax.tree.map(lambda leaf: leaf.reshape(*lead, *leaf.shape[1:]), out)
