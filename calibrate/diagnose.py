"""How much each quantized module harms the model's last hidden state, and what that says about where to mend it."""

import math
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_HIGHEST = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class CkaMoments:
    """Centred moments of token features `x` and of the change `d = y - x`, summed over any number of rows.

    Holding the change, not `y`, keeps a damage of 1e-6 exact to its last digits: errors in the moment of `x` cancel.
    A pytree of fixed shape, so it may be carried through `scan`, or stacked and updated under `vmap`.
    """

    count: Any
    mean_x: Any
    mean_d: Any
    xx: Any
    xd: Any
    dd: Any

    @classmethod
    def zeros(cls, width: int) -> Self:
        """Return the moments of no row at all."""
        vector, matrix = jnp.zeros((width,), jnp.float32), jnp.zeros((width, width), jnp.float32)
        count = jnp.zeros((), jnp.float32)
        return cls(count=count, mean_x=vector, mean_d=vector, xx=matrix, xd=matrix, dd=matrix)

    def add(self, x: Float[Array, "*T D"], y: Float[Array, "*T D"]) -> Self:
        """Return the moments with the rows of `x` (reference) and `y` added; pure, for use inside `jit`."""
        with jax.named_scope("cka_moments"):
            x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
            d = y.reshape(-1, y.shape[-1]).astype(jnp.float32) - x
            rows, total = x.shape[0], self.count + x.shape[0]
            mean_x, mean_d = jnp.mean(x, axis=0), jnp.mean(d, axis=0)
            x, d = x - mean_x, d - mean_d
            # Moments of two sets about their own means merge with one term of rank 1 (Chan, Golub and LeVeque).
            share = self.count * rows / total
            step_x, step_d = mean_x - self.mean_x, mean_d - self.mean_d

            def merge(old: Array, a: Array, b: Array, step_a: Array, step_b: Array) -> Array:
                return old + jnp.matmul(a.T, b, precision=_HIGHEST) + share * jnp.outer(step_a, step_b)

            return type(self)(
                count=total,
                mean_x=self.mean_x + step_x * (rows / total),
                mean_d=self.mean_d + step_d * (rows / total),
                xx=merge(self.xx, x, x, step_x, step_x),
                xd=merge(self.xd, x, d, step_x, step_d),
                dd=merge(self.dd, d, d, step_d, step_d),
            )

    def damage(self) -> float:
        """Return `1 - CKA(x, y)`, in [0, 1].

        Raises:
            ValueError: fewer than two rows, a feature set that does not vary, or values that are not finite.
        """
        if self.count < 2:
            raise ValueError(f"CKA needs at least 2 rows, got {int(self.count)}")
        xx, xd, dd = (np.asarray(m, np.float64) for m in (self.xx, self.xd, self.dd))
        for name, moment in (("reference hidden states", xx), ("quantized hidden states", dd + xd)):
            if not np.all(np.isfinite(moment)):
                raise ValueError(f"{name} hold NaN or infinity (their moments are not finite)")
        xy, yy = xx + xd, xx + xd + xd.T + dd
        return _damage(xy, xx, yy)


def _damage(xy: np.ndarray, xx: np.ndarray, yy: np.ndarray) -> float:
    sizes = np.linalg.norm(xx) * np.linalg.norm(yy)
    if sizes == 0:
        raise ValueError("CKA is undefined: a feature set has the same value in every row")
    # Rounding alone takes the ratio past 1, by 1e-16.
    return min(max(1.0 - float(np.sum(xy * xy) / sizes), 0.0), 1.0)


def linear_cka(x: Float[Array, "T D"], y: Float[Array, "T E"]) -> float:
    """Return `||Yc^T Xc||_F^2 / (||Xc^T Xc||_F ||Yc^T Yc||_F)` of two feature sets of the same rows (arXiv 1905.00414).

    Raises:
        ValueError: row counts that disagree, fewer than two rows, no variation, or values that are not finite.
    """
    features = []
    for name, value in (("x", x), ("y", y)):
        value = np.asarray(value, np.float64)
        if not np.all(np.isfinite(value)):
            raise ValueError(f"{name} of shape {value.shape} holds values that are NaN or infinite")
        features.append(value - value.mean(axis=0, keepdims=True))
    a, b = features
    if a.shape[0] != b.shape[0] or a.shape[0] < 2:
        raise ValueError(f"CKA needs the same rows, at least 2, in both: got {a.shape} and {b.shape}")
    return 1.0 - _damage(a.T @ b, a.T @ a, b.T @ b)


def damage_shares(damage: Float[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
    """Return `p = d / sum(d)`; equal shares where nothing is damaged.

    Raises:
        ValueError: no module, or a damage that is negative or not finite.
    """
    damage = np.asarray(damage, np.float64)
    if damage.size == 0:
        raise ValueError("no module to diagnose")
    bad = np.flatnonzero(~(np.isfinite(damage) & (damage >= 0)))
    if bad.size:
        raise ValueError(f"damage of module {bad[0]} is {damage.flat[bad[0]]}; expected a finite value of at least 0")
    total = damage.sum()
    return damage / total if total > 0 else np.full_like(damage, 1 / damage.size)


def entropy(shares: Float[np.ndarray, " M"]) -> float:
    """Return `-sum p ln p`, in nats."""
    shares = np.asarray(shares, np.float64)
    present = shares[shares > 0]
    return float(-np.sum(present * np.log(present)))


def coverage(shares: Float[np.ndarray, " M"]) -> int:
    """Return `ceil(exp(H(p)))`: as many modules as the damage is effectively spread over."""
    # Equal shares give exp(H) = M up to rounding, which must not become M + 1.
    return min(math.ceil(math.exp(entropy(shares)) - 1e-9), int(np.size(shares)))


def latency_scores(
    shares: Float[np.ndarray, " M"], latency: Float[np.ndarray, " M"] | None = None
) -> Float[np.ndarray, " M"]:
    """Return damage share over the relative latency that a compensator costs at each module; `latency` in any unit.

    Latency is divided by its mean, so that without differences in latency the score is the share.

    Raises:
        ValueError: lengths that disagree, or a latency that is not finite and positive.
    """
    shares = np.asarray(shares, np.float64)
    if latency is None:
        return shares
    latency = np.asarray(latency, np.float64)
    if latency.shape != shares.shape:
        raise ValueError(f"{latency.size} latencies for {shares.size} modules")
    bad = np.flatnonzero(~(np.isfinite(latency) & (latency > 0)))
    if bad.size:
        raise ValueError(f"latency of module {bad[0]} is {latency[bad[0]]}; expected a finite value above 0")
    return shares / (latency / latency.mean())


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What the damage of each module says: shares, their entropy (nats), and the modules to mend, worst first."""

    damage: Float[np.ndarray, " M"]
    shares: Float[np.ndarray, " M"]
    entropy: float
    coverage: int
    scores: Float[np.ndarray, " M"]
    chosen: Int[np.ndarray, " C"]


def diagnose(damage: Float[np.ndarray, " M"], latency: Float[np.ndarray, " M"] | None = None) -> Diagnosis:
    """Rank modules by latency-aware score and choose as many as the entropy of the damage covers.

    Raises:
        ValueError: as `damage_shares` and `latency_scores`.
    """
    shares = damage_shares(damage)
    scores = latency_scores(shares, latency)
    count = coverage(shares)
    return Diagnosis(
        damage=np.asarray(damage, np.float64),
        shares=shares,
        entropy=entropy(shares),
        coverage=count,
        scores=scores,
        chosen=np.argsort(-scores, kind="stable")[:count],
    )
