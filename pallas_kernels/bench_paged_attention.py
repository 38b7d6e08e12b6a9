"""Time paged attention on the GPU at hand beside what a user could run instead, each checked against the reference.

python -m pallas_kernels.bench_paged_attention --output pallas_kernels/results/paged_attention.json

Every step runs in a process of its own under a time limit, so that one that hangs or fails costs itself alone.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention.gpu import candidates, choose_config, paged_attention_mosaic_gpu, rank_by_rule
from pallas_kernels.paged_attention.plan import HopperConfig
from pallas_kernels.paged_attention.reference import paged_attention_xla
from pallas_kernels.shapes import copies
from pallas_kernels.timing import failure_message, kernel_microseconds

_TOLERANCE = 2e-2
_CHECKED = 4
"""Sequences of which the result is compared: the reference gathers their keys in float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """`sequences` of `length` keys each, all of a shape as in Llama-3.1-8B unless said otherwise."""

    sequences: int
    length: int
    tokens: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page: int = 16
    kv_dtype: str = "bfloat16"

    @property
    def bytes(self) -> int:
        """Bytes of keys and values, and of their scales, that must be read."""
        rows = 2 * self.sequences * self.length * self.kv_heads
        size = jnp.dtype(self.kv_dtype).itemsize
        return rows * (self.head_dim * size + (4 if size == 1 else 0))


SHAPES = {
    "decode 32 x 8k": Shape(sequences=32, length=8192),
    "decode 32 x 8k, pages of 64": Shape(sequences=32, length=8192, page=64),
    "decode 32 x 8k, int8": Shape(sequences=32, length=8192, kv_dtype="int8"),
    "decode 32 x 8k, fp8": Shape(sequences=32, length=8192, kv_dtype="float8_e4m3fn"),
    "decode 32 x 1k": Shape(sequences=32, length=1024),
    "decode 1 x 1k": Shape(sequences=1, length=1024),
    "decode 1 x 32k": Shape(sequences=1, length=32_768),
    "chunk of 256 after 8k": Shape(sequences=1, length=8192, tokens=256),
}

VARIANTS = ("ours", "triton", "cudnn", "xla", "bandwidth")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One thing to time: `variant` is one of `VARIANTS`; `config` settings of it."""

    shape: str
    variant: str
    config: dict[str, Any] | None = None


def steps(names: list[str], tries: int) -> list[Step]:
    """List what is to be timed, with up to `tries` further configurations of ours for each shape."""
    found = [Step(shape=names[0], variant="bandwidth")]
    for name in names:
        shape = SHAPES[name]
        found.append(Step(shape=name, variant="ours"))
        known = {"head_dim": shape.head_dim, "kv_bytes": jnp.dtype(shape.kv_dtype).itemsize}
        rows = shape.tokens * shape.heads // shape.kv_heads
        fitting = candidates(rows, capacity=shape.length, **known)
        ranked = rank_by_rule(fitting, shape.sequences, shape.kv_heads, rows, capacity=shape.length)
        found += [Step(shape=name, variant="ours", config=dataclasses.asdict(config)) for config in ranked[1:tries]]
        if shape.tokens == 1:
            if shape.kv_dtype != "float8_e4m3fn":
                found += [
                    Step(shape=name, variant="triton", config={"k_splits": splits, "pages_per_compute_block": pages})
                    for splits, pages in ((16, 8), (4, 8), (4, 4), (1, 4))
                ]
            if shape.kv_dtype == "bfloat16":
                found.append(Step(shape=name, variant="cudnn"))
        found.append(Step(shape=name, variant="xla"))
    return found


def measure(step: Step) -> dict[str, Any]:
    """Check and time a step in this process.

    Raises:
        ValueError: The result is wrong.
    """
    if step.variant == "bandwidth":
        from pallas_kernels.bench import read_bandwidth

        return {"bytes_per_second": read_bandwidth(), "device": jax.devices()[0].device_kind}
    shape = SHAPES[step.shape]
    q, table, lengths, starts = _queries(shape)
    caches = [_pages(shape, seed) for seed in range(copies(shape.bytes))]
    call, arrange = _variant(step, shape)
    some = slice(0, min(_CHECKED, shape.sequences))
    wanted = jax.jit(_xla)(caches[0], q[some], table[some], lengths[some], starts[some])
    arranged = [arrange(cache, table) for cache in caches]
    del caches
    got = np.asarray(jax.jit(call)(arranged[0], q, table, lengths, starts)[some], np.float32)
    wanted = np.asarray(wanted, np.float32).reshape(got.shape)
    error = float(np.max(np.abs(got - wanted)) / np.max(np.abs(wanted)))
    if not error < _TOLERANCE:
        raise ValueError(f"wrong by {error:.2e}")
    microseconds = kernel_microseconds(call, arranged, q, table, lengths, starts)
    result: dict[str, Any] = {"us": microseconds, "error": error, "bytes_per_second": shape.bytes / microseconds * 1e6}
    if step.variant == "ours" and step.config is None:
        result["chosen"] = dataclasses.asdict(_chosen(shape))
    return result


def _queries(shape: Shape) -> tuple[jax.Array, ...]:
    entries = shape.length // shape.page
    order = np.random.default_rng(0).permutation(shape.sequences * entries)
    q = jax.random.normal(jax.random.key(9), (shape.sequences, shape.tokens, shape.heads, shape.head_dim), jnp.bfloat16)
    lengths = jnp.full((shape.sequences,), shape.length, jnp.int32)
    return q, jnp.asarray(order.reshape(shape.sequences, entries), jnp.int32), lengths, lengths - shape.tokens


def _pages(shape: Shape, seed: int) -> dict[str, jax.Array]:
    pages = (shape.sequences * shape.length // shape.page, shape.kv_heads, shape.page, shape.head_dim)
    keys = jax.random.split(jax.random.key(seed))
    cache = {name: _draw(key, shape.kv_dtype, pages) for name, key in zip("kv", keys, strict=True)}
    if cache["k"].dtype.itemsize == 1:
        step = 1 / 64 if shape.kv_dtype == "int8" else 1.0
        cache |= {f"{name}_scale": jnp.full(pages[:3], step, jnp.float32) for name in "kv"}
    return cache


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: jax.Array, dtype: str, shape: tuple[int, ...]) -> jax.Array:
    if dtype == "int8":
        return jax.random.randint(key, shape, -127, 128, jnp.int8)
    return jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)


def _chosen(shape: Shape) -> HopperConfig:
    return choose_config(
        shape.sequences,
        shape.kv_heads,
        shape.tokens * shape.heads // shape.kv_heads,
        head_dim=shape.head_dim,
        page=shape.page,
        capacity=shape.length,
        kv_bytes=jnp.dtype(shape.kv_dtype).itemsize,
    )


def _ours(config: HopperConfig | None, cache: dict, q: Any, table: Any, lengths: Any, starts: Any) -> jax.Array:
    where = (table, lengths, starts)
    return paged_attention_mosaic_gpu(*(q, *_operands(cache), *where, None), scale=_scale(q), config=config)


def _xla(cache: dict, q: Any, table: Any, lengths: Any, starts: Any) -> jax.Array:
    return paged_attention_xla(*(q, *_operands(cache), table, lengths, starts, None), scale=_scale(q))


def _operands(cache: dict) -> tuple[Any, Any, Any, Any]:
    return cache["k"], cache["v"], cache.get("k_scale"), cache.get("v_scale")


def _scale(q: jax.Array) -> float:
    return 1 / math.sqrt(q.shape[-1])


def _variant(step: Step, shape: Shape) -> tuple[Callable[..., jax.Array], Callable[[dict, jax.Array], dict]]:
    """Give what runs a step, and what brings a cache into the layout that it wants."""
    if step.variant == "ours":
        config = None if step.config is None else HopperConfig(**step.config)
        return functools.partial(_ours, config), lambda cache, table: cache
    if step.variant == "xla":
        return _xla, lambda cache, table: cache
    if step.variant == "triton":
        settings = step.config or {}

        def run(cache, q, table, lengths, starts):
            from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as triton

            q = q[:, 0] * jnp.bfloat16(_scale(q))  # it has no scale of its own
            return triton(q, *_operands(cache)[:2], table, lengths, *_operands(cache)[2:], **settings)

        return run, lambda cache, table: {name: jnp.swapaxes(array, 0, 1) for name, array in cache.items()}
    assert step.variant == "cudnn", step.variant

    def contiguous(cache, table):
        return {
            name: jnp.swapaxes(pages[table], 2, 3).reshape(table.shape[0], -1, shape.kv_heads, shape.head_dim)
            for name, pages in cache.items()
        }

    def cudnn(cache, q, table, lengths, starts):
        return jax.nn.dot_product_attention(
            q, cache["k"], cache["v"], scale=_scale(q), key_value_seq_lengths=lengths, implementation="cudnn"
        )

    return cudnn, contiguous


def run(step: Step, seconds: float) -> dict[str, Any]:
    """Measure a step in a process of its own; give what it found, or why it failed."""
    command = [sys.executable, "-m", "pallas_kernels.bench_paged_attention", "--step", json.dumps(vars(step))]
    begin = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        said = " ".join(done.stderr.split())[-1000:] or "no message"
        found = json.loads(done.stdout or json.dumps({"failure": f"exit status {done.returncode}: {said}"}))
    except subprocess.TimeoutExpired:
        found = {"failure": f"took longer than {seconds:g} s"}
    return vars(step) | found | {"seconds": round(time.monotonic() - begin, 1)}


def _row(result: dict[str, Any], bandwidth: float) -> str:
    config = " ".join(f"{name}={value}" for name, value in (result["config"] or result.get("chosen") or {}).items())
    cells = [result["shape"], result["variant"], config]
    if "failure" in result:
        cells += [result["failure"], "", ""]
    elif "us" in result:
        speed = result["bytes_per_second"]
        cells += [f"{result['us']:.1f}", f"{speed / 1e12:.2f}", f"{100 * speed / bandwidth:.0f}%"]
    else:
        cells += ["", f"{bandwidth / 1e12:.2f}", "100%"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench_paged_attention", description=__doc__)
    parser.add_argument("--shapes", nargs="*", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=VARIANTS, help="what to time")
    parser.add_argument("--tries", type=int, default=6, help="configurations of ours for each shape")
    parser.add_argument("--step-seconds", type=float, default=60, help="time limit of each step")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no step after so long")
    parser.add_argument("--output", type=Path, help="JSON file of results, written after every step")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.step is not None:
        try:
            found = measure(Step(**json.loads(flags.step)))
        except Exception as failure:  # here, as a CUDA error's name is in the middle of what is said
            found = {"failure": failure_message(failure)}
        print(json.dumps(found), flush=True)
        return
    begin, bandwidth, results = time.monotonic(), math.nan, []
    print("| shape | what | settings | us | TB/s | of reading |\n|---|---|---|---|---|---|", flush=True)
    for step in [step for step in steps(flags.shapes, flags.tries) if step.variant in flags.variants]:
        if time.monotonic() - begin > flags.seconds:
            break
        result = run(step, flags.step_seconds)
        if step.variant == "bandwidth":
            bandwidth = result.get("bytes_per_second", math.nan)
        results.append(result)
        print(_row(result, bandwidth), flush=True)
        if flags.output is not None:
            _write(flags.output, results)
    if all("failure" in result for result in results):
        sys.exit(1)


def _write(path: Path, results: list[dict[str, Any]]) -> None:
    table = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "jax": metadata.version("jax"),
        "command": "python -m pallas_kernels.bench_paged_attention " + " ".join(sys.argv[1:]),
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
