"""Local training: compensators, rounded as they are stored, against the errors of their own modules."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from calibrate.capture import Moments
from calibrate.solvers.grid import HIGHEST
from calibrate.student import Params, Student
from calibrate.train import TrainConfig, make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalProblem:
    """The error of one module in all layers, as far as compensators can see it.

    `moment` [L, K, K] is `R = E[x x^T]` of the inputs, `error_moment` [L, N, K] is `E R`, `total` [L] is `E||E x||^2`.
    """

    moment: Any
    error_moment: Any
    total: Any

    @classmethod
    def of(cls, error: Float[Array, "L N K"], moment: Float[Array, "L K K"]) -> "LocalProblem":
        """Prepare a module's problem."""
        error_moment = jnp.matmul(error, moment, precision=HIGHEST)
        return cls(moment=moment, error_moment=error_moment, total=jnp.sum(error_moment * error, axis=(1, 2)))

    def remaining(self, a: Float[Array, "L R K"], bt: Float[Array, "L R N"]) -> Float[Array, " L"]:
        """Give `E||(E - b a) x||^2` as a share of `E||E x||^2`, from products no larger than `a R`."""
        with jax.default_matmul_precision("highest"):
            mended = jnp.sum(jnp.einsum("lrn,lnk->lrk", bt, self.error_moment) * a, axis=(1, 2))
            power = jnp.einsum("lrj,lsj->lrs", jnp.einsum("lrk,lkj->lrj", a, self.moment), a)
            added = jnp.sum(power * jnp.einsum("lrn,lsn->lrs", bt, bt), axis=(1, 2))
        return 1 + (added - 2 * mended) / jnp.maximum(self.total, 1e-30)


def local_errors(problems: dict[str, LocalProblem], student: Student, params: Params) -> dict[str, Float[Array, " L"]]:
    """Give the share of each module's output error that compensators leave, rounded as stored and gates at one."""
    left = {}
    for name, bank in student.banks({"factors": params["factors"]}).items():
        layer, place = _places(bank.ranks)
        shape = len(bank.ranks), max(bank.ranks)
        a, bt = (jnp.zeros((*shape, f.shape[-1])).at[layer, place].set(f[...]) for f in (bank.a, bank.bt))
        left[name] = problems[name].remaining(a, bt)
    return left


def _places(ranks: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Give the layer of each row of a bank's factors, and which of the layer's rows it is."""
    layer = np.repeat(np.arange(len(ranks)), ranks)
    return layer, np.arange(len(layer)) - np.repeat(np.cumsum(ranks) - ranks, ranks)


def train_locally(
    errors: dict[str, Float[Array, "L N K"]],
    moments: Moments,
    student: Student,
    params: Params,
    *,
    steps: int,
    rate: float = 3e-4,
    progress: Callable[[int, int], None] | None = None,
) -> Params:
    """Lower `E||(E - b a) x||^2` of all modules at once, over factors that are rounded as they are stored.

    The whitened SVD is the optimum over real numbers, not over rounded ones. No text is run: errors and second moments
    say all there is to say while gates are at one. Each layer of a module ends with the best factors it has had.
    `rate` is a fraction of each row's size; small, as many entries that cross to the next code at once undo each other.

    Raises:
        ValueError: `steps` is below 1.
    """
    problems = {name: jax.jit(LocalProblem.of)(errors[name], moments[name]) for name in params["factors"]}
    start = {"factors": jax.tree.map(jnp.array, params["factors"])}
    optimizer = make_optimizer(TrainConfig(steps=steps, factor_rate=rate), start, student.units(start))
    layer_of = {name: _places(student.ranks[name])[0] for name in problems}

    def loss(trained: Params, problems: dict[str, LocalProblem]) -> tuple[Array, dict[str, Array]]:
        left = local_errors(problems, student, trained)
        return sum(map(jnp.sum, left.values()), jnp.zeros(())), left

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, problems: dict[str, LocalProblem]) -> Any:
        trained, best, least, optimizer_state = state
        gradient, left = jax.grad(loss, has_aux=True)(trained, problems)
        better = {name: (left[name] < least[name])[layer_of[name], None] for name in problems}
        best = jax.tree.map(
            lambda rows, old, new: {side: jnp.where(rows, new[side], old[side]) for side in old},
            better, best, trained["factors"],
        )  # fmt: skip
        # optax raises a float to its int32 step count, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer_state = optimizer.update(gradient, optimizer_state, trained)
        return optax.apply_updates(trained, updates), best, jax.tree.map(jnp.minimum, least, left), optimizer_state

    least = {name: jnp.full(len(student.ranks[name]), jnp.inf) for name in problems}
    state = start, jax.tree.map(jnp.copy, start["factors"]), least, optimizer.init(start)
    for done in range(steps + 1):  # One more than there are, to compare what the last has given.
        state = step(state, problems)
        if progress:
            progress(min(done + 1, steps), steps)
    return params | {"factors": state[1]}
