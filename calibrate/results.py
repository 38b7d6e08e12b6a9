"""What a calibration found, as plain data: written as JSON, rendered by `calibrate.report`."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

from spear_jax.config import parse_mapping

FORMAT = 1
"""Version of the JSON; files with a higher one are refused."""

DECILES = 10

type ArmKind = Literal["reference", "rtn", "w4", "zero_byte", "static", "gated"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """The losses of one logged training step; `held_out_loss` only where it was measured."""

    stage: str
    step: int
    loss: float
    learning_rate: float
    held_out_loss: float | None = None

    def __post_init__(self) -> None:
        for name in ("loss", "learning_rate", "held_out_loss"):
            _finite(f"{name} at step {self.step} of {self.stage}", getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One variant of the model on one text.

    `rtn` is plain rounding where the base of this run (`w4`) is another quantizer; `zero_byte` is the base with
    re-learned scales and norm gains; `static` and `gated` add error compensators of `compensator_bytes`.
    """

    kind: ArmKind
    label: str
    perplexity: float
    compensator_bytes: int = 0

    def __post_init__(self) -> None:
        _finite(f"perplexity of {self.label}", self.perplexity)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gap:
    """Perplexities of all arms on one text, `tokens` scored in windows of `window`."""

    text: str
    tokens: int
    window: int
    arms: tuple[Arm, ...]

    def arm(self, kind: ArmKind) -> Arm | None:
        """Give the first arm of a kind."""
        return next((arm for arm in self.arms if arm.kind == kind), None)

    def recovered(self, arm: Arm, *, base: ArmKind = "w4") -> float | None:
        """Give the share of the gap from the reference to `base` that an arm closes; None where there is no gap."""
        reference, worst = self.arm("reference"), self.arm(base)
        if reference is None or worst is None or worst.perplexity <= reference.perplexity:
            return None
        return (worst.perplexity - arm.perplexity) / (worst.perplexity - reference.perplexity)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecileErrors:
    """Mean per-token error (KL of the reference's next-token distribution, in nats) by decile of difficulty.

    Tokens are sorted into tenths by the error of the W4 model without compensators, easiest first.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]
    measure: str = "KL to the reference, nats per token"

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            values = getattr(self, name)
            if len(values) != DECILES:
                raise ValueError(f"decile errors {name} must be {DECILES} values, got {len(values)}")
            for i, value in enumerate(values):
                _finite(f"error {name} in decile {i + 1}", value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BytesEntry:
    """Bytes that one component takes as stored."""

    component: str
    nbytes: int
    part: Literal["int4_linears", "other", "compensators"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteBudget:
    """Where the bytes of the served model are; `limit` is the overhead allowed, as a share of the W4 model."""

    entries: tuple[BytesEntry, ...]
    limit: float | None = None

    def total(self, *parts: Literal["int4_linears", "other", "compensators"]) -> int:
        """Count the bytes of some parts."""
        return sum(entry.nbytes for entry in self.entries if entry.part in parts)

    @property
    def w4_bytes(self) -> int:
        """Bytes of the whole W4 model: int4 linears with their scales, embedding, norms, biases, head."""
        return self.total("int4_linears", "other")

    @property
    def overhead_of_model(self) -> float:
        """Compensator bytes as a share of the whole W4 model as stored."""
        return self.total("compensators") / self.w4_bytes if self.w4_bytes else 0.0

    @property
    def overhead_of_linears(self) -> float:
        """Compensator bytes as a share of the int4 linears alone."""
        linears = self.total("int4_linears")
        return self.total("compensators") / linears if linears else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskScore:
    """Accuracy of a zero-shot task in [0, 1]: of the reference, of the W4 model, and with compensators."""

    task: str
    reference: float | None = None
    before: float
    after: float

    def __post_init__(self) -> None:
        for name in ("reference", "before", "after"):
            _finite(f"{name} of {self.task}", getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageTime:
    """Wall-clock seconds of one stage of the pipeline."""

    stage: str
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationResult:
    """Everything that a calibration reports.

    `damage` and `ranks` give a value per layer for each module ("qkv", "o", "gate_up", "down"); damage is 1 - CKA and
    is empty where placement did not need it. `coverage` is the effective number of damaged modules, exp(entropy).
    `gaps` is one entry per text evaluated, the main one first. `config` is the calibration's configuration as plain
    JSON values. `date` is ISO 8601. `notes` are remarks for the reader, one sentence each.
    """

    model: str
    quantizer: str
    ranks: dict[str, tuple[int, ...]]
    damage: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    coverage: float | None = None
    curve: tuple[CurvePoint, ...] = ()
    gaps: tuple[Gap, ...] = ()
    deciles: DecileErrors | None = None
    budget: ByteBudget
    tasks: tuple[TaskScore, ...] = ()
    timings: tuple[StageTime, ...] = ()
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    command: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    device: str = ""
    date: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        lengths = {len(values) for values in (*self.ranks.values(), *self.damage.values())}
        if len(lengths) > 1:
            raise ValueError(f"damage and ranks must have one value per layer in every module, got lengths {lengths}")
        for module, values in self.damage.items():
            for layer, value in enumerate(values):
                _finite(f"damage of {module} in layer {layer}", value)

    @property
    def num_layers(self) -> int:
        """Layers that damage and ranks are given for."""
        return max((len(values) for values in (*self.ranks.values(), *self.damage.values())), default=0)

    def to_json(self) -> str:
        """Write as JSON, with the derived figures that readers ask for under `summary`.

        Raises:
            ValueError: `config` holds something that JSON cannot.
        """
        values = {"format": FORMAT, "summary": self._summary(), **dataclasses.asdict(self)}
        try:
            return json.dumps(values, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        except (TypeError, ValueError) as error:
            raise ValueError(f"the calibration's result cannot be written as JSON: {error}") from None

    @classmethod
    def from_json(cls, text: str, *, source: str = "calibration result") -> "CalibrationResult":
        """Read what `to_json` wrote.

        Raises:
            ValueError: It is not JSON, not a calibration result, or of a newer format.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{source}: not valid JSON: {error}") from None
        found = values.pop("format", None) if isinstance(values, dict) else None
        if not isinstance(found, int):
            raise ValueError(f"{source}: not a calibration result: it has no format number")
        if found > FORMAT:
            raise ValueError(f"{source}: written in format {found}; this version of spear-jax reads up to {FORMAT}")
        values.pop("summary", None)
        return parse_mapping(cls, values, source=source)

    @classmethod
    def load(cls, path: str | Path) -> "CalibrationResult":
        """Read a JSON file that holds a result."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"), source=str(path))

    def _summary(self) -> dict[str, Any]:
        return {
            "overhead_of_model": self.budget.overhead_of_model,
            "overhead_of_linears": self.budget.overhead_of_linears,
            "recovered": {gap.text: {arm.label: gap.recovered(arm) for arm in gap.arms} for gap in self.gaps},
        }


def _finite(what: str, value: float | None) -> None:
    if value is not None and not math.isfinite(value):
        raise ValueError(f"{what} is {value}, expected a finite number")
