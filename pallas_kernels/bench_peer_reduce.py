"""Time what follows a row-parallel int4 product on several GPUs: sums through inboxes beside sums by collectives.

python -m pallas_kernels.bench peer_reduce --output pallas_kernels/results/peer_reduce.json

A program is a chain of layers, each a product of [N, N] weights a device (weights in turn, more than the cache holds),
whose sum's norm the next layer takes, in a loop; a layer's time is what the program takes over its layers, launches
and gaps included. Every case runs in a process of its own under a time limit: one that hangs costs itself alone.

    --check              small shapes against float64 instead
    --stress 100000      so many sums of random shapes one after another, some devices delayed, compared on all devices
"""

import argparse
import dataclasses
import datetime
import faulthandler
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.int4_matmul import Compensator, Gate, int4_matmul
from pallas_kernels.packing import pack_int4, to_fragments
from pallas_kernels.peer_reduce import Inbox, empty_inbox, peer_reduce, prepare, row_parallel
from pallas_kernels.peer_reduce.cases import CASES, Case

AXIS = "tp"
ROWS = (1, 8, 32, 64)
COLUMNS = (4096, 5120, 8192)
VARIANTS = {
    "product": "the product alone",
    "dual-write": "product that writes into inboxes, tail; gated compensator",
    "dual-write, static": "the same, compensator without a gate",
    "dual-write, no EC": "the same, no compensator",
    "push": "product, then tail that pushes; no compensator",
    "naive": "product, psum(y), psum(z), gate, B, add, norm",
    "psum, no EC": "product, psum(y), add, norm",
}
OWN, SAME = PartitionSpec(AXIS), PartitionSpec()
_CACHE_BYTES = 96 << 20
_BUFFERS = {
    "default": None,
    "whole": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,COLLECTIVES,WHILE",
    "none": "",
}
_EPS = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Layers of M rows and N columns, K columns a device, and a compensator of a rank."""

    variant: str
    m: int
    n: int
    rank: int = 16
    hidden: int = 16
    command_buffers: str = "whole"
    loops: int = 64
    repeats: int = 7

    @property
    def layers(self) -> int:
        """Layers in turn, whose codes the cache does not hold."""
        return max(4, -(-_CACHE_BYTES // (self.n * self.n // 2)))


def _mesh(devices: int) -> jax.sharding.Mesh:
    return jax.make_mesh((devices,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def _weights(problem: Problem, seed: int) -> dict[str, Any]:
    """Draw a layer of one device, in the form in which the server keeps it."""
    rng = np.random.default_rng(seed)
    n, rank = problem.n, problem.rank

    def normal(*shape: int, size: float = 1.0) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) * size, jnp.float32)

    factors = {"b": jnp.asarray(rng.integers(-127, 128, (n, rank)), jnp.int8), "bt_scale": jnp.full(rank, 1e-3)}
    a = normal(rank, n, size=n**-0.5).astype(jnp.bfloat16)
    gate = Gate(
        w_in=normal(rank, problem.hidden, size=0.3),
        b_in=normal(problem.hidden),
        w_out=normal(rank, problem.hidden, size=0.3),
        b_out=normal(rank),
    )
    gate = None if problem.variant == "dual-write, static" else gate
    compensator = Compensator(a=a, **factors, gate=gate)
    if problem.variant != "naive":
        compensator = prepare(compensator)
    # Codes have a mean of -1/2: without norms between, layers would grow what all columns share n**0.5 / 8 times each.
    size = 2 / n if problem.variant == "product" else n**-0.5 / 4
    without = problem.variant in ("dual-write, no EC", "push", "psum, no EC", "product")
    return {
        "packed": jnp.asarray(rng.integers(-128, 128, (n, n // 2)), jnp.int8),
        "scale": jnp.full((1, n), size, jnp.float32),
        "norm": 1 + normal(n) / 4,
        "compensator": None if without else compensator,
    }


def _layer(variant: str) -> Callable[..., Any]:
    """Give a layer: (weights, x, h, inbox) to (x, h, inbox)."""

    @jax.jit
    def run(weights: dict[str, Any], x: jax.Array, h: jax.Array, inbox: Inbox | None) -> Any:
        operands = (weights["packed"], weights["scale"])
        product = functools.partial(int4_matmul, x, *operands, layout="fragments", implementation="mosaic_gpu")
        rest = {"axis": AXIS, "eps": _EPS}
        if variant == "product":
            return product(), h, inbox
        if variant == "push":
            y = product(out_dtype=jnp.float32)
            x, h, _, inbox = peer_reduce(y, None, h, weights["norm"], inbox, **rest, implementation="mosaic_gpu")
            return x, h, inbox
        dual = variant.startswith("dual-write")
        x, h, _, after = row_parallel(
            *(x, *operands, h, weights["norm"], inbox if dual else None),
            **rest,
            layout="fragments",
            compensator=weights["compensator"],
            implementation="mosaic_gpu" if dual else None,
        )
        return x, h, after if dual else inbox

    return run


def operands(problem: Problem, devices: int) -> tuple[Any, jax.Array, Inbox]:
    """Draw the layers of all devices, alike, x, and empty inboxes; what devices have of their own is stacked."""
    layers = [_of_all(_weights(problem, i), devices) for i in range(problem.layers)]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((problem.m, problem.n)), jnp.bfloat16)
    return layers, x, _of_all(empty_inbox(devices=devices, rows=problem.m, columns=problem.n), devices)


def _placed(inbox: Inbox, mesh: jax.sharding.Mesh) -> Inbox:
    """Put inboxes where they stay; nobody writes before all are there."""
    return jax.block_until_ready(jax.device_put(inbox, NamedSharding(mesh, OWN)))


def _of_all(tree: Any, devices: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (devices, *leaf.shape)), tree)


def program(problem: Problem, mesh: jax.sharding.Mesh) -> Any:
    """Give the jitted chain of layers, of `operands`; it gives x of each device, and the inboxes."""
    layer = _layer(problem.variant)

    def one(layers: Any, x: jax.Array, inbox: Inbox) -> tuple[jax.Array, Inbox]:
        layers, inbox = jax.tree.map(lambda leaf: leaf[0], (layers, inbox))

        def body(_: Any, state: Any) -> Any:
            x, h, inbox = state
            for weights in layers:
                x, h, inbox = layer(weights, x, h, inbox)
            return x, h * jnp.bfloat16(0.5), inbox

        x, _, inbox = jax.lax.fori_loop(0, problem.loops, body, (x, x, inbox))
        return x[None], jax.tree.map(lambda leaf: leaf[None], inbox)

    specs = {"in_specs": (OWN, SAME, OWN), "out_specs": OWN, "check_vma": False}
    buffers = _BUFFERS[problem.command_buffers]
    options = {} if buffers is None else {"xla_gpu_enable_command_buffer": buffers}
    return jax.jit(
        jax.shard_map(one, mesh=mesh, **specs),
        donate_argnums=2,
        out_shardings=NamedSharding(mesh, OWN),
        compiler_options=options,
    )


def measure(problem: Problem, devices: int) -> dict[str, Any]:
    """Time a problem on this process's first GPUs."""
    mesh = _mesh(devices)
    layers, x, inbox = operands(problem, devices)
    layers, inbox = jax.device_put(layers, NamedSharding(mesh, OWN)), _placed(inbox, mesh)
    x = jax.device_put(x, NamedSharding(mesh, SAME))
    begin = time.perf_counter()
    compiled = program(problem, mesh).lower(layers, x, inbox).compile()
    compiling = time.perf_counter() - begin
    out, times = None, []
    for _ in range(problem.repeats + 2):
        begin = time.perf_counter()
        out, inbox = compiled(layers, x, inbox)
        jax.block_until_ready(out)
        times.append(time.perf_counter() - begin)
        inbox.check()
    out = np.asarray(out, np.float32)
    if problem.variant != "product" and not all(np.array_equal(part, out[0]) for part in out[1:]):
        raise AssertionError("devices do not agree")
    if not np.isfinite(out).all():
        raise AssertionError("the result is not finite")
    us = [1e6 * seconds / problem.loops / problem.layers for seconds in times[2:]]
    found = {"us": statistics.median(us), "least_us": min(us), "first_us": 1e6 * times[0]}
    device = jax.devices()[0].device_kind
    return found | {"layers": problem.layers, "compile_seconds": round(compiling, 1), "device": device}


def _sum_of(case: Case, **options: Any) -> Callable[..., Any]:
    """Give a function of what a device has of a case's operands, of what all have, and of the inbox."""

    def run(own: dict[str, Any], same: dict[str, Any], inbox: Inbox) -> Any:
        compensator = same["compensator"]
        keywords = {"axis": AXIS, "eps": _EPS, "following": same["following"], **options}
        rest = (same["residual"], same["weight"], inbox)
        if not case.k:
            return peer_reduce(own["y"], own.get("z"), *rest, compensator=compensator, **keywords)
        if case.rank:
            compensator = dataclasses.replace(compensator, a=own["a"])
        packed = to_fragments(pack_int4(own["codes"]))
        scale = jnp.swapaxes(own["scale"], 0, 1)
        keywords |= {"layout": "fragments", "compensator": compensator}
        return row_parallel(own["x"], packed, scale, *rest, **keywords)

    return run


def check(devices: int, names: list[str]) -> None:
    """Compare small sums with those of `psum` in float32, several one after another in one program."""
    mesh = _mesh(devices)
    for name in names:
        case = CASES[name] if name in CASES else Case(**json.loads(name))
        own, same = case.operands(devices)
        inbox = _of_all(empty_inbox(devices=devices, rows=case.m, columns=case.n), devices)
        inbox = _placed(inbox, mesh)

        def one(own: Any, same: Any, inbox: Inbox, case: Case = case) -> Any:
            own, inbox = jax.tree.map(lambda leaf: leaf[0], (own, inbox))
            results = []
            run = _sum_of(case, implementation="mosaic_gpu")
            for _ in range(3):
                x, h, z, inbox = run(own, same, inbox)
                results.append((x, h, z))
            wide, common = jax.tree.map(_widened, (own, same))
            wanted = _sum_of(case, implementation="xla")(wide, common, None)[:3]
            return jax.tree.map(lambda leaf: leaf[None], (results, wanted, inbox))

        run = jax.shard_map(one, mesh=mesh, in_specs=(OWN, SAME, OWN), out_specs=OWN, check_vma=False)
        with jax.default_matmul_precision("highest"):
            results, wanted, inbox = jax.jit(run, donate_argnums=2, out_shardings=NamedSharding(mesh, OWN))(
                own, same, inbox
            )
        worst = 0.0
        for result in results:
            for got, right in zip(result, wanted, strict=True):
                if got is None:
                    continue
                got, right = np.asarray(got, np.float32), np.asarray(right, np.float32)
                if not all(np.array_equal(part, got[0]) for part in got[1:]):
                    raise AssertionError(f"{name}: devices do not agree")
                worst = max(worst, float(np.abs(got[0] - right[0]).max() / np.abs(right[0]).max()))
        inbox.check()
        print(f"{name}: wrong by {worst:.1e}", flush=True)
        if not worst < 2e-2:
            raise AssertionError(f"{name}: wrong by {worst:.1e}")


def _widened(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf


STRESSES = (
    Case(m=1, n=4096, k=1024, rank=16, gated=True, following=16),
    Case(m=8, n=2048, k=1024, rank=16),
    Case(m=32, n=1024, k=512, rank=32, gated=True),
    Case(m=64, n=4096, k=512),
    Case(m=3, n=5120, rank=16, gated=True),
)
_CHUNK = 250
"""Sums of one program."""


def stress_program(mesh: jax.sharding.Mesh) -> Any:
    """Give a jitted function of cases' operands, their order, delays, and inboxes; it gives a digest of each sum."""

    def one(operands: Any, order: jax.Array, delays: jax.Array, inbox: Inbox) -> Any:
        operands = [(jax.tree.map(lambda leaf: leaf[0], own), same) for own, same in operands]
        inbox, delays = jax.tree.map(lambda leaf: leaf[0], (inbox, delays))

        def of(case: Case, own: Any, same: Any, inbox: Inbox) -> tuple[jax.Array, Inbox]:
            x, h, _, inbox = _sum_of(case, implementation="mosaic_gpu")(own, same, inbox)
            words = [jax.lax.bitcast_convert_type(part, jnp.uint16).astype(jnp.uint32).reshape(-1) for part in (x, h)]
            words = jnp.concatenate(words)
            return jnp.sum(words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1)), inbox

        branches = [
            functools.partial(of, case, own, same) for case, (own, same) in zip(STRESSES, operands, strict=True)
        ]

        def step(inbox: Inbox, turn: Any) -> tuple[Inbox, jax.Array]:
            which, delay = turn
            late = jax.lax.fori_loop(0, delay, lambda _, v: jnp.sin(v) + 1, jnp.float32(0))
            # The sum waits for the delay, which changes nothing.
            generation = inbox.generation + (late > 1e30).astype(jnp.int32)
            digest, inbox = jax.lax.switch(which, branches, dataclasses.replace(inbox, generation=generation))
            return inbox, digest

        inbox, digests = jax.lax.scan(step, inbox, (order, delays))
        return digests[None], jax.tree.map(lambda leaf: leaf[None], inbox)

    specs = {"in_specs": ([(OWN, SAME)] * len(STRESSES), SAME, OWN, OWN), "out_specs": OWN, "check_vma": False}
    return jax.jit(jax.shard_map(one, mesh=mesh, **specs), donate_argnums=3, out_shardings=NamedSharding(mesh, OWN))


def stress(devices: int, sums: int, *, seed: int, seconds: float) -> int:
    """Run sums of random shapes in random order, each device delayed at random, and compare devices; give how many.

    A delay is a loop of XLA's of random length on one device. Results of each chunk of sums are compared between
    devices and with what the same sum gave before: a stale or torn part would change some bits.
    """
    mesh, rng = _mesh(devices), np.random.default_rng(seed)
    operands = [case.operands(devices, seed=seed) for case in STRESSES]
    inbox = _of_all(empty_inbox(devices=devices, rows=64, columns=5120), devices)
    inbox = _placed(inbox, mesh)
    run = stress_program(mesh)
    known: dict[int, int] = {}
    done, begin = 0, time.monotonic()
    while done < sums and time.monotonic() - begin < seconds:
        order = rng.integers(len(STRESSES), size=_CHUNK).astype(np.int32)
        delays = (rng.integers(0, 40, (devices, _CHUNK)) * (rng.random((devices, _CHUNK)) < 0.1)).astype(np.int32)
        digests, inbox = run(operands, order, delays, inbox)
        digests = np.asarray(digests)
        inbox.check()
        for which, *found in zip(order, *digests, strict=True):
            if len(set(found)) != 1 or known.setdefault(int(which), int(found[0])) != found[0]:
                raise AssertionError(f"sum {done} of case {which}: {found}, and {known[int(which)]} before")
        done += _CHUNK
        if done % 5000 == 0 or done == _CHUNK:
            print(f"{done} sums, {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    return done


def run(problem: Problem, devices: int, seconds: float) -> dict[str, Any]:
    """Measure a problem in a process of its own; give what it found, or why it failed."""
    command = [sys.executable, "-m", "pallas_kernels.bench_peer_reduce", "--devices", str(devices)]
    command += ["--limit", str(seconds), "--problem", json.dumps(vars(problem))]
    begin = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 5, check=False)
        lines = done.stderr.strip().splitlines() or ["no message"]
        found = json.loads(done.stdout) if done.returncode == 0 else {"failure": lines[-1][:500]}
    except subprocess.TimeoutExpired:
        found = {"failure": f"took longer than {seconds:g} s"}
    return vars(problem) | found | {"seconds": round(time.monotonic() - begin, 1)}


def table(results: list[dict[str, Any]]) -> str:
    """Give the results in Markdown: microseconds of a layer, and what the targets are about."""
    lines = ["| rows | N | " + " | ".join(VARIANTS) + " | naive / ours | psum without EC / ours | added |"]
    lines.append("|" + "---|" * (len(VARIANTS) + 5))
    for m, n in sorted({(result["m"], result["n"]) for result in results}):
        us = {result["variant"]: result.get("us") for result in results if (result["m"], result["n"]) == (m, n)}
        cells = [f"{us[name]:.1f}" if us.get(name) else "" for name in VARIANTS]
        ours = us.get("dual-write")

        def over(name: str, us: Any = us, ours: Any = ours) -> str:
            return f"{us[name] / ours:.2f}" if ours and us.get(name) else ""

        added = f"{ours - us['product']:.1f}" if ours and us.get("product") else ""
        lines.append(f"| {m} | {n} | " + " | ".join([*cells, over("naive"), over("psum, no EC"), added]) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench peer_reduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS))
    parser.add_argument("--columns", type=int, nargs="*", default=list(COLUMNS), help="N, and K of each device")
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--command-buffers", choices=list(_BUFFERS), default="whole")
    parser.add_argument("--check", nargs="*", help="names of cases, or cases in JSON; all without names")
    parser.add_argument("--stress", type=int, help="sums")
    parser.add_argument("--limit", type=float, default=60, help="seconds of each process")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file of results, written after every case")
    parser.add_argument("--problem", help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    if flags.problem is not None or flags.check is not None or flags.stress is not None:
        faulthandler.dump_traceback_later(flags.limit, exit=True)
    if flags.problem is not None:
        print(json.dumps(measure(Problem(**json.loads(flags.problem)), flags.devices)))
        return
    if flags.check is not None:
        check(flags.devices, flags.check or list(CASES))
        return
    if flags.stress is not None:
        done = stress(flags.devices, flags.stress, seed=flags.seed, seconds=flags.limit - 15)
        print(json.dumps({"sums": done, "devices": flags.devices, "seed": flags.seed}))
        return
    begin, results = time.monotonic(), []
    for m in flags.rows:
        for n in flags.columns:
            for variant in flags.variants:
                if time.monotonic() - begin > flags.seconds:
                    break
                problem = Problem(variant=variant, m=m, n=n, command_buffers=flags.command_buffers)
                result = run(problem, flags.devices, flags.limit)
                results.append(result)
                found = result.get("failure") or f"{result['us']:.1f} us, at least {result['least_us']:.1f}"
                print(f"{m} rows, {n} columns, {variant}: {found}", file=sys.stderr, flush=True)
                if flags.output is not None:
                    _write(flags.output, results, flags.devices)
    print(table(results))
    if all("failure" in result for result in results):
        sys.exit(1)


def _write(path: Path, results: list[dict[str, Any]], devices: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "devices": devices,
        "jax": jax.__version__,
        "command": "python -m pallas_kernels.bench peer_reduce " + " ".join(sys.argv[1:]),
        "results": results,
    }
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
