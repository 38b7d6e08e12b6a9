"""The stages of a calibration, from a model's name to a checkpoint and a report; each is found again after a kill."""

import dataclasses
import datetime
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from calibrate.capture import choose_attend
from calibrate.config import CalibrateConfig
from calibrate.diagnose import diagnose
from calibrate.keys import file_stamp
from calibrate.measure import decile_errors, matmul_speed, task_accuracies, token_errors
from calibrate.plan import make_plan
from calibrate.progress import Report, Stages
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
from calibrate.resumable import Trained
from calibrate.stages import Workshop
from calibrate.student import GateConfig
from calibrate.train import TrainConfig, rate_schedule
from calibrate.weights import as_stored
from calibrate.workdir import Key
from spear_jax.checkpoint import component_bytes, save_checkpoint
from spear_jax.evaluation import perplexity
from spear_jax.loading import CHECKPOINT
from spear_jax.models.decoder import MODULES, Decoder
from spear_jax.models.quantize import cast_model, expand_model, quantize_model
from spear_jax.versions import package_versions

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


def calibrate(config: CalibrateConfig, *, stages: Stages, command: Sequence[str] = ()) -> Outcome:
    """Run all stages and write `checkpoint/`, `report.html` and `report.json` to the output directory.

    Stages that an earlier run with the same settings finished are read from `work/` there, and training goes on from
    the last state saved.

    Raises:
        ValueError: An input cannot be used, or training diverged; nothing that was saved is lost.
        OSError: A file cannot be read, or the disk is full.
    """
    config.check()
    return _outcome(Workshop(config, stages=stages), command)


def _outcome(run: Workshop, command: Sequence[str]) -> Outcome:
    """Run what has not been run, measure, and write."""
    config = run.config
    _show_plan(run)
    if len(run.tokens) < config.sequences:
        run.note(f"the calibration text gives {len(run.tokens)} sequences, not {config.sequences}")
    stored: list[Variant] = []
    curve: list[CurvePoint] = []
    base_label = f"W4 ({config.quantizer})"
    if config.quantizer != "rtn":
        rtn = cast_model(as_stored(quantize_model(run.exact, config.spec)), run.dtype)
        stored.append(Variant(kind="rtn", label="W4 (rtn)", model=rtn, key=run.keys["rtn"]))
    stored.append(Variant(kind="w4", label=base_label, model=run.quantized, key=run.keys["quantize"]))
    if run.zero_byte is not None:
        label = f"{base_label} + {', '.join(config.zero_byte)}"
        stored.append(Variant(kind="zero_byte", label=label, model=run.base, key=run.keys["zero-byte"]))
        curve += _points(run.zero_byte, "zero-byte", config.zero_config, config.zero_byte[0])
    gated = config.gate != "static"
    both = f" + {', '.join(config.joint)}" if config.joint else ""
    if config.budget and config.static_too and gated:
        model, trained = run.compensated(GateConfig(form="static"), twin=True)
        stored.append(Variant(kind="static", label=f"static EC{both}", model=model, key=run.keys["static train"]))
        curve += _points(trained, "static compensators", config.train_config, "factors")
    if config.budget:
        model, trained = run.compensated(config.gate_config)
        kind: Literal["gated", "static"] = "gated" if gated else "static"
        stored.append(Variant(kind=kind, label=f"{kind} EC{both}", model=model, key=run.keys["train"]))
        curve += _points(trained, "compensators", config.train_config, "factors")
    if config.budget and run.latency is not None:
        times = ", ".join(f"{name} {1e6 * seconds:.1f}" for name, seconds in zip(MODULES, run.latency, strict=True))
        run.note(f"damage was divided by the time a compensator of rank 4 adds to a token, in microseconds: {times}")
    if config.joint and config.budget:
        run.note(f"{' and '.join(config.joint)} were trained along with the compensators, at no cost in bytes")
    reference = Variant(kind="reference", label="reference", model=run.reference, key=run.keys["load"])
    with run.stages.stage("evaluate") as report:
        gaps, tasks = _measure(run, [reference, *stored], report)
        deciles = _deciles(run, stored) if config.budget else None
    with run.stages.stage("write"):
        result = _result(run, command, stored, gaps, tasks, curve, deciles)
        checkpoint = _write_checkpoints(run, stored)
        page, _ = write_report(result, run.output)
    return Outcome(result=result, checkpoint=checkpoint, report=page)


def _show_plan(run: Workshop) -> None:
    """Print what is about to happen."""
    config, speed = run.config, matmul_speed(run.dtype)
    most = math.inf if config.eval_windows is None else config.eval_windows * config.eval_window
    tokens = sum(min(most, len(tokens)) for tokens in run.eval_tokens.values())
    plan = make_plan(config, run.exact.config, eval_tokens=int(tokens), speed=speed)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    run.stages.say(f"{run.loaded.name} on {device} ({speed / 1e12:.2f} Tflop/s in {run.dtype.name})")
    for line in plan.lines():
        run.stages.say(line)
    run.stages.say(f"results go to {run.output}/; an interrupted run goes on from {run.work.path}/")


def _measure(run: Workshop, variants: list[Variant], report: Report) -> tuple[tuple[Gap, ...], tuple[TaskScore, ...]]:
    """Give perplexities on every text and task scores, each measured once for a model and its settings."""
    config = run.config
    bos_id = _bos_id(run)
    settings = {
        "texts": [*run.eval_tokens, *(file_stamp(path) for path in config.eval_text)],
        "window": config.eval_window,
        "windows": config.eval_windows,
        "bos": bos_id,
        "tasks": config.tasks,
        "limit": config.task_limit,
    }
    scores: list[dict[str, Any]] = []
    for done, variant in enumerate(variants):
        key = variant.key.then(**settings)
        saved = run.work.load("scores", key)
        if saved is None:
            values = _score(run, variant.model, bos_id)
            run.work.save("scores", key, {}, **values)
        else:
            values = saved.values
        scores.append(values)
        shown = ", ".join(f"{text} {score:.2f}" for text, score in values["perplexity"].items())
        run.stages.say(f"{variant.label}: perplexity {shown}")
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


def _score(run: Workshop, model: Decoder, bos_id: int | None) -> dict[str, Any]:
    config = run.config
    dense = expand_model(model, run.dtype)
    values: dict[str, Any] = {"perplexity": {}, "tokens": {}, "window": {}}
    batch = 1 if run.on_cpu else 8
    texts = {name: (tokens, config.eval_window, bos_id) for name, tokens in run.eval_tokens.items()}
    if not texts:
        held = max(1, round(config.held_out * len(run.tokens)))
        texts["held-out calibration text"] = run.tokens[-held:].reshape(-1), config.length, None
    for name, (tokens, window, bos) in texts.items():
        windows = config.eval_windows if run.eval_tokens else None
        found = perplexity(dense, tokens, window=window, bos_id=bos, max_windows=windows, batch_size=batch)
        values["perplexity"][name], values["tokens"][name], values["window"][name] = (
            found.value,
            found.tokens,
            window,
        )
    values["tasks"] = task_accuracies(
        dense,
        run.loaded.tokenizer,
        run.examples,
        max_length=run.exact.config.max_position,
        bos_id=bos_id,
        batch_size=batch,
    )
    return values


def _bos_id(run: Workshop) -> int | None:
    bos_id = run.exact.config.bos_id
    if run.config.bos == "no":
        return None
    if run.config.bos == "yes":
        if bos_id is None:
            raise ValueError(f"bos: {run.loaded.name} has no BOS token")
        return bos_id
    return bos_id if bos_id is not None and run.loaded.tokenizer("a")["input_ids"][:1] == [bos_id] else None


def _deciles(run: Workshop, stored: list[Variant]) -> Any:
    """Compare the errors of tokens before and after, on the first windows of the main text."""
    config = run.config
    if run.eval_tokens:
        text, window = next(iter(run.eval_tokens.values())), config.eval_window
        rows = text[: len(text) // window * window].reshape(-1, window)
    else:
        rows, window = run.tokens[-max(1, round(config.held_out * len(run.tokens))) :], config.length
    limit = 2048 if run.on_cpu else _DECILE_TOKENS
    rows = rows[: min(max(1, limit // window), config.eval_windows or len(rows))]
    before = next(variant for variant in stored if variant.kind == "w4")
    attend = choose_attend(run.reference, window)
    errors = [
        token_errors(run.reference, expand_model(variant.model, run.dtype), rows, attend=attend)
        for variant in (before, stored[-1])
    ]
    return decile_errors(*errors)


def _result(
    run: Workshop,
    command: Sequence[str],
    stored: list[Variant],
    gaps: tuple[Gap, ...],
    tasks: tuple[TaskScore, ...],
    curve: list[CurvePoint],
    deciles: Any,
) -> CalibrationResult:
    config, model = run.config, stored[-1].model
    spec = "per channel" if config.group_size == -1 else f"group {config.group_size}"
    layers = run.exact.config.num_layers
    ranks = {name: model.compensators[name].ranks if name in model.compensators else (0,) * layers for name in MODULES}
    damage = run.damage
    return CalibrationResult(
        model=run.loaded.name,
        quantizer=f"{config.quantizer}, {'asymmetric' if config.asymmetric else 'symmetric'}, {spec}",
        ranks=ranks if config.budget else {},
        damage={} if damage is None else {m: tuple(map(float, damage[:, i])) for i, m in enumerate(MODULES)},
        coverage=None if damage is None else float(math.exp(diagnose(damage.reshape(-1)).entropy)),
        curve=tuple(curve),
        gaps=gaps,
        deciles=deciles,
        budget=byte_budget(model, limit=config.budget or None),
        tasks=tasks,
        timings=tuple(StageTime(stage=name, seconds=seconds) for name, seconds in run.stages.seconds.items()),
        config=config.as_json(),
        command=shlex.join(command),
        versions=package_versions("spear-jax", "jax", "flax", "optax", "numpy", "transformers"),
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        notes=tuple(run.notes),
    )


def _write_checkpoints(run: Workshop, stored: list[Variant]) -> Path:
    config = run.config
    named = config.reference or config.model
    source = Path(named).expanduser()
    details = {
        "reference": str(source.resolve()) if source.exists() else named,
        "quantizer": config.quantizer,
        "zero_byte": list(dict.fromkeys((*config.zero_byte, *config.joint))),
        "settings": config.as_json(),
    }
    final = stored[-1]
    twin = next((variant for variant in stored[:-1] if variant.kind == "static"), None)
    if twin is not None:
        _save(run, run.output / STATIC, twin, details)
        details["static"] = f"../{STATIC}"
    _save(run, run.output / CHECKPOINT, final, details)
    return run.output / CHECKPOINT


def _save(run: Workshop, path: Path, variant: Variant, details: dict[str, Any]) -> None:
    save_checkpoint(
        path,
        variant.model,
        run.loaded.tokenizer,
        name=run.loaded.name,
        metadata=details | {"key": variant.key.digest},
        overwrite=True,
    )


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


def _points(trained: Trained, stage: str, config: TrainConfig, group: str) -> list[CurvePoint]:
    schedule = rate_schedule(config, config.rates()[group])
    return [
        CurvePoint(
            stage=stage,
            step=point.step,
            loss=point.loss,
            learning_rate=float(np.asarray(schedule(point.step))),
            held_out_loss=point.held_out(config),
        )
        for point in trained.curve
    ]
