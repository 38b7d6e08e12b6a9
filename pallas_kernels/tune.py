"""Find the fastest configuration of a kernel for shapes on the GPU at hand, and keep it as data.

python -m pallas_kernels.tune --shapes llama-3.1-8b --rows 1 16 32 64 --output pallas_kernels/tuned
"""

import argparse
import collections
import dataclasses
import datetime
import functools
import itertools
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
from pallas_kernels.int4_matmul import Compensator, int4_matmul
from pallas_kernels.int4_matmul.gpu import (
    Shape,
    candidates,
    choose_config,
    int4_matmul_mosaic_gpu,
    rank_by_rule,
    row_class,
    variants,
)
from pallas_kernels.int4_matmul.plan import HopperConfig
from pallas_kernels.packing import factor_to_fragments
from pallas_kernels.shapes import SHAPES, copies
from pallas_kernels.timing import compile_all, failure_message, kernel_microseconds

_TOLERANCE = 2e-2
_OF_A_CUT = 2
_LONE = ("o", "down")
"""Products that compute coordinates: others have a norm before them that does."""


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

    def weights(self, *, seed: int = 0, least: int = 2) -> list[tuple[jax.Array, jax.Array]]:
        """Draw codes, in fragments, and scales, as many as it takes to keep them out of the cache, and `least`."""
        count = max(least, copies(self.n * self.k // 2))
        *keys, key = jax.random.split(jax.random.key(seed), count + 1)
        spread = jax.random.uniform(key, (self.groups, self.n), minval=0.5, maxval=1.5)
        scale = (spread * self.k**-0.5 / 4).astype(jnp.float32 if self.groups == 1 else jnp.bfloat16)
        return [(jax.lax.bitcast_convert_type(_bytes(key, self.n, self.k // 2), jnp.int8), scale) for key in keys]

    def x(self, *, seed: int = 1) -> jax.Array:
        """Draw x."""
        return jax.random.normal(jax.random.key(seed), (self.m, self.k), jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _bytes(key: jax.Array, rows: int, columns: int) -> jax.Array:
    return jax.random.bits(key, (rows, columns), jnp.uint8)


def along(problem: Problem, rank: int, *, seed: int = 0) -> Compensator:
    """Draw a static compensator as the kernel reads it when it computes the coordinates too."""
    a, b = jax.random.split(jax.random.key(seed))
    factor = jax.random.normal(a, (rank, problem.k), jnp.bfloat16) * jnp.bfloat16(problem.k**-0.5 / 8)
    b = jax.lax.bitcast_convert_type(_bytes(b, problem.n, rank), jnp.int8)
    return Compensator(a_fragments=factor_to_fragments(factor), b=b)


def tune_int4_matmul(
    problem: Problem, configs: Sequence[HopperConfig], *, rank: int = 0, threads: int = 1
) -> dict[str, Any]:
    """Time configurations; give the key, the best and what each took.

    `rank` is that of a compensator whose coordinates the product computes. A configuration whose result is wrong is
    reported and left out.
    """
    weights, x = problem.weights(), problem.x()
    compensator = along(problem, rank) if rank else None

    def reference(weight, x, compensator):
        options = {"layout": "fragments", "out_dtype": jnp.float32, "implementation": "xla"}
        return int4_matmul(x, *weight, compensator=compensator, **options)

    def call(weight, x, compensator, *, config):
        codes, scale = weight
        operands = (x, codes, scale, None, None, compensator, None, jnp.dtype(jnp.bfloat16))
        return int4_matmul_mosaic_gpu(*operands, layout="fragments", config=config)

    wanted = np.asarray(jax.jit(reference)(weights[0], x, compensator))
    programs = {
        # Where launches overlap, a kernel's time counts its wait for the one before it.
        str(i): (
            jax.jit(functools.partial(call, config=dataclasses.replace(config, overlap=False))),
            (weights[0], x, compensator),
        )
        for i, config in enumerate(configs)
    }
    compiled, failures = compile_all(programs, threads=threads)
    tried = []
    for i, config in enumerate(configs):
        settings = dataclasses.asdict(config)
        try:
            if (message := failures.get(str(i))) is not None:
                raise RuntimeError(message)
            run = compiled[str(i)]
            got = np.asarray(run(weights[0], x, compensator), np.float32)
            error = float(np.max(np.abs(got - wanted)) / np.max(np.abs(wanted)))
            microseconds = kernel_microseconds(run, weights, x, compensator)
        except Exception as failure:
            print(f"  {settings}: {failure_message(failure)[:200]}", file=sys.stderr, flush=True)
            continue
        if not error < _TOLERANCE:
            print(f"  {settings}: wrong by {error:.2e}", file=sys.stderr, flush=True)
            continue
        tried.append({"config": settings, "us": round(microseconds, 2)})
        print(f"  {microseconds:7.2f} us {_brief(settings)}", file=sys.stderr, flush=True)
    if not tried:
        raise ValueError(f"no configuration of {problem} is right")
    tried.sort(key=lambda entry: entry["us"])
    key = {"tile_m": row_class(problem.m), "n": problem.n, "k": problem.k, "groups": problem.groups, "rank": rank}
    return {"key": key, "config": tried[0]["config"], "us": tried[0]["us"], "tried": tried}


def differing(ranked: Sequence[HopperConfig], limit: int) -> list[HopperConfig]:
    """Take up to `limit` configurations, the first ones, but of each way to cut the product up only two."""
    taken: list[HopperConfig] = []
    cuts: collections.Counter[tuple[int, int, int, int]] = collections.Counter()
    for config in ranked:
        cut = (config.tile_m, config.row_tiles, config.k_parts, config.splits)
        if cuts[cut] < _OF_A_CUT and len(taken) < limit:
            cuts[cut] += 1
            taken.append(config)
    return taken


def _brief(settings: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def write(folder: Path, entries: list[dict[str, Any]], *, operation: str = "int4_matmul") -> Path:
    """Write entries into the device's file of an operation, in place of those of the same keys."""
    file = folder / tuning.device_name() / f"{operation}.json"
    old = json.loads(file.read_text(encoding="utf-8"))["entries"] if file.exists() else []
    new = [entry["key"] for entry in entries]
    table = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "command": f"python -m pallas_kernels.{Path(sys.argv[0]).stem} " + " ".join(sys.argv[1:]),
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
    parser.add_argument(
        "--ranks", type=int, nargs="*", default=[0, 16], help="ranks whose coordinates o and down compute"
    )
    parser.add_argument("--limit", type=int, default=12, help="cuts tried for each shape, before paces of the best")
    parser.add_argument("--paces", type=int, default=12, help="paces tried of the best cut")
    parser.add_argument("--compile-threads", type=int, default=8, help="programs compiled at a time")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no shape after so long")
    parser.add_argument(
        "--show", metavar="DEVICE", help="print what would be used on a device (`nvidia-h100-80gb-hbm3`), tune nothing"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tuned")
    flags = parser.parse_args()
    if flags.show is not None:
        _show(flags.show, SHAPES[flags.shapes], flags.rows, flags.group_size)
        return
    if jax.default_backend() != "gpu":
        parser.error(f"tuning measures on a GPU, and there is none here (the backend is {jax.default_backend()})")
    begin, entries = time.monotonic(), []
    for rows, rank, (name, (n, k)) in itertools.product(flags.rows, flags.ranks, SHAPES[flags.shapes].items()):
        late = time.monotonic() - begin > flags.seconds
        if (flags.only and name not in flags.only) or (rank and name not in _LONE) or late:
            continue
        print(f"{name} [{n}, {k}], {rows} rows, rank {rank}", file=sys.stderr, flush=True)
        problem = Problem(m=rows, n=n, k=k, group=flags.group_size)
        shape = Shape(n=n, k=k, groups=problem.groups, rank=rank, paired=name == "gate_up")
        ranked = rank_by_rule(candidates(rows, shape), rows, shape)
        tune = functools.partial(tune_int4_matmul, problem, rank=rank, threads=flags.compile_threads)
        entry = tune(differing(ranked, flags.limit))
        if flags.paces:
            tried = [HopperConfig(**one["config"]) for one in entry["tried"]]
            paced = [config for config in variants(tried[0], shape) if config not in tried]
            further = tune(paced[: flags.paces])["tried"] if paced else []
            entry["tried"] = sorted(entry["tried"] + further, key=lambda one: one["us"])
            entry |= entry["tried"][0]
        entries.append(entry)
        write(flags.output, entries)
    print(json.dumps({"tuned": len(entries)}))


if __name__ == "__main__":
    main()
