"""The TPU kernel in Pallas's interpreter: equal to the reference, in both orders of copies, without races."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.paged_attention import paged_attention, paged_decode, paged_write
from pallas_kernels.paged_attention.cases import CASES, Case
from pallas_kernels.paged_attention.tpu import (
    TpuConfig,
    choose_config,
    paged_attention_mosaic_tpu,
    paged_decode_mosaic_tpu,
    paged_write_mosaic_tpu,
)

V6E = "TPU v6 lite"
SMALL = TpuConfig(rows=16, tile=128)
BY_DEFAULT = {
    ("decode", "eager"),
    ("int8_window", "on_wait"),
    ("chunk_padded", "on_wait"),
    ("chunk_fp8_window", "eager"),
}


def check(tpu_interpreted, case: Case, *, order: str, config: TpuConfig | None = None) -> None:
    operands, keywords = case.operands(seed=1)
    wanted = paged_attention(*operands, **keywords, implementation="xla")
    q, k, v, table, lengths = operands
    tokens = q if q.ndim == 4 else q[:, None]
    call = functools.partial(
        paged_attention_mosaic_tpu, scale=keywords["scale"], config=config,
        interpret=pltpu.InterpretParams(detect_races=True, dma_execution_mode=order),
    )  # fmt: skip
    starts = keywords.get("starts", lengths - tokens.shape[1])
    scales = keywords.get("k_scale"), keywords.get("v_scale")
    with dispatch.compiling_for("tpu", kind=V6E):
        out = tpu_interpreted(call, tokens, k, v, *scales, table, lengths, starts, keywords.get("window"))
    assert out.dtype == jnp.bfloat16
    got, wanted = (np.asarray(array.reshape(q.shape), np.float64) for array in (out, wanted))
    assert np.isfinite(got).all()
    size = np.abs(wanted).max(axis=-1, keepdims=True)
    # Weights of the softmax are rounded to bfloat16, and so is the result.
    assert np.max(np.abs(got - wanted) / np.where(size == 0, 1e-3, size)) < 2.0**-6


ALL = [
    pytest.param(case, order, marks=() if (case, order) in BY_DEFAULT else pytest.mark.slow)
    for case in CASES
    for order in ("on_wait", "eager")
]


@pytest.mark.parametrize(("case", "order"), ALL)
def test_the_kernel_equals_the_reference(tpu_interpreted, case: str, order: str):
    check(tpu_interpreted, CASES[case], order=order)


@pytest.mark.parametrize(
    "case", ["chunk_window", *(pytest.param(case, marks=pytest.mark.slow) for case in ("window", "groups_of_three"))]
)
def test_several_tiles_and_blocks_equal_the_reference(tpu_interpreted, case: str):
    check(tpu_interpreted, CASES[case], order="on_wait", config=SMALL)


def decode_operands(lengths: tuple[int, ...], *, page: int, h: int = 128, heads: int = 8, kv_heads: int = 2):
    """Draw what `paged_decode` takes; what no sequence has is NaN, and the new token's place too."""
    rng, entries = np.random.default_rng(3), -(-max(lengths) // page) + 1
    shape = (len(lengths) * entries + 1, kv_heads, page, h)
    table = rng.permutation(shape[0] - 1)[: len(lengths) * entries].reshape(-1, entries)
    pages = rng.standard_normal((2, *shape))
    for row, length in enumerate(lengths):
        place = np.arange(entries * page) >= max(length - 1, 0)
        pages[:, table[row]] = np.where(place.reshape(1, entries, 1, page, 1), np.nan, pages[:, table[row]])
    qkv = jnp.asarray(rng.standard_normal((len(lengths), heads + 2 * kv_heads, h)), jnp.bfloat16)
    angle = rng.uniform(0, 6, (len(lengths), h // 2))
    cos, sin = np.tile(np.cos(angle), 2), np.concatenate([-np.sin(angle), np.sin(angle)], axis=1)
    k, v = jnp.asarray(pages, jnp.bfloat16)
    rotation = jnp.asarray(np.stack([cos, sin], axis=1), jnp.float32)
    return qkv, rotation, k, v, jnp.asarray(table, jnp.int32), jnp.asarray(lengths, jnp.int32)


@pytest.mark.parametrize(
    ("lengths", "page", "window", "config", "cores"),
    [
        ((0, 300, 129, 0, 1), 64, None, SMALL, 1),
        ((128, 257), 128, 40, None, 2),
        pytest.param((17, 16, 500, 0), 16, None, None, 2, marks=pytest.mark.slow),
        pytest.param((200, 0, 0, 64), 64, 1, SMALL, 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("order", ["on_wait", pytest.param("eager", marks=pytest.mark.slow)])
def test_a_decode_writes_and_attends_as_the_reference_does(
    tpu_interpreted, lengths: tuple[int, ...], page: int, window: int | None, config, cores: int, order: str
):
    """With empty sequences before, between and after others; on a TPU of two cores each takes half of them."""
    operands = decode_operands(lengths, page=page)
    call = functools.partial(
        paged_decode_mosaic_tpu, scale=0.1, config=config,
        interpret=pltpu.InterpretParams(detect_races=True, dma_execution_mode=order, num_cores_or_threads=cores),
    )  # fmt: skip
    seen = None if window is None else jnp.int32(window)
    with dispatch.compiling_for("tpu", kind="TPU v5p" if cores == 2 else V6E):
        out, *pages = tpu_interpreted(call, *operands, seen)
    wanted, *right = paged_decode(*operands, scale=0.1, window=window, implementation="xla")
    for got, expected in zip(pages, right, strict=True):
        np.testing.assert_array_equal(np.float32(got), np.float32(expected))
    np.testing.assert_allclose(np.float32(out), np.float32(wanted), atol=2.0**-6 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize(("start", "tokens"), [(0, 64), (70, 33), (127, 2), (150, 1), (100, 128)])
def test_a_chunk_is_written_as_the_reference_does(tpu_interpreted, start: int, tokens: int):
    _, _, k_pages, v_pages, table, _ = decode_operands((240,), page=64)
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.standard_normal((tokens, 2, 128)), jnp.bfloat16) for _ in range(2))
    operands = (k, v, k_pages, v_pages, table[0], jnp.int32(start))
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")
    with dispatch.compiling_for("tpu", kind=V6E):
        written = tpu_interpreted(functools.partial(paged_write_mosaic_tpu, interpret=params), *operands)
    for got, expected in zip(written, paged_write(*operands, implementation="xla"), strict=True):
        np.testing.assert_array_equal(np.float32(got), np.float32(expected))


def test_what_does_not_fit_together_is_not_written():
    pages = jnp.ones((2, 2, 16, 64))
    with pytest.raises(ValueError, match=r"expected twice \[T, 2, 64\] .*, got \[3, 1, 64\]"):
        paged_write(jnp.ones((3, 1, 64)), jnp.ones((3, 1, 64)), pages, pages, jnp.zeros(2, jnp.int32), jnp.int32(0))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(lengths=(9,), dtype="float32"), "got float32, bfloat16"),
        (Case(lengths=(9,), kv_dtype="float32"), "got bfloat16, float32"),
        (Case(lengths=(9,), h=80), "got 16 and 80"),
        (Case(lengths=(9,), page=24), "a multiple of 16 tokens"),
    ],
)
def test_what_the_kernel_cannot_do_is_said(case: Case, message: str):
    operands, keywords = case.operands()
    with dispatch.compiling_for("tpu", kind=V6E), pytest.raises(NotImplementedError, match=message):
        paged_attention(*operands, **keywords, implementation="mosaic_tpu")


@pytest.mark.parametrize("page", [16, 32, 48, 64, 128, 256])
@pytest.mark.parametrize("heads", [1, 8, 32])
def test_every_page_has_a_configuration(page: int, heads: int):
    for rows in (1, 4, 300):
        choose_config(rows, heads, 128, page=page, kv_bytes=2).check(page=page)
    with pytest.raises(NotImplementedError, match="does not fit pages of 96 tokens"):
        SMALL.check(page=96)
