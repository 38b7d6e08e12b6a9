"""Time int4 matmul on the GPU at hand beside what a user could run instead, each checked against float32 first.

python -m pallas_kernels.bench int4_matmul --seconds 500 --skip-done --output pallas_kernels/results/int4_matmul.json

Every model's products are timed here, then those of other libraries in a process of their own (`bench_peers.py`).
Results go to the file as they come, beside those that it holds, so that a later run goes on where time ran out. The
table of all that the file holds is printed at the end (`tables.py`), progress on stderr.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import bench_peer_reduce, bench_peers, tables
from pallas_kernels.int4_matmul import Compensator, int4_matmul
from pallas_kernels.int4_matmul.gpu import choose_config, int4_matmul_mosaic_gpu
from pallas_kernels.packing import RANK_STEP, SIDE, factor_to_fragments
from pallas_kernels.shapes import ROWS, SHAPES, copies
from pallas_kernels.timing import compile_all, failure_message, in_a_row, kernel_microseconds, microseconds_in_a_row
from pallas_kernels.tune import Problem

_TOLERANCE = 2e-2
_READ_BYTES = 2**29
_CHECKED = 128
"""Rows of a result that are compared at most."""

_SIDE = 8192
"""Sides of the matrices whose product is the most that tensor cores can be held to."""

_IN_A_ROW = 16
"""Calls in a program for few rows of x, so that starting the program does not count."""


def read_bandwidth() -> float:
    """Measure how fast the device reads, in bytes a second: the most that any kernel can be held to."""
    arrays = [
        jax.random.bits(key, (512, _READ_BYTES // 2048), jnp.uint32) for key in jax.random.split(jax.random.key(0))
    ]
    return arrays[0].nbytes / (kernel_microseconds(lambda array: jnp.sum(array, axis=1), arrays) * 1e-6)


def matmul_flops() -> float:
    """Measure how fast the device multiplies large matrices of random bfloat16, in operations a second."""
    x, *weights = (
        jax.random.normal(key, (_SIDE, _SIDE), jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3)
    )
    return 2 * _SIDE**3 / (kernel_microseconds(lambda weight, x: x @ weight, weights, x) * 1e-6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Variant:
    """A way to compute a product: `alone` for the time of its kernels, `together` as a program would call it."""

    alone: Callable[..., jax.Array]
    weights: Sequence[Any]
    rest: tuple[Any, ...]
    together: Callable[..., jax.Array] | None = None


def _variants(problem: Problem, *, rank: int, seed: int) -> dict[str, _Variant]:
    """List what is timed: bfloat16 weights, XLA on int4, ours, and with a compensator whose z is known, or computed."""
    few = problem.m <= 64
    int4, x = problem.weights(seed=seed, least=_IN_A_ROW if few else 2), problem.x(seed=seed + 1)
    shape = problem.n, problem.k
    keys = jax.random.split(jax.random.key(seed + 2), copies(2 * problem.n * problem.k))
    bf16 = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
    compensator, z = _compensator(problem, rank, seed)
    config, _ = choose_config(problem.m, problem.n, problem.k, groups=problem.groups)
    # Where launches overlap, a kernel's time counts its wait for the one before it.
    config = dataclasses.replace(config, overlap=False)

    # Few rows: the product computes the coordinates itself. With many, a product before it does.
    one = _along(compensator) if few and rank % RANK_STEP == 0 and rank <= SIDE else None
    of_rank, _ = choose_config(problem.m, problem.n, problem.k, groups=problem.groups, rank=0 if one is None else rank)
    of_rank = dataclasses.replace(of_rank, overlap=False)

    def alone(weight: Any, x: jax.Array, compensator: Any = None, z: Any = None) -> jax.Array:
        codes, scale = weight
        return int4_matmul_mosaic_gpu(
            *(x, codes, scale, None, None, compensator, z, jnp.dtype(jnp.bfloat16)),
            layout="fragments",
            config=of_rank if compensator is not None and z is None else config,
        )

    def together(weight: Any, x: jax.Array, compensator: Any = None, z: Any = None) -> jax.Array:
        return int4_matmul(x, *weight, layout="fragments", implementation="mosaic_gpu", compensator=compensator, z=z)

    def xla(weight: Any, x: jax.Array) -> jax.Array:
        codes, scale = weight
        return int4_matmul(x, codes, scale.T, implementation="xla")

    def multiply(weight: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.einsum("mk,nk->mn", x, weight)

    ours = functools.partial(_Variant, alone=alone, together=together, weights=int4)
    return {
        "bf16": _Variant(alone=multiply, weights=bf16, rest=(x,)),
        "xla_int4": _Variant(alone=xla, weights=int4, rest=(x,)),
        "int4": ours(rest=(x,)),
        "int4_ec": ours(rest=(x, compensator, z)),
        "int4_ec_with_z": ours(rest=(x, compensator) if one is None else (x, one)),
    }


def _compensator(problem: Problem, rank: int, seed: int) -> tuple[Compensator, jax.Array]:
    rng = np.random.default_rng(seed)

    def factor(*shape: int) -> jax.Array:
        return jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)

    scales = jnp.full((rank,), 1e-3, jnp.float32)
    b = factor(problem.n, rank)
    compensator = Compensator(a=factor(rank, problem.k), b=b, a_scale=scales, bt_scale=scales)
    return compensator, jnp.asarray(rng.standard_normal((problem.m, rank)), jnp.float32)


def _along(compensator: Compensator) -> Compensator:
    """Give the same compensator as the product reads it that computes coordinates too."""
    a = compensator.a.astype(jnp.float32) * (compensator.a_scale * compensator.bt_scale)[:, None]
    return Compensator(a_fragments=factor_to_fragments(a.astype(jnp.bfloat16)), b=compensator.b)


# Computed once for each product: looking for the fastest way would take longer than any.
@functools.partial(jax.jit, compiler_options={"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False})
def _references(
    int4: tuple[jax.Array, jax.Array], bf16: jax.Array, x: jax.Array, compensator: Compensator, z: jax.Array
) -> dict[str, jax.Array]:
    """Compute what each variant should give, in float32."""
    x = x.astype(jnp.float32)
    codes, scale = int4
    fragments = functools.partial(int4_matmul, x, codes, scale, layout="fragments", implementation="xla")
    with jax.default_matmul_precision("highest"):
        return {
            "bf16": jnp.einsum("mk,nk->mn", x, bf16.astype(jnp.float32)),
            "xla_int4": int4_matmul(x, codes, scale.T, implementation="xla"),
            "int4": fragments(),
            "int4_ec": fragments(compensator=compensator, z=z),
            "int4_ec_with_z": fragments(compensator=compensator),
        }


def _taken(array: jax.Array, rows: np.ndarray) -> jax.Array:
    """Give some rows, by way of the host: on the device it would be one more program for each shape."""
    return jnp.asarray(np.asarray(array)[rows])


def bench_int4_matmul(problem: Problem, *, rank: int, seed: int, threads: int) -> dict[str, Any]:
    """Check and time one product in each variant; one that fails, or is wrong, is reported and has no time."""
    variants = _variants(problem, rank=rank, seed=seed)
    x, compensator, z = variants["int4_ec"].rest
    # Rows from everywhere, the first and the last among them.
    rows = np.linspace(0, problem.m - 1, min(problem.m, _CHECKED)).round().astype(int)
    first = variants["int4"].weights[0], variants["bf16"].weights[0]
    programs: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "references": (_references, (*first, _taken(x, rows), compensator, _taken(z, rows)))
    }
    for name, variant in variants.items():
        programs[name] = jax.jit(variant.alone), (variant.weights[0], *variant.rest)
        if variant.together is not None:
            programs[f"{name} in a row"] = jax.jit(in_a_row(variant.together)), (list(variant.weights), variant.rest)
    begin = time.monotonic()
    compiled, failures = compile_all(programs, threads=threads)
    compiling = time.monotonic() - begin
    result: dict[str, Any] = {
        "m": problem.m,
        "n": problem.n,
        "k": problem.k,
        "group": problem.group,
        "rank": rank,
        "compile_seconds": round(compiling, 1),
        "config": dataclasses.asdict(choose_config(problem.m, problem.n, problem.k, groups=problem.groups)[0]),
        "error": {},
        "us": {},
        "us_in_a_row": {},
        "failures": failures,
    }
    wanted = jax.device_get(compiled["references"](*programs["references"][1]))
    for name, variant in variants.items():
        if name in compiled:
            try:
                got = np.asarray(compiled[name](variant.weights[0], *variant.rest))[rows].astype(np.float32)
                error = float(np.max(np.abs(got - wanted[name])) / np.max(np.abs(wanted[name])))
                result["error"][name] = error
                if not error < _TOLERANCE:
                    failures[name] = f"wrong by {error:.2e}"
            except Exception as failure:
                failures[name] = failure_message(failure)
    for name, variant in variants.items():
        try:
            if name in result["error"] and name not in failures:
                result["us"][name] = kernel_microseconds(compiled[name], variant.weights, *variant.rest)
            if (together := compiled.get(f"{name} in a row")) is not None and name in result["us"]:
                result["us_in_a_row"][name] = microseconds_in_a_row(together, variant.weights, *variant.rest)
        except Exception as failure:
            failures[name] = failure_message(failure)
    return result


class Results:
    """What a file of results holds, and what is added to it; written after every addition."""

    def __init__(self, path: Path | None, run: dict[str, Any]):
        self._path = path
        old: dict[str, Any] = {"runs": []}
        if path is not None and path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(old.get("runs"), list):
            raise ValueError(f"{path} holds no results of this command: expected a list `runs` in it")
        if other := {one["device"] for one in old["runs"]} - {run["device"]}:
            raise ValueError(f"{path} holds results of {', '.join(sorted(other))}; this is {run['device']}")
        self.table: dict[str, Any] = {"int4_matmul": [], "peers": []} | old
        self.table["runs"].append(run)

    @staticmethod
    def _key(kind: str, entry: dict[str, Any]) -> tuple[Any, ...]:
        names = ("model", "weight", "m", *(("group", "rank") if kind == "int4_matmul" else ("method",)))
        return tuple(entry[name] for name in names)

    def has(self, kind: str, wanted: dict[str, Any]) -> bool:
        """Whether there is such a result, without a failure."""
        key = self._key(kind, wanted)
        return any(
            self._key(kind, entry) == key and not (entry.get("failure") or entry.get("failures"))
            for entry in self.table[kind]
        )

    def add(self, kind: str, entry: dict[str, Any]) -> None:
        """Add a result of this run, in place of an older one of the same."""
        key = self._key(kind, entry)
        others = [other for other in self.table[kind] if self._key(kind, other) != key]
        self.table[kind] = [*others, {"run": len(self.table["runs"]) - 1} | entry]
        self.write()

    def write(self) -> None:
        """Write the file."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".writing")
        beside.write_text(json.dumps(self.table, indent=1) + "\n", encoding="utf-8")
        beside.replace(self._path)


def _problems(flags: argparse.Namespace, model: str) -> Iterator[tuple[str, Problem]]:
    for group in flags.group_sizes:
        for rows in flags.rows:
            for weight, (n, k) in SHAPES[model].items():
                if not flags.weights or weight in flags.weights:
                    yield weight, Problem(m=rows, n=n, k=k, group=group)


def _cases(flags: argparse.Namespace, model: str) -> Iterator[bench_peers.Case]:
    """List cases of other libraries, ordered so that weights are built, and kernels found, once for all rows."""
    for method in bench_peers.methods(flags.peers):
        for weight, (n, k) in SHAPES[model].items():
            if not flags.weights or weight in flags.weights:
                for rows in flags.rows:
                    yield bench_peers.Case(method=method, model=model, weight=weight, m=rows, n=n, k=k)


def _brief(entry: dict[str, Any]) -> str:
    """Give a line of progress."""
    line = f"{entry['model']} {entry['weight']} [{entry['n']}, {entry['k']}] {entry['m']} rows, {entry['seconds']} s: "
    if "method" in entry:
        found = entry.get("failure") or f"{entry['us_in_a_row']:.1f} us in a row, wrong by {entry['error']:.1e}"
        return line + f"{entry['method']} {found}"
    times = [f"{name} {us:.1f}" for name, us in entry["us"].items()]
    times += [f"{name} in a row {us:.1f}" for name, us in entry["us_in_a_row"].items()]
    return line + ", ".join([*times, *(f"{name} failed: {why}" for name, why in entry["failures"].items())])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("operation", choices=["int4_matmul", "peer_reduce"], help="peer_reduce: flags of its own")
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES), help="models, in order")
    parser.add_argument("--weights", nargs="*", help="names of weights, of all by default")
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS), help="rows of x, in order")
    parser.add_argument("--rank", type=int, default=16, help="rank of compensators")
    parser.add_argument("--group-sizes", type=int, nargs="*", default=[-1], help="columns a scale of ours, -1 for all")
    parser.add_argument(
        "--peers", nargs="*", default=list(bench_peers.PEERS), help="libraries, or methods of them; none without names"
    )
    parser.add_argument("--peer-seconds", type=float, default=120, help="time limit of each product of a peer")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has PyTorch and the peers")
    parser.add_argument("--gemlite-tuning", choices=["shipped", "search"], default="shipped")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so long")
    parser.add_argument("--skip-done", action="store_true", help="leave out what the output file has without a failure")
    parser.add_argument("--compile-threads", type=int, default=8)
    parser.add_argument("--seed", type=int, help="of the random data; a fresh one by default")
    parser.add_argument("--output", type=Path, help="JSON file of results, written after every product")
    return parser


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] == ["peer_reduce"]:
        bench_peer_reduce.main(sys.argv[2:])
        return
    parser = _parser()
    flags = parser.parse_args()
    begin = time.monotonic()
    try:
        chosen = bench_peers.methods(flags.peers)
    except ValueError as wrong:
        parser.error(str(wrong))
    if jax.default_backend() != "gpu":
        parser.error(f"this measures on a GPU, and there is none here (the backend is {jax.default_backend()})")
    seed = secrets.randbelow(2**31) if flags.seed is None else flags.seed
    run: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "command": "python -m pallas_kernels.bench " + " ".join(sys.argv[1:]),
        "seed": seed,
        "packages": bench_peers.versions(),
    }
    try:
        results = Results(flags.output, run)
    except ValueError as wrong:
        parser.error(str(wrong))
    run |= {"read_bandwidth": read_bandwidth(), "matmul_flops": matmul_flops()}
    say = functools.partial(print, file=sys.stderr, flush=True)
    say(f"reads {run['read_bandwidth'] / 1e12:.2f} TB/s, multiplies {run['matmul_flops'] / 1e12:.0f} Tflop/s")
    for model in flags.shapes:
        for weight, problem in _problems(flags, model):
            name = {"model": model, "weight": weight}
            if flags.skip_done and results.has("int4_matmul", name | vars(problem) | {"rank": flags.rank}):
                continue
            if (started := time.monotonic()) - begin > flags.seconds:
                break
            try:
                result = bench_int4_matmul(problem, rank=flags.rank, seed=seed, threads=flags.compile_threads)
            except Exception as failure:
                result = vars(problem) | {"rank": flags.rank, "error": {}, "us": {}, "us_in_a_row": {}}
                result["failures"] = {"all": failure_message(failure)}
            result = name | result | {"seconds": round(time.monotonic() - started, 1)}
            results.add("int4_matmul", result)
            say(_brief(result))
        jax.clear_caches()
        cases = [
            case
            for case in _cases(flags, model)
            if not (flags.skip_done and results.has("peers", dataclasses.asdict(case)))
        ]
        measured = 0
        for result in bench_peers.run(
            cases,
            seconds=flags.peer_seconds,
            deadline=begin + flags.seconds,
            options=["--seed", str(seed), "--gemlite-tuning", flags.gemlite_tuning],
            python=flags.peer_python,
        ):
            measured += 1
            results.add("peers", result)
            say(_brief(result))
        if measured < len(cases):
            say(f"{model}: {len(cases) - measured} cases of {', '.join(chosen)} left out, out of time")
    print(tables.render(results.table))
    if not any(entry["us"] for entry in results.table["int4_matmul"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
