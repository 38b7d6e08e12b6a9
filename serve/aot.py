"""Compile a whole int4 model for accelerators that this machine does not have, and say its costs.

`python -m pallas_kernels.aot` is the command. The code is here because what is compiled is the server's own decode and
prefill.
"""

import contextlib
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from rich.console import Console
from rich.table import Table

from pallas_kernels import dispatch, tpus
from pallas_kernels.peer_reduce import Reduction
from pallas_kernels.topology import GPUS, compiler_environment, gpu_topology, tpu_topology
from serve.bench_step import random_model
from serve.gpu import lay_out_for_hopper
from serve.request import SamplingParams
from serve.runner import decode_step, empty_state, prefill_step
from serve.sampling import SamplingState
from serve.tpu import lay_out_for_tpu
from spear_jax.cli import parse_flags, run_main
from spear_jax.config import ModelConfig, load_yaml
from spear_jax.models.decoder import Decoder
from spear_jax.models.quantize import weight_bytes
from spear_jax.nn.row_parallel import AXIS
from spear_jax.quant import QuantSpec
from spear_jax.sharding import OWN, SAME, of_parts, part, part_of, sum_rows

_MOST_GPUS = 8
_H200 = (4.8e12, 989e12)
"""Bytes and dense bfloat16 operations a second of an H200 (NVIDIA's data sheet)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AotConfig:
    """Compile prefill and decode of a W4 + EC model ahead of time. A table on stderr, JSON on stdout.

    FLOPs and bytes are counted from the architecture: every weight once, and the live cache. The JSON has the
    compiler's own count too, which takes a loop for one turn, and how many kernels the program calls, where layers that
    are alike are one function. Memory is the compiler's figure for one device.
    """

    topology: str = "v6e:2x2"
    """GPUs of one machine, h200:1x1x2, or a TPU and its chips: v5e:2x2, v5p:2x2x1, v6e:2x2, tpu7x:2x2x1."""

    model: Path = Path("configs/models/llama-3.1-8b.yaml")
    """YAML file of the architecture."""

    tp: int = 1
    """Devices that the model is divided over."""

    reduction: Reduction = "dual-write"
    """How devices sum parts of products: each writes into the others' memory, or psum."""

    layers: int | None = None
    """Keep the first layers only."""

    rank: int = 16
    """Rank of the static compensator that every linear gets; 0 for none."""

    group_size: Literal[-1, 32, 64, 128] = -1
    """Columns that share a scale."""

    slots: int = 16
    """Sequences decoded together."""

    context: int = 2048
    """Tokens that the cache has room for, and that figures for decode take as there."""

    chunk: int = 256
    """Tokens of a prompt that prefill takes at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Target:
    """What is compiled for: the platform, its kind of device, the devices, and bytes and operations a second of one."""

    platform: Literal["gpu", "tpu"]
    kind: str
    devices: list[Any]
    bandwidth: float
    flops: float

    @classmethod
    def named(cls, topology: str, tp: int) -> "_Target":
        name, _, chips = topology.partition(":")
        on_gpus = name in GPUS
        devices = [] if on_gpus else list(tpu_topology(topology).devices)
        count = _gpus(chips) if on_gpus else len(devices)
        if not 1 <= tp <= count:
            raise ValueError(f"tp must be from 1 to the {count} devices of {topology}, got {tp}")
        if on_gpus:
            rates = dict(zip(("bandwidth", "flops"), _H200, strict=True))
            devices = list(gpu_topology(name, count=count).devices)
            return cls(platform="gpu", kind="NVIDIA H200", devices=devices[:tp], **rates)
        kind = devices[0].device_kind
        chip = tpus.generation(kind)
        rates = {"bandwidth": chip.bandwidth * chip.cores, "flops": chip.bf16_flops * chip.cores}
        return cls(platform="tpu", kind=kind, devices=devices[:tp], **rates)


def _gpus(chips: str) -> int:
    """Read how many GPUs "1x1x2" are, one where nothing is said."""
    one, of, count = (chips or "1x1x1").rpartition("x")
    if (one, of) != ("1x1", "x") or not count.isdecimal() or not 1 <= int(count) <= _MOST_GPUS:
        raise ValueError(f"GPUs of one machine are given as h200:1x1xN, N up to {_MOST_GPUS}, got {chips!r}")
    return int(count)


def abstract_model(config: ModelConfig, aot: AotConfig, lay_out: Callable[[Decoder], Decoder]) -> Decoder:
    """Describe one device's part of a model with random int4 weights, laid out; no array is made."""
    part_of(config, aot.tp)

    def build() -> Decoder:
        spec = QuantSpec(group_size=aot.group_size)
        model = random_model(config, spec=spec, rank=aot.rank, dtype=jnp.dtype(jnp.bfloat16))
        if aot.tp == 1:
            return lay_out(model)
        return sum_rows(lay_out(part(model, 0, aot.tp)), parts=aot.tp, reduction=aot.reduction)

    return jax.eval_shape(build)


def steps(model: Decoder, aot: AotConfig) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Give decode and prefill as functions of (leaves, state, ...), and what further arguments they take."""
    tree = jax.tree.structure(model)

    def of(step: Callable[..., Any]) -> Callable[..., Any]:
        return lambda leaves, state, *rest: step(jax.tree.unflatten(tree, leaves), Decoder.logits, state, *rest)

    greedy = SamplingState.of([SamplingParams(max_tokens=1, temperature=0.0)])
    chunk = (np.zeros((1, aot.chunk), np.int32), np.zeros(6, np.int32), greedy)
    return {"decode": (of(decode_step), (np.ones(aot.slots, bool),)), "prefill": (of(prefill_step), chunk)}


def compile_steps(aot: AotConfig) -> list[dict[str, Any]]:
    """Compile every step; give what each costs a device.

    Raises:
        ValueError: The topology is not known, or the model cannot be divided so.
    """
    config = load_yaml(ModelConfig, aot.model)
    if aot.layers is not None:
        config = dataclasses.replace(config, num_layers=min(aot.layers, config.num_layers))
    target = _Target.named(aot.topology, aot.tp)
    lay_out = lay_out_for_tpu if target.platform == "tpu" else lay_out_for_hopper
    with dispatch.compiling_for(target.platform, kind=target.kind):
        model = abstract_model(config, aot, lay_out)
        sizes: dict[str, Any] = {"slots": aot.slots, "context": aot.context, "padding": aot.chunk, "devices": aot.tp}
        state = jax.eval_shape(lambda: empty_state(model, **sizes))
        results = []
        for name, (step, rest) in steps(model, aot).items():
            begin = time.perf_counter()
            lowered = _lower(step, (jax.tree.leaves(model), state), rest, target.devices)
            kernels = len(re.findall(r"custom_call @(?:tpu_custom_call|mosaic_gpu)", lowered.as_text()))
            compiled = lowered.compile()
            seconds = time.perf_counter() - begin
            results.append(
                {"step": name, "compile_seconds": seconds, "kernel_calls": kernels}
                | _costs(compiled)
                | _roofline(name, model, state, aot, target)
            )
            print(f"compiled {name} in {seconds:.1f} s", file=sys.stderr, flush=True)
    return results


def _lower(step: Callable[..., Any], held: Any, rest: tuple[Any, ...], devices: list[Any]) -> Any:
    """Trace a step for one device, or for several that hold their parts side by side along a leading axis."""
    if len(devices) == 1:
        place = SingleDeviceSharding(devices[0])
        held, rest = (
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), part)
            for part in (held, rest)
        )
        return jax.jit(step, donate_argnums=1).lower(*held, *rest)
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS,))
    divided = of_parts(step, mesh, own=2, gives=(SAME, OWN))
    results = (NamedSharding(mesh, SAME), NamedSharding(mesh, OWN))

    def parts(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(devices), *x.shape), x.dtype, sharding=NamedSharding(mesh, OWN))

    def whole(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, SAME))

    run = jax.jit(divided, donate_argnums=1, out_shardings=results)
    return run.lower(*jax.tree.map(parts, held), *jax.tree.map(whole, rest))


def _costs(compiled: Any) -> dict[str, Any]:
    memory, counted = compiled.memory_analysis(), compiled.cost_analysis() or {}
    argument, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return {
        "argument_bytes": argument,
        "temporary_bytes": temporary,
        # What a step gives back lies, but for a few tokens, in the donated state.
        "hbm_bytes": argument + temporary + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "compiler_flops": counted.get("flops"),
        "compiler_bytes": counted.get("bytes accessed"),
    }


def _roofline(name: str, model: Decoder, state: Any, aot: AotConfig, target: _Target) -> dict[str, Any]:
    """Count operations and bytes of a step on one device, and the time that neither can be done in less."""
    config = model.config
    rows, sequences = (aot.slots, aot.slots) if name == "decode" else (aot.chunk, 1)
    pairs = sum(n * k + aot.rank * (n + k) for n, k in config.module_shapes().values()) * config.num_layers
    keys = aot.context if name == "decode" else aot.chunk
    attended = 2 * config.num_heads * config.head_dim * keys * rows * config.num_layers
    head = model.embed if model.head is None else model.head
    vocabulary = head.shape[0] * config.hidden_size * sequences
    cache = weight_bytes(state.cache) * sequences // aot.slots
    read = weight_bytes(model) + cache * keys // aot.context
    if model.head is not None:
        read -= weight_bytes(model.embed)  # a few rows of the embedding are read
    flops = 2 * (pairs * rows + attended + vocabulary)
    return {
        "flops": flops,
        "bytes": read,
        "roofline_ms": 1e3 * max(flops / target.flops, read / target.bandwidth),
    }


def aot(config: AotConfig) -> None:
    """Compile, and print the figures."""
    with contextlib.redirect_stdout(sys.stderr):
        results = compile_steps(config)
    table = Table("step", "compile s", "HBM GiB", "temporary MiB", "GFLOP", "GB", "roofline ms")
    for result in results:
        table.add_row(
            result["step"],
            f"{result['compile_seconds']:.1f}",
            f"{result['hbm_bytes'] / 2**30:.2f}",
            f"{result['temporary_bytes'] / 2**20:.1f}",
            f"{result['flops'] / 1e9:.1f}",
            f"{result['bytes'] / 1e9:.2f}",
            f"{result['roofline_ms']:.2f}",
        )
    Console(stderr=True).print(table)
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    print(json.dumps({"config": settings, "jax": jax.__version__, "steps": results}))


def main() -> None:
    """Run the command line."""

    def run() -> None:
        config = parse_flags(AotConfig, prog="python -m pallas_kernels.aot")
        # Compilers read these when they are first used, which is after this.
        os.environ.update(compiler_environment())
        jax.config.update("jax_platforms", "cpu")
        try:
            aot(config)
        except ModuleNotFoundError as missing:
            raise ValueError(str(missing)) from None

    run_main(run)


if __name__ == "__main__":
    main()
