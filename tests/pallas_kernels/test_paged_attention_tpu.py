"""The TPU kernel in Pallas's interpreter: equal to the reference, in both orders of copies, without races."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention.cases import CASES, Case
from pallas_kernels.paged_attention.tpu import TpuConfig, choose_config, paged_attention_mosaic_tpu

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
