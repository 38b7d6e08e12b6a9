"""One pass over the columns of a weight, each rounded against the errors of the others.

The passes of GPTQ and of coordinate descent differ only in the *feedback*, the share of the errors of other columns
that a column makes up for. With `e = w - s q` the error of a row:

- GPTQ lowers `e H e^T = ||e V||^2`, where `H = V V^T` and V is upper triangular. Column j of `e V` is
  `V_jj (e_j + sum_{i<j} e_i V_ij / V_jj)`, so each column makes up for those before it by `V_ij / V_jj`
  (Babai's nearest plane; the same numbers as the inverse-Hessian form of arXiv 2210.17323, without the inverse).
- Coordinate descent minimises `e H e^T` over one code and leaves the rest: `H_ij / H_jj`, from the columns on both
  sides (arXiv 2309.01885).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from calibrate.solvers.grid import CODE_MAX, CODE_MIN, HIGHEST

_BLOCK = 128


def damped(second_moment: Float[Array, "K K"], damping: float) -> Float[Array, "K K"]:
    """Add `damping` times the mean of the diagonal to the diagonal; one, where the moment is zero throughout."""
    mean = jnp.mean(jnp.diagonal(second_moment))
    floor = jnp.where(mean > 0, damping * mean, 1.0)
    return second_moment + floor * jnp.eye(second_moment.shape[0], dtype=second_moment.dtype)


def gptq_feedback(hessian: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """Return `V_ij / V_jj` above the diagonal and zero elsewhere, `H = V V^T` with V upper triangular.

    The factor is taken of H scaled to a unit diagonal, which float32 survives at far larger condition numbers. Where it
    still fails, the damping grows tenfold until it does not.
    """
    size = jnp.sqrt(jnp.diagonal(hessian))
    unit = hessian / (size[:, None] * size[None, :])

    def factor(extra: Float[Array, ""]) -> Float[Array, "K K"]:
        shifted = (unit + extra * jnp.eye(unit.shape[0], dtype=unit.dtype)) / (1 + extra)
        return jnp.linalg.cholesky(shifted[::-1, ::-1])[::-1, ::-1]

    def failed(state: tuple[Float[Array, ""], Float[Array, "K K"]]) -> Array:
        extra, upper = state
        return ~jnp.all(jnp.isfinite(upper)) & (extra < 1.0)

    def stronger(state: tuple[Float[Array, ""], Float[Array, "K K"]]) -> tuple[Float[Array, ""], Float[Array, "K K"]]:
        extra = jnp.maximum(10 * state[0], 1e-5)
        return extra, factor(extra)

    zero = jnp.zeros((), unit.dtype)
    _, upper = jax.lax.while_loop(failed, stronger, (zero, factor(zero)))
    feedback = upper * size[:, None] / (jnp.diagonal(upper) * size)[None, :]
    return jnp.triu(feedback, 1)


def descent_feedback(hessian: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """Return `H_ij / H_jj` off the diagonal."""
    feedback = hessian / jnp.diagonal(hessian)[None, :]
    return feedback - jnp.diag(jnp.diagonal(feedback))


def sweep(
    weight: Float[Array, "K N"],
    error: Float[Array, "K N"],
    feedback: Float[Array, "K K"],
    scale: Float[Array, "K N"],
    zero: Float[Array, "K N"] | None,
) -> tuple[Float[Array, "K N"], Float[Array, "K N"]]:
    """Round the columns in order; return the codes as float32 and the error `weight - scale * (codes - zero)`.

    Everything lies column by column, so that a step reads N contiguous values. `error` holds the errors of the columns
    not yet visited. Feedback from outside a block comes by one matrix product, inside it column by column.
    """
    columns, rows = weight.shape
    blocks = math.ceil(columns / _BLOCK)
    block = math.ceil(columns / blocks)
    short = blocks * block - columns
    pad = lambda x, fill=0.0: jnp.pad(x, ((0, short), (0, 0)), constant_values=fill)  # noqa: E731
    weight, error, scale = pad(weight), pad(error), pad(scale, 1.0)
    zero = jnp.zeros_like(weight) if zero is None else pad(zero)
    feedback = jnp.pad(feedback, ((0, short), (0, short)))

    def round_block(number: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        error, codes = state
        start = number * block
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, start, block)  # noqa: E731
        from_all = jax.lax.dynamic_slice_in_dim(feedback, start, block, axis=1)
        own, own_error, own_scale, own_zero = take(from_all).T, take(error), take(scale), take(zero)
        outside = jax.lax.dynamic_update_slice_in_dim(error, jnp.zeros_like(own_error), start, axis=0)
        own_weight = take(weight)
        target = own_weight + jnp.matmul(from_all.T, outside, precision=HIGHEST)

        def round_column(column: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            own_error, own_codes = state
            wanted = target[column] + jnp.matmul(own[column], own_error, precision=HIGHEST)
            code = jnp.clip(jnp.round(wanted / own_scale[column] + own_zero[column]), CODE_MIN, CODE_MAX)
            left = own_weight[column] - own_scale[column] * (code - own_zero[column])
            return own_error.at[column].set(left), own_codes.at[column].set(code)

        own_error, own_codes = jax.lax.fori_loop(0, block, round_column, (own_error, jnp.zeros((block, rows))))
        put = lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, start, axis=0)  # noqa: E731
        return put(error, own_error), put(codes, own_codes)

    with jax.named_scope("sweep"):
        error, codes = jax.lax.fori_loop(0, blocks, round_block, (error, jnp.zeros_like(weight)))
    return codes[:columns], error[:columns]
