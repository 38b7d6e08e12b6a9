"""What the Hopper product does besides: coordinates of a compensator, and an activation; interpreted, without races."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.int4_matmul import Compensator, dequantize, int4_matmul
from pallas_kernels.int4_matmul import gpu as gpu_backend
from pallas_kernels.int4_matmul.cases import Case
from pallas_kernels.int4_matmul.fragments import read_factor
from pallas_kernels.int4_matmul.gpu import int4_matmul_mosaic_gpu
from pallas_kernels.int4_matmul.plan import HopperConfig
from pallas_kernels.packing import factor_from_fragments, factor_to_fragments, to_fragments

TOLERANCE = 1e-2
"""Of the largest result: x, B and z are bfloat16, and so is the odd half of a pair."""

CUTS = {
    "one block": HopperConfig(tile_m=8, row_tiles=2, slots=2, blocks=1),
    "parts": HopperConfig(tile_m=16, row_tiles=2, k_parts=2, blocks=1, slots=2),
    "cluster": HopperConfig(tile_m=16, row_tiles=2, splits=2, blocks=2),
    "cluster of 4, one reducer": HopperConfig(tile_m=8, row_tiles=2, splits=4, blocks=1),
    "many rows": HopperConfig(tile_m=64, row_tiles=2, splits=2, blocks=1, slots=2),
}
QUICK = {("parts", "channel", None), ("parts", "group", "silu")}
KINDS = {
    "channel": Case(m=1, n=256, k=256, rank=16, int8_factors=True, bias=True),
    "group": Case(m=1, n=256, k=256, rank=32, int8_factors=True, group=64, symmetric=False),
}


def for_the_kernel(compensator: Compensator) -> Compensator:
    scale = compensator.a_scale * compensator.bt_scale
    a = (compensator.a.astype(jnp.float32) * scale[:, None]).astype(jnp.bfloat16)
    return Compensator(a_fragments=factor_to_fragments(a), b=compensator.bt.T)


@pytest.fixture
def compare(interpreted, interpreter, monkeypatch):
    def run(case: Case, config: HopperConfig | None, activation) -> None:
        (x, packed, scale), keywords = case.operands()
        x = x.astype(jnp.bfloat16)
        wanted = int4_matmul(
            x.astype(jnp.float32), packed, scale, **keywords, activation=activation, implementation="xla"
        )
        compensator = keywords.pop("compensator")
        monkeypatch.setattr(gpu_backend, "project_hopper", lambda *_, **__: pytest.fail("a launch of its own"))
        zero = keywords.get("zero")
        keywords["zero"] = None if zero is None else zero.T

        def call(x, fragments, scale, keywords, compensator):
            kernel = functools.partial(int4_matmul_mosaic_gpu, config=config, interpret=interpreter.PARAMS)
            zero, bias = keywords["zero"], keywords.get("bias")
            return kernel(
                *(x, fragments, scale, zero, bias, compensator, None, jnp.dtype(jnp.float32)),
                layout="fragments",
                activation=activation,
            )

        got = interpreted(call, x, to_fragments(packed), scale.T, keywords, for_the_kernel(compensator))
        assert got.shape == wanted.shape
        error = np.abs(np.asarray(got - wanted)).max() / np.abs(np.asarray(wanted)).max()
        assert error < TOLERANCE  # NaN fails too

    return run


@pytest.mark.parametrize(
    ("cut", "kind", "activation"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(CUTS, KINDS, (None, "silu"))
    ],
)
def test_coordinates_and_activation_in_one_launch(compare, cut: str, kind: str, activation):
    config, case = CUTS[cut], KINDS[kind]
    compare(dataclasses.replace(case, m=config.tile_m - 3 if config.tile_m > 8 else 11), config, activation)


def test_a_rule_of_thumb_leaves_room_for_coordinates(compare):
    compare(Case(m=3, n=128, k=512, rank=64, int8_factors=True), None, None)


def test_the_compensator_is_not_lost(interpreter, interpreted):
    """A compensator many times as large as the product: the comparison above would see a missing one."""
    (x, packed, scale), keywords = Case(m=8, n=128, k=256, rank=16, int8_factors=True).operands()
    without = int4_matmul(x, packed, scale)
    with_it = int4_matmul(x, packed, scale, **keywords)
    assert np.abs(with_it - without).max() > 0.3 * np.abs(without).max()


@pytest.mark.slow
def test_many_rows_compute_coordinates_before(interpreted, interpreter):
    case = Case(m=70, n=128, k=128, rank=16, int8_factors=True)
    (x, packed, scale), keywords = case.operands()
    wanted = int4_matmul(x, packed, scale, **keywords)
    compensator = for_the_kernel(keywords["compensator"])

    def call(x, packed, scale, compensator):
        kernel = functools.partial(int4_matmul_mosaic_gpu, interpret=interpreter.PARAMS)
        return kernel(*(x, packed, scale, None, None, compensator, None, jnp.dtype(jnp.float32)), layout="fragments")

    got = interpreted(call, x.astype(jnp.bfloat16), to_fragments(packed), scale.T, compensator)
    assert np.abs(np.asarray(got - wanted)).max() < TOLERANCE * np.abs(np.asarray(wanted)).max()


@pytest.mark.parametrize("rank", [16, 32, 48, 64])
def test_a_factor_is_read_as_it_was(rank: int):
    a = jnp.asarray(np.random.default_rng(rank).standard_normal((rank, 128)), jnp.bfloat16)
    fragments = factor_to_fragments(a)
    np.testing.assert_array_equal(factor_from_fragments(fragments, rank=rank), a)
    np.testing.assert_array_equal(read_factor(fragments, 2, rank, interpret=True)[:rank], a)


@pytest.mark.parametrize("shape", [(8, 64), (80, 64), (16, 96)])
def test_a_factor_that_is_no_fragment_is_refused(shape: tuple[int, int]):
    with pytest.raises(ValueError, match="multiple of 16 rows up to 64"):
        factor_to_fragments(jnp.zeros(shape, jnp.bfloat16))


def test_activations_are_checked():
    (x, packed, scale), _ = Case(m=2, n=64, k=64).operands()
    with pytest.raises(ValueError, match="over a multiple of 128 output channels, got 'silu' over 64"):
        int4_matmul(x, packed, scale, activation="silu")


def test_an_activation_takes_channels_by_turns():
    (x, packed, scale), _ = Case(m=2, n=256, k=64).operands()
    y = x @ dequantize(packed, scale).T
    wanted = jnp.concatenate([jax.nn.silu(y[:, i : i + 64]) * y[:, i + 64 : i + 128] for i in (0, 128)], axis=1)
    np.testing.assert_allclose(int4_matmul(x, packed, scale, activation="silu"), wanted, rtol=1e-4, atol=1e-5)
