"""End-to-end training of a student against the reference: AdamW on KL divergence and hidden states."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from calibrate.capture import Remat, all_hidden_states, choose_attend, hidden_states
from calibrate.loss import distillation_loss
from calibrate.nonfinite import broken_gradients, first_not_finite
from calibrate.student import Params, Student
from calibrate.weights import dense_weights
from pallas_kernels.dispatch import by_xla
from spear_jax.models.decoder import Decoder

type Initial = Literal["svd", "zero"]
"""Where compensators start: at the whitened SVD of the weight errors, or with its A and a B of zero."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How parameters are trained.

    Learning rates are peaks, as a fraction of each parameter's natural size (`Student.units`); `warmup` and `held_out`
    are shares of the steps and of the sequences. `ema` above zero averages parameters with that decay. `patience` is
    how many evaluations in a row may be no better before training stops; 0 never stops early. `initial` "zero" takes
    A and the size of B's steps from the factors that training is given, and B starts at zero: the student at its base.
    """

    steps: int = 400
    batch_size: int = 16
    initial: Initial = "svd"
    factor_rate: float = 1e-2
    gate_rate: float = 1e-2
    scale_rate: float = 2e-3
    norm_rate: float = 2e-3
    code_rate: float = 2e-3
    warmup: float = 0.05
    final_rate: float = 0.02
    clip: float = 1.0
    beta2: float = 0.98
    weight_decay: float = 0.0
    hidden_weight: float = 1.0
    temperature: float = 1.0
    ema: float = 0.0
    held_out: float = 0.03
    evaluate_every: int = 100
    patience: int = 0
    remat: Remat = "dots"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"training's {name} must be at least 1, got {getattr(self, name)}")
        if self.initial not in ("svd", "zero"):
            raise ValueError(f"training's initial must be svd or zero, got {self.initial!r}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")
        if self.patience < 0:
            raise ValueError(f"patience must be at least 0, got {self.patience}")

    def rates(self) -> dict[str, float]:
        """Give the peak learning rate of each group of parameters."""
        return {
            "factors": self.factor_rate,
            "gates": self.gate_rate,
            "scales": self.scale_rate,
            "ranges": self.scale_rate,
            "norms": self.norm_rate,
            "codes": self.code_rate,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Losses after `step` steps: mean training loss since the last point, and KL and hidden error on held-out text."""

    step: int
    loss: float
    held_out_kl: float
    held_out_hidden: float
    seconds: float

    def held_out(self, config: TrainConfig) -> float:
        """Give the loss on held-out text, which decides which parameters are best."""
        return self.held_out_kl + config.hidden_weight * self.held_out_hidden


class TrainingDiverged(ValueError):
    """Loss or gradients became NaN or infinite; `params` are the best ones before."""

    def __init__(self, message: str, params: Params) -> None:
        super().__init__(message)
        self.params = params


class TrainState(NamedTuple):
    """What a step changes; `broken` is the first step that was not finite, after which none changes anything, or -1."""

    step: Array
    params: Params
    average: Params
    optimizer: Any
    loss_sum: Array
    broken: Array


class Standing(NamedTuple):
    """Where training stands after an evaluation; `best` are the parameters of the lowest held-out loss so far.

    Steps that follow give the memory of `state` away: copy it before.
    """

    state: TrainState
    best: Params
    curve: tuple[CurvePoint, ...]


def rate_schedule(config: TrainConfig, peak: float) -> optax.Schedule:
    """Give the learning rate by step: linear warm-up to `peak`, then a cosine."""
    warmup = min(config.steps, max(1, round(config.warmup * config.steps)))
    return optax.warmup_cosine_decay_schedule(
        peak / warmup, peak, warmup, max(config.steps, warmup + 1), peak * config.final_rate
    )


def make_optimizer(config: TrainConfig, params: Params, units: Params) -> optax.GradientTransformation:
    """Build AdamW with a global-norm clip, warm-up and cosine, and a rate for each group of parameters."""

    def adam(peak: float) -> optax.GradientTransformation:
        parts = [optax.scale_by_adam(b1=0.9, b2=config.beta2, eps=1e-12)]
        if config.weight_decay:
            parts.append(optax.add_decayed_weights(config.weight_decay))
        return optax.chain(*parts, optax.scale_by_learning_rate(rate_schedule(config, peak)))

    labels = {group: jax.tree.map(lambda _, label=group: label, part) for group, part in params.items()}
    rates: dict[Hashable, optax.GradientTransformation] = {
        group: adam(peak) for group, peak in config.rates().items() if group in params
    }
    return optax.chain(
        _clip_by_group(config.clip),
        optax.transforms.partition(rates, labels),
        optax.stateless(lambda u, _: jax.tree.map(jnp.multiply, u, units)),
    )


def _clip_by_group(limit: float) -> optax.GradientTransformation:
    """Clip the gradient of each group to a multiple of its running norm, so that no scale need be known."""

    def init(params: Params) -> dict[str, Array]:
        return {group: jnp.zeros((), jnp.float32) for group in params}

    def update(updates: Params, state: dict[str, Array], params: Any = None) -> tuple[Params, dict[str, Array]]:
        del params
        clipped, norms = {}, {}
        for group, part in updates.items():
            norm = optax.tree.norm(part)
            running = jnp.where(state[group] > 0, state[group], norm)
            factor = jnp.minimum(1.0, 2 * limit * running / (norm + 1e-20))
            clipped[group] = jax.tree.map(lambda leaf, factor=factor: leaf * factor, part)
            norms[group] = 0.95 * running + 0.05 * norm * factor
        return clipped, norms

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def data_mesh() -> Mesh | None:
    """Give a mesh of all devices, of all processes, over the axis "batch", or None where there is one."""
    devices = jax.devices()
    if len(devices) == 1:
        return None
    return jax.make_mesh((len(devices),), ("batch",), devices=devices, axis_types=(AxisType.Auto,))


def _here(leaf: Array) -> Array:
    """Give this process's copy of what all processes have alike."""
    return leaf if leaf.is_fully_addressable else leaf.addressable_data(0)


class Trainer:
    """Trains the parameters of a student on given token sequences; holds the compiled step and the teacher's states.

    `dense` are what `Student.assemble` takes: the base's weights if none are given. `tokens` and `target`, the
    reference's final hidden states, stay on the device. Batches are sharded over all devices; where they are those of
    several processes (`jax.distributed`), each must be given the same and do the same.
    """

    def __init__(
        self,
        reference: Decoder,
        base: Decoder,
        student: Student,
        tokens: Int[np.ndarray, "S T"],
        config: TrainConfig,
        *,
        target: Float[Array, "S T D"] | None = None,
        dense: dict[str, Float[Array, "L N K"]] | None = None,
    ) -> None:
        count, length = tokens.shape
        held = max(1, round(config.held_out * count))
        if count - held < 1:
            raise ValueError(f"calibration text has {count} sequences: expected at least 2, one of them held out")
        self.config, self.student = config, student
        self.attend = choose_attend(base, length)
        self.train_count, self.held_count = count - held, held
        self.batch_size = min(config.batch_size, count - held)
        if target is None:
            target = all_hidden_states(reference, tokens, batch_size=self.batch_size, attend=self.attend)
        dense = dense_weights(base) if dense is None else dense
        mesh = data_mesh()
        self.mesh = None if mesh is None or self.batch_size % mesh.size else mesh
        self.frozen = self._everywhere((reference, base, dense, jnp.asarray(tokens), target))

    def _everywhere(self, tree: Any) -> Any:
        if self.mesh is None:
            return tree
        sharding = NamedSharding(self.mesh, PartitionSpec())
        if jax.process_count() == 1:
            return jax.device_put(tree, sharding)

        def put(leaf: Array) -> Array:
            copies = [jax.device_put(_here(leaf), device) for device in sharding.addressable_devices]
            return jax.make_array_from_single_device_arrays(leaf.shape, sharding, copies)

        return jax.tree.map(put, tree)

    def start(self, params: Params) -> TrainState:
        """Give the state before the first step."""
        # Steps give their input's memory away, which must not be the caller's.
        params = jax.tree.map(jnp.array, params)
        self.optimizer = make_optimizer(self.config, params, self.student.units(params))
        if self.config.initial == "zero":
            for factors in params.get("factors", {}).values():
                factors["bt"] = jnp.zeros_like(factors["bt"])
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            average=jax.tree.map(jnp.copy, params) if self.config.ema else {},
            optimizer=self.optimizer.init(params),
            loss_sum=jnp.zeros((), jnp.float32),
            broken=jnp.full((), -1, jnp.int32),
        )
        return self._everywhere(state)

    def _losses(self, frozen: Any, params: Params, index: Int[Array, " B"]) -> tuple[Array, tuple[Array, Array]]:
        reference, base, dense, tokens, target = frozen
        rows, wanted = tokens[index], target[index]
        if self.mesh is not None:
            split = NamedSharding(self.mesh, PartitionSpec("batch"))
            rows, wanted = jax.lax.with_sharding_constraint((rows, wanted), split)
        model = self.student.assemble(base, dense, params)
        with by_xla():
            hidden = hidden_states(model, rows, attend=self.attend, remat=self.config.remat)
            kl, relative = distillation_loss(reference, model, wanted, hidden, temperature=self.config.temperature)
        return kl + self.config.hidden_weight * relative, (kl, relative)

    @functools.cached_property
    def _step(self) -> Callable[..., TrainState]:
        def step(state: TrainState, frozen: Any, index: Array) -> TrainState:
            losses = functools.partial(self._losses, frozen)
            (loss, _), gradient = jax.value_and_grad(losses, has_aux=True)(state.params, index)
            finite = [jnp.all(jnp.isfinite(leaf)) for leaf in (loss, *jax.tree.leaves(gradient))]
            good = jnp.all(jnp.stack(finite)) & (state.broken < 0)
            # optax raises a float to its int32 step count, which strict promotion refuses.
            with jax.numpy_dtype_promotion("standard"):
                updates, optimizer = self.optimizer.update(gradient, state.optimizer, state.params)
            params: Any = optax.apply_updates(state.params, updates)
            average = state.average
            if self.config.ema:
                decay = jnp.minimum(self.config.ema, (1 + state.step) / (10 + state.step))
                average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, params)
            new = TrainState(
                step=state.step + 1,
                params=params,
                average=average,
                optimizer=optimizer,
                loss_sum=state.loss_sum + loss,
                broken=state.broken,
            )
            kept: TrainState = jax.tree.map(lambda old, new: jnp.where(good, new, old), state, new)
            first = jnp.where(good | (state.broken >= 0), state.broken, state.step)
            return kept._replace(step=new.step, broken=first)

        return jax.jit(step, donate_argnums=0)

    @functools.cached_property
    def _measure(self) -> Callable[..., tuple[Array, Array]]:
        return jax.jit(lambda frozen, params, index: self._losses(frozen, params, index)[1])

    def _held_out_rows(self) -> Iterator[np.ndarray]:
        size = min(self.batch_size, self.held_count)
        for start in range(self.train_count, self.train_count + self.held_count - size + 1, size):
            yield np.arange(start, start + size, dtype=np.int32)

    def held_out_losses(self, params: Params) -> tuple[float, float]:
        """Measure mean KL and relative hidden error on the held-out sequences."""
        losses = [
            self._measure(self.frozen, params, self._everywhere(jnp.asarray(rows))) for rows in self._held_out_rows()
        ]
        kl, hidden = np.mean(jax.device_get(losses), axis=0)
        return float(kl), float(hidden)

    def run(
        self,
        params: Params,
        *,
        resume: Standing | None = None,
        on_point: Callable[[Standing], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Standing:
        """Train from `params`, or go on from where an earlier run stood, to the last step or until patience is out.

        `on_point` is called after each evaluation, the place to save what is needed to go on.

        Raises:
            TrainingDiverged: A loss or gradient is not finite; says where, and carries the best parameters before.
        """
        config = self.config
        standing = Standing(state=self.start(params), best=params, curve=())
        if resume is None:
            standing = self._evaluated(standing, standing.state, seconds=0.0)
            if on_point:
                on_point(standing)
        else:
            standing = resume._replace(state=self._everywhere(resume.state))
        state, begin = standing.state, time.perf_counter() - standing.curve[-1].seconds
        for step in range(int(state.step), config.steps):
            if self.out_of_patience(standing.curve):
                break
            state = self._step(state, self.frozen, self._everywhere(jnp.asarray(self._rows(step))))
            done = step + 1
            if progress:
                progress(done, config.steps)
            if done % config.evaluate_every and done != config.steps:
                continue
            standing = self._evaluated(standing, state, seconds=time.perf_counter() - begin)
            state = standing.state
            if on_point:
                on_point(standing)
        return standing._replace(best=jax.tree.map(_here, standing.best))

    def out_of_patience(self, curve: Sequence[CurvePoint]) -> bool:
        """Say whether the last `patience` evaluations were all no better than one before."""
        losses = [point.held_out(self.config) for point in curve]
        return 0 < self.config.patience < len(losses) - losses.index(min(losses))

    def _evaluated(self, before: Standing, state: TrainState, *, seconds: float) -> Standing:
        """Measure a state on held-out text and compare it with the best before."""
        config, step, broken = self.config, int(state.step), int(state.broken)
        if broken >= 0:
            raise self._diverged(before, f"step {broken + 1}", state.params, [self._rows(broken)])
        # Copied: the next step gives the state's memory away.
        params = jax.tree.map(jnp.copy, state.average if config.ema else state.params)
        kl, hidden = self.held_out_losses(params)
        if not math.isfinite(kl + hidden):
            raise self._diverged(before, f"the evaluation after {step} steps", params, self._held_out_rows())
        since = before.curve[-1].step if before.curve else 0
        loss = float(state.loss_sum) / (step - since) if step else kl + config.hidden_weight * hidden
        point = CurvePoint(step=step, loss=loss, held_out_kl=kl, held_out_hidden=hidden, seconds=seconds)
        least = min((earlier.held_out(config) for earlier in before.curve), default=math.inf)
        return Standing(
            state=state._replace(loss_sum=jnp.zeros_like(state.loss_sum)),
            best=params if point.held_out(config) < least else before.best,
            curve=(*before.curve, point),
        )

    def _diverged(self, before: Standing, when: str, params: Params, batches: Iterable[np.ndarray]) -> TrainingDiverged:
        where = next(filter(None, (self._not_finite(params, jnp.asarray(rows)) for rows in batches)), "the loss")
        kept = f"the state of step {before.curve[-1].step} is kept; lower the learning rates" if before.curve else ""
        message = f"training stopped at {when}: NaN or infinite values in {where}"
        return TrainingDiverged("; ".join(filter(None, (message, kept))), before.best)

    def _not_finite(self, params: Params, index: Int[Array, " B"]) -> str | None:
        """Say what is not finite on some sequences: a module's output, or else a module's gradient."""
        _, base, dense, tokens, target = self.frozen
        if not bool(jnp.all(jnp.isfinite(target[index]))):
            return "the reference's last hidden states"
        model = self.student.assemble(base, dense, params)
        with by_xla():
            where = first_not_finite(model, tokens[index], attend=self.attend)
        if where is not None:
            return where
        gradient = jax.grad(lambda params: self._losses(self.frozen, params, index)[0])(params)
        return broken_gradients(gradient, self.student.ranks)

    def _rows(self, step: int) -> np.ndarray:
        """Give the sequences of a step: a new order each pass over the text, the same for the same seed."""
        per_pass = self.train_count // self.batch_size
        turn, part = divmod(step, per_pass)
        order = np.random.default_rng((self.config.seed, turn)).permutation(self.train_count)
        return order[part * self.batch_size : (part + 1) * self.batch_size].astype(np.int32)
