"""Kernels before a product, interpreted with race detection and poisoned memory, against the reference in float32."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tails import glu_project, gpu, rmsnorm_project
from pallas_kernels.tails.cases import CASES, Case
from pallas_kernels.tails.hopper import tail_hopper

SUM = 4e-6
"""Rounding of float32 sums, and of the approximate exponential and root, as a share of the sum of sizes."""

BF16 = 2.0**-8
"""Rounding to bfloat16, as a share of what is rounded."""

CUTS = {
    "one block": {"cluster": 1, "warpgroups": 1},
    "warpgroups alone": {"cluster": 1, "warpgroups": 4},
    "cluster alone": {"cluster": 4, "warpgroups": 1},
    "both": {"cluster": 2, "warpgroups": 2},
}
KINDS = {
    "norm": Case(op="norm", m=8, k=448, rank=16),
    "norm without A": Case(op="norm", m=3, k=448),
    "norm alone": Case(op="norm", m=5, k=448, update=False, rank=32),
    "glu": Case(op="glu", m=6, k=448, rank=16),
    "glu in pieces": Case(op="glu", m=2, k=1216, rank=16),
    "norm in pieces": Case(op="norm", m=2, k=1216, rank=16),
}
SLOW = {"norm_alone", "norm_rank_16", "norm_rank_80", "glu", "glu_gated_rank_3"}
QUICK = {("both", "norm"), ("cluster alone", "norm alone"), ("one block", "norm in pieces"), ("both", "glu in pieces")}


def wanted(case: Case, operands, keywords) -> dict[str, Any]:
    """Give results in float32, of operands as they are; h is rounded as the kernel's must be."""
    function = {"norm": rmsnorm_project, "glu": glu_project}[case.op]
    first, *rest = operands
    if case.op == "norm":
        h = first if rest[0] is None else first + rest[0]
        x, _, z = function(h.astype(jnp.float32), None, rest[1], **keywords, implementation="xla")
        return {"x": x, "h": h, "z": z}
    x, z = function(first.astype(jnp.float32), **keywords, implementation="xla")
    return {"x": x, "z": z}


def assert_right(out: dict[str, Any], case: Case, operands, keywords) -> None:
    """Allow each element what rounding can do to it."""
    assert out["x"].dtype == jnp.bfloat16
    rounded = out.get("z") is not None and out["z"].dtype == jnp.bfloat16
    in_float64 = functools.partial(jax.tree.map, lambda value: np.asarray(value, np.float64))
    right, out = in_float64(wanted(case, operands, keywords)), in_float64(out)
    compensator = keywords["compensator"]
    assert (out.get("z") is None) == (compensator is None)
    if "h" in out:
        np.testing.assert_array_equal(out["h"], right["h"])
    np.testing.assert_array_less(np.abs(out["x"] - right["x"]), (BF16 + SUM) * np.abs(right["x"]) + 1e-30)
    if compensator is None:
        return
    scale = 1 if compensator.a_scale is None else np.asarray(compensator.a_scale)[:, None]
    sizes = np.abs(right["x"]) @ np.abs(np.asarray(compensator.a, np.float64) * scale).T
    allowed = (BF16 * (1 if compensator.a.dtype == jnp.int8 else 2.1) + SUM) * sizes
    if case.gated:  # which passes errors of one coordinate on to others
        allowed = 4 * np.sum(allowed, axis=1, keepdims=True)
    allowed = allowed + rounded * BF16 * np.abs(right["z"])
    np.testing.assert_array_less(np.abs(out["z"] - right["z"]), allowed)


@pytest.fixture
def public(interpreter, monkeypatch):
    """Give the public functions by op, with their GPU kernels interpreted."""
    for name in ("rmsnorm_project_mosaic_gpu", "glu_project_mosaic_gpu"):
        kernel = functools.partial(getattr(gpu, name), interpret=interpreter.PARAMS)
        monkeypatch.setattr(gpu, name, kernel)
    norm = functools.partial(rmsnorm_project, implementation="mosaic_gpu")
    glu = functools.partial(glu_project, implementation="mosaic_gpu")

    def run(case: Case, operands, keywords):
        static = {name: keywords[name] for name in ("eps", "activation") if name in keywords}

        def call(operands, compensator):
            results = {"norm": norm, "glu": glu}[case.op](*operands, compensator=compensator, **static)
            return dict(zip(("x", "h", "z") if case.op == "norm" else ("x", "z"), results, strict=True))

        return call, operands, keywords["compensator"]

    return run


EVERY = [pytest.param(case, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, case in CASES.items()]


@pytest.mark.parametrize("case", EVERY)
def test_every_case(interpreted, public, case: Case):
    operands, keywords = case.operands()
    assert_right(interpreted(*public(case, operands, keywords)), case, operands, keywords)


PAIRS = [
    pytest.param(CUTS[c], KINDS[k], id=f"{c}-{k}", marks=() if (c, k) in QUICK else pytest.mark.slow)
    for c in CUTS
    for k in KINDS
]


def kernel(interpreter, case: Case, operands, keywords, **options):
    def run(operands, compensator):
        given = dict(zip(("first", "update", "weight"), operands, strict=False))
        if compensator is not None:
            given |= {"a": compensator.a, "a_scale": compensator.a_scale}
        return tail_hopper(case.op, **given, eps=1e-5, interpret=interpreter.PARAMS, **options)

    return run, operands, keywords["compensator"]


@pytest.mark.parametrize(("cut", "case"), PAIRS)
def test_every_way_to_cut(interpreter, interpreted, cut: dict[str, int], case: Case):
    """Seven or nineteen blocks of columns: the last parts have fewer than others, or none."""
    operands, keywords = case.operands()
    out = interpreted(*kernel(interpreter, case, operands, keywords, **cut))
    assert_right(out, case, operands, keywords)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_coordinates_of_what_is_there(interpreter, interpreted, dtype):
    case = Case(op="norm", m=16, k=256, rank=16)
    (x, *_), keywords = case.operands()
    a, scale = keywords["compensator"].a, keywords["compensator"].a_scale
    options = {"cluster": 2, "warpgroups": 2, "z_dtype": dtype, "interpret": interpreter.PARAMS}
    out = interpreted(lambda x: tail_hopper("plain", x, a=a, a_scale=scale, **options), x)
    assert list(out) == ["z"]
    assert out["z"].dtype == dtype
    right = x.astype(jnp.float32) @ (a.astype(jnp.float32) * scale[:, None]).T
    np.testing.assert_allclose(
        out["z"].astype(jnp.float32), right, rtol=BF16 if dtype == jnp.bfloat16 else 0, atol=1e-5
    )


@pytest.mark.parametrize("op", ["norm", pytest.param("glu", marks=pytest.mark.slow)])
def test_what_is_not_finite_stays_in_its_row(interpreter, interpreted, op):
    case = Case(op=op, m=5, k=256, rank=16)
    (first, *rest), keywords = case.operands()
    operands = (first.at[3, 70].set(jnp.nan), *rest)
    out = interpreted(*kernel(interpreter, case, operands, keywords, cluster=2, warpgroups=2))
    assert bool(jnp.isnan(out["z"][3]).all())
    rows = np.array([0, 1, 2, 4])
    kept = (first[rows], *(array if array is None or array.ndim == 1 else array[rows] for array in rest))
    out = {name: value[rows] for name, value in out.items()}
    assert_right(out, dataclasses.replace(case, m=4), kept, keywords)


def test_sums_do_not_depend_on_timing(interpreter, interpreted):
    case = Case(op="norm", m=8, k=512, rank=16)
    operands, keywords = case.operands()
    call = kernel(interpreter, case, operands, keywords, cluster=4, warpgroups=2)
    first = interpreted(*call)
    jax.tree.map(np.testing.assert_array_equal, interpreted(*call), first)


def test_what_the_kernel_cannot_do():
    def refused(match: str, m: int, k: int, dtype=jnp.bfloat16):
        x = jax.ShapeDtypeStruct((m, k), dtype)
        norm = functools.partial(rmsnorm_project, eps=1e-5, implementation="mosaic_gpu")
        with pytest.raises(NotImplementedError, match=match):
            jax.eval_shape(norm, x, x, jax.ShapeDtypeStruct((k,), jnp.float32))

    refused("72 rows are more than 64", 72, 128)
    refused("13 rows are more than 64, or more than 8 but no multiple", 13, 128)
    refused("96 columns are no multiple of 64", 8, 96)
    refused("65536 columns and rank 0 takes", 8, 65536)
    refused("for bfloat16, got float32", 8, 128, jnp.float32)


def test_operands_that_do_not_fit_are_refused():
    x, weight = jnp.ones((2, 8)), jnp.ones(8)
    compensator = Case(op="norm", m=1, k=16, rank=2).operands()[1]["compensator"]
    with pytest.raises(ValueError, match=r"update must be float32\[2, 8\] as residual is, got float32\[2, 4\]"):
        rmsnorm_project(x, x[:, :4], weight, eps=0.1)
    with pytest.raises(ValueError, match=r"weight must have shape \[8\], got \[4\]"):
        rmsnorm_project(x, x, weight[:4], eps=0.1)
    with pytest.raises(ValueError, match="residual must be floating, got int32"):
        rmsnorm_project(x.astype(jnp.int32), None, weight, eps=0.1)
    with pytest.raises(ValueError, match=r"compensator.a must have shape \[R, 8\], got \[2, 16\]"):
        rmsnorm_project(x, x, weight, eps=0.1, compensator=compensator)
    with pytest.raises(ValueError, match=r"activation must be one of .*, got 'relu'"):
        glu_project(x, activation="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"with an even last axis, got float32\[2, 7\]"):
        glu_project(x[:, :7], activation="silu")


def test_a_norm_is_cut_as_tuned(monkeypatch):
    asked, used = [], {}
    operands, keywords = Case(op="norm", m=3, k=128, rank=16).operands()
    out = {"x": operands[0], "h": operands[0], "z": jnp.zeros((3, 16))}
    cut = {"cluster": 2, "warpgroups": 1}
    monkeypatch.setattr(gpu.dispatch, "refuse_other_gpus", lambda: None)
    monkeypatch.setattr(gpu.tuning, "lookup", lambda *key: asked.append(key) or cut)
    monkeypatch.setattr(gpu, "tail_hopper", lambda kind, **options: used.update(options) or out)
    gpu.rmsnorm_project_mosaic_gpu(*operands, keywords["compensator"], eps=1e-5)
    assert asked == [("rmsnorm_project", {"m": 3, "k": 128, "ranks": 16})]
    assert used.items() >= cut.items()
