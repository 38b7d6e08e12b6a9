"""The Hopper kernel, interpreted with race detection and poisoned memory, against the reference in float32."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.int4_matmul import compensator_coordinates, dequantize, int4_matmul
from pallas_kernels.int4_matmul import gpu as gpu_backend
from pallas_kernels.int4_matmul.cases import CASES, Case
from pallas_kernels.int4_matmul.fragments import unpack_words
from pallas_kernels.int4_matmul.gpu import int4_matmul_mosaic_gpu
from pallas_kernels.int4_matmul.plan import HopperConfig
from pallas_kernels.packing import to_fragments, unpack_int4

SUM = 2e-6
"""Rounding of float32 sums of up to 512 terms, as a share of the sum of their sizes."""

BF16 = 2.0**-8
"""Rounding to bfloat16, as a share of what is rounded."""

CONFIGS: dict[str, dict[str, Any]] = {
    "one slot": {"tile_m": 8, "blocks": 1, "slots": 1},
    "more slots than there are steps": {"tile_m": 8, "blocks": 2, "slots": 9},
    "everything cut": {"tile_m": 16, "row_tiles": 2, "k_parts": 2, "splits": 2, "blocks": 1},
    "cluster of 4, one reducer": {"tile_m": 8, "splits": 4, "blocks": 1},
    "cluster of 8, two reducers": {"tile_m": 16, "splits": 8, "blocks": 1},
    "parts of K alone": {"tile_m": 32, "k_parts": 4, "blocks": 1},
    "cluster of 2": {"tile_m": 32, "k_parts": 2, "splits": 2, "blocks": 2},
    "cluster of 4": {"tile_m": 64, "splits": 4, "blocks": 2},
    "four blocks at a time": {"tile_m": 16, "blocks": 4, "slots": 1},
    "tile of 128": {"tile_m": 128, "splits": 2, "blocks": 1},
    "tile of 192": {"tile_m": 192, "row_tiles": 2, "splits": 2, "blocks": 1},
    "tile of 256": {"tile_m": 256, "row_tiles": 2, "blocks": 1},
}
KINDS: dict[str, dict[str, Any]] = {
    "channel": {},
    "channel, asymmetric, bias, rank 5": {"symmetric": False, "bias": True, "rank": 5},
    "group 32": {"group": 32},
    "group 128, asymmetric, bias, rank 5": {"group": 128, "symmetric": False, "bias": True, "rank": 5},
}
QUICK = {
    ("one slot", "channel, asymmetric, bias, rank 5"),
    ("more slots than there are steps", "group 128, asymmetric, bias, rank 5"),
    ("everything cut", "channel, asymmetric, bias, rank 5"),
    ("cluster of 4, one reducer", "group 128, asymmetric, bias, rank 5"),
    ("cluster of 8, two reducers", "channel, asymmetric, bias, rank 5"),
    ("parts of K alone", "group 32"),
    ("cluster of 4", "group 32"),
    ("four blocks at a time", "channel, asymmetric, bias, rank 5"),
    ("tile of 128", "group 128, asymmetric, bias, rank 5"),
    ("tile of 192", "channel, asymmetric, bias, rank 5"),
    ("tile of 256", "channel, asymmetric, bias, rank 5"),
}
PAIRS = [
    pytest.param(CONFIGS[c], KINDS[k], id=f"{c}-{k}", marks=() if (c, k) in QUICK else pytest.mark.slow)
    for c in CONFIGS
    for k in KINDS
]


def in_bfloat16(case: Case) -> tuple[tuple[jax.Array, ...], dict]:
    (x, *weight), keywords = case.operands()
    return (x.astype(jnp.bfloat16), *weight), keywords


def assert_right(y, operands, keywords, *, scaled_weights: bool = False) -> None:
    """Compare with float32, allowing each element what rounding can do to it: sizes of terms times unit errors."""
    x, packed, scale = operands
    x = x.astype(jnp.float32)
    wanted = np.asarray(int4_matmul(x, packed, scale, **keywords, implementation="xla"), np.float64)
    sizes = np.abs(x) @ np.abs(dequantize(packed, scale, keywords.get("zero"))).T
    allowed = (SUM + (2.1 * BF16 if scaled_weights else 0)) * sizes + 1e-30  # of a scale, and of the weight under it
    if (compensator := keywords.get("compensator")) is not None:
        terms = np.abs(compensator_coordinates(x, compensator)) * 2.1  # z and B are rounded
        if compensator.a.dtype != jnp.int8:  # and A is; a gate passes on a few times as much
            terms = terms + (1 if compensator.gate is None else 4) * np.abs(x) @ np.abs(compensator.a).T
        bt_scale = 1 if compensator.bt_scale is None else compensator.bt_scale[:, None]
        allowed = allowed + BF16 * terms @ np.abs(compensator.bt.astype(jnp.float32) * bt_scale)
    if y.dtype == jnp.bfloat16:
        allowed = allowed + BF16 * np.abs(wanted)
    allowed = allowed + SUM * np.abs(wanted)  # of bias and scale
    wrong = np.abs(np.asarray(y, np.float64) - wanted) / np.asarray(allowed, np.float64)
    assert wrong.max() <= 1, f"error up to {wrong.max():.1f} times what rounding allows"  # NaN fails too


@pytest.fixture
def kernel(interpreter):
    def call(operands, keywords, config: HopperConfig | None, z=None):
        def run(operands, keywords, z):
            x, packed, scale = operands
            zero, bias, compensator = (keywords.get(name) for name in ("zero", "bias", "compensator"))
            return int4_matmul_mosaic_gpu(
                *(x, packed, scale, zero, bias, compensator, z, jnp.dtype(jnp.float32)),
                config=config,
                interpret=interpreter.PARAMS,
            )

        return run, operands, keywords, z

    return call


@pytest.fixture
def public(interpreter, monkeypatch):
    """Give the public function, with its GPU kernel interpreted."""
    kernel = functools.partial(int4_matmul_mosaic_gpu, interpret=interpreter.PARAMS)
    monkeypatch.setattr(gpu_backend, "int4_matmul_mosaic_gpu", kernel)
    return functools.partial(int4_matmul, implementation="mosaic_gpu")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_case_by_the_rule_of_thumb(interpreted, public, case: Case):
    operands, keywords = in_bfloat16(case)
    y = interpreted(lambda operands, keywords: public(*operands, **keywords), operands, keywords)
    assert y.dtype == jnp.bfloat16
    assert_right(y, operands, keywords)


@pytest.mark.parametrize(("config", "kind"), PAIRS)
def test_every_way_to_cut(interpreted, kernel, config: dict[str, Any], kind: dict[str, Any]):
    # Groups have a slot a step: see `test_groups_values_in_slots_that_are_used_again`.
    slots: dict[str, Any] = {"slots": 4 if "group" not in kind else 8}
    cut = HopperConfig(**(slots | config))
    tile_m = cut.tile_m
    m = 1 if tile_m > 128 else tile_m + 3 if tile_m < 32 else tile_m - 3  # odd; for small tiles, two of them
    operands, keywords = in_bfloat16(Case(m=m, n=128, k=512, **kind))
    y = interpreted(*kernel(operands, keywords, cut))
    assert y.dtype == jnp.float32
    assert_right(y, operands, keywords, scaled_weights="group" in kind and tile_m > 16)


@pytest.mark.parametrize("groups", [1, 4])
def test_fragments_through_the_public_function(interpreted, public, groups: int):
    (x, packed, scale), keywords = in_bfloat16(Case(m=6, n=128, k=256, group=256 // groups if groups > 1 else -1))
    scale = scale.astype(jnp.bfloat16)
    x = x.reshape(2, 3, 256)

    def call(function, x):
        return function(x, to_fragments(packed), scale.T, layout="fragments", out_dtype=jnp.float32)

    y = interpreted(functools.partial(call, public), x)
    assert y.shape == (2, 3, 128)
    assert_right(y, (x, packed, scale), keywords)
    assert_right(
        call(functools.partial(int4_matmul, implementation="xla"), x.astype(jnp.float32)), (x, packed, scale), {}
    )


def test_known_coordinates_are_taken(interpreted, kernel):
    operands, keywords = in_bfloat16(Case(m=5, n=64, k=128, rank=4, gated=True))
    config = HopperConfig(tile_m=8, blocks=1, splits=2)
    without = {name: value for name, value in keywords.items() if name != "compensator"}
    y = interpreted(*kernel(operands, keywords, config, z=jnp.zeros((5, 4))))
    assert_right(y, operands, without)


def test_what_is_not_finite_stays_in_its_row(interpreted, kernel):
    (x, *weight), keywords = in_bfloat16(Case(m=5, n=64, k=256, rank=3, bias=True))
    poisoned = x.at[3, 7].set(jnp.nan)
    config = HopperConfig(tile_m=8, blocks=1, splits=2, k_parts=2)
    y = interpreted(*kernel((poisoned, *weight), keywords, config))
    rows = jnp.array([0, 1, 2, 4])
    assert bool(jnp.isnan(y[3]).all())
    assert_right(y[rows], (x[rows], *weight), keywords)


def test_sums_do_not_depend_on_timing(interpreted, kernel):
    operands, keywords = in_bfloat16(Case(m=8, n=64, k=512))
    call = kernel(operands, keywords, HopperConfig(tile_m=8, blocks=1, splits=4, k_parts=2))
    first = interpreted(*call)
    for _ in range(3):
        np.testing.assert_array_equal(interpreted(*call), first)


@pytest.mark.parametrize("zero", [False, True])
def test_groups_values_in_slots_that_are_used_again(interpreted, kernel, zero: bool):
    operands, keywords = in_bfloat16(Case(m=8, n=64, k=512, group=64, symmetric=not zero))
    y, raced = interpreted.watch(*kernel(operands, keywords, HopperConfig(tile_m=8, blocks=1, slots=2)))
    assert_right(y, operands, keywords)
    assert not raced


def test_what_the_kernel_cannot_do(kernel):
    (x, packed, scale), _ = in_bfloat16(Case(m=4, n=64, k=128))

    def refused(match: str, config=None, **changes):
        operands = tuple(({"x": x, "packed": packed, "scale": scale} | changes).values())
        run, *rest = kernel(operands, {}, config)
        with pytest.raises(NotImplementedError, match=match):
            jax.eval_shape(run, *rest)

    refused("multiplies bfloat16, got float32", x=x.astype(jnp.float32))
    refused("multiplies bfloat16, got float16", x=x.astype(jnp.float16))
    refused("tile_m must be a multiple of 8 up to 256, got 12", HopperConfig(tile_m=12))
    refused("tile_m must be a multiple of 8 up to 256, got 264", HopperConfig(tile_m=264))
    refused("64 output channels are no multiple of 2 tiles of 64", HopperConfig(tile_m=8, row_tiles=2))
    refused("a copy brings 16 blocks at most, got 32", HopperConfig(tile_m=8, blocks=32))
    refused("128 columns are no multiple of 256", HopperConfig(tile_m=8, splits=2, blocks=2))
    refused("96 columns in groups of 48", packed=packed[:, :48], x=x[:, :96], scale=jnp.ones((64, 2)))
    refused(r"no configuration fits a weight \[64, 192\] with 2 groups", **wide(2))
    with pytest.raises(NotImplementedError, match=r"got bfloat16 to float16"):
        int4_matmul(x, packed, scale, out_dtype=jnp.float16, implementation="mosaic_gpu")


@pytest.mark.parametrize(("k", "blocks"), [(192, 1), (384, 2)])
def test_groups_that_a_cut_does_not_fit_are_refused(kernel, k: int, blocks: int):
    operands, keywords = in_bfloat16(Case(m=8, n=64, k=k, group=96))
    run, *rest = kernel(operands, keywords, HopperConfig(tile_m=8, blocks=blocks))
    with pytest.raises(NotImplementedError, match="group"):
        jax.eval_shape(run, *rest)


def wide(groups: int) -> dict:
    return {
        "x": jnp.ones((4, 192), jnp.bfloat16),
        "packed": jnp.zeros((64, 96), jnp.int8),
        "scale": jnp.ones((64, groups)),
    }


def test_other_gpus_are_refused(monkeypatch):
    (x, packed, scale), _ = in_bfloat16(Case(m=4, n=64, k=128))
    ada = [dataclasses.make_dataclass("Device", ["compute_capability", "device_kind"])("8.9", "NVIDIA L4")]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: ada)
    with pytest.raises(NotImplementedError, match="for Hopper, not NVIDIA L4"):
        int4_matmul(x, packed, scale, implementation="mosaic_gpu")
    assert_right(int4_matmul(x, packed, scale), (x, packed, scale), {})  # the next backend takes it


def test_an_unknown_layout_is_refused():
    (x, packed, scale), _ = in_bfloat16(Case(m=4, n=64, k=128))
    with pytest.raises(ValueError, match="layout must be rows, fragments or columns, got 'tiles'"):
        int4_matmul(x, packed, scale, layout="tiles")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scale must be \[G, 64\] with G dividing 128, got \[64, 1\]"):
        int4_matmul(x, to_fragments(packed), scale, layout="fragments")


@pytest.mark.parametrize("columns", [16, 32, 64, 128])
def test_words_unpack_to_codes(columns: int):
    """What the interpreted kernel does in place of assembly, against the packing's own definition."""
    codes = np.random.default_rng(0).integers(-128, 128, (64, 64), np.int8)
    words = jax.lax.bitcast_convert_type(to_fragments(jnp.asarray(codes)).reshape(-1, 4), jnp.int32)
    rows = jnp.arange(64)
    pieces = 128 // columns
    zeros = [rows % 16 - 8 + piece % 2 for piece in range(pieces)]
    scales = [(1 + rows / 64 + piece).astype(jnp.float32) for piece in range(pieces)]

    def unpacked(**options):
        got = unpack_words(words, columns=columns, **options, interpret=True)
        assert len(got) == pieces
        assert all(piece.dtype == jnp.bfloat16 for piece in got)
        return jnp.concatenate(got, axis=1)

    wanted = unpack_int4(jnp.asarray(codes)).astype(jnp.int32)
    np.testing.assert_array_equal(unpacked().astype(jnp.int32), wanted)
    wanted = wanted - jnp.repeat(jnp.stack(zeros, axis=1), columns, axis=1)
    np.testing.assert_array_equal(unpacked(zeros=zeros).astype(jnp.int32), wanted)
    factor = jnp.repeat(jnp.stack(scales, axis=1), columns, axis=1).astype(jnp.bfloat16)
    np.testing.assert_array_equal(unpacked(zeros=zeros, scales=scales), wanted.astype(jnp.bfloat16) * factor)
