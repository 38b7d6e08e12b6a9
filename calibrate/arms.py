"""What an ablation is asked to run: its settings, its arms as a command line says them, and sets of arms by name."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from calibrate.damage import Strategy
from calibrate.quantizers import Quantizer
from calibrate.student import GateConfig
from calibrate.train import TrainConfig
from spear_jax.quant import Bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One variant: a base, what is trained on it without bytes, then compensators and how they are trained.

    `zero` and `joint` list groups of zero-byte parameters joined by "+" ("scales+norms+codes"): those of `zero` are
    trained before there are compensators, those of `joint` along with them. `pool` is the text to train on: all of it,
    or only what was sampled from the model. `local_steps` train factors against the errors of their own modules first.
    `bits` are those of a factor's codes, 8 or 4.
    """

    name: str = "arm"
    base: Quantizer = "rtn"
    zero: str = ""
    zero_train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    compensate: bool = True
    joint: str = ""
    budget: float = 0.01
    placement: Strategy = "uniform"
    flatten: float = 1.0
    max_rank: int = 16
    gate: GateConfig = dataclasses.field(default_factory=lambda: GateConfig(form="static"))
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    int8: bool = True
    bits: Bits = 8
    local_steps: int = 0
    pool: Literal["all", "sampled"] = "all"
    seed: int = 0


def parse_arm(text: str, common: tuple[str, ...] = ()) -> Arm:
    """Read "name:key=value,key=value"; keys of nested settings have dots ("train.steps"); `common` comes first.

    Raises:
        ValueError: A key is unknown or a value has the wrong type.
    """
    name, _, body = text.partition(":")
    arm = Arm(name=name)
    for item in (*common, *body.split(",")):
        if item:
            key, equals, value = item.partition("=")
            if not equals:
                raise ValueError(f"arm {name}: expected key=value, got {item!r}")
            arm = _assign(arm, key.strip().split("."), value.strip(), where=f"arm {name}: {key}")
    return arm


def _assign(target: Any, path: list[str], value: str, *, where: str) -> Any:
    head, *rest = path
    known = {field.name for field in dataclasses.fields(target)}
    if head not in known:
        raise ValueError(f"{where}: unknown; known: {', '.join(sorted(known))}")
    old = getattr(target, head)
    if rest:
        return dataclasses.replace(target, **{head: _assign(old, rest, value, where=where)})
    try:
        match old:
            case bool():
                new: Any = {"true": True, "false": False, "1": True, "0": False}[value.lower()]
            case int() | float() | str():
                new = type(old)(float(value)) if isinstance(old, int) else type(old)(value)
            case _:
                raise ValueError
    except (KeyError, ValueError):
        raise ValueError(f"{where}: expected a {type(old).__name__}, got {value!r}") from None
    return dataclasses.replace(target, **{head: new})


PRESETS: dict[str, tuple[str, ...]] = {
    "quick-gpu": (
        "rtn:compensate=0",
        "clip:base=clip,compensate=0",
        "gptq-clip:base=gptq-clip,compensate=0",
        "refined:base=refined,compensate=0",
        "static:",
        "static-hot:train.factor_rate=3e-2",
        "static-cool:train.factor_rate=3e-3",
        "shift-rms:gate.form=shift,gate.rms=1,gate.hidden=8",
        "refined-scales-ec:base=refined,zero=scales+norms",
        "refined-codes:base=refined,zero=scales+norms+codes,compensate=0",
        "published:gate.form=published",
        "static-gain-flat:placement=gain,flatten=0.5",
    ),
    "better": (
        "long:train.steps=2000",
        "long-kl:train.steps=2000,train.hidden_weight=0.1",
        "cka:placement=cka",
        "linear-rms:gate.form=linear,gate.rms=1,gate.hidden=8",
        "shift-probe:gate.form=shift,gate.rms=1,gate.hidden=8,gate.probes=1",
        "linear-probe:gate.form=linear,gate.rms=1,gate.hidden=8,gate.probes=1",
    ),
    "zero": (
        "rtn-scales:zero=scales+norms,compensate=0",
        "refined-scales:base=refined,zero=scales+norms,compensate=0",
        "refined-codes:base=refined,zero=scales+norms+codes,compensate=0",
        "refined-codes-hot:base=refined,zero=scales+norms+codes,compensate=0,zero_train.code_rate=1e-2",
        "refined-scales-ec:base=refined,zero=scales+norms",
        "refined-scales-ec-joint:base=refined,zero=scales+norms,joint=scales+norms",
        "refined-codes-ec:base=refined,zero=scales+norms+codes",
    ),
    "bases": tuple(
        f"{base}:base={base},compensate=0"
        for base in ("rtn", "awq", "clip", "learned-clip", "gptq", "gptq-clip", "refined")
    ),
    "gates": tuple(
        f"{form}-{seed}:gate.form={form},seed={seed}" for seed in range(3) for form in ("static", "published", "shift")
    ),
    "placement": tuple(
        f"{how}-{seed}:placement={how},seed={seed}" for seed in range(3) for how in ("uniform", "cka", "random")
    ),
}
"""Sets of arms by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """Run variants of a calibration on one model and print each one's perplexity, bytes and recovered share."""

    model: str = "demo"
    """`demo`, a Hugging Face directory, a GGUF file, or a hub id."""

    text: tuple[Path, ...] = ()
    """Text files to measure perplexity on; the first is the main one."""

    windows: int | None = None
    """Measure the first windows of each text only."""

    window: int = 1024
    """Tokens in a window of evaluation."""

    bos: bool = False
    """Begin windows with BOS."""

    preset: str = ""
    """Set of arms: quick-gpu, better, zero, bases, gates, placement."""

    arms: tuple[str, ...] = ()
    """Arms as "name:key=value,key=value", run after those of the preset."""

    common: tuple[str, ...] = ()
    """Settings "key=value" of all arms."""

    sequences: int = 2048
    """Calibration sequences."""

    length: int = 512
    """Tokens in a calibration sequence."""

    source: str = ""
    """Calibration text: a text or jsonl file or a dataset's id; empty: sampled from the model itself."""

    text_share: float = 1.0
    """Share of sequences cut from `source`; the rest is sampled."""

    prompt_length: int = 64
    """Sampled sequences go on from up to this many tokens of `source`; 0: from BOS or any token."""

    bos_share: float = 0.5
    """Share of sampled sequences that begin with BOS."""

    moment_sequences: int = 128
    """Sequences that second moments are measured on."""

    spectrum: int = 24
    """Highest rank that whitened errors are decomposed to, for `max_rank` and the probes of gates."""

    initial: bool = False
    """Measure the perplexity of compensators as initialised, too."""

    damage_sequences: int = 16
    """Sequences that module damage is measured on."""

    batch_size: int = 16
    """Sequences or windows run at a time outside training."""

    layers: int = 0
    """Keep the first layers of the model only, for a trial; 0 keeps all."""

    tasks: tuple[str, ...] = ()
    """Zero-shot tasks to measure: lambada, hellaswag, arc_easy, piqa, winogrande."""

    tasks_dir: Path | None = None
    """Folder with the tasks' files. Without it: from the dataset hub."""

    task_limit: int | None = None
    """Score the first examples of each task only."""

    group_size: int = -1
    """Columns that share a scale; -1: one scale a row."""

    asymmetric: bool = False
    """Quantize with zero points."""

    seed: int = 0
    """Seed of the calibration text."""

    cache: Path | None = None
    """Folder to keep sampled text in."""

    output: Path | None = None
    """JSON file of results, written after every arm."""

    save: Path | None = None
    """Folder to write each arm's trained parameters to, as NAME.npz."""
