"""Programs compile for accelerators that this machine does not have."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.int4_matmul.plan import HopperConfig
from pallas_kernels.topology import tpu_topology
from pallas_kernels.tuning import read_table
from spear_jax.models.decoder import Decoder
from spear_jax.models.quantize import quantize_model
from spear_jax.quant import QuantSpec
from spear_jax.testing import random_weights, tiny_config

pytestmark = pytest.mark.aot


def described(topology, *args):
    try:
        return topology(*args)
    except ModuleNotFoundError as missing:
        return pytest.skip(str(missing))


@pytest.mark.parametrize("kind", ["v5e", "v6e"])
def test_a_quantized_model_compiles_with_weights_packed(kind: str):
    """Arguments of the program are the packed bytes: nothing widened the weights on their way in."""
    sharding = jax.sharding.SingleDeviceSharding(described(tpu_topology, kind).devices[0])
    config = tiny_config(hidden_size=256, intermediate_size=512, head_dim=64)
    model = Decoder.from_weights(config, random_weights(config), dtype=jnp.bfloat16)
    quantized = jax.eval_shape(lambda m: quantize_model(m, QuantSpec(group_size=64)), model)

    def on_device(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32, sharding=sharding)
    lowered = jax.jit(lambda m, t: m(t)[0]).trace(jax.tree.map(on_device, quantized), tokens).lower()
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    stored = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(quantized))
    assert memory.argument_size_in_bytes < 1.5 * stored + 2**20


def product(m: int, n: int, k: int, *, group: int = -1, rank: int = 0, **options) -> dict:
    """Describe a product; `options` are further operands and epilogues, and fields of a configuration."""
    groups = 1 if group == -1 else k // group
    beside = {"zero": False, "bias": False, "projected": False, "activation": None}
    beside = {name: options.pop(name, default) for name, default in beside.items()}
    paired = beside["activation"] is not None
    HopperConfig(**options).check(n=n, k=k, groups=groups, projected=beside["projected"], paired=paired)
    return {"kind": "product", "config": options, "m": m, "n": n, "k": k, "groups": groups, "rank": rank, **beside}


def tuned() -> dict[str, dict]:
    problems = {}
    for name, config in read_table("int4_matmul", "nvidia-h100-80gb-hbm3").items():
        key = {part.split("=")[0]: int(part.split("=")[1]) for part in name.split(",")}
        group = -1 if key["groups"] == 1 else key["k"] // key["groups"]
        shape = {"n": key["n"], "k": key["k"], "group": group, "rank": key["rank"], "projected": key["rank"] > 0}
        problems[f"tuned {name}"] = product(key["tile_m"], **shape, **config)
    return problems


FULL: dict[str, Any] = {"zero": True, "bias": True, "rank": 16}
ALONG: dict[str, Any] = {"rank": 16, "projected": True}
PRODUCTS = tuned() | {
    "rank 16": product(16, 4096, 4096, rank=16, tile_m=16, k_parts=4, splits=2),
    "rank 16, bias": product(16, 4096, 4096, rank=16, bias=True, tile_m=16, k_parts=4),
    "coordinates along": product(16, 4096, 4096, **ALONG, tile_m=16, row_tiles=2, k_parts=2, splits=4),
    "coordinates along, one row": product(1, 4096, 14336, **ALONG, tile_m=8, row_tiles=4, splits=8),
    "coordinates along, silu": product(16, 28672, 4096, **ALONG, activation="silu", tile_m=16, row_tiles=4),
    "coordinates along, silu, 64 rows": product(
        64, 28672, 4096, **ALONG, activation="silu", tile_m=64, row_tiles=2, blocks=2, slots=4
    ),
    "rank 64 along, groups of 128": product(
        32, 4096, 4096, rank=64, projected=True, group=128, tile_m=32, row_tiles=2, splits=2, slots=3
    ),
    "silu, 256 rows": product(512, 28672, 4096, activation="silu", tile_m=256, row_tiles=2, blocks=1, slots=3),
    "groups of 128": product(32, 28672, 4096, group=128, **FULL, tile_m=32, row_tiles=4),
    "groups of 64": product(32, 28672, 4096, group=64, **FULL, tile_m=32, row_tiles=4, blocks=1),
    "groups of 32": product(32, 28672, 4096, group=32, **FULL, tile_m=32, row_tiles=4, blocks=1),
    "groups of 32, 16 rows": product(16, 4096, 4096, group=32, **FULL, tile_m=16, k_parts=4, blocks=1),
    "groups of 16, four warpgroups": product(16, 4096, 4096, group=16, tile_m=16, row_tiles=4),
    "groups of 128, 64 rows": product(64, 28672, 4096, group=128, **FULL, tile_m=64, row_tiles=4, blocks=1),
    "512 rows, four warpgroups": product(512, 4096, 14336, rank=16, tile_m=64, row_tiles=4, blocks=2, slots=5),
    "512 rows, silu, four warpgroups": product(
        512, 28672, 4096, rank=16, activation="silu", tile_m=64, row_tiles=4, blocks=2, slots=4
    ),
    "512 rows, three warpgroups": product(512, 6144, 4096, rank=16, tile_m=128, row_tiles=3, blocks=1, slots=6),
    "768 rows, tiles of 192, silu": product(
        768, 28672, 4096, rank=16, activation="silu", tile_m=192, row_tiles=2, blocks=1, slots=4
    ),
    "256 rows": product(512, 28672, 4096, tile_m=256, row_tiles=2, blocks=1),
    "256 rows, groups of 128": product(512, 28672, 4096, group=128, **FULL, tile_m=256, row_tiles=2, blocks=1, slots=3),
    "128 rows, groups of 32": product(128, 4096, 4096, group=32, **FULL, tile_m=128, row_tiles=2, blocks=1, slots=3),
}
TIGHT = {
    "64 rows, seven warpgroups": product(64, 28672, 4096, **ALONG, tile_m=64, row_tiles=2, k_parts=2, splits=2, slots=2)
}
"""A cut whose sums and codes do not fit the 72 registers that a thread then has: `Shape.fits` refuses it."""

STACKS = {
    kind: {"kind": kind, "m": 16, "n": 1024, "layers": 4, "groups": 1, "config": {"tile_m": 16, "splits": 2}}
    for kind in ("scan", "unrolled")
}


@pytest.fixture(scope="module")
def reports(compile_for_hopper):
    return compile_for_hopper(PRODUCTS | TIGHT | STACKS)


@pytest.mark.parametrize(
    "name", [*PRODUCTS, *(pytest.param(name, marks=pytest.mark.xfail(strict=True, reason="spills")) for name in TIGHT)]
)
def test_the_kernel_compiles_as_it_should(reports, well_compiled, name: str):
    well_compiled(reports[name])


@pytest.mark.parametrize("kind", STACKS)
def test_layers_of_a_stack_are_read_where_they_are(reports, kind: str):
    """Slicing a layer out of a stack of packed weights copies nothing."""
    report, layer = reports[kind], STACKS[kind]["n"] ** 2 // 2
    assert "failure" not in report, report["failure"]
    assert report["temporary_bytes"] < layer / 2
