"""The stages of a calibration, from a model's name to a checkpoint and a report; each is found again after a kill."""

import dataclasses
import datetime
import functools
import importlib.metadata
import math
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from calibrate.capture import Moments, all_hidden_states, choose_attend, second_moments
from calibrate.config import CalibrateConfig
from calibrate.damage import choose_ranks, module_damage
from calibrate.data import cut_texts, read_texts, sample_tokens
from calibrate.diagnose import diagnose
from calibrate.measure import decile_errors, matmul_speed, token_errors
from calibrate.plan import make_plan
from calibrate.progress import Report, Stages
from calibrate.quantizers import float_weight, move_channel_scales, quantize_base, weight_errors
from calibrate.report import write_report
from calibrate.results import (
    Arm,
    ArmKind,
    ByteBudget,
    BytesEntry,
    CalibrationResult,
    CurvePoint,
    Gap,
    StageTime,
    TaskScore,
)
from calibrate.student import GateConfig, Params, Student, initial_compensators, zero_byte_params
from calibrate.train import CurvePoint as TrainedPoint
from calibrate.train import TrainConfig, Trainer, TrainState, dense_weights, rate_schedule
from calibrate.workdir import Key, WorkDirectory
from spear_jax import models
from spear_jax.checkpoint import component_bytes, inspect_checkpoint, named_arrays, save_checkpoint
from spear_jax.evaluate import WIKITEXT
from spear_jax.evaluation import load_examples, perplexity, run_task
from spear_jax.evaluation.comparison import Overhead
from spear_jax.evaluation.tasks import find_task, load_hub_rows
from spear_jax.loading import CHECKPOINT, find_checkpoint
from spear_jax.models.decoder import MODULES, Decoder
from spear_jax.models.quantize import cast_model, expand_model, quantize_model
from spear_jax.models.source import resolve
from spear_jax.nn.linear import Linear
from spear_jax.quant import QuantTensor

STATIC = "static-checkpoint"
"""Folder of the static twin of a gated checkpoint."""

_DECILE_TOKENS = 65_536
"""Tokens that errors by decile are measured on, on an accelerator; a CPU takes 2,048."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a calibration wrote, and its result."""

    result: CalibrationResult
    checkpoint: Path
    report: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A model to measure: what it is, the model as stored, and the key of the stage that made it."""

    kind: ArmKind
    label: str
    model: Decoder
    key: Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """The end of a stage of training."""

    params: Params
    curve: tuple[TrainedPoint, ...]
    key: Key


def calibrate(config: CalibrateConfig, *, stages: Stages, command: Sequence[str] = ()) -> Outcome:
    """Run all stages and write `checkpoint/`, `report.html` and `report.json` to the output directory.

    Stages that an earlier run with the same settings finished are read from `work/` there, and training goes on from
    the last state saved.

    Raises:
        ValueError: An input cannot be used, or training diverged; nothing that was saved is lost.
        OSError: A file cannot be read, or the disk is full.
    """
    config.check()
    return _Run(config, stages, command).outcome()


class _Run:
    """One calibration; what stages share is made on demand, so that a finished stage need not make it."""

    def __init__(self, config: CalibrateConfig, stages: Stages, command: Sequence[str]) -> None:
        self.config, self.stages, self.command = config, stages, command
        self.notes: list[str] = []
        if find_checkpoint(config.model) is not None:
            raise ValueError(f"{config.model} is a checkpoint of a quantized model: name the model it was made from")
        source = resolve(config.model)
        self.output = config.output or Path("calibrated") / Path(source.name).name
        self.work = WorkDirectory(self.output / "work")
        self.on_cpu = jax.default_backend() == "cpu"
        dtype = ("float32" if self.on_cpu else "bfloat16") if config.dtype == "auto" else config.dtype
        self.dtype = jnp.dtype(dtype)
        self.keys = self._keys(source.path)
        self._refuse_foreign_output()
        for name in config.tasks:
            find_task(name)
        self.examples = {
            name: load_examples(name, tasks_dir=config.tasks_dir, limit=config.task_limit) for name in config.tasks
        }
        self.user_texts = [text for name in config.text for text in read_texts(name)]
        eval_texts = self._read_eval_texts()
        with stages.stage("load"):
            self.loaded = models.load(config.model, dtype="float32")
            self.exact = self.loaded.model
            check_weights(self.exact, source=config.model)
            self.reference = cast_model(self.exact, self.dtype)
        limit = self.exact.config.max_position
        for name in ("length", "eval_window"):
            if getattr(config, name) > limit:
                raise ValueError(f"{name} {getattr(config, name)}: the model has {limit} positions")
        self.eval_tokens = {name: self._encode(text) for name, text in eval_texts.items()}
        for name, tokens in self.eval_tokens.items():
            if len(tokens) < config.eval_window:
                raise ValueError(f"{name}: {len(tokens)} tokens, fewer than one window of {config.eval_window}")
        self.attend = choose_attend(self.reference, config.length)

    def _keys(self, path: Path) -> dict[str, Key]:
        """Give the key of each stage: its settings, and those of the stages that it builds on."""
        c = self.config
        files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), path / "config.json"])
        stamps = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.exists()]
        texts = [[name, *_stamp(Path(name))] for name in c.text]
        keys = {"load": Key.first(files=stamps, dtype=self.dtype.name)}
        keys["text"] = keys["load"].then(
            texts=texts, sequences=c.sequences, length=c.length, bos_share=c.bos_share, seed=c.seed
        )
        keys["rtn"] = keys["load"].then(group_size=c.group_size, asymmetric=c.asymmetric)
        keys["quantize"] = keys["text"].then(
            quantizer=c.quantizer,
            group_size=c.group_size,
            asymmetric=c.asymmetric,
            moment_sequences=c.moment_sequences,
        )
        keys["zero-byte"] = keys["quantize"]
        if c.zero_byte:
            keys["zero-byte"] = keys["quantize"].then(groups=c.zero_byte, train=_relevant(c.zero_config, c.zero_byte))
        keys["damage"] = keys["zero-byte"].then(sequences=c.damage_sequences)
        placement = {"placement": c.placement, "flatten": c.flatten, "max_rank": c.max_rank, "budget": c.budget}
        gate = dataclasses.asdict(c.gate_config)
        groups = ("factors", *(() if c.gate == "static" else ("gates",)), *c.joint)
        train = _relevant(c.train_config, groups)
        keys["initial"] = keys["damage"].then(gate=gate, joint=c.joint, seed=c.seed, **placement)
        keys["train"] = keys["initial"].then(train=train)
        static = dataclasses.asdict(GateConfig(form="static"))
        keys["static initial"] = keys["damage"].then(gate=static, joint=c.joint, seed=c.seed, **placement)
        keys["static"] = keys["static initial"].then(train=_relevant(c.train_config, ("factors", *c.joint)))
        return keys

    @property
    def final_key(self) -> Key:
        """The key of what the checkpoint holds."""
        return self.keys["train" if self.config.budget else "zero-byte"]

    def _refuse_foreign_output(self) -> None:
        place = self.output / CHECKPOINT
        if self.config.overwrite or not place.exists():
            return
        try:
            found = inspect_checkpoint(place)[0].details.get("key")
        except ValueError:
            found = None
        if found != self.final_key.digest:
            raise FileExistsError(
                f"{place} was made with other settings: give another --output, or --overwrite to replace it"
            )

    def _read_eval_texts(self) -> dict[str, str]:
        texts = {}
        for path in self.config.eval_text:
            try:
                texts[path.name] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not UTF-8 text: {error}") from None
            if not texts[path.name].strip():
                raise ValueError(f"{path}: the text is empty")
        if self.config.eval_text or self.config.tasks:
            return texts
        try:
            rows = load_hub_rows(*WIKITEXT, instead="--eval-text FILE")
            return {"WikiText-2 test": "\n\n".join(rows["text"])}
        except ValueError as error:
            self._note(f"{error}; perplexity is measured on held-out calibration text only")
            return {}

    def _note(self, text: str) -> None:
        self.notes.append(text[0].upper() + text[1:] + ("" if text.endswith(".") else "."))
        self.stages.say(f"note: {text}")

    def _encode(self, text: str) -> np.ndarray:
        return np.asarray(self.loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)

    def show_plan(self) -> None:
        """Print what is about to happen."""
        config, speed = self.config, matmul_speed(self.dtype)
        most = math.inf if config.eval_windows is None else config.eval_windows * config.eval_window
        tokens = sum(min(most, len(tokens)) for tokens in self.eval_tokens.values())
        plan = make_plan(config, self.exact.config, eval_tokens=int(tokens), speed=speed)
        device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        self.stages.say(f"{self.loaded.name} on {device} ({speed / 1e12:.2f} Tflop/s in {self.dtype.name})")
        for line in plan.lines():
            self.stages.say(line)
        self.stages.say(f"results go to {self.output}/; an interrupted run goes on from {self.work.path}/")

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """Calibration sequences."""
        saved = self.work.load("text", self.keys["text"])
        if saved is not None:
            self.stages.resumed("text", saved.values["seconds"])
            return saved.arrays["tokens"]
        config, key = self.config, jax.random.key(self.config.seed)
        with self.stages.stage("text") as report:
            if config.text:
                tokens = cut_texts(
                    self.user_texts,
                    lambda text: self._encode(text).tolist(),
                    count=config.sequences,
                    length=config.length,
                    key=key,
                )
                if len(tokens) < config.sequences:
                    self._note(f"the calibration text gives {len(tokens)} sequences, not {config.sequences}")
            else:
                tokens = sample_tokens(
                    self.reference,
                    count=config.sequences,
                    length=config.length,
                    key=key,
                    bos_share=config.bos_share,
                    progress=report,
                )
        self.work.save("text", self.keys["text"], {"tokens": tokens}, seconds=self.stages.seconds["text"])
        return tokens

    @functools.cached_property
    def moments(self) -> Moments:
        """Second moments of the inputs of every linear; too large to keep, and quick to make."""
        tokens = self.tokens[: self.config.moment_sequences]
        with self.stages.stage("moments"):
            size = min(self.config.batch_size, len(tokens))
            return jax.block_until_ready(second_moments(self.reference, tokens, batch_size=size, attend=self.attend))

    @functools.cached_property
    def target(self) -> Array:
        """The reference's last hidden states of all calibration sequences."""
        tokens = self.tokens
        with self.stages.stage("reference states"):
            return jax.block_until_ready(
                all_hidden_states(self.reference, tokens, batch_size=self.config.batch_size, attend=self.attend)
            )

    @functools.cached_property
    def rounded_from(self) -> tuple[Decoder, Moments]:
        """The float model that the base was rounded from, and its moments: with AWQ, behind channel scales."""
        if self.config.quantizer != "awq":
            return self.exact, self.moments
        with self.stages.stage("channel scales"):
            return move_channel_scales(self.exact, self.moments, self.config.spec)

    @functools.cached_property
    def quantized(self) -> Decoder:
        """The int4 base as the quantizer gives it, with embedding and head as they are stored."""
        saved = self.work.load("quantize", self.keys["quantize"])
        stored = as_stored(self.reference)
        if saved is not None:
            self.stages.resumed("quantize", saved.values["seconds"])
            base = stored
            if self.config.quantizer == "awq":
                base = stored.replace(layers=jax.tree.map(lambda leaf: leaf, stored.layers))
                for name in ("input_norm", "mlp_norm"):
                    getattr(base.layers, name).weight = nnx.Param(jnp.asarray(saved.arrays[f"{name}"]))
            weights = {name: QuantTensor(**_weight_arrays(saved.arrays, name)) for name in MODULES}
            return with_weights(base, weights)
        moments = None if self.config.quantizer == "rtn" else self.moments
        with self.stages.stage("quantize") as report:
            base = quantize_base(
                self.exact,
                quantizer=self.config.quantizer,
                spec=self.config.spec,
                moments=moments or {},
                progress=report,
            )
            if self.config.quantizer == "awq":
                self.__dict__["rounded_from"] = base.exact, base.moments
            model = as_stored(cast_model(base.model, self.dtype))
            jax.block_until_ready(model)
        arrays: dict[str, Any] = {name: weight_of(model, name) for name in MODULES}
        for name in ("input_norm", "mlp_norm"):
            arrays[name] = getattr(model.layers, name).weight[...]
        self.work.save("quantize", self.keys["quantize"], arrays, seconds=self.stages.seconds["quantize"])
        return model

    @functools.cached_property
    def zero_byte(self) -> Trained | None:
        """What was trained before compensators; None where nothing was."""
        config = self.config
        if not config.zero_byte:
            return None
        student = Student(ranks={}, gate=GateConfig(form="static"))
        params = zero_byte_params(self.quantized, self.rounded_from[0], config.zero_byte)
        return self._train(
            "train zero-byte", self.keys["zero-byte"], self.quantized, student, params, config.zero_config
        )

    @functools.cached_property
    def base(self) -> Decoder:
        """The model that compensators are put on."""
        if self.zero_byte is None:
            return self.quantized
        student = Student(ranks={}, gate=GateConfig(form="static"))
        return student.finish(self.quantized, self.zero_byte.params, exact=self.rounded_from[0])

    @functools.cached_property
    def dense(self) -> dict[str, Array]:
        """The base's int4 weights written out."""
        return dense_weights(self.base)

    @functools.cached_property
    def damage(self) -> np.ndarray | None:
        """`1 - CKA` of each layer and module alone; None where it is not measured."""
        config = self.config
        if not config.damage_sequences or not config.budget:
            return None
        saved = self.work.load("diagnose", self.keys["damage"])
        if saved is not None:
            self.stages.resumed("diagnose", saved.values["seconds"])
            return saved.arrays["damage"]
        tokens, dense = self.tokens[: config.damage_sequences], self.dense
        with self.stages.stage("diagnose") as report:
            size = min(config.batch_size, len(tokens))
            damage = module_damage(self.reference, dense, tokens, batch_size=size, attend=self.attend, progress=report)
        self.work.save("diagnose", self.keys["damage"], {"damage": damage}, seconds=self.stages.seconds["diagnose"])
        return damage

    def initial(self, gate: GateConfig, key: Key) -> tuple[dict[str, tuple[int, ...]], Params]:
        """Place ranks and give the parameters that training starts from."""
        config, stage = self.config, "place and initialise"
        saved = self.work.load(stage, key)
        if saved is not None:
            self.stages.resumed(stage, saved.values["seconds"])
            return {name: tuple(ranks) for name, ranks in saved.values["ranks"].items()}, _nested(saved.arrays)
        damage, tokens = self.damage, self.tokens
        del tokens
        exact, moments = self.rounded_from
        dense = self.dense
        with self.stages.stage(stage):
            errors = weight_errors(exact, dense)
            budget = int(config.budget * Overhead.of(self.base).model)
            ranks, _, _ = choose_ranks(
                errors,
                moments,
                damage if config.placement in ("cka", "gain") else None,
                budget=budget,
                strategy=config.placement,
                gate=gate,
                max_rank=config.max_rank,
                seed=config.seed,
                flatten=config.flatten,
            )
            params = initial_compensators(errors, moments, ranks, gate, key=jax.random.key(config.seed))
            params |= zero_byte_params(self.base, exact, config.joint)
            params = jax.block_until_ready(params)
        self.work.save(stage, key, params, ranks=ranks, seconds=self.stages.seconds[stage])
        return ranks, params

    def compensated(self, gate: GateConfig, initial_key: Key, key: Key, *, stage: str) -> tuple[Decoder, Trained]:
        """Train compensators with a gate; give the model as stored."""
        ranks, params = self.initial(gate, initial_key)
        student = Student(ranks=ranks, gate=gate)
        trained = self._train(stage, key, self.base, student, params, self.config.train_config)
        exact = self.rounded_from[0] if "ranges" in self.config.joint else None
        return student.finish(self.base, trained.params, exact=exact), trained

    def _train(
        self, stage: str, key: Key, base: Decoder, student: Student, params: Params, config: TrainConfig
    ) -> Trained:
        """Train, saving the state at every evaluation; the best parameters by held-out loss are the result."""
        saved = self.work.load(stage, key)
        if saved is not None:
            self.stages.resumed(stage, saved.values["seconds"])
            return Trained(params=saved.tree(params), curve=_curve(saved.values), key=key)
        dense = None
        if "ranges" in params:
            dense = {
                name: float_weight(getattr(self.rounded_from[0].layers, name)).astype(self.dtype) for name in MODULES
            }
        tokens, target = self.tokens, self.target
        trainer = Trainer(self.reference, base, student, tokens, config, target=target, dense=dense)
        curve: list[TrainedPoint] = []
        best, best_loss, state, before = params, math.inf, None, 0.0
        unfinished = self.work.load(f"{stage} state", key)
        if unfinished is not None:
            state = _placed(unfinished.tree(trainer.start(params), prefix="state."), trainer)
            best, best_loss = unfinished.tree(params, prefix="best."), unfinished.values["best_loss"]
            curve, before = list(_curve(unfinished.values)), unfinished.values["seconds"]
            self.stages.resumed(stage, before, what=f"goes on from step {int(state.step)} of {config.steps}")

        def keep(point: TrainedPoint, state: TrainState) -> None:
            nonlocal best, best_loss
            point = dataclasses.replace(point, seconds=before + point.seconds)
            curve.append(point)
            held = point.held_out_kl + config.hidden_weight * point.held_out_hidden
            if held < best_loss:
                best_loss, best = held, jax.device_get(state.average if config.ema else state.params)
            self.stages.say(
                f"{stage}: step {point.step} of {config.steps}, loss {point.loss:.4f}, held-out KL "
                f"{point.held_out_kl:.4f}, hidden error {point.held_out_hidden:.4f}"
            )
            self.work.save(
                f"{stage} state",
                key,
                # The sum of losses begins anew after each evaluation.
                {"state": state._replace(loss_sum=jnp.zeros_like(state.loss_sum)), "best": best},
                best_loss=best_loss,
                seconds=point.seconds,
                curve=[dataclasses.asdict(p) for p in curve],
            )

        with self.stages.stage(stage) as report:
            if state is None or int(state.step) < config.steps:
                trainer.run(params, state=state, on_point=keep, progress=report)
        if not math.isfinite(best_loss):
            raise ValueError(f"{stage}: the loss on held-out text is not finite from the first step on")
        points = [dataclasses.asdict(p) for p in curve]
        self.work.save(stage, key, best, seconds=self.stages.seconds[stage], curve=points)
        self.work.remove(f"{stage} state", key)
        return Trained(params=jax.tree.map(jnp.asarray, best), curve=tuple(curve), key=key)

    def outcome(self) -> Outcome:
        """Run what has not been run, measure, and write."""
        config = self.config
        self.show_plan()
        stored: list[Variant] = []
        curve: list[CurvePoint] = []
        base_label = f"W4 ({config.quantizer})"
        if config.quantizer != "rtn":
            rtn = cast_model(as_stored(quantize_model(self.exact, config.spec)), self.dtype)
            stored.append(Variant(kind="rtn", label="W4 (rtn)", model=rtn, key=self.keys["rtn"]))
        stored.append(Variant(kind="w4", label=base_label, model=self.quantized, key=self.keys["quantize"]))
        if self.zero_byte is not None:
            label = f"{base_label} + {', '.join(config.zero_byte)}"
            stored.append(Variant(kind="zero_byte", label=label, model=self.base, key=self.keys["zero-byte"]))
            curve += _points(self.zero_byte, "zero-byte", config.zero_config, config.zero_byte[0])
        gated = config.gate != "static"
        both = f" + {', '.join(config.joint)}" if config.joint else ""
        if config.budget and config.static_too and gated:
            static = GateConfig(form="static")
            keys = self.keys["static initial"], self.keys["static"]
            model, trained = self.compensated(static, *keys, stage="train static")
            stored.append(Variant(kind="static", label=f"static EC{both}", model=model, key=keys[1]))
            curve += _points(trained, "static compensators", config.train_config, "factors")
        if config.budget:
            keys = self.keys["initial"], self.keys["train"]
            model, trained = self.compensated(config.gate_config, *keys, stage="train")
            kind: Literal["gated", "static"] = "gated" if gated else "static"
            stored.append(Variant(kind=kind, label=f"{kind} EC{both}", model=model, key=keys[1]))
            curve += _points(trained, "compensators", config.train_config, "factors")
        if config.joint and config.budget:
            self._note(f"{' and '.join(config.joint)} were trained along with the compensators, at no cost in bytes")
        reference = Variant(kind="reference", label="reference", model=self.reference, key=self.keys["load"])
        with self.stages.stage("evaluate") as report:
            gaps, tasks = self._measure([reference, *stored], report)
            deciles = self._deciles(stored) if config.budget else None
        with self.stages.stage("write"):
            result = self._result(stored, gaps, tasks, curve, deciles)
            checkpoint = self._write_checkpoints(stored)
            page, _ = write_report(result, self.output)
        return Outcome(result=result, checkpoint=checkpoint, report=page)

    def _measure(self, variants: list[Variant], report: Report) -> tuple[tuple[Gap, ...], tuple[TaskScore, ...]]:
        """Give perplexities on every text and task scores, each measured once for a model and its settings."""
        config = self.config
        bos_id = self._bos_id()
        settings = {
            "texts": [[path.name, *_stamp(path)] for path in config.eval_text],
            "window": config.eval_window,
            "windows": config.eval_windows,
            "bos": bos_id,
            "tasks": config.tasks,
            "limit": config.task_limit,
        }
        scores: list[dict[str, Any]] = []
        for done, variant in enumerate(variants):
            key = variant.key.then(**settings)
            saved = self.work.load("scores", key)
            if saved is None:
                values = self._score(variant.model, bos_id)
                self.work.save("scores", key, {}, **values)
            else:
                values = saved.values
            scores.append(values)
            shown = ", ".join(f"{text} {score:.2f}" for text, score in values["perplexity"].items())
            self.stages.say(f"{variant.label}: perplexity {shown}")
            report(done + 1, len(variants) + bool(config.budget))
        gaps = []
        for text in scores[0]["perplexity"]:
            arms = tuple(
                Arm(
                    kind=variant.kind,
                    label=variant.label,
                    perplexity=found["perplexity"][text],
                    compensator_bytes=sum(bank.nbytes for bank in variant.model.compensators.values()),
                )
                for variant, found in zip(variants, scores, strict=True)
            )
            gaps.append(Gap(text=text, tokens=scores[0]["tokens"][text], window=scores[0]["window"][text], arms=arms))
        by_kind = {variant.kind: found for variant, found in zip(variants, scores, strict=True)}
        before, after = by_kind["w4"], scores[-1]
        tasks = tuple(
            TaskScore(
                task=task,
                reference=by_kind["reference"]["tasks"][task],
                before=before["tasks"][task],
                after=after["tasks"][task],
            )
            for task in config.tasks
        )
        return tuple(gaps), tasks

    def _score(self, model: Decoder, bos_id: int | None) -> dict[str, Any]:
        config = self.config
        dense = expand_model(model, self.dtype)
        values: dict[str, Any] = {"perplexity": {}, "tokens": {}, "window": {}, "tasks": {}}
        batch = 1 if self.on_cpu else 8
        texts = {name: (tokens, config.eval_window, bos_id) for name, tokens in self.eval_tokens.items()}
        if not texts:
            held = max(1, round(config.held_out * len(self.tokens)))
            texts["held-out calibration text"] = self.tokens[-held:].reshape(-1), config.length, None
        for name, (tokens, window, bos) in texts.items():
            windows = config.eval_windows if self.eval_tokens else None
            found = perplexity(dense, tokens, window=window, bos_id=bos, max_windows=windows, batch_size=batch)
            values["perplexity"][name], values["tokens"][name], values["window"][name] = (
                found.value,
                found.tokens,
                window,
            )
        for task, examples in self.examples.items():
            scored = run_task(
                dense,
                self.loaded.tokenizer,
                task,
                examples,
                max_length=self.exact.config.max_position,
                bos_id=bos_id,
                batch_tokens=batch * 1024,
            )
            values["tasks"][task] = scored.metrics["acc"]
        return values

    def _bos_id(self) -> int | None:
        bos_id = self.exact.config.bos_id
        if self.config.bos == "no":
            return None
        if self.config.bos == "yes":
            if bos_id is None:
                raise ValueError(f"bos: {self.loaded.name} has no BOS token")
            return bos_id
        return bos_id if bos_id is not None and self.loaded.tokenizer("a")["input_ids"][:1] == [bos_id] else None

    def _deciles(self, stored: list[Variant]) -> Any:
        """Compare the errors of tokens before and after, on the first windows of the main text."""
        config = self.config
        if self.eval_tokens:
            text, window = next(iter(self.eval_tokens.values())), config.eval_window
            rows = text[: len(text) // window * window].reshape(-1, window)
        else:
            rows, window = self.tokens[-max(1, round(config.held_out * len(self.tokens))) :], config.length
        limit = 2048 if self.on_cpu else _DECILE_TOKENS
        rows = rows[: min(max(1, limit // window), config.eval_windows or len(rows))]
        before = next(variant for variant in stored if variant.kind == "w4")
        attend = choose_attend(self.reference, window)
        errors = [
            token_errors(self.reference, expand_model(variant.model, self.dtype), rows, attend=attend)
            for variant in (before, stored[-1])
        ]
        return decile_errors(*errors)

    def _result(
        self,
        stored: list[Variant],
        gaps: tuple[Gap, ...],
        tasks: tuple[TaskScore, ...],
        curve: list[CurvePoint],
        deciles: Any,
    ) -> CalibrationResult:
        config, model = self.config, stored[-1].model
        spec = "per channel" if config.group_size == -1 else f"group {config.group_size}"
        layers = self.exact.config.num_layers
        ranks = {
            name: model.compensators[name].ranks if name in model.compensators else (0,) * layers for name in MODULES
        }
        damage = self.damage
        return CalibrationResult(
            model=self.loaded.name,
            quantizer=f"{config.quantizer}, {'asymmetric' if config.asymmetric else 'symmetric'}, {spec}",
            ranks=ranks if config.budget else {},
            damage={} if damage is None else {m: tuple(map(float, damage[:, i])) for i, m in enumerate(MODULES)},
            coverage=None if damage is None else float(math.exp(diagnose(damage.reshape(-1)).entropy)),
            curve=tuple(curve),
            gaps=gaps,
            deciles=deciles,
            budget=byte_budget(model, limit=config.budget or None),
            tasks=tasks,
            timings=tuple(StageTime(stage=name, seconds=seconds) for name, seconds in self.stages.seconds.items()),
            config=config.as_json(),
            command=shlex.join(self.command),
            versions=_versions(),
            device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            notes=tuple(self.notes),
        )

    def _write_checkpoints(self, stored: list[Variant]) -> Path:
        config = self.config
        source = Path(config.model).expanduser()
        details = {
            "reference": str(source.resolve()) if source.exists() else config.model,
            "quantizer": config.quantizer,
            "zero_byte": list(dict.fromkeys((*config.zero_byte, *config.joint))),
            "settings": config.as_json(),
        }
        final = stored[-1]
        twin = next((variant for variant in stored[:-1] if variant.kind == "static"), None)
        if twin is not None:
            self._save(self.output / STATIC, twin, details)
            details["static"] = f"../{STATIC}"
        self._save(self.output / CHECKPOINT, final, details)
        return self.output / CHECKPOINT

    def _save(self, path: Path, variant: Variant, details: dict[str, Any]) -> None:
        save_checkpoint(
            path,
            variant.model,
            self.loaded.tokenizer,
            name=self.loaded.name,
            metadata=details | {"key": variant.key.digest},
            overwrite=True,
        )


def check_weights(model: Decoder, *, source: str) -> None:
    """Refuse a model with a weight that is not a number.

    Raises:
        ValueError: Names the weight, and its layer.
    """
    for name, array in named_arrays(model):
        if bool(jnp.all(jnp.isfinite(array))):
            continue
        where = ""
        if name.startswith("layers."):
            flat = jnp.isfinite(array.reshape(array.shape[0], -1)).all(axis=1)
            where = f" in layer {int(jnp.argmin(flat))}"
        raise ValueError(f"{source}: {name}{where} holds NaN or infinite values")


def as_stored(model: Decoder) -> Decoder:
    """Give the model with embedding and head rounded to what a checkpoint stores, in the type they had."""

    def rounded(table: Any) -> Any:
        return None if table is None else nnx.Param(table[...].astype(jnp.bfloat16).astype(table[...].dtype))

    return model.replace(embed=rounded(model.embed), head=rounded(model.head))


def weight_of(model: Decoder, name: str) -> QuantTensor:
    """Give the int4 weights of a module."""
    weight = getattr(model.layers, name).weight
    assert isinstance(weight, QuantTensor), name
    return weight


def with_weights(model: Decoder, weights: dict[str, QuantTensor]) -> Decoder:
    """Give the model with other weights in some of its modules."""
    layers = jax.tree.map(lambda leaf: leaf, model.layers)
    for name, weight in weights.items():
        linear: Linear = getattr(model.layers, name)
        setattr(layers, name, Linear(weight, None if linear.bias is None else linear.bias[...]))
    return model.replace(layers=layers)


def byte_budget(model: Decoder, *, limit: float | None) -> ByteBudget:
    """Say where the bytes of a quantized model are."""
    entries = []
    for component, nbytes in component_bytes(model).items():
        part: Literal["int4_linears", "other", "compensators"] = "other"
        if component.startswith("int4"):
            part = "int4_linears"
        elif component.startswith("compensator"):
            part = "compensators"
        entries.append(BytesEntry(component=component, nbytes=nbytes, part=part))
    return ByteBudget(entries=tuple(entries), limit=limit)


def _weight_arrays(arrays: dict[str, np.ndarray], name: str) -> dict[str, Array]:
    found = {field: arrays.get(f"{name}.{field}") for field in ("packed", "scale", "zero")}
    return {field: jnp.asarray(array) for field, array in found.items() if array is not None}


def _nested(arrays: dict[str, np.ndarray]) -> Params:
    """Give parameters back their groups from names with dots."""
    params: Params = {}
    for name, array in arrays.items():
        *groups, last = name.split(".")
        place = params
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = jnp.asarray(array)
    return params


def _placed(state: TrainState, trainer: Trainer) -> TrainState:
    """Put a state that was read from disk where the trainer has its own."""
    if trainer.mesh is None:
        return state
    everywhere = jax.sharding.NamedSharding(trainer.mesh, jax.sharding.PartitionSpec())
    return jax.device_put(state, everywhere)


def _curve(values: dict[str, Any]) -> tuple[TrainedPoint, ...]:
    return tuple(TrainedPoint(**point) for point in values["curve"])


def _points(trained: Trained, stage: str, config: TrainConfig, group: str) -> list[CurvePoint]:
    schedule = rate_schedule(config, config.rates()[group])
    return [
        CurvePoint(
            stage=stage,
            step=point.step,
            loss=point.loss,
            learning_rate=float(np.asarray(schedule(point.step))),
            held_out_loss=point.held_out_kl + config.hidden_weight * point.held_out_hidden,
        )
        for point in trained.curve
    ]


def _relevant(config: TrainConfig, groups: Sequence[str]) -> dict[str, Any]:
    """Give the settings of training that matter to some groups of parameters: no rate of another."""
    values = dataclasses.asdict(config)
    rates = {f"{group}_rate": config.rates()[group] for group in groups}
    return (
        {name: value for name, value in values.items() if not name.endswith("_rate")}
        | rates
        | {"final_rate": config.final_rate}
    )


def _stamp(path: Path) -> list[int]:
    """Give what tells a file from another of the same name; nothing for what is no file."""
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else []


def _versions() -> dict[str, str]:
    names = ("spear-jax", "jax", "flax", "optax", "numpy", "transformers")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
