"""Settings of a calibration: presets, a YAML file over them, flags over both."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from calibrate.damage import Strategy
from calibrate.quantizers import Quantizer
from calibrate.student import GateConfig, GateForm
from calibrate.train import Initial, TrainConfig
from spear_jax.cli import parse_flags
from spear_jax.config import load_yaml
from spear_jax.hosts import check_processes
from spear_jax.quant import Bits, QuantSpec

type ZeroByteGroup = Literal["scales", "ranges", "norms", "codes"]

_Zero = tyro.conf.create_mutex_group(required=False, title="zero points")
_Flag = tyro.conf.FlagCreatePairsOff


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """Quantize a model to int4, train error compensators for it, and write a checkpoint and a report.

    Usage: python -m spear_jax.calibrate [SETTINGS.yaml] [--flags]; flags win over the file. Without any it runs the
    demo model with --quick. A run that was stopped goes on where it was when the same command is given again. Progress
    goes to stderr, one JSON object of results to stdout; the exit status is 2 for a mistake in settings or inputs.
    """

    model: str = "demo"
    """`demo` (SmolLM2-135M-Instruct), a Hugging Face directory, a GGUF file, or a hub id `org/name`."""

    reference: str | None = None
    """Where --model is an int4 checkpoint (AutoAWQ, GPTQ, compressed-tensors): the model it was made from, which is
    what compensators are trained towards. The base is imported as it is: its codes, scales and zero points change only
    if --zero-byte or --joint say so."""

    output: Path | None = None
    """Directory of the results: checkpoint/, report.html, report.json and work/. Default: calibrated/NAME."""

    overwrite: bool = False
    """Replace a checkpoint in the output directory that other settings gave."""

    quick: bool = False
    """Few and short sequences, few steps, few windows of evaluation: minutes on a CPU."""

    quantizer: Quantizer | Literal["imported"] = "refined"
    """How weights are rounded to int4. rtn: to nearest, min-max scales. awq: to nearest behind channel scales. clip,
    learned-clip: to nearest on searched, on learned scales. gptq, gptq-clip: GPTQ on min-max, on searched scales.
    refined: scales searched under GPTQ, then coordinate descent; the best. imported: --model is int4 already; what
    --reference sets."""

    group_size: Literal[-1, 32, 64, 128] = -1
    """Input features that share a scale; -1 is one scale per output channel."""

    symmetric: Annotated[bool, _Zero, _Flag] = False
    """Quantize without zero points (the default)."""

    asymmetric: Annotated[bool, _Zero, _Flag] = False
    """Quantize with zero points."""

    budget: float = 0.01
    """Bytes of all compensators, as a share of the W4 model as stored; 0 for a base without compensators."""

    placement: Strategy = "gain"
    """Where ranks go. cka: by marginal gain in the modules that the entropy of CKA damage covers. gain: by marginal
    gain in all. uniform: the same everywhere. random: anywhere."""

    latency_aware: bool = False
    """For cka and gain: divide a module's damage by the time that a compensator adds to it, measured on this device."""

    flatten: float = 0.5
    """Exponent on marginal gains, for cka and gain: below 1 spreads ranks more evenly."""

    max_rank: int = 16
    """Highest rank of a compensator."""

    factor_bits: Bits = 8
    """Bits of a compensator's factors, as stored; at equal bytes, 4 buys twice the rank. In memory they take 8."""

    gate: GateForm = "published"
    """Gate of the compensators. static: none. published: 1 + tanh(MLP(z)). linear: without tanh. shift: z + MLP(z)."""

    gate_hidden: int = 4
    """Width of the gate's hidden layer."""

    gate_probes: int = 0
    """Further projections of the input that the gate sees."""

    gate_rms: bool = False
    """Let the gate see the size of the input."""

    static_too: bool = False
    """Train static compensators of equal bytes as well, for comparison; about doubles the training time."""

    text: tuple[str, ...] = ()
    """Calibration text: text or jsonl files, or ids of datasets. Without any: sampled from the model itself."""

    text_share: float = 1.0
    """Share of the sequences that are cut from `text`; the model itself writes the rest."""

    prompt_length: int = 64
    """What the model writes goes on from up to this many tokens of `text`; 0, or no text: from BOS or any token."""

    sequences: int = 2048
    """Calibration sequences."""

    length: int = 512
    """Tokens in a calibration sequence."""

    bos_share: float = 0.5
    """Share of sampled sequences that begin with BOS."""

    moment_sequences: int = 128
    """Sequences that the second moments of activations are measured on."""

    damage_sequences: int = 16
    """Sequences that the damage of each module is measured on; 0 leaves it out where the placement allows."""

    zero_byte: tuple[ZeroByteGroup, ...] = ("scales", "norms")
    """What is trained before there are compensators, at no cost in bytes; nothing to leave it out."""

    zero_steps: int = 400
    """Steps of that."""

    initial: Initial = "svd"
    """Where compensators start. svd: at the whitened SVD of the weight errors. zero: with its A and steps of its B's
    size, but B at zero, so at the base itself. The SVD mends the error of each module, and may start worse than a base
    that zero-byte training fitted to the error of the whole."""

    local_steps: int = 0
    """Steps of training each compensator, rounded to int8, against the error of its own module before all are trained
    together. The whitened SVD that they start from is the optimum but for rounding, which costs next to nothing."""

    joint: tuple[ZeroByteGroup, ...] = ()
    """What is trained along with the compensators, at no cost in bytes."""

    steps: int = 400
    """Steps of training the compensators."""

    batch_size: int = 16
    """Sequences in a step."""

    factor_rate: float = 5e-2
    """Peak learning rate of compensator factors, as a fraction of their size."""

    gate_rate: float = 1e-2
    """Peak learning rate of gates."""

    scale_rate: float = 2e-3
    """Peak learning rate of the logarithms of scales."""

    norm_rate: float = 2e-3
    """Peak learning rate of norm gains."""

    code_rate: float = 2e-3
    """Peak learning rate of weights in units of codes."""

    hidden_weight: float = 1.0
    """Weight of the relative error of the last hidden state beside the KL divergence."""

    ema: float = 0.0
    """Decay of an average of the parameters that is kept in place of the last ones; 0 for none."""

    held_out: float = 0.03
    """Share of the sequences that is held out, to choose the best parameters on."""

    save_every: int = 50
    """Steps between evaluations on held-out text; the state of training is saved at each."""

    patience: int = 4
    """Training stops when so many evaluations in a row are no better; the best parameters are kept. 0: never."""

    eval_text: tuple[Path, ...] = ()
    """Text files to measure perplexity on, the main one first. Default: WikiText-2 test, if the hub can be reached."""

    eval_window: int = 1024
    """Tokens in a window of evaluation."""

    eval_windows: int | None = None
    """Measure the first windows of each text only."""

    bos: Literal["auto", "yes", "no"] = "auto"
    """Begin windows of evaluation with BOS; auto does as the tokenizer."""

    tasks: tuple[str, ...] = ()
    """Zero-shot tasks to measure: lambada, hellaswag, arc_easy, piqa, winogrande."""

    tasks_dir: Path | None = None
    """Folder with the tasks' files. Without it: from the dataset hub."""

    task_limit: int | None = None
    """Score the first examples of each task only."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations; auto is float32 on a CPU, bfloat16 elsewhere."""

    seed: int = 0
    """Seed of sampling, initialisation and the order of sequences."""

    coordinator: str | None = None
    """HOST:PORT of process 0, to train by several processes, one on each host, all started with the same settings and
    an output directory that they share: each takes its part of every batch. auto: found out on Cloud TPU, under SLURM
    and Open MPI."""

    num_processes: int | None = None
    """With a coordinator, how many processes there are."""

    process_id: int | None = None
    """With a coordinator, which of them this is, from 0."""

    def check(self) -> None:
        """Refuse values that make no sense; apart from construction, so that a flag's mistake is one line.

        Raises:
            ValueError: Names the setting and its value.
        """
        if self.symmetric and self.asymmetric:
            raise ValueError("symmetric and asymmetric exclude each other")
        self._check_import()
        check_processes(self.coordinator, self.num_processes, self.process_id)
        lowest = {"sequences": 2, "length": 8, "moment_sequences": 1, "eval_window": 2}
        lowest |= dict.fromkeys(("damage_sequences", "prompt_length", "local_steps"), 0)
        positive = ("max_rank", "zero_steps", "steps", "batch_size", "save_every", "eval_windows", "task_limit")
        for name, low in (lowest | dict.fromkeys(positive, 1)).items():
            if (value := getattr(self, name)) is not None and value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        for name in ("factor_rate", "gate_rate", "scale_rate", "norm_rate", "code_rate", "flatten"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.budget < 1:
            raise ValueError(f"budget is a share of the model's bytes from 0 to 1, got {self.budget}")
        for name in ("bos_share", "text_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.placement in ("cka", "gain") and self.budget and not self.damage_sequences:
            raise ValueError(f"placement {self.placement} needs damage_sequences of at least 1, got 0")
        if self.initial == "zero" and self.local_steps:
            raise ValueError(f"initial zero throws away what local_steps train: expected 0, got {self.local_steps}")
        for name in ("zero_byte", "joint"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} names a group twice: {', '.join(getattr(self, name))}")
        # These refuse what is wrong with the values they are built from.
        _ = self.spec, self.gate_config, self.train_config, self.zero_config

    def _check_import(self) -> None:
        if self.quantizer == "imported" and self.reference is None:
            raise ValueError("quantizer imported needs --reference: the model that the int4 checkpoint was made from")
        if self.reference is None:
            return
        if self.quantizer != "imported":
            raise ValueError(f"quantizer {self.quantizer}: with --reference the int4 base is imported as it is")
        if changed := {"codes", "ranges"}.intersection(self.zero_byte + self.joint):
            raise ValueError(f"{' and '.join(sorted(changed))} would round an imported base again: leave them out")

    @property
    def spec(self) -> QuantSpec:
        """The int4 grid."""
        return QuantSpec(group_size=self.group_size, symmetric=not self.asymmetric)

    @property
    def gate_config(self) -> GateConfig:
        """The gate of the compensators."""
        return GateConfig(form=self.gate, hidden=self.gate_hidden, probes=self.gate_probes, rms=self.gate_rms)

    @property
    def train_config(self) -> TrainConfig:
        """How compensators are trained."""
        shared = {field.name for field in dataclasses.fields(self)}.intersection(TrainConfig.__dataclass_fields__)
        return TrainConfig(evaluate_every=self.save_every, **{name: getattr(self, name) for name in shared})

    @property
    def zero_config(self) -> TrainConfig:
        """How parameters that add no bytes are trained, before there are compensators."""
        return dataclasses.replace(self.train_config, steps=self.zero_steps)

    def as_json(self) -> dict[str, Any]:
        """Give the settings that results depend on as JSON values."""
        values = dataclasses.asdict(self)
        for name in ("coordinator", "num_processes", "process_id"):
            del values[name]
        return {key: _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


QUICK: dict[str, Any] = {
    "quick": True,
    "quantizer": "gptq-clip",
    "sequences": 48,
    "length": 256,
    "moment_sequences": 24,
    "damage_sequences": 1,
    "zero_steps": 12,
    "joint": ("scales", "norms"),
    "steps": 28,
    "batch_size": 4,
    "factor_rate": 3e-2,
    "held_out": 0.09,
    "save_every": 4,
    "eval_windows": 6,
}
"""What --quick sets; a file and flags win over it."""

IMPORTED: dict[str, Any] = {"quantizer": "imported", "zero_byte": (), "joint": ()}
"""What --reference sets; a file and flags win over it."""


def parse(arguments: Sequence[str]) -> CalibrateConfig:
    """Read settings from an optional YAML file and flags; none at all means the demo model with --quick.

    Raises:
        ValueError, OSError: The file cannot be read or a value makes no sense.
    """
    arguments = list(arguments)
    given: dict[str, Any] = {}
    if arguments and not arguments[0].startswith("-"):
        path = Path(arguments.pop(0))
        settings = load_yaml(CalibrateConfig, path)
        given = {key: getattr(settings, key) for key in yaml.safe_load(path.read_text()) or {}}
        quick = settings.quick or "--quick" in arguments
    else:
        quick = "--quick" in arguments or not arguments

    def read(preset: dict[str, Any]) -> CalibrateConfig:
        defaults = dataclasses.replace(CalibrateConfig(**(preset | given)), quick=quick)
        return parse_flags(CalibrateConfig, prog="python -m spear_jax.calibrate", args=arguments, default=defaults)

    preset = QUICK if quick else {}
    config = read(preset)
    if config.reference is not None:
        config = read(preset | IMPORTED)
    config.check()
    return config
