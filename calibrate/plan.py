"""What a calibration is going to do: its stages, about how long each takes, and the bytes of what it makes."""

import dataclasses

from calibrate.config import CalibrateConfig
from spear_jax.config import ModelConfig

_SWEEPS = {
    "imported": 0.0,
    "rtn": 0.0,
    "awq": 20,
    "clip": 24,
    "learned-clip": 100,
    "gptq": 4,
    "gptq-clip": 28,
    "refined": 110,
}
"""About how many products of a weight with its inputs' moment each quantizer takes."""

_COMPILE_SECONDS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """One stage and its estimated seconds."""

    name: str
    seconds: float
    what: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The stages of a run, and bytes: of the W4 model as stored, and what compensators may take."""

    stages: tuple[PlannedStage, ...]
    reference_bytes: int
    w4_bytes: int
    budget_bytes: int

    @property
    def seconds(self) -> float:
        """Estimated seconds in all."""
        return sum(stage.seconds for stage in self.stages)

    def lines(self) -> list[str]:
        """Write the plan for a reader."""
        width = max(len(stage.name) for stage in self.stages)
        sizes = (
            f"{self.reference_bytes / 1e6:.1f} MB in 16 bits -> {self.w4_bytes / 1e6:.1f} MB as W4 + at most "
            f"{self.budget_bytes / 1e6:.2f} MB of compensators"
        )
        rows = [f"  {s.name:{width}}  {_duration(s.seconds):>8}  {s.what}" for s in self.stages]
        return [sizes, *rows, f"  {'in all':{width}}  {_duration(self.seconds):>8}  (an estimate)"]


def make_plan(config: CalibrateConfig, model: ModelConfig, *, eval_tokens: int, speed: float) -> Plan:
    """Estimate a run at `speed` floating point operations a second, counting matrix products alone.

    `eval_tokens` are the tokens of all evaluation texts together.
    """
    shapes = model.module_shapes().values()
    weights = model.num_layers * sum(n * k for n, k in shapes)
    table = model.vocab_size * model.hidden_size
    forward, head = 2 * weights, 2 * table
    squares = model.num_layers * sum(k * k for _, k in shapes)
    solver = model.num_layers * sum(2 * n * k * k for n, k in shapes)
    tokens = config.sequences * config.length
    moment_tokens = min(config.sequences, config.moment_sequences) * config.length
    damage_tokens = min(config.sequences, config.damage_sequences) * config.length
    step_tokens = config.batch_size * config.length
    # A recomputed forward pass, and a backward pass through activations (and into weights, where they are trained).
    step = step_tokens * (3 * forward + 5 * head)
    step_into_weights = step_tokens * forward

    stages: list[tuple[str, float, str]] = []

    def add(name: str, operations: float, what: str, *, compile_seconds: float = _COMPILE_SECONDS) -> None:
        stages.append((name, operations / (0.6 * speed) + compile_seconds, what))

    sampled = 1 - config.text_share if config.text else 1.0
    sources = [", ".join(config.text)] if sampled < 1 else []
    if sampled:
        sources.append("the model itself")
    add("load", 0, config.model, compile_seconds=5)
    add(
        "text",
        2 * sampled * tokens * (forward + head),
        f"{config.sequences} x {config.length} tokens, from {' and '.join(sources)}",
    )
    grid = "per channel" if config.group_size == -1 else f"groups of {config.group_size}"
    add(
        "quantize",
        moment_tokens * (forward + 2 * squares) + _SWEEPS[config.quantizer] * solver,
        f"{config.quantizer}, {'asymmetric' if config.asymmetric else 'symmetric'}, {grid}",
    )
    targets = tokens * forward
    if config.zero_byte:
        operations = targets + config.zero_steps * (step + step_into_weights)
        add("train zero-byte", operations, f"{config.zero_steps} steps, {' and '.join(config.zero_byte)}")
        targets = 0
    if config.budget:
        if config.damage_sequences:
            pairs = 4 * (model.num_layers + 1) / 2
            add("diagnose", damage_tokens * pairs * forward, "damage (1 - CKA) of each module alone")
        if config.latency_aware:
            add("latency", 0, "time that a compensator adds to each module")
        eigen = 2 * model.num_layers * sum(20 * min(n, k) ** 3 for n, k in shapes)
        add("place and initialise", eigen, f"{config.placement}, {config.budget:.2%} of the bytes, whitened SVD")
        if config.local_steps:
            operations = config.local_steps * 6 * config.max_rank * (squares + weights)
            add("train locally", operations, f"{config.local_steps} steps, each module by itself")
        extra = step_into_weights if config.joint else 0
        joint = f", with {' and '.join(config.joint)}" if config.joint else ""
        add("train", targets + config.steps * (step + extra), f"{config.steps} steps, {config.gate} gate{joint}")
        if config.static_too and config.gate != "static":
            add("train static", config.steps * (step + extra), f"{config.steps} steps, for comparison")
    arms = 3 + bool(config.zero_byte) + bool(config.budget) + (config.quantizer != "rtn")
    add("evaluate", arms * eval_tokens * (forward + head), f"{arms - 1} arms, {eval_tokens:,} tokens each")
    add("write", 0, "checkpoint and report", compile_seconds=3)

    norms = 4 * model.num_layers * 2 * model.hidden_size
    tables = 2 * table * (1 if model.tie_embeddings else 2)
    per_scale, scale_bytes = (0, 4) if config.group_size == -1 else (config.group_size, 2)
    scale_bytes += config.asymmetric
    scales = model.num_layers * scale_bytes * sum(n * (k // per_scale if per_scale else 1) for n, k in shapes)
    w4 = weights // 2 + scales + tables + norms
    return Plan(
        stages=tuple(PlannedStage(name=name, seconds=seconds, what=what) for name, seconds, what in stages),
        reference_bytes=2 * weights + tables + norms,
        w4_bytes=w4,
        budget_bytes=int(config.budget * w4),
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
