"""How long an iteration takes: a measured table, its file, and a slow correction from what is observed."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.tpus import GENERATIONS
from spear_jax.config import ModelConfig

FORMAT = 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """`seconds` [E, D, C, K] of an iteration, by numpy or on the device; the same code runs inside a jitted program.

    E: sets of error compensators that a prompt chunk is run with, from all to fewest. D: decoding sequences, from 0.
    C: sizes of the prompt chunk, from 0, one a compiled program. K: tokens in the cache of every sequence. `decodes`
    [D], `chunks` [C] and `contexts` [K] say which, rising. Each set must take no longer than the one before, and time
    must not fall along the other axes (`monotone`). `longest` says that decoding costs what the longest context makes
    it cost, rather than the mean.
    """

    seconds: Any
    decodes: Any
    chunks: Any
    contexts: Any
    longest: bool = dataclasses.field(metadata={"static": True})

    def at(self, decodes: Any, context: Any) -> Float[Array, "E C"]:
        """Interpolate between measured numbers of sequences and contexts, and go straight on past the last context."""
        i, across = _between(self.decodes, decodes)
        k, along = _between(self.contexts, context)
        near, far = self.seconds[:, i], self.seconds[:, i + 1]
        mixed = near + across * (far - near)
        return mixed[..., k] + along * (mixed[..., k + 1] - mixed[..., k])

    def step(self, decodes: Any, context: Any, start: Any) -> Float[Array, "E C"]:
        """Give the seconds of an iteration that decodes at one context and has its chunk begin at position `start`."""
        return self.at(decodes, context) + self.at(0, start) - self.at(0, context)

    def scaled(self, factor: float) -> "LatencyTable":
        """Give the table of a machine that takes `factor` times as long."""
        return dataclasses.replace(self, seconds=self.seconds * factor)


def _between(grid: Any, value: Any) -> tuple[Any, Any]:
    """Give the grid point below a value, and how far it is to the next one in parts of the gap."""
    xp = grid.__array_namespace__()
    value = xp.asarray(value, dtype=grid.dtype)
    i = xp.clip(xp.searchsorted(grid, value, side="right") - 1, 0, grid.shape[0] - 2)
    return i, xp.maximum((value - grid[i]) / (grid[i + 1] - grid[i]), 0.0)


def monotone(seconds: Float[np.ndarray, "E D C K"]) -> Float[np.ndarray, "E D C K"]:
    """Raise what noise measured as faster than a smaller step, or than one with fewer compensators."""
    for axis in (1, 2, 3):
        seconds = np.maximum.accumulate(seconds, axis=axis)
    return np.maximum.accumulate(seconds[::-1], axis=0)[::-1]


def make_table(
    seconds: Any, *, decodes: Sequence[int], chunks: Sequence[int], contexts: Sequence[int], longest: bool
) -> LatencyTable:
    """Check and even out measurements.

    Raises:
        ValueError: Axes do not rise, do not begin where they must, or do not fit the measurements.
    """
    seconds = np.asarray(seconds, np.float64)
    axes = {"decodes": decodes, "chunks": chunks, "contexts": contexts}
    for name, axis in axes.items():
        if len(axis) < 2 or list(axis) != sorted(set(axis)) or (name != "contexts" and axis[0] != 0):
            raise ValueError(f"{name} must rise, from 0 but for contexts, and have two points at least, got {axis}")
    shape = tuple(len(axis) for axis in axes.values())
    if seconds.ndim != 4 or not len(seconds) or seconds.shape[1:] != shape:
        raise ValueError(f"seconds have shape {seconds.shape}, expected [sets, {shape[0]}, {shape[1]}, {shape[2]}]")
    if not np.isfinite(seconds).all() or seconds.min() < 0:
        raise ValueError("seconds must be finite and not negative")
    points = {name: np.asarray(axis, np.float64) for name, axis in axes.items()}
    return LatencyTable(seconds=monotone(seconds), longest=longest, **points)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """A table as its file has it. `identity` says what was measured; `kept` names the compensated modules of each set.

    `source` tells how the figures came about: `measured`, or what they were computed from.
    """

    table: LatencyTable
    kept: tuple[tuple[str, ...], ...]
    identity: Mapping[str, Any]
    source: str

    def save(self, path: Path) -> None:
        """Write the table as JSON, milliseconds."""
        table = self.table
        axes = {name: getattr(table, name).astype(int).tolist() for name in ("decodes", "chunks", "contexts")}
        rounded = np.round(table.seconds * 1e3, 5).tolist()
        content = {
            "format": FORMAT, "source": self.source, "identity": dict(self.identity), "kept": self.kept,
            "longest": table.longest, **axes, "milliseconds": rounded,
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def check(self, identity: Mapping[str, Any], *, path: Path) -> None:
        """Refuse a table of another device, model or version, or one measured before something was changed.

        Raises:
            ValueError: Names what differs.
        """
        names = sorted({*identity, *self.identity})
        differing = [name for name in names if identity.get(name) != self.identity.get(name)]
        if differing:
            what = ", ".join(f"{n} {self.identity.get(n)!r}, now {identity.get(n)!r}" for n in differing)
            again = "run `python -m spear_jax.serve profile` with the settings that you serve with"
            raise ValueError(f"{path} was measured with {what}: {again}")


def load_profile(path: Path) -> Profile:
    """Read a table.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a latency table, or one of another format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"latency table {path} does not exist: run `python -m spear_jax.serve profile`")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        axes = {name: content[name] for name in ("decodes", "chunks", "contexts")}
        table = make_table(np.asarray(content["milliseconds"]) / 1e3, longest=bool(content["longest"]), **axes)
        kept = tuple(tuple(names) for names in content["kept"])
        if len(kept) != len(table.seconds):
            raise ValueError(f"{len(kept)} sets of compensators for {len(table.seconds)} in the measurements")
        return Profile(table=table, kept=kept, identity=content["identity"], source=content["source"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no latency table that can be read: {error}") from None


class Drift:
    """A factor on predicted times that slowly follows what is observed: clocks change, and neighbours come and go.

    A single step counts at most as twice as far off as expected, so that a pause of the host leaves little behind.
    """

    _RATE = 0.02

    def __init__(self) -> None:
        self.factor = 1.0

    def observe(self, *, predicted: float, observed: float) -> None:
        """Take in a step that was predicted without this factor."""
        if predicted > 0:
            ratio = min(max(observed / predicted, self.factor / 2), self.factor * 2)
            self.factor += self._RATE * (ratio - self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a roofline needs: bytes/s of memory, operations/s of matrix products, seconds that a step costs besides.

    Of several `devices` that share a model, also bytes/s from each to the others, and seconds that a sum over them
    takes beside.
    """

    name: str
    bandwidth: float
    operations: float
    overhead: float = 0.8e-3
    link: float
    sum_latency: float
    devices: int = 1


H200 = Hardware(name="H200", bandwidth=0.85 * 4.8e12, operations=0.6 * 989e12, link=0.7 * 450e9, sum_latency=12e-6)
"""Data sheet (SXM: 4.8 TB/s, 989 bf16 TFLOP/s dense, NVLink 450 GB/s each way) times shares that well-tuned kernels
reach; not measured here."""

_ICI = {"v5e": 200e9, "v5p": 600e9, "v6e": 448e9, "tpu7x": 600e9}
"""Bytes/s between a TPU and its neighbours, all links one way, by data sheets."""

_ROOFLINES = {"h200": H200} | {
    name: Hardware(
        name=name,
        bandwidth=0.85 * chip.bandwidth,
        operations=0.6 * chip.bf16_flops,
        link=0.7 * _ICI[name],
        sum_latency=6e-6,
    )
    for name, chip in GENERATIONS.items()
}


def hardware(spec: str = "h200") -> Hardware:
    """Give what a roofline needs of a chip, or of several: `h200`, `v5e`, `h200x4`. A TPU is one core of its kind.

    Raises:
        ValueError: It is none that is known.
    """
    match = re.fullmatch(r"(.+?)(?:x([1-9]\d*))?", spec.lower())
    if match is None or match[1] not in _ROOFLINES:
        raise ValueError(f"{spec!r} is none of {', '.join(_ROOFLINES)}, nor several of one, as h200x4")
    found, devices = _ROOFLINES[match[1]], int(match[2] or 1)
    return dataclasses.replace(found, devices=devices, name=found.name if devices == 1 else f"{devices} {found.name}")


def roofline(
    config: ModelConfig,
    hardware: Hardware,
    *,
    decodes: Sequence[int],
    chunks: Sequence[int],
    contexts: Sequence[int],
    density: float = 0.38,
    rank: int = 32,
) -> Profile:
    """Compute the table of an int4 model with bf16 activations and cache from a roofline, where none was measured.

    The chunk and the decode step are programs of their own, as the engine runs them: each reads the weights. `density`
    is the share of linears that have a compensator, of `rank`, which the second set leaves out. Several devices divide
    the work evenly, but for two sums a layer.
    """
    parts = hardware.devices
    bandwidth, operations = parts * hardware.bandwidth, parts * hardware.operations
    shapes = config.module_shapes().values()
    linear = config.num_layers * sum(n * k for n, k in shapes)
    low_rank = config.num_layers * density * sum(rank * (n + k) for n, k in shapes)
    head = config.vocab_size * config.hidden_size
    per_token = 4.0 * config.num_kv_heads * config.head_dim * config.num_layers  # bytes of keys and values, bf16
    pairs = 4.0 * config.num_heads * config.head_dim * config.num_layers  # operations for a query and a key
    d, c, k = (np.asarray(axis, float) for axis in np.meshgrid(decodes, chunks, contexts, indexing="ij"))

    def program(rows: Any, sequences: Any, keys: Any, seen: Any, extra: float) -> Any:
        """Time a program of so many rows, of which `sequences` need logits; `keys` are read, `seen` by each row."""
        reading = (linear / 2 + 2 * head + extra) / bandwidth
        computing = (2 * rows * (linear + extra) + 2 * sequences * head) / operations
        attending = np.maximum(keys * per_token / bandwidth, rows * seen * pairs / operations)
        sent = 2 * (parts - 1) / parts * rows * config.hidden_size * 2 / hardware.link
        summing = 2 * config.num_layers * (hardware.sum_latency + sent) if parts > 1 else 0.0
        return np.where(rows > 0, hardware.overhead + np.maximum(reading, computing) + attending + summing, 0.0)

    seconds = [program(d, d, d * k, k, low_rank) + program(c, 1, k + c, k + c / 2, extra) for extra in (low_rank, 0.0)]
    table = make_table(np.stack(seconds), decodes=decodes, chunks=chunks, contexts=contexts, longest=False)
    source = f"computed from a roofline of {hardware.name}, not measured"
    identity = {"device": hardware.name, "density": density, "rank": rank}
    return Profile(table=table, kept=(tuple(config.module_shapes()), ()), identity=identity, source=source)
