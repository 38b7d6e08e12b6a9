"""`python -m serve.bench_step`: the time of one decode step of an architecture with random int4 weights.

All layers, head and sampling are one jitted program, as the server runs it; nothing is read back between steps.
"""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array
from rich.console import Console
from rich.table import Table

from pallas_kernels.peer_reduce import Reduction
from serve.gpu import CommandBuffers, command_buffer_options
from serve.layout import lay_out
from serve.loop import Call, LoopRunner, LoopSettings
from serve.runner import DeviceState, Runner
from spear_jax.cli import parse_flags, run_main
from spear_jax.config import ModelConfig, load_yaml
from spear_jax.models.decoder import MODULES, Decoder, weight_shapes
from spear_jax.models.quantize import weight_bytes
from spear_jax.nn.row_parallel import PeerCache
from spear_jax.quant import CompensatorBank, QuantSpec, QuantTensor
from spear_jax.sharding import divide, make_mesh
from spear_jax.versions import package_versions

_WARM_UP = 3
"""Calls before any is timed: the first runs without CUDA graphs, the second makes them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Time decode steps. A table on stderr, JSON on stdout."""

    model: Path = Path("configs/models/llama-3.1-8b.yaml")
    """YAML file of the architecture."""

    layers: int | None = None
    """Keep the first layers only."""

    rows: tuple[int, ...] = (1, 32)
    """Numbers of sequences decoded together."""

    context: int = 1024
    """Tokens of each sequence that are in the cache."""

    ranks: tuple[int, ...] = (0, 16)
    """Ranks of the static compensators that every linear gets; 0 for none."""

    group_size: Literal[-1, 32, 64, 128] = -1
    """Columns that share a scale."""

    tensor_parallel: int = 1
    """Devices that the model is divided over."""

    reduction: Reduction = "psum"
    """How devices sum parts of products: into each other's memory on Hopper GPUs and TPUs, or psum."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations."""

    command_buffers: tuple[CommandBuffers, ...] = ("whole",)
    """How much of a step is one CUDA graph: as XLA has it (`default`), with the branches of sampling, or nothing."""

    sampling: Literal["greedy", "branch"] = "greedy"
    """Whether the program only takes the likeliest tokens, or chooses in each step whether any are drawn at random."""

    steps_per_call: tuple[int, ...] = (1,)
    """Steps that one program does, in a loop on the device."""

    loop: bool = False
    """Time the server's own loop (`serve/loop.py`), which chooses what each step is, samples, and ends answers."""

    steps: int = 48
    """Steps timed together, a multiple of those of a call."""

    repeats: int = 5
    """Times that is done; the median counts."""

    profile: Path | None = None
    """Folder to write a profile of a few steps of each case to, for XProf or Perfetto."""

    output: Path | None = None
    """JSON file of results, written after every case."""

    def check(self) -> None:
        """Raise ValueError for a setting that cannot be run."""
        for name in ("rows", "ranks", "command_buffers", "steps_per_call"):
            if not getattr(self, name):
                raise ValueError(f"{name}: give at least one")
        for name, least in {"context": 1, "steps": 1, "repeats": 1, "layers": 1, "tensor_parallel": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if any(each < 1 or self.steps % each for each in self.steps_per_call):
            raise ValueError(
                f"steps must be a multiple of each of steps_per_call, got {self.steps}, {self.steps_per_call}"
            )
        if min(self.rows) < 1 or min(self.ranks) < 0:
            raise ValueError(f"rows must be at least 1 and ranks at least 0, got {self.rows} and {self.ranks}")


def random_model(config: ModelConfig, *, spec: QuantSpec, rank: int, dtype: Any, seed: int = 0) -> Decoder:
    """Give a model of an architecture with random int4 linears; no float weight of them is ever made."""
    keys: Iterator[Array] = iter(jax.random.split(jax.random.key(seed), 256))
    shapes, count = config.module_shapes(), config.num_layers

    def draw(name: str, shape: tuple[int, ...]) -> Array:
        if "norm" in name:
            return jnp.ones(shape, jnp.float32)
        return (jax.random.normal(next(keys), shape, dtype) * 0.02).astype(dtype)

    whole = weight_shapes(config)
    linears = {f"layers.{name}.weight" for name in MODULES}
    weights: dict[str, Array] = {name: draw(name, shape) for name, shape in whole.items() if name not in linears}
    for name, (n, k) in shapes.items():
        packed = jax.random.bits(next(keys), (count, n, k // 2), jnp.uint8).astype(jnp.int8)
        scale = jnp.full((count, n, spec.groups(k, name=name)), k**-0.5 / 4.6, spec.scale_dtype)
        weights[f"layers.{name}.weight"] = QuantTensor(packed=packed, scale=scale)  # type: ignore[assignment]
    model = Decoder.from_weights(config, weights, dtype=dtype)
    if rank:
        banks = {name: _bank(next(keys), rank, count, n, k) for name, (n, k) in shapes.items()}
        model = model.replace(compensators=nnx.Dict(banks))
    return model


def _bank(key: Array, rank: int, layers: int, n: int, k: int) -> CompensatorBank:
    total = rank * layers
    a, bt = (
        jax.random.randint(part, (total, side), -127, 128, jnp.int8)
        for part, side in zip(jax.random.split(key), (k, n), strict=True)
    )
    scale = jnp.full((total,), 1e-3, jnp.float32)
    return CompensatorBank((rank,) * layers, a, bt, a_scale=scale, bt_scale=scale)


def _filled(state: DeviceState, *, context: int) -> DeviceState:
    """Give a state whose slots hold `context` tokens each, of random keys and values."""

    def fill(state: DeviceState) -> DeviceState:
        cache = state.cache
        leaves, tree = jax.tree.flatten(cache.cache if isinstance(cache, PeerCache) else cache)
        drawn = [jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)]
        filled: Any = jax.tree.unflatten(tree, drawn)
        if isinstance(cache, PeerCache):
            filled = dataclasses.replace(cache, cache=filled)
        slots = state.slots
        if slots is not None:
            running = dataclasses.replace(slots.running, decoding=jnp.ones_like(slots.running.decoding))
            slots = dataclasses.replace(slots, remaining=jnp.full_like(slots.remaining, 2**30), running=running)
        return dataclasses.replace(state, cache=filled, length=jnp.full_like(state.length, context), slots=slots)

    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.block_until_ready(jax.jit(fill, donate_argnums=0, out_shardings=places)(state))


def time_steps(
    model: Decoder,
    config: StepConfig,
    *,
    rows: int,
    buffers: CommandBuffers,
    per_call: int,
    profile: Path | None,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Time a decode step of `rows` sequences, `per_call` of them in a program.

    Medians in milliseconds: `ms` of a step, `host_ms` of the part in which the host starts it and does not wait.
    """
    options: dict[str, Any] = {
        "slots": rows,
        "context": config.context + config.steps * (config.repeats + 1) + _WARM_UP * per_call,
        "buckets": [1],
        "lone_program": False,
        "compiler_options": command_buffer_options(buffers) if jax.default_backend() == "gpu" else None,
        "mesh": mesh,
    }
    if config.loop:
        runner = LoopRunner(model, settings=LoopSettings(passes=per_call, stall_tokens=1), **options)
        step = functools.partial(runner.advance, Call.of(slots=rows, drop=np.zeros(rows, bool), passes=per_call))
    else:
        runner = Runner(model, greedy_program=config.sampling == "greedy", steps_per_call=per_call, **options)
        step = functools.partial(runner.decode, np.ones(rows, bool))
    runner._state = _filled(runner._state, context=config.context)
    for _ in range(_WARM_UP):
        jax.block_until_ready(step())
        runner.check()
    times = []
    for repeat in range(config.repeats + 1):
        trace = contextlib.nullcontext()
        if profile is not None and repeat == config.repeats:
            trace = jax.profiler.trace(str(profile))
        with trace:
            begin, token = time.perf_counter(), None
            for _ in range(config.steps // per_call):
                # None is kept but the last: memory is given out at the same places again, as CUDA graphs want it.
                token = step()
            called = time.perf_counter()
            jax.block_until_ready(token)
        if repeat < config.repeats:
            times.append([(end - begin) / config.steps * 1e3 for end in (time.perf_counter(), called)])
    runner.check()
    return dict(zip(("ms", "host_ms"), map(statistics.median, zip(*times, strict=True)), strict=True))


def bench(config: StepConfig) -> Mapping[str, Any]:
    """Run every case; give and write the results.

    Raises:
        ValueError: A setting cannot be run, or a group size does not divide a module's inputs.
    """
    config.check()
    architecture = load_yaml(ModelConfig, config.model)
    if config.layers is not None:
        architecture = dataclasses.replace(architecture, num_layers=min(config.layers, architecture.num_layers))
    mesh = make_mesh(config.tensor_parallel) if config.tensor_parallel > 1 else None
    device = jax.devices()[0]
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "versions": package_versions("jax", "flax"),
        "command": " ".join(["python -m serve.bench_step", *sys.argv[1:]]),
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "cases": [],
    }
    table = Table("rows", "rank", "graphs", "steps a call", "ms a step", "ms to start it", "GB/s of weights")
    for rank in config.ranks:
        spec = QuantSpec(group_size=config.group_size)
        model = random_model(architecture, spec=spec, rank=rank, dtype=jnp.dtype(config.dtype))
        nbytes = weight_bytes(model)
        model = lay_out(model) if mesh is None else divide(model, mesh, lay_out=lay_out, reduction=config.reduction)
        jax.block_until_ready(jax.tree.leaves(model))
        for rows, buffers, per_call in itertools.product(config.rows, config.command_buffers, config.steps_per_call):
            name = f"rows-{rows}-rank-{rank}-{buffers}-{per_call}"
            profile = None if config.profile is None else config.profile / name
            case = {"rows": rows, "rank": rank, "command_buffers": buffers, "steps_per_call": per_call}
            case |= time_steps(model, config, rows=rows, buffers=buffers, per_call=per_call, profile=profile, mesh=mesh)
            case["weight_bytes"] = nbytes
            results["cases"].append(case)
            times = f"{case['ms']:.3f}", f"{case['host_ms']:.3f}"
            table.add_row(str(rows), str(rank), buffers, str(per_call), *times, f"{nbytes / case['ms'] / 1e6:.0f}")
            print(f"{name}: {times[0]} ms a step, {times[1]} to start it", file=sys.stderr, flush=True)
            if config.output is not None:
                config.output.parent.mkdir(parents=True, exist_ok=True)
                config.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    Console(stderr=True).print(table)
    return results


def main() -> None:
    """Run the command line."""
    run_main(lambda: print(json.dumps(bench(parse_flags(StepConfig, prog="python -m serve.bench_step")))))


if __name__ == "__main__":
    main()
