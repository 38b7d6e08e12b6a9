"""Kernels before a product on a TPU, interpreted: equal to the reference, in both orders of copies, without races."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.tails import glu_project, rmsnorm_project, tpu
from pallas_kernels.tails.cases import CASES, Case
from spear_jax.testing import assert_close

V6E = "TPU v6 lite"
BF16 = 2.0**-8
FITTING = {name: case for name, case in CASES.items() if case.k % 128 == 0}
MANY_ROWS = {
    "norm": Case(op="norm", m=300, k=256, rank=16, gated=True),
    "glu": Case(op="glu", m=300, k=256, rank=5, activation="gelu_tanh"),
}


def public(case: Case, implementation: str, operands, compensator, options):
    function = {"norm": rmsnorm_project, "glu": glu_project}[case.op]
    out = function(*operands, compensator=compensator, implementation=implementation, **options)
    return dict(zip(("x", "h", "z") if case.op == "norm" else ("x", "z"), out, strict=True))


def check(tpu_interpreted, monkeypatch, case: Case, order: str) -> None:
    operands, keywords = case.operands()
    compensator = keywords.pop("compensator")
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode=order)
    for name in ("rmsnorm_project_mosaic_tpu", "glu_project_mosaic_tpu"):
        monkeypatch.setattr(tpu, name, functools.partial(getattr(tpu, name), interpret=params))
    with dispatch.compiling_for("tpu", kind=V6E):
        out = tpu_interpreted(
            lambda operands, own: public(case, "mosaic_tpu", operands, own, keywords), operands, compensator
        )
    first, *rest = operands
    if case.op == "norm":
        h = first if rest[0] is None else first + rest[0]
        np.testing.assert_array_equal(out.pop("h"), h)
        first, rest = h, [None, rest[1]]
    right = public(case, "xla", (first.astype(jnp.float32), *rest), compensator, keywords)
    assert out["x"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out["x"]), right["x"], rtol=BF16 + 1e-5, atol=1e-6)
    assert (out["z"] is None) == (compensator is None)
    if compensator is not None:
        # x is rounded, and so are factors that are no int8; a gate passes errors of one coordinate on to others.
        assert_close(out["z"], right["z"], relative=2e-2)


@pytest.mark.parametrize("order", ["on_wait", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", FITTING)
def test_every_case(tpu_interpreted, monkeypatch, case: str, order: str):
    check(tpu_interpreted, monkeypatch, FITTING[case], order)


@pytest.mark.parametrize("case", MANY_ROWS)
def test_several_blocks_of_rows_of_which_the_last_is_not_full(tpu_interpreted, monkeypatch, case: str):
    check(tpu_interpreted, monkeypatch, MANY_ROWS[case], "eager")


def test_what_the_kernel_cannot_do():
    def refused(match: str, m: int, k: int, dtype=jnp.bfloat16):
        x = jax.ShapeDtypeStruct((m, k), dtype)
        norm = functools.partial(rmsnorm_project, eps=1e-5, implementation="mosaic_tpu")
        with dispatch.compiling_for("tpu", kind=V6E), pytest.raises(NotImplementedError, match=match):
            jax.eval_shape(norm, x, x, jax.ShapeDtypeStruct((k,), jnp.float32))

    refused("192 columns are no multiple of 128", 8, 192)
    refused("16 rows of 262144 columns do not fit into the vector memory of v6e", 16, 2**18)
    refused("for bfloat16, got float32", 8, 128, jnp.float32)
