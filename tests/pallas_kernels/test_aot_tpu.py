"""Kernels compile for TPUs that this machine does not have: block sizes fit, and no weight is widened in HBM."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tuning
from pallas_kernels.int4_matmul import Compensator, Gate
from pallas_kernels.int4_matmul.tpu import choose_config, int4_matmul_mosaic_tpu
from pallas_kernels.int4_matmul.tpu_kernel import LANES
from pallas_kernels.shapes import SHAPES
from pallas_kernels.topology import compiling_for_tpu, tpu_topology
from pallas_kernels.tpus import GENERATIONS, Generation
from pallas_kernels.tuning import read_table

pytestmark = [pytest.mark.aot, pytest.mark.timeout(600)]

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
PARTS = 4


@pytest.fixture(scope="module", params=GENERATIONS)
def chip(request) -> Generation:
    return GENERATIONS[request.param]


@pytest.fixture(scope="module")
def array(chip: Generation):
    try:
        device = tpu_topology(chip.name).devices[0]
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    assert device.device_kind in chip.kinds
    return functools.partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(device))


def compile_product(chip: Generation, array, *, m: int, n: int, k: int, groups: int, rank: int = 0, **options: str):
    """Compile a product, with everything that it can have where there is a rank; give its memory and stored bytes."""
    scale = array((groups, n), F32 if groups == 1 else BF16)
    operands = [array((m, k), BF16), array((k // 2, n), jnp.int8), scale, None, None, None, None]
    if rank:
        gate = Gate(
            w_in=array((rank, 32), BF16),
            b_in=array((32,), BF16),
            w_out=array((rank, 32), BF16),
            b_out=array((rank,), BF16),
        )
        compensator = Compensator(
            a=array((rank, k), jnp.int8), bt=array((rank, n), jnp.int8), gate=gate,
            a_scale=array((rank,), F32), bt_scale=array((rank,), F32),
        )  # fmt: skip
        operands[3:6] = [array((groups, n), jnp.int8), array((n,), BF16), compensator]

    def run(*operands):
        return int4_matmul_mosaic_tpu(*operands, BF16, layout="columns", **options)

    with compiling_for_tpu(chip.name):
        lowered = jax.jit(run).lower(*operands)
    assert "tpu_custom_call" in lowered.as_text()
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(operands))
    return memory, stored


def check(chip: Generation, array, *, options: dict[str, str] | None = None, **shape: int) -> None:
    memory, stored = compile_product(chip, array, **shape, **(options or {}))
    codes, name = shape["n"] * shape["k"] // 2, f"{chip.name} {shape}"
    # A row of x, a bias or a scale may take a whole tile.
    assert memory.argument_size_in_bytes < 1.02 * stored + 2**18, name
    # Small operands may be brought into tiles first; half of the smallest stored weight is more than that.
    if shape["n"] % LANES == 0:  # others XLA keeps the other way around, and turns at every call
        assert memory.temp_size_in_bytes < codes / 4 + 2**19, name


def stored_keys(chip: Generation) -> list[dict[str, int]]:
    table = read_table("int4_matmul", tuning.device_name(chip.kinds[0]))
    return [{part.split("=")[0]: int(part.split("=")[1]) for part in name.split(",")} for name in table]


@pytest.mark.parametrize("part", range(PARTS))
def test_every_stored_block_size_compiles(chip: Generation, array, part: int):
    keys = stored_keys(chip)
    assert len(keys) > 100
    for key in keys[part::PARTS]:
        shape = {"n": key["n"], "k": key["k"], "groups": key["groups"]}
        assert choose_config(key["tile_m"], rank=0, chip=chip, **shape)[1] == "tuned"
        check(chip, array, m=key["tile_m"], **shape)


@pytest.mark.parametrize("group", [-1, 32, 64, 128])
@pytest.mark.parametrize("m", [1, 16, 100])
def test_everything_that_a_product_can_have_compiles(chip: Generation, array, m: int, group: int):
    for n, k in [*SHAPES["llama-3.2-1b"].values(), (4096, 14336), (960, 576), (576, 1536), (9728, 896)]:
        if k % group == 0:
            check(chip, array, m=m, n=n, k=k, groups=1 if group == -1 else k // group, rank=64)


def test_large_products_with_everything_compile(chip: Generation, array):
    for m in (300, 1024, 2048):
        check(chip, array, m=m, n=28672, k=4096, groups=32, rank=64)
        check(chip, array, m=m, n=4096, k=14336, groups=1, rank=64)


@pytest.mark.parametrize("group", [-1, 64, 128])
def test_int8_activations_compile(chip: Generation, array, group: int):
    if not chip.int8_rate:
        pytest.skip(f"{chip.name} multiplies no int8")
    for m in (1, 16, 128, 1024):
        for rank in (0, 64):
            groups = 1 if group == -1 else 4096 // group
            check(chip, array, m=m, n=6144, k=4096, groups=groups, rank=rank, options={"activations": "int8"})


@pytest.mark.parametrize("group", [-1, 128])
def test_products_that_end_with_an_activation_compile(chip: Generation, array, group: int):
    for m in (1, 16, 256, 1024):
        for n, k in ((28672, 4096), (16384, 2048)):
            if k % group == 0:
                groups = 1 if group == -1 else k // group
                check(chip, array, m=m, n=n, k=k, groups=groups, rank=16, options={"activation": "silu"})
