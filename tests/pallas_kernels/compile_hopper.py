"""Compile kernels for an H200 and say what ptxas said: a process of its own, as dumps are set up at its start.

Reads a JSON object of problems by name from stdin, writes one of reports to stdout. MOSAIC_GPU_DUMP_TO is the folder.
"""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.int4_matmul.gpu import int4_matmul_mosaic_gpu
from pallas_kernels.int4_matmul.hopper import int4_matmul_hopper
from pallas_kernels.int4_matmul.plan import HopperConfig
from pallas_kernels.paged_attention import plan
from pallas_kernels.paged_attention.gpu import paged_attention_mosaic_gpu, paged_decode_mosaic_gpu
from pallas_kernels.peer_reduce import empty_inbox, peer_reduce, prepare, row_parallel
from pallas_kernels.peer_reduce.cases import Case
from pallas_kernels.tails.hopper import tail_hopper
from pallas_kernels.topology import gpu_topology

SHARDING = jax.sharding.SingleDeviceSharding(gpu_topology("h200").devices[0])
BF16 = jnp.dtype(jnp.bfloat16)


def array(shape, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SHARDING)


def product(problem: dict[str, Any]):
    m, n, k, groups, rank = (problem[name] for name in ("m", "n", "k", "groups", "rank"))
    config = HopperConfig(**problem["config"])
    operands = {
        "x": array((m, k), BF16),
        "packed": array((n, k // 2), jnp.int8),
        "scale": array((groups, n), jnp.float32 if groups == 1 else BF16),
        "zero": array((groups, n), jnp.int8) if problem["zero"] else None,
        "bias": array((n,), BF16) if problem["bias"] else None,
        "b": array((n, rank), jnp.int8) if rank else None,
        "z": array((m, rank), BF16) if rank and not problem["projected"] else None,
    }
    if problem["projected"]:
        operands["a"] = array((rank * k // 64, 64), BF16)

    def run(operands):
        return int4_matmul_hopper(**operands, config=config, out_dtype=BF16, activation=problem["activation"])

    return run, operands


def layers(problem: dict[str, Any]):
    m, n, count = problem["m"], problem["n"], problem["layers"]
    config = HopperConfig(**problem["config"])
    stack = {"packed": array((count, n, n // 2), jnp.int8), "scale": array((count, problem["groups"], n), jnp.float32)}

    def layer(x, weight):
        packed, scale = weight["packed"], weight["scale"]
        return int4_matmul_mosaic_gpu(
            *(x, packed, scale, None, None, None, None, BF16), layout="fragments", config=config
        )

    def scanned(x, stack):
        return jax.lax.scan(lambda x, weight: (layer(x, weight), None), x, stack)[0]

    def unrolled(x, stack):
        for i in range(count):
            x = layer(x, jax.tree.map(lambda leaf, i=i: leaf[i], stack))
        return x

    return {"scan": scanned, "unrolled": unrolled}[problem["kind"]], array((m, n), BF16), stack


def attention(problem: dict[str, Any]):
    b, pool = problem["sequences"], problem["sequences"] * problem["entries"]
    pages = array((pool, problem["kv_heads"], problem["page"], problem["head_dim"]), jnp.dtype(problem["kv_dtype"]))
    scales = array(pages.shape[:3], jnp.float32) if pages.dtype.itemsize == 1 else None
    q = array((b, problem["tokens"], problem["kv_heads"] * problem["group"], problem["head_dim"]), BF16)
    places = array((b,), jnp.int32)
    window = array((), jnp.int32) if problem["windowed"] else None
    config = None if problem["config"] is None else plan.HopperConfig(**problem["config"])

    def run(*operands):
        return paged_attention_mosaic_gpu(*operands, scale=0.1, config=config)

    return run, q, pages, pages, scales, scales, array((b, problem["entries"]), jnp.int32), places, places, window


def decode(problem: dict[str, Any]):
    b, heads = problem["sequences"], problem["kv_heads"] * (problem["group"] + 2)
    h, entries = problem["head_dim"], problem["entries"]
    pages = array((b * entries, problem["kv_heads"], problem["page"], h), BF16)
    config = None if problem["config"] is None else plan.HopperConfig(**problem["config"])

    def run(pages, *operands):
        qkv, rotation, table, lengths = operands
        return paged_decode_mosaic_gpu(qkv, rotation, *pages, table, lengths, scale=0.1, config=config)

    operands = (array((b, heads, h), BF16), array((b, 2, h), jnp.float32))
    return run, (pages, pages), *operands, array((b, entries), jnp.int32), array((b,), jnp.int32)


def tail(problem: dict[str, Any]):
    m, k, rank, op = (problem[name] for name in ("m", "k", "rank", "op"))
    operands = {"first": array((m, 2 * k if op == "glu" else k), BF16)}
    if op == "norm":
        operands["weight"] = array((k,), jnp.float32)
        if problem["update"]:
            operands["update"] = array((m, k), BF16)
    if rank:
        operands |= {"a": array((rank, k), jnp.dtype(problem["a"])), "a_scale": array((rank,), jnp.float32)}

    def run(operands):
        options = {"activation": problem["activation"], "z_dtype": jnp.dtype(problem["z"])}
        return tail_hopper(op, **operands, eps=1e-5, **options)

    return run, operands


def peers(problem: dict[str, Any]):
    """Two sums one after another, in a loop, as a decode step's are."""
    case, devices = Case(**problem["case"]), problem["devices"]
    mesh = jax.sharding.Mesh(np.array(gpu_topology("h200", count=devices).devices), ("tp",))
    own, same = NamedSharding(mesh, PartitionSpec("tp")), NamedSharding(mesh, PartitionSpec())

    def build():
        of_each, of_all = case.operands(devices)
        if case.rank and case.k:
            compensator = dataclasses.replace(of_all["compensator"], a=of_each.pop("a")[0])
            of_all["compensator"] = prepare(compensator)
        if case.k:
            codes = of_each.pop("codes")
            of_each["packed"] = codes[..., : case.k // 2]
            of_each["scale"] = jnp.swapaxes(of_each["scale"], 1, 2)
        inbox = empty_inbox(devices=devices, rows=case.m, columns=case.n)
        return of_each, of_all, jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (devices, *leaf.shape)), inbox)

    operands = [
        jax.tree.map(lambda leaf, at=at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), part)
        for part, at in zip(jax.eval_shape(build), (own, same, own), strict=True)
    ]

    @jax.jit
    def sum_(of_each, of_all, h, inbox):
        options = {"axis": "tp", "eps": 1e-5, "implementation": "mosaic_gpu"}
        options |= {name: of_all[name] for name in ("compensator", "following")}
        rest = (h, of_all["weight"], inbox)
        if not case.k:
            return peer_reduce(of_each["y"], of_each.get("z"), *rest, **options)
        product = (of_each[name] for name in ("x", "packed", "scale"))
        return row_parallel(*product, *rest, layout="fragments", **options)

    def one(of_each, of_all, inbox):
        of_each, inbox = jax.tree.map(lambda leaf: leaf[0], (of_each, inbox))

        def body(_, state):
            for _ in range(2):
                _, h, _, inbox = sum_(of_each, of_all, *state)
                state = h, inbox
            return state

        h, inbox = jax.lax.fori_loop(0, 3, body, (of_all["residual"], inbox))
        return h[None], jax.tree.map(lambda leaf: leaf[None], inbox)

    specs = {"in_specs": (own.spec, same.spec, own.spec), "out_specs": own.spec, "check_vma": False}
    run = jax.shard_map(one, mesh=mesh, **specs)
    return run, *operands


KINDS = {
    "tail": tail,
    "product": product,
    "scan": layers,
    "unrolled": layers,
    "attention": attention,
    "decode": decode,
    "peers": peers,
}
DONATED = {"decode": (0,), "peers": (2,)}


def report(problem: dict[str, Any], dumps: Path) -> dict[str, Any]:
    before = set(dumps.iterdir())
    kind = problem["kind"]
    function, *operands = KINDS[kind](problem)
    options: dict[str, Any] = {"donate_argnums": DONATED.get(kind, ())}
    if kind == "peers":
        options["out_shardings"] = operands[-1].y.sharding
    lowered = jax.jit(function, **options).lower(*operands)
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    texts = {path: path.read_text(errors="replace") for path in set(dumps.iterdir()) - before}
    return {
        "ptxas": [text for path, text in texts.items() if path.suffix == ".ptxas"],
        "ptx": [text for path, text in texts.items() if path.suffix == ".ptx"],
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "meetings": lowered.as_text().count("uses_xla_collective_metadata = true"),
        "copies": re.findall(r" = (\S+) copy(?:-start)?\(", compiled.as_text()),
    }


def main() -> None:
    dumps = Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    reports = {}
    for name, problem in json.load(sys.stdin).items():
        try:
            reports[name] = report(problem, dumps)
        except Exception as failure:
            reports[name] = {"failure": f"{type(failure).__name__}: {str(failure)[:2000]}"}
    json.dump(reports, sys.stdout)


if __name__ == "__main__":
    main()
