"""Compile kernels for an H200 and say what ptxas said: a process of its own, as dumps are set up at its start.

Reads a JSON object of problems by name from stdin, writes one of reports to stdout. MOSAIC_GPU_DUMP_TO is the folder.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.int4_matmul.gpu import int4_matmul_mosaic_gpu
from pallas_kernels.int4_matmul.hopper import int4_matmul_hopper
from pallas_kernels.int4_matmul.plan import HopperConfig
from pallas_kernels.paged_attention import plan
from pallas_kernels.paged_attention.gpu import paged_attention_mosaic_gpu, paged_decode_mosaic_gpu
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


KINDS = {"tail": tail, "product": product, "scan": layers, "unrolled": layers, "attention": attention, "decode": decode}


def report(problem: dict[str, Any], dumps: Path) -> dict[str, Any]:
    before = set(dumps.iterdir())
    function, *operands = KINDS[problem["kind"]](problem)
    donated = (0,) if problem["kind"] == "decode" else ()
    compiled = jax.jit(function, donate_argnums=donated).lower(*operands).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    texts = {path: path.read_text(errors="replace") for path in set(dumps.iterdir()) - before}
    return {
        "ptxas": [text for path, text in texts.items() if path.suffix == ".ptxas"],
        "ptx": [text for path, text in texts.items() if path.suffix == ".ptx"],
        "temporary_bytes": memory.temp_size_in_bytes,
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
