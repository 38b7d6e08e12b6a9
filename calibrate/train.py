"""End-to-end training of a student against the reference: AdamW on KL divergence and hidden states."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from calibrate.capture import Remat, all_hidden_states, choose_attend, hidden_states
from calibrate.student import Params, Student
from spear_jax.models.decoder import MODULES, Decoder
from spear_jax.quant.rows import Int8Rows

_LOGITS_BYTES = 2**29
"""Float32 logits of each model held at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How parameters are trained.

    Learning rates are peaks, as a fraction of each parameter's natural size (`Student.units`); `warmup` and `held_out`
    are shares of the steps and of the sequences. `ema` above zero averages parameters with that decay. `patience` is
    how many evaluations in a row may be no better before training stops; 0 never stops early.
    """

    steps: int = 400
    batch_size: int = 16
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
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")

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


class TrainingDiverged(ValueError):
    """Loss or gradients became NaN or infinite; `params` are the last good ones."""

    def __init__(self, message: str, params: Params) -> None:
        super().__init__(message)
        self.params = params


class TrainState(NamedTuple):
    """What a step changes; `bad` counts, for each leaf of the gradients, steps that were skipped as not finite."""

    step: Array
    params: Params
    average: Params
    optimizer: Any
    loss_sum: Array
    bad: Params


def distillation_loss(
    reference: Decoder,
    student: Decoder,
    target: Float[Array, "B T D"],
    hidden: Float[Array, "B T D"],
    *,
    temperature: float = 1.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Give mean KL(reference || student) in nats a token, and the relative squared error of the last hidden states."""
    tables = tuple(model.embed if model.head is None else model.head for model in (reference, student))
    wanted_table, table = (_dense_table(table, hidden.dtype) for table in tables)
    total: Any = _summed_kl(wanted_table, table, target, hidden, temperature)
    wanted, got = target.astype(jnp.float32), hidden.astype(jnp.float32)
    relative = jnp.sum(jnp.square(got - wanted), axis=-1) / (jnp.sum(jnp.square(wanted), axis=-1) + 1e-6)
    return total / math.prod(target.shape[:2]), jnp.mean(relative)


def _dense_table(table: Any, dtype: Any) -> Float[Array, "V D"]:
    return table.dequantize(dtype) if isinstance(table, Int8Rows) else table[...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summed_kl(wanted_table: Array, table: Array, target: Array, hidden: Array, temperature: float) -> Array:
    """Sum KL over tokens, differentiable in `hidden` only.

    Logits are computed a piece of the sequence at a time and never again: the gradient, known as soon as they are, is
    what the backward pass keeps of them.
    """
    return _summed_kl_forward(wanted_table, table, target, hidden, temperature)[0]


def _summed_kl_forward(
    wanted_table: Array, table: Array, target: Array, hidden: Array, temperature: float
) -> tuple[Array, Array]:
    batch, length, width = hidden.shape
    pieces = min(length, max(1, math.ceil(4 * batch * length * table.shape[0] / _LOGITS_BYTES)))
    while length % pieces:
        pieces += 1

    def logits(table: Array, states: Array) -> Array:
        return jnp.einsum("btd,vd->btv", states, table, preferred_element_type=jnp.float32) / temperature

    def piece(total: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        wanted, got = logits(wanted_table, pair[0]), logits(table, pair[1])
        wanted_log, got_log = jax.nn.log_softmax(wanted), jax.nn.log_softmax(got)
        share = jnp.exp(wanted_log)
        slope = ((jnp.exp(got_log) - share) / temperature).astype(table.dtype)
        return total + jnp.sum(share * (wanted_log - got_log)), jnp.einsum("btv,vd->btd", slope, table)

    def split(states: Array) -> Array:
        return jnp.moveaxis(states.reshape(batch, pieces, length // pieces, width), 1, 0)

    with jax.named_scope("kl"):
        total, slopes = jax.lax.scan(piece, jnp.zeros((), jnp.float32), (split(target), split(hidden)))
    return total, jnp.moveaxis(slopes, 0, 1).reshape(hidden.shape)


def _summed_kl_backward(temperature: float, slopes: Array, cotangent: Array) -> tuple[None, None, None, Array]:
    del temperature
    return None, None, None, (slopes.astype(jnp.float32) * cotangent).astype(slopes.dtype)


_summed_kl.defvjp(_summed_kl_forward, _summed_kl_backward)


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
    """Give a mesh of all local devices over the axis "batch", or None where there is one."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return None
    return jax.make_mesh((len(devices),), ("batch",), devices=devices, axis_types=(AxisType.Auto,))


class Trainer:
    """Trains the parameters of a student on given token sequences; holds the compiled step and the teacher's states.

    `dense` are what `Student.assemble` takes: the base's weights if none are given. `tokens` and `target`, the
    reference's final hidden states, stay on the device. Batches are sharded over all local devices.
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
        self.config, self.student, self.length = config, student, length
        self.reference, self.base = reference, base
        self.attend = choose_attend(base, length)
        self.batch_size = min(config.batch_size, count - held)
        if target is None:
            target = all_hidden_states(reference, tokens, batch_size=self.batch_size, attend=self.attend)
        self.train_count, self.held_count = count - held, held
        self.tokens, self.target = jnp.asarray(tokens), target
        self.dense = dense_weights(base) if dense is None else dense
        self.mesh = data_mesh()
        if self.mesh is not None and self.batch_size % self.mesh.size:
            self.mesh = None
        if self.mesh is not None:
            everywhere = NamedSharding(self.mesh, PartitionSpec())
            self.reference, self.base, self.dense, self.tokens, self.target = jax.device_put(
                (self.reference, self.base, self.dense, self.tokens, self.target), everywhere
            )

    def start(self, params: Params) -> TrainState:
        """Give the state before the first step."""
        # Steps give their input's memory away, which must not be the caller's.
        params = jax.tree.map(jnp.array, params)
        self.units = self.student.units(params)
        self.optimizer = make_optimizer(self.config, params, self.units)
        zero = jnp.zeros((), jnp.float32)
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            average=jax.tree.map(jnp.copy, params) if self.config.ema else {},
            optimizer=self.optimizer.init(params),
            loss_sum=zero,
            bad=jax.tree.map(lambda _: jnp.zeros((), jnp.int32), params),
        )
        return state if self.mesh is None else jax.device_put(state, NamedSharding(self.mesh, PartitionSpec()))

    def _losses(self, frozen: Any, params: Params, index: Int[Array, " B"]) -> tuple[Array, tuple[Array, Array]]:
        reference, base, dense, tokens, target = frozen
        rows, wanted = tokens[index], target[index]
        if self.mesh is not None:
            split = NamedSharding(self.mesh, PartitionSpec("batch"))
            rows, wanted = jax.lax.with_sharding_constraint((rows, wanted), split)
        model = self.student.assemble(base, dense, params)
        hidden = hidden_states(model, rows, attend=self.attend, remat=self.config.remat)
        kl, relative = distillation_loss(reference, model, wanted, hidden, temperature=self.config.temperature)
        return kl + self.config.hidden_weight * relative, (kl, relative)

    @functools.cached_property
    def _step(self) -> Callable[..., TrainState]:
        def step(state: TrainState, frozen: Any, index: Array) -> TrainState:
            losses = functools.partial(self._losses, frozen)
            (loss, _), gradient = jax.value_and_grad(losses, has_aux=True)(state.params, index)
            broken = jax.tree.map(lambda leaf: ~jnp.all(jnp.isfinite(leaf)), gradient)
            good = jnp.isfinite(loss) & ~jnp.any(jnp.stack(jax.tree.leaves(broken)))
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
                bad=state.bad,
            )
            kept: TrainState = jax.tree.map(lambda old, new: jnp.where(good, new, old), state, new)
            bad = jax.tree.map(
                lambda count, is_broken: count + (is_broken | ~good).astype(count.dtype), state.bad, broken
            )
            return kept._replace(step=new.step, bad=bad)

        return jax.jit(step, donate_argnums=0)

    @functools.cached_property
    def _measure(self) -> Callable[..., tuple[Array, Array]]:
        return jax.jit(lambda frozen, params, index: self._losses(frozen, params, index)[1])

    @property
    def frozen(self) -> tuple[Any, ...]:
        """Arrays that steps read and never change."""
        return self.reference, self.base, self.dense, self.tokens, self.target

    def held_out_losses(self, params: Params) -> tuple[float, float]:
        """Measure mean KL and relative hidden error on the held-out sequences."""
        size = min(self.batch_size, self.held_count)
        starts = range(self.train_count, self.train_count + self.held_count - size + 1, size)
        losses = [self._measure(self.frozen, params, start + jnp.arange(size)) for start in starts]
        kl, hidden = np.mean(jax.device_get(losses), axis=0)
        return float(kl), float(hidden)

    def run(
        self,
        params: Params,
        *,
        state: TrainState | None = None,
        on_point: Callable[[CurvePoint, TrainState], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Params, list[CurvePoint]]:
        """Train from `params`, or go on from `state`; give the best parameters by held-out loss, and the curve.

        `on_point` is called after each evaluation, the place to write a checkpoint.

        Raises:
            TrainingDiverged: A loss or gradient is not finite; names the parameters, carries the last good ones.
        """
        config = self.config
        fresh = self.start(params)
        state = fresh if state is None else state
        begin, first = time.perf_counter(), int(state.step)
        curve: list[CurvePoint] = []
        best, best_loss, worse = self._result(state), math.inf, 0
        if first == 0:
            kl, hidden = self.held_out_losses(best)
            best_loss = kl + config.hidden_weight * hidden
            curve.append(CurvePoint(step=0, loss=best_loss, held_out_kl=kl, held_out_hidden=hidden, seconds=0.0))
            if on_point:
                on_point(curve[-1], state)
        since = first
        for step in range(first, config.steps):
            state = self._step(state, self.frozen, jnp.asarray(self._rows(step)))
            done = step + 1
            if progress:
                progress(done, config.steps)
            if done % config.evaluate_every and done != config.steps:
                continue
            self._check(state)
            result = self._result(state)
            kl, hidden = self.held_out_losses(result)
            loss = float(state.loss_sum) / (done - since)
            seconds = time.perf_counter() - begin
            curve.append(CurvePoint(step=done, loss=loss, held_out_kl=kl, held_out_hidden=hidden, seconds=seconds))
            state, since = state._replace(loss_sum=jnp.zeros((), jnp.float32)), done
            held = kl + config.hidden_weight * hidden
            if held < best_loss:
                best, best_loss, worse = result, held, 0
            else:
                worse += 1
            if on_point:
                on_point(curve[-1], state)
            if config.patience and worse >= config.patience:
                break
        return best, curve

    def _result(self, state: TrainState) -> Params:
        """Copy the parameters to keep: the step gives its input's memory away."""
        return jax.tree.map(jnp.copy, state.average if self.config.ema else state.params)

    def _rows(self, step: int) -> np.ndarray:
        """Give the sequences of a step: a new order each pass over the text, the same for the same seed."""
        per_pass = self.train_count // self.batch_size
        turn, part = divmod(step, per_pass)
        order = np.random.default_rng((self.config.seed, turn)).permutation(self.train_count)
        return order[part * self.batch_size : (part + 1) * self.batch_size].astype(np.int32)

    def _check(self, state: TrainState) -> None:
        bad: dict[str, Bool] = {
            jax.tree_util.keystr(path, simple=True, separator="."): int(count)
            for path, count in jax.tree_util.tree_leaves_with_path(jax.device_get(state.bad))
            if count
        }
        if bad:
            names = ", ".join(list(bad)[:4])
            raise TrainingDiverged(
                f"training stopped at step {int(state.step)}: loss or gradients are NaN or infinite ({names}); "
                "the last good parameters are kept; lower the learning rates",
                self._result(state),
            )


@functools.partial(jax.jit, static_argnames=("dtype",))
def _dequantize(tensor: Any, *, dtype: Any) -> Array:
    return tensor.dequantize(dtype)


def dense_weights(base: Decoder) -> dict[str, Float[Array, "L N K"]]:
    """Give the four stacks of int4 weights in the model's type."""
    return {name: _dequantize(getattr(base.layers, name).weight, dtype=jnp.dtype(base.dtype)) for name in MODULES}
