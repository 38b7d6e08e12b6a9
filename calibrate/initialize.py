"""The best static compensator of a quantization error, and what each further rank would add."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from calibrate.solvers.grid import HIGHEST, check_finite, check_problem, over_layers

# Beyond this side an eigendecomposition takes minutes on a CPU, and a subspace of the wanted rank seconds.
_DENSE_SIDE = 2048
_EXTRA, _ITERATIONS = 32, 12


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Factors of the term `b a` that best mends an error, and the spectrum they come from.

    `a` is [*L, R, K] and `b` [*L, N, R]. `energies` [*L, S] are the squared singular values of `E R^1/2`, in falling
    order: rank r + 1 lowers `E||(E - b a) x||^2` by `energies[r]`, down from `total` [*L] at rank 0. S is min(N, K), or
    R where only the leading ones were computed.
    """

    a: Any
    b: Any
    energies: Any
    total: Any

    def residuals(self) -> Float[Array, "*L S+1"]:
        """Return the output error that is left at rank 0, 1, ... S; never below zero."""
        left = self.total[..., None] - jnp.cumsum(self.energies, axis=-1)
        return jnp.concatenate([self.total[..., None], jnp.maximum(left, 0.0)], axis=-1)

    def truncate(self, rank: int) -> "LowRank":
        """Return the best factors of a lower rank: the leading ones."""
        if not 1 <= rank <= self.a.shape[-2]:
            raise ValueError(f"rank {rank} is not between 1 and the {self.a.shape[-2]} at hand")
        return LowRank(a=self.a[..., :rank, :], b=self.b[..., :rank], energies=self.energies, total=self.total)


def whitened_svd(
    error: Float[Array, "*L N K"], second_moment: Float[Array, "*L K K"], *, rank: int, dense: bool | None = None
) -> LowRank:
    """Return the factors of `rank` that minimise `E||(E - b a) x||^2` over inputs of moment `R = E[x x^T]`.

    `b a = U U^T E`, with U the leading eigenvectors of `E R E^T`: the optimum of QERA-exact (arXiv 2410.06040) and EoRA
    without an inverse of R, so a moment of deficient rank does no harm. The smaller of N and K decides the size of the
    eigenproblem; from 2,048 on (or `dense=False`) only the leading subspace is found, by iteration. Singular values are
    shared evenly between the factors. Directions that carry no error give zero rows.

    Raises:
        ValueError: shapes that disagree, values that are not finite, or a rank outside 1 .. min(N, K).
    """
    check_finite(error=error)
    check_problem(error, second_moment)
    side = min(error.shape[-2:])
    if not 1 <= rank <= side:
        raise ValueError(f"rank {rank} is not between 1 and {side}, the smaller side of {error.shape}")
    if dense is None:
        dense = side <= _DENSE_SIDE or rank + _EXTRA >= side
    return _compiled(jax.default_backend())(error, second_moment, rank=rank, dense=dense)


@functools.cache
def _compiled(backend: str) -> Callable[..., LowRank]:
    # Tuning each of the many float32 products on a GPU takes a minute, to save less than a second of their time.
    options = {"xla_gpu_autotune_level": 0} if backend == "gpu" else None
    return jax.jit(_whitened_svd, static_argnames=("rank", "dense"), compiler_options=options)


def _whitened_svd(error: Any, second_moment: Any, *, rank: int, dense: bool) -> LowRank:
    def solve(error: Array, second_moment: Array) -> LowRank:
        # Errors are of order 1e-2 and moments of any order: float32 squares neither without loss unless scaled.
        size = jnp.max(jnp.abs(error))
        size = jnp.where(size > 0, size, 1.0)
        power = jnp.max(jnp.diagonal(second_moment))
        power = jnp.where(power > 0, power, 1.0)
        unit, moment = error / size, second_moment / power
        moment = (moment + moment.T) / 2
        through = jnp.matmul(unit, moment, precision=HIGHEST)
        total = jnp.sum(through * unit)
        wide = unit.shape[0] <= unit.shape[1]
        if wide:
            gram = jnp.matmul(through, unit.T, precision=HIGHEST)
            energies, left = _leading((gram + gram.T) / 2, rank, dense=dense)
        else:
            # E R E^T and R^1/2 E^T E R^1/2 share their eigenvalues; the second is the smaller.
            root = _square_root(moment)
            half = jnp.matmul(unit, root, precision=HIGHEST)
            gram = jnp.matmul(half.T, half, precision=HIGHEST)
            energies, right = _leading((gram + gram.T) / 2, rank, dense=dense)
            left, _ = jnp.linalg.qr(jnp.matmul(half, right, precision=HIGHEST))
        energies = jnp.maximum(energies, 0.0)
        singular = jnp.sqrt(energies[:rank])
        floor = 1e-6 * jnp.sqrt(jnp.maximum(total, 1e-30))
        share = jnp.where(singular > floor, jnp.sqrt(jnp.maximum(singular, floor)), 0.0)
        b = left * share
        a = jnp.where(share > 0, 1 / jnp.where(share > 0, share, 1.0), 0.0)[:, None] * jnp.matmul(
            left.T, unit, precision=HIGHEST
        )
        # E = size * unit: each factor takes half, and R its power in the energies.
        scale = jnp.sqrt(size)
        return LowRank(a=a * scale, b=b * scale, energies=energies * size**2 * power, total=total * size**2 * power)

    with jax.named_scope("whitened_svd"):
        return over_layers(solve, error.astype(jnp.float32), second_moment.astype(jnp.float32))


def _square_root(moment: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """Return a symmetric root of a positive semi-definite matrix; eigenvalues below zero count as zero."""
    values, vectors = jnp.linalg.eigh(moment)
    return jnp.matmul(vectors * jnp.sqrt(jnp.maximum(values, 0.0)), vectors.T, precision=HIGHEST)


def _leading(gram: Float[Array, "S S"], rank: int, *, dense: bool) -> tuple[Array, Float[Array, "S R"]]:
    """Return eigenvalues in falling order (all if `dense`, else `rank` of them) and the first `rank` eigenvectors."""
    if dense:
        values, vectors = jnp.linalg.eigh(gram)
        return values[::-1], vectors[:, ::-1][:, :rank]
    # A fixed key: the start decides nothing but the last digits.
    start = jax.random.normal(jax.random.key(0), (gram.shape[0], rank + _EXTRA), gram.dtype)

    def iterate(_: Array, basis: Array) -> Array:
        return jnp.linalg.qr(jnp.matmul(gram, basis, precision=HIGHEST))[0]

    basis = jax.lax.fori_loop(0, _ITERATIONS, iterate, jnp.linalg.qr(start)[0])
    small = jnp.matmul(basis.T, jnp.matmul(gram, basis, precision=HIGHEST), precision=HIGHEST)
    values, vectors = jnp.linalg.eigh((small + small.T) / 2)
    return values[::-1][:rank], jnp.matmul(basis, vectors[:, ::-1][:, :rank], precision=HIGHEST)
