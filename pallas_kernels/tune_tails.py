"""Find how many blocks and warpgroups make a norm fastest on the GPU at hand, and keep it as data.

python -m pallas_kernels.tune_tails --columns 4096 --rows 1 32 --output pallas_kernels/tuned
"""

import argparse
import functools
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.int4_matmul import Compensator
from pallas_kernels.tails import rmsnorm_project
from pallas_kernels.tails.hopper import tail_hopper
from pallas_kernels.timing import compile_all, failure_message, kernel_microseconds
from pallas_kernels.tune import write

_CUTS = ((8, 4), (4, 4), (2, 4), (1, 4), (4, 2), (2, 8), (1, 8))
"""Blocks of a cluster, and warpgroups of a block."""

_COPIES = 8
_TOLERANCE = 2e-2
_EPS = 1e-5


def tune_norm(m: int, k: int, rank: int, *, threads: int) -> dict[str, Any]:
    """Time a norm of m rows, with the coordinates of `rank` where that is not 0; give the key, the best and all times.

    Raises:
        ValueError: No cut gives the right result.
    """
    keys = jax.random.split(jax.random.key(0), _COPIES)
    rows = [jax.random.normal(key, (2, m, k), jnp.bfloat16) for key in keys]
    weight = 1 + jax.random.normal(jax.random.key(1), (k,)) / 4
    a = jax.random.randint(jax.random.key(2), (rank, k), -127, 128, jnp.int8) if rank else None
    scale = jnp.full((rank,), k**-0.5 / 64) if rank else None

    def call(pair: jax.Array, weight: Any, a: Any, scale: Any, **cut: Any) -> dict[str, jax.Array]:
        first, update = pair
        return tail_hopper(
            "norm", first, update, weight, a, scale, eps=_EPS, z_dtype=jnp.bfloat16, overlap=False, **cut
        )

    def reference(pair: jax.Array, weight: Any, a: Any, scale: Any) -> dict[str, jax.Array]:
        compensator = None if a is None else Compensator(a=a, a_scale=scale, bt=jnp.zeros((rank, 64), jnp.int8))
        first, update = pair
        x, h, z = rmsnorm_project(first, update, weight, eps=_EPS, compensator=compensator, implementation="xla")
        return {"x": x, "h": h} | ({} if z is None else {"z": z})

    wanted = jax.device_get(jax.jit(reference)(rows[0], weight, a, scale))
    cuts = [dict(zip(("cluster", "warpgroups"), cut, strict=True)) for cut in _CUTS]
    programs = {
        str(i): (jax.jit(functools.partial(call, **cut)), (rows[0], weight, a, scale)) for i, cut in enumerate(cuts)
    }
    compiled, failures = compile_all(programs, threads=threads)
    for i, why in failures.items():
        print(f"  {cuts[int(i)]}: {why[:150]}", file=sys.stderr, flush=True)
    tried = []
    for i, run in compiled.items():
        cut = cuts[int(i)]
        try:
            got = jax.device_get(run(rows[0], weight, a, scale))
            microseconds = kernel_microseconds(run, rows, weight, a, scale)
        except Exception as failure:
            print(f"  {cut}: {failure_message(failure)[:200]}", file=sys.stderr, flush=True)
            continue
        error = max(_error(got[name], wanted[name]) for name in wanted)
        print(f"  {microseconds:7.2f} us, wrong by {error:.1e}: {cut}", file=sys.stderr, flush=True)
        if error < _TOLERANCE:
            tried.append({"config": cut, "us": round(microseconds, 2)})
    if not tried:
        raise ValueError(f"no cut of a norm of {m} rows of {k} with rank {rank} is right")
    tried.sort(key=lambda entry: entry["us"])
    return {"key": {"m": m, "k": k, "ranks": rank}} | tried[0] | {"tried": tried}


def _error(got: np.ndarray, wanted: np.ndarray) -> float:
    got, wanted = got.astype(np.float32), wanted.astype(np.float32)
    return float(np.max(np.abs(got - wanted)) / np.max(np.abs(wanted)))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune_tails", description=__doc__)
    parser.add_argument("--columns", type=int, nargs="*", default=[4096])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--ranks", type=int, nargs="*", default=[0, 16])
    parser.add_argument("--compile-threads", type=int, default=8, help="programs compiled at a time")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tuned")
    flags = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error(f"tuning measures on a GPU, and there is none here (the backend is {jax.default_backend()})")
    entries = []
    for k, m, rank in itertools.product(flags.columns, flags.rows, flags.ranks):
        print(f"norm of {m} rows of {k}, rank {rank}", file=sys.stderr, flush=True)
        entries.append(tune_norm(m, k, rank, threads=flags.compile_threads))
        write(flags.output, entries, operation="rmsnorm_project")
    print(json.dumps({"tuned": len(entries)}))


if __name__ == "__main__":
    main()
