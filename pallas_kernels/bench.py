"""Time kernels on the GPU at hand beside what a user could run instead, each checked against the reference first.

python -m pallas_kernels.bench int4_matmul --rows 1 16 32 64 --rank 16 --output pallas_kernels/results/int4_matmul.json
"""

import argparse
import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.int4_matmul import Compensator, int4_matmul
from pallas_kernels.int4_matmul.gpu import choose_config
from pallas_kernels.timing import copies, kernel_microseconds
from pallas_kernels.tune import SHAPES, Problem

_TOLERANCE = 2e-2
_READ_BYTES = 2**29


def read_bandwidth() -> float:
    """Measure how fast the device reads, in bytes a second: the most that any kernel can be held to."""
    arrays = [
        jax.random.bits(key, (512, _READ_BYTES // 2048), jnp.uint32) for key in jax.random.split(jax.random.key(0))
    ]
    return arrays[0].nbytes / (kernel_microseconds(lambda array: jnp.sum(array, axis=1), arrays) * 1e-6)


def bench_int4_matmul(problem: Problem, *, rank: int) -> dict[str, Any]:
    """Time one product: bfloat16 weights, XLA on int4, ours, ours with a compensator whose z is known, or computed."""
    weights, x = problem.weights(), problem.x()
    compensator, z = _compensator(problem, rank)

    def ours(weight: Any, x: jax.Array, **kwargs: Any) -> jax.Array:
        codes, scale = weight
        return int4_matmul(x, codes, scale, layout="fragments", implementation="mosaic_gpu", **kwargs)

    def xla(weight: Any, x: jax.Array, **kwargs: Any) -> jax.Array:
        codes, scale = weight
        return int4_matmul(x, codes, scale.T, implementation="xla", **kwargs)

    def reference(weight: Any, x: jax.Array, **kwargs: Any) -> jax.Array:
        codes, scale = weight
        return int4_matmul(x, codes, scale, layout="fragments", implementation="xla", out_dtype=jnp.float32, **kwargs)

    error = max(
        _error(ours, reference, weights[0], x), _error(ours, reference, weights[0], x, compensator=compensator, z=z)
    )
    if not error < _TOLERANCE:
        raise ValueError(f"wrong by {error:.2e} for {problem}")
    dense = jax.random.normal(jax.random.key(2), (problem.n, problem.k), jnp.bfloat16)
    many = [dense + i for i in range(copies(dense.nbytes))]
    return {
        "m": problem.m,
        "n": problem.n,
        "k": problem.k,
        "group": problem.group,
        "rank": rank,
        "error": error,
        "config": dataclasses.asdict(choose_config(problem.m, problem.n, problem.k, groups=problem.groups)[0]),
        "us": {
            "bf16": kernel_microseconds(lambda w, x: jnp.einsum("mk,nk->mn", x, w), many, x),
            "xla_int4": kernel_microseconds(xla, weights, x),
            "int4": kernel_microseconds(ours, weights, x),
            "int4_ec": kernel_microseconds(
                lambda w, x, c, z: ours(w, x, compensator=c, z=z), weights, x, compensator, z
            ),
            "int4_ec_with_z": kernel_microseconds(lambda w, x, c: ours(w, x, compensator=c), weights, x, compensator),
        },
    }


def _compensator(problem: Problem, rank: int) -> tuple[Compensator, jax.Array]:
    rng = np.random.default_rng(0)

    def factor(*shape: int) -> jax.Array:
        return jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)

    scales = jnp.full((rank,), 1e-3, jnp.float32)
    b = factor(problem.n, rank)
    compensator = Compensator(a=factor(rank, problem.k), b=b, a_scale=scales, bt_scale=scales)
    return compensator, jnp.asarray(rng.standard_normal((problem.m, rank)), jnp.float32)


def _error(ours: Callable, reference: Callable, *args: Any, **kwargs: Any) -> float:
    got, wanted = (np.asarray(jax.jit(f)(*args, **kwargs), np.float32) for f in (ours, reference))
    return float(np.max(np.abs(got - wanted)) / np.max(np.abs(wanted)))


def chain_microseconds(problem: Problem, *, repeats: int = 20) -> float:
    """Give the time of a call in a chain of dependent ones inside one program, gaps between kernels included."""
    weights, x = problem.weights(), problem.x()

    def chain(weights: Any, x: jax.Array) -> jax.Array:
        for codes, scale in weights:
            x = int4_matmul(x, codes, scale, layout="fragments", implementation="mosaic_gpu")[:, : problem.k]
        return x

    run = jax.jit(chain)
    jax.block_until_ready(run(weights, x))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        y = x
        for _ in range(repeats):
            y = run(weights, x)
        jax.block_until_ready(y)
        times.append((time.perf_counter() - begin) / repeats / len(weights))
    return float(np.median(times) * 1e6)


def _row(name: str, result: dict[str, Any], bandwidth: float) -> str:
    us = result["us"]
    speed = result["n"] * result["k"] / 2 / us["int4"] * 1e6
    cells = [
        name,
        result["m"],
        *(f"{us[key]:.1f}" for key in us),
        f"{speed / 1e12:.2f}",
        f"{100 * speed / bandwidth:.0f}%",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__)
    parser.add_argument("operation", choices=["int4_matmul"])
    parser.add_argument("--shapes", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 32, 64])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=-1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no shape after so long")
    parser.add_argument("--output", type=Path, help="JSON file of results, written after every shape")
    flags = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error(f"this measures on a GPU, and there is none here (the backend is {jax.default_backend()})")
    begin, bandwidth = time.monotonic(), read_bandwidth()
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "command": "python -m pallas_kernels.bench " + " ".join(sys.argv[1:]),
        "read_bandwidth": bandwidth,
        "int4_matmul": [],
    }
    print(f"reads {bandwidth / 1e12:.2f} TB/s; microseconds of kernels alone", file=sys.stderr)
    print("| weight | rows | bf16 | XLA int4 | int4 | int4 + EC | int4 + EC with z | TB/s | of reading |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for rows in flags.rows:
        for name, (n, k) in SHAPES[flags.shapes].items():
            if time.monotonic() - begin > flags.seconds:
                continue
            result = bench_int4_matmul(Problem(m=rows, n=n, k=k, group=flags.group_size), rank=flags.rank)
            if n >= k:
                result["chain_us"] = chain_microseconds(Problem(m=rows, n=n, k=k, group=flags.group_size))
            results["int4_matmul"].append(result | {"weight": name})
            print(_row(name, result, bandwidth), flush=True)
            if flags.output is not None:
                flags.output.parent.mkdir(parents=True, exist_ok=True)
                flags.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
