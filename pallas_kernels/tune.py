"""Find the fastest configuration of a kernel for shapes on the GPU at hand, and keep it as data.

python -m pallas_kernels.tune --shapes llama-3.1-8b --rows 1 16 32 64 --output pallas_kernels/tuned
"""

import argparse
import dataclasses
import datetime
import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tuning
from pallas_kernels.int4_matmul import int4_matmul
from pallas_kernels.int4_matmul.gpu import (
    candidates,
    choose_config,
    int4_matmul_mosaic_gpu,
    rank_by_rule,
    tile_rows,
    variants,
)
from pallas_kernels.int4_matmul.hopper import HopperConfig
from pallas_kernels.timing import copies, kernel_microseconds

SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "llama-3.1-8b": {"o": (4096, 4096), "qkv": (6144, 4096), "down": (4096, 14336), "gate_up": (28672, 4096)},
    "llama-3.1-8b-tp4": {"o": (4096, 1024), "qkv": (1536, 4096), "down": (4096, 3584), "gate_up": (7168, 4096)},
    "llama-3.2-1b": {"o": (2048, 2048), "qkv": (3072, 2048), "down": (2048, 8192), "gate_up": (16384, 2048)},
}
"""Weights [N, K] of models' layers; products that share an input are one."""

_TOLERANCE = 2e-2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A weight [n, k] with one scale for each `group` columns (-1: all), and m rows of x."""

    m: int
    n: int
    k: int
    group: int = -1

    @property
    def groups(self) -> int:
        """Groups of columns."""
        return 1 if self.group == -1 else self.k // self.group

    def weights(self) -> list[tuple[jax.Array, jax.Array]]:
        """Draw codes, in fragments, and scales, as many as it takes to keep them out of the cache."""
        count = copies(self.n * self.k // 2)
        keys = jax.random.split(jax.random.key(0), count)
        scale = jnp.full((self.groups, self.n), self.k**-0.5 / 4, jnp.float32 if self.groups == 1 else jnp.bfloat16)
        return [(jax.lax.bitcast_convert_type(_bytes(key, self.n, self.k // 2), jnp.int8), scale) for key in keys]

    def x(self) -> jax.Array:
        """Draw x."""
        return jax.random.normal(jax.random.key(1), (self.m, self.k), jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _bytes(key: jax.Array, rows: int, columns: int) -> jax.Array:
    return jax.random.bits(key, (rows, columns), jnp.uint8)


def tune_int4_matmul(problem: Problem, configs: Sequence[HopperConfig]) -> dict[str, Any]:
    """Time configurations; give the key, the best and what each took.

    A configuration whose result is wrong is reported and left out.
    """
    tile_m = tile_rows(problem.m)
    weights, x = problem.weights(), problem.x()

    def reference(weight, x):
        return int4_matmul(x, *weight, layout="fragments", out_dtype=jnp.float32, implementation="xla")

    wanted = np.asarray(jax.jit(reference)(weights[0], x))
    tried = []
    for config in configs:
        settings = dataclasses.asdict(config)

        def call(weight, x, config=config):
            codes, scale = weight
            return int4_matmul_mosaic_gpu(
                x, codes, scale, None, None, None, None, jnp.dtype(jnp.bfloat16), layout="fragments", config=config
            )

        try:
            got = np.asarray(jax.jit(call)(weights[0], x), np.float32)
            error = float(np.max(np.abs(got - wanted)) / np.max(np.abs(wanted)))
            alone = dataclasses.replace(config, overlap=False)
            microseconds = kernel_microseconds(functools.partial(call, config=alone), weights, x)
        except Exception as failure:
            print(f"  {settings}: {type(failure).__name__}: {str(failure)[:200]}", file=sys.stderr, flush=True)
            continue
        if not error < _TOLERANCE:
            print(f"  {settings}: wrong by {error:.2e}", file=sys.stderr, flush=True)
            continue
        tried.append({"config": settings, "us": round(microseconds, 2)})
        print(f"  {microseconds:7.2f} us {_brief(settings)}", file=sys.stderr, flush=True)
    if not tried:
        raise ValueError(f"no configuration of {problem} is right")
    tried.sort(key=lambda entry: entry["us"])
    key = {"tile_m": tile_m, "n": problem.n, "k": problem.k, "groups": problem.groups, "rank": 0}
    return {"key": key, "config": tried[0]["config"], "us": tried[0]["us"], "tried": tried}


def _brief(settings: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def write(folder: Path, entries: list[dict[str, Any]]) -> Path:
    """Write entries into the device's file, in place of those of the same keys."""
    file = folder / tuning.device_name() / "int4_matmul.json"
    old = json.loads(file.read_text(encoding="utf-8"))["entries"] if file.exists() else []
    new = [entry["key"] for entry in entries]
    table = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "command": "python -m pallas_kernels.tune " + " ".join(sys.argv[1:]),
        "entries": [entry for entry in old if entry["key"] not in new] + entries,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return file


def _show(device: str, shapes: dict[str, tuple[int, int]], rows: Sequence[int], group: int) -> None:
    """Print a table of the configurations that `int4_matmul` would use."""
    names = [field.name for field in dataclasses.fields(HopperConfig)]
    print("| weight | rows | from | " + " | ".join(names) + " |")
    print("|" + "---|" * (len(names) + 3))
    for m in rows:
        for name, (n, k) in shapes.items():
            groups = Problem(m=m, n=n, k=k, group=group).groups
            config, source = choose_config(m, n, k, groups=groups, device=device)
            print(f"| {name} | {m} | {source} | " + " | ".join(str(getattr(config, field)) for field in names) + " |")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=__doc__)
    parser.add_argument("--shapes", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--only", nargs="*", help="names of weights to tune, of all by default")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 32, 64], help="rows of x")
    parser.add_argument("--group-size", type=int, default=-1)
    parser.add_argument("--limit", type=int, default=12, help="cuts tried for each shape, before paces of the best")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no shape after so long")
    parser.add_argument(
        "--show", metavar="DEVICE", help="print what would be used on a device (`nvidia-h200`), tune nothing"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tuned")
    flags = parser.parse_args()
    if flags.show is not None:
        _show(flags.show, SHAPES[flags.shapes], flags.rows, flags.group_size)
        return
    if jax.default_backend() != "gpu":
        parser.error(f"tuning measures on a GPU, and there is none here (the backend is {jax.default_backend()})")
    begin, entries = time.monotonic(), []
    for rows in flags.rows:
        for name, (n, k) in SHAPES[flags.shapes].items():
            if (flags.only and name not in flags.only) or time.monotonic() - begin > flags.seconds:
                continue
            print(f"{name} [{n}, {k}], {rows} rows", file=sys.stderr, flush=True)
            problem = Problem(m=rows, n=n, k=k, group=flags.group_size)
            fitting = candidates(tile_rows(rows), n, k, groups=problem.groups)
            entry = tune_int4_matmul(problem, rank_by_rule(fitting, rows, n, k)[: flags.limit])
            best = HopperConfig(**entry["config"])
            paced = tune_int4_matmul(problem, [best, *variants(best, n, k, groups=problem.groups)])
            entries.append(paced | {"tried": sorted(entry["tried"] + paced["tried"], key=lambda one: one["us"])})
            write(flags.output, entries)
    print(json.dumps({"tuned": len(entries)}))


if __name__ == "__main__":
    main()
