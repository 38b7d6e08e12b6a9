"""Measure a model: perplexity over a text and zero-shot tasks; one JSON object on stdout.

uv run python -m spear_jax.evaluate --text FILE --max-windows 6 --quantize rtn
uv run python -m spear_jax.evaluate --checkpoint DIR --compare --text FILE
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from spear_jax.cli import parse_flags, run_main
from spear_jax.versions import package_versions

if TYPE_CHECKING:
    from spear_jax.evaluation.scoring import ReportProgress
    from spear_jax.models import DType, LoadedModel
    from spear_jax.models.decoder import Decoder

WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")

_Bos = tyro.conf.create_mutex_group(required=False, title="beginning of sequence")
_Zero = tyro.conf.create_mutex_group(required=False, title="zero points")
_Flag = tyro.conf.FlagCreatePairsOff


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure perplexity over a text, and zero-shot tasks, of a model as it is or quantized.

    Perplexity is exp(mean next-token cross-entropy) over non-overlapping windows; it is measured when --text is given,
    or when no --tasks are. Prints one JSON object on stdout; progress, and on a terminal a table, go to stderr.
    """

    model: str = "demo"
    """`demo` (SmolLM2-135M-Instruct), a Hugging Face directory, a GGUF file, a hub id `org/name`, or a checkpoint."""

    checkpoint: Path | None = None
    """Measure what a calibration wrote: its output directory, or the checkpoint in it; `demo` for the demo model as it
    is served by default. Takes the place of --model."""

    compare: bool = False
    """Measure the reference, RTN, the W4 base, static and gated compensators as well, as far as they are at hand."""

    text: Path | None = None
    """Text file for perplexity. Without it: the WikiText-2 test split from the dataset hub."""

    window: int = 1024
    """Tokens of text in a window; BOS comes on top."""

    max_windows: int | None = None
    """Measure the first windows only. Without it: all, and the shorter one at the end."""

    bos: Annotated[bool, _Bos, _Flag] = False
    """Begin each window and each task prompt with BOS. With neither flag: as the tokenizer does."""

    no_bos: Annotated[bool, _Bos, _Flag] = False
    """Never add BOS."""

    quantize: Literal["none", "rtn"] = "none"
    """Quantize the linear layers to int4 first: `rtn` rounds to nearest."""

    group_size: Literal[-1, 32, 64, 128] = -1
    """Input features that share a scale; -1 is one scale per output channel."""

    symmetric: Annotated[bool, _Zero, _Flag] = False
    """Quantize without zero points (the default)."""

    asymmetric: Annotated[bool, _Zero, _Flag] = False
    """Quantize with zero points."""

    embedding: Literal["keep", "int8"] = "keep"
    """Embedding and head: as loaded, or rounded to int8 with a scale a row."""

    tasks: tuple[str, ...] = ()
    """Zero-shot tasks, separated by commas or blanks: lambada, hellaswag, arc_easy, piqa, winogrande, or all."""

    tasks_dir: Path | None = None
    """Folder with the tasks' files. Without it: from the dataset hub."""

    limit: int | None = None
    """Score the first examples of each task only."""

    batch_size: int | None = None
    """Windows computed at a time; task batches hold about as many tokens. Default: 1 on CPU, 8 elsewhere."""

    tensor_parallel: int = 1
    """Devices of this machine that each model is divided over."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations; `auto` is float32 on CPU, bfloat16 elsewhere. The softmax is always float32."""

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"--window must be at least 2 tokens, got {self.window}")
        for name in ("max_windows", "limit", "batch_size", "tensor_parallel"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.compare and self.checkpoint is None:
            raise ValueError("--compare: give the --checkpoint to compare")
        if self.checkpoint is not None and (self.quantize != "none" or self.embedding != "keep"):
            raise ValueError("--checkpoint holds a quantized model: leave out --quantize and --embedding")

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks asked for, in order, each once."""
        from spear_jax.evaluation import TASKS

        names = [name for item in self.tasks for name in item.split(",") if name]
        return tuple(TASKS) if "all" in names else tuple(dict.fromkeys(names))

    def as_json(self) -> dict[str, Any]:
        """Give the settings, with each pair of flags as the one value it stands for."""
        values: dict[str, Any] = dataclasses.asdict(self)
        del values["no_bos"], values["asymmetric"]
        return values | {
            "text": None if self.text is None else str(self.text),
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "tasks": list(self.task_names),
            "tasks_dir": None if self.tasks_dir is None else str(self.tasks_dir),
            "bos": True if self.bos else False if self.no_bos else None,
            "symmetric": not self.asymmetric,
        }


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Do what the command does; give its result as a JSON object.

    Raises:
        ValueError: An input is malformed, too short, or does not fit the model.
        OSError: An input cannot be read.
    """
    import jax

    from spear_jax import loading
    from spear_jax.evaluation import load_examples
    from spear_jax.evaluation.comparison import Overhead, add_recovery, compare, variants
    from spear_jax.evaluation.tasks import find_task
    from spear_jax.models.quantize import weight_bytes

    begin = time.perf_counter()
    # What can be checked before the model takes its time to load is checked here.
    for name in config.task_names:
        find_task(name)
    text = _read_text(config) if config.text is not None or not config.task_names else None
    examples = {name: load_examples(name, tasks_dir=config.tasks_dir, limit=config.limit) for name in config.task_names}

    path, details = None, {}
    if config.checkpoint is None:
        loaded = loading.load(config.model, dtype=config.dtype)
    else:
        loaded, path, details = _calibrated(config.checkpoint, config.dtype)
    bos_id = _bos_id(config, loaded)
    length = config.window + (bos_id is not None)
    if text is not None and length > loaded.config.max_position:
        with_bos = " and BOS" if bos_id is not None else ""
        raise ValueError(f"--window {config.window}{with_bos}: the model has {loaded.config.max_position} positions")
    stored = _quantize(loaded.model, config)
    meter = _Meter(config, loaded, text, examples, bos_id)
    result: dict[str, Any] = {
        "model": loaded.name,
        "bits": round(_bits(stored), 4),
        "model_bytes": weight_bytes(stored),
        "bos": bos_id is not None,
    }
    if stored.compensators:
        result |= Overhead.of(stored).as_json()
    if config.compare:
        arms, notes = variants(details, loaded, path=path, dtype=config.dtype, load_source=loading.load)
        result["arms"] = dict(compare(arms, meter.measure))
        result["notes"] = notes
        add_recovery(result["arms"])
        result |= meter.measured(list(result["arms"].values())[-1])
    else:
        result |= meter.measure(stored)
    return result | {
        "config": config.as_json(),
        "dtype": str(stored.dtype),
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.perf_counter() - begin, 3),
        "versions": package_versions("spear-jax", "jax", "flax", "numpy", "transformers"),
    }


class _Meter:
    """Measures one model after another on the same text and tasks."""

    def __init__(
        self,
        config: EvaluateConfig,
        loaded: "LoadedModel",
        text: str | None,
        examples: dict[str, Any],
        bos_id: int | None,
    ) -> None:
        import jax
        import numpy as np

        from spear_jax.sharding import make_mesh

        self.config, self.examples, self.bos_id = config, examples, bos_id
        self.tokenizer, self.max_length = loaded.tokenizer, loaded.config.max_position
        self.mesh = make_mesh(config.tensor_parallel) if config.tensor_parallel > 1 else None
        self.on_cpu = jax.default_backend() == "cpu"
        self.batch_size = config.batch_size or (1 if self.on_cpu else 8)
        self.tokens = None
        if text is not None:
            ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            self.tokens = np.asarray(ids, np.int32)

    def measure(self, stored: "Decoder", label: str = "") -> dict[str, Any]:
        """Give the figures of a model as JSON values."""
        from spear_jax.evaluation import perplexity, run_task
        from spear_jax.models.quantize import expand_model
        from spear_jax.sharding import DividedModel, divide

        # Unpacking int4 in every step costs a CPU more than memory for the expanded weights.
        model: Any = expand_model(stored, stored.dtype) if self.on_cpu else stored
        if self.mesh is not None:
            model = DividedModel(parts=divide(model, self.mesh, lay_out=lambda part: part), mesh=self.mesh)
        prefix = f"{label}: " if label else ""
        result: dict[str, Any] = {}
        if self.tokens is not None:
            start = time.perf_counter()
            with _progress(f"{prefix}perplexity") as progress:
                measured = perplexity(
                    model,
                    self.tokens,
                    window=self.config.window,
                    bos_id=self.bos_id,
                    max_windows=self.config.max_windows,
                    batch_size=self.batch_size,
                    progress=progress,
                )
            seconds = time.perf_counter() - start
            result |= {
                "perplexity": measured.value,
                "nll": measured.nll,
                "tokens": measured.tokens,
                "windows": measured.windows,
                "predictions": measured.predictions,
                "windows_per_second": round(measured.windows / seconds, 4),
            }
        if self.examples:
            result["tasks"] = {}
        for name, chosen in self.examples.items():
            with _progress(prefix + name) as progress:
                scored = run_task(
                    model,
                    self.tokenizer,
                    name,
                    chosen,
                    max_length=self.max_length,
                    bos_id=self.bos_id,
                    batch_tokens=self.batch_size * max(self.config.window, 1024),
                    progress=progress,
                )
            result["tasks"][name] = {**scored.metrics, "examples": scored.examples}
        return result

    @staticmethod
    def measured(arm: dict[str, Any]) -> dict[str, Any]:
        """Give what `measure` found of an arm, without what a comparison adds."""
        keys = ("perplexity", "nll", "tokens", "windows", "predictions", "windows_per_second", "tasks")
        return {key: arm[key] for key in keys if key in arm}


def _calibrated(path: Path, dtype: "DType") -> "tuple[LoadedModel, Path | None, dict[str, Any]]":
    """Load a checkpoint; give its model, the path that was found, and what it says of itself."""
    from spear_jax import loading
    from spear_jax.checkpoint import inspect_checkpoint, load_checkpoint
    from spear_jax.models.source import DEMO
    from spear_jax.recovery import load_recovered, recovery_details

    found = loading.find_checkpoint(path)
    if found is None and str(path) == DEMO:
        return load_recovered(dtype=dtype), None, recovery_details()
    if found is None and not path.exists():
        raise FileNotFoundError(f"--checkpoint {path}: no such checkpoint")
    # What is no checkpoint is refused by its loader, which says why.
    place = found or path
    return load_checkpoint(place, dtype=dtype), place, inspect_checkpoint(place)[0].details


def _read_text(config: EvaluateConfig) -> str:
    from spear_jax.evaluation.tasks import load_hub_rows

    if config.text is None:
        rows = load_hub_rows(*WIKITEXT, instead="--text FILE")
        return "\n\n".join(rows["text"])
    try:
        text = config.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{config.text}: not UTF-8 text: {error}") from None
    if not text.strip():
        raise ValueError(f"{config.text}: the text is empty")
    return text


def _bos_id(config: EvaluateConfig, loaded: "LoadedModel") -> int | None:
    """Give the id to begin with: where no flag says so, the one that the tokenizer itself puts before a text."""
    bos_id = loaded.config.bos_id
    if config.no_bos:
        return None
    if config.bos:
        if bos_id is None:
            raise ValueError(f"--bos: {loaded.name} has no BOS token")
        return bos_id
    return bos_id if bos_id is not None and loaded.tokenizer("a")["input_ids"][:1] == [bos_id] else None


def _quantize(model: "Decoder", config: EvaluateConfig) -> "Decoder":
    from spear_jax.models.quantize import quantize_model, quantize_tables
    from spear_jax.quant import QuantSpec

    if config.embedding == "int8":
        model = quantize_tables(model)
    if config.quantize == "none":
        return model
    return quantize_model(model, QuantSpec(group_size=config.group_size, symmetric=not config.asymmetric))


def _bits(model: "Decoder") -> float:
    """Give the bits that a weight of the linear layers takes as stored, scales and zero points included."""
    from spear_jax.models.decoder import MODULES
    from spear_jax.models.quantize import weight_bytes

    linears = [getattr(model.layers, name) for name in MODULES]
    stored = sum(weight_bytes(linear.weight) for linear in linears)
    return 8 * stored / sum(math.prod(linear.weight.shape) for linear in linears)


@contextmanager
def _progress(label: str) -> Iterator["ReportProgress"]:
    """Show a bar on stderr while the block runs."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        row = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)


def main() -> None:
    """Run the command line."""
    run_main(lambda: _main(parse_flags(EvaluateConfig, prog="python -m spear_jax.evaluate")))


def _main(config: EvaluateConfig) -> None:
    result = evaluate(config)
    print(json.dumps(result))
    if sys.stderr.isatty() or config.compare:
        from spear_jax.evaluation.tables import print_table

        print_table(result)


if __name__ == "__main__":
    main()
