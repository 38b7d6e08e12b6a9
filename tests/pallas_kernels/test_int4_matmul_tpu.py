"""The TPU kernel in Pallas's interpreter: equal to the reference, in both orders of copies, without races."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, tuning
from pallas_kernels.int4_matmul import Compensator, int4_matmul
from pallas_kernels.int4_matmul.cases import CASES, Case
from pallas_kernels.int4_matmul.operands import Gate
from pallas_kernels.int4_matmul.tpu import candidates, choose_config, int4_matmul_mosaic_tpu, vmem_budget, vmem_bytes
from pallas_kernels.int4_matmul.tpu_kernel import TpuConfig
from pallas_kernels.tpus import GENERATIONS, generation
from spear_jax.testing import assert_close

V6E = "TPU v6 lite"

LARGE = {
    "per channel": Case(m=40, n=512, k=512, bias=True, rank=16, gated=True, int8_factors=True, symmetric=False),
    "groups of 64": Case(m=40, n=512, k=512, group=64, rank=7, symmetric=False),
}
CUTS = {
    "one step": TpuConfig(block_m=64, block_n=512, block_k=512),
    "many steps": TpuConfig(block_m=16, block_n=128, block_k=128),
    "two cores": TpuConfig(block_m=16, block_n=128, block_k=256, cores=2),
    "x by blocks": TpuConfig(block_m=32, block_n=256, block_k=256, resident=False),
    "scaled weights": TpuConfig(block_m=64, block_n=256, block_k=256, resident=False, scaled="weights"),
}


def kernel(
    tpu_interpreted,
    positional,
    keywords,
    *,
    order: str = "on_wait",
    z=None,
    kind: str = V6E,
    cores: int = 1,
    **settings,
):
    options = (keywords.get(name) for name in ("zero", "bias", "compensator"))
    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode=order, num_cores_or_threads=cores)
    call = functools.partial(int4_matmul_mosaic_tpu, out_dtype=jnp.dtype(jnp.float32), interpret=interpret, **settings)
    x, *weight = positional
    with dispatch.compiling_for("tpu", kind=kind):
        return tpu_interpreted(call, x.astype(jnp.bfloat16), *weight, *options, z)


def reference(positional, keywords, **options):
    x, *weight = positional
    x = x.astype(jnp.bfloat16).astype(jnp.float32)
    return int4_matmul(x, *weight, **keywords, out_dtype=jnp.float32, implementation="xla", **options)


def check(tpu_interpreted, case: Case, **options) -> None:
    positional, keywords = case.operands()
    wanted = reference(positional, keywords)
    # Products of codes are exact; z and the weights that are scaled are rounded to bfloat16.
    exact = not case.rank and getattr(options.get("config"), "scaled", "sums") == "sums"
    assert_close(kernel(tpu_interpreted, positional, keywords, **options), wanted, relative=1e-6 if exact else 5e-3)


COVERED = {"group_64", "group_128", "asymmetric", "extreme_scales", "odd_columns", "static_rank_3", "static_rank_19"}
"""Cases that others are much like: `-m slow` runs them, and all in the other order of copies."""

CASE_ORDERS = [
    pytest.param(case, order, marks=pytest.mark.slow if case in COVERED or order == "eager" else ())
    for case, order in itertools.product(CASES, ("on_wait", "eager"))
]


@pytest.mark.parametrize(("case", "order"), CASE_ORDERS)
def test_the_kernel_equals_the_reference(tpu_interpreted, case: str, order: str):
    check(tpu_interpreted, CASES[case], order=order)


BY_DEFAULT = {
    ("per channel", "two cores", "eager"),
    ("per channel", "x by blocks", "on_wait"),
    ("groups of 64", "many steps", "on_wait"),
    ("groups of 64", "scaled weights", "on_wait"),
}
CUT_UP = [
    pytest.param(*key, marks=() if key in BY_DEFAULT else pytest.mark.slow)
    for key in itertools.product(LARGE, CUTS, ("on_wait", "eager"))
]


@pytest.mark.parametrize(("case", "cut", "order"), CUT_UP)
def test_every_cut_equals_the_reference(tpu_interpreted, case: str, cut: str, order: str):
    check(tpu_interpreted, LARGE[case], config=CUTS[cut], order=order)


@pytest.mark.parametrize("case", [CASES["asymmetric_group_32"], CASES["gated_group_64_int8"]])
def test_weights_may_be_laid_out_once(tpu_interpreted, case: Case):
    (x, packed, scale), keywords = case.operands()
    turned = {**keywords, "zero": keywords["zero"].T}
    operands = (x, packed.T, scale.T)
    rows = kernel(tpu_interpreted, (x, packed, scale), keywords)
    np.testing.assert_array_equal(kernel(tpu_interpreted, operands, turned, layout="columns"), rows)
    assert_close(reference(operands, turned, layout="columns"), rows, relative=5e-3)


@pytest.mark.parametrize("form", ["linear", "shift"])
def test_every_form_of_gate(tpu_interpreted, form: str):
    positional, keywords = Case(m=8, n=128, k=128, rank=16, gated=True).operands()
    old: Compensator = keywords["compensator"]
    gate = Gate(**(vars(old.gate) | {"form": form}))
    keywords["compensator"] = Compensator(a=old.a, b=old.bt.T, gate=gate)
    wanted = reference(positional, keywords)
    assert_close(kernel(tpu_interpreted, positional, keywords), wanted, relative=5e-3)


def test_what_a_gate_needs_besides_z_is_computed_before(tpu_interpreted):
    positional, keywords = Case(m=8, n=128, k=128, rank=16, gated=True).operands()
    old: Compensator = keywords["compensator"]
    gate = Gate(**(vars(old.gate) | {"w_rms": jnp.ones(8)}))
    keywords["compensator"] = Compensator(a=old.a, bt=old.bt, gate=gate)
    wanted = reference(positional, keywords)
    assert_close(kernel(tpu_interpreted, positional, keywords), wanted, relative=5e-3)


def test_known_coordinates_replace_the_first_factor(tpu_interpreted):
    positional, keywords = Case(m=8, n=128, k=128, rank=5).operands()
    z = jnp.asarray(np.random.default_rng(0).standard_normal((8, 5)), jnp.float32)
    wanted = reference(positional, keywords, z=z)
    assert_close(kernel(tpu_interpreted, positional, keywords, z=z), wanted, relative=5e-3)


@pytest.mark.parametrize("case", LARGE)
def test_two_cores_may_run_at_once(tpu_interpreted, case: str):
    """Each computes z for its own half of the columns, in vector memory of its own."""
    check(tpu_interpreted, LARGE[case], config=CUTS["two cores"], cores=2)


@pytest.mark.parametrize(
    ("case", "cut"),
    [("per channel", "one step"), pytest.param("groups of 64", "x by blocks", marks=pytest.mark.slow)],
)
def test_an_activation_ends_the_product(tpu_interpreted, case: str, cut: str):
    positional, keywords = LARGE[case].operands()
    got = kernel(tpu_interpreted, positional, keywords, config=CUTS[cut], activation="silu")
    assert got.shape == (40, 256)
    assert_close(got, reference(positional, keywords, activation="silu"), relative=5e-3)


def test_an_activation_takes_whole_vectors_of_pairs():
    (x, packed, scale), _ = Case(m=8, n=384, k=128).operands()
    call = functools.partial(
        int4_matmul, x.astype(jnp.bfloat16), packed.T, scale.T, activation="silu", layout="columns"
    )
    assert call().shape == (8, 192)
    with dispatch.compiling_for("tpu", kind=V6E), pytest.raises(NotImplementedError, match="no configuration fits"):
        call(implementation="mosaic_tpu")


INT8 = {name: CASES[name] for name in ("odd_rows", "gated_rank_16_int8")} | {"large": LARGE["groups of 64"]}


@pytest.mark.parametrize("name", INT8)
def test_x_may_be_rounded_to_int8(tpu_interpreted, name: str):
    """Beside the reference with the same rounding the kernel is exact; that rounding costs less than 2% here."""
    positional, keywords = INT8[name].operands()
    config = CUTS["two cores"] if name == "large" else None
    got = kernel(tpu_interpreted, positional, keywords, activations="int8", config=config)
    wanted = reference(positional, keywords, activations="int8")
    assert_close(got, wanted, relative=5e-3 if INT8[name].rank else 1e-6)
    assert_close(wanted, reference(positional, keywords), relative=2e-2)


def test_the_error_of_int8_is_as_stated():
    (x, packed, scale), _ = Case(m=64, n=256, k=4096).operands()
    exact = int4_matmul(x, packed, scale)
    error = jnp.linalg.norm(int4_matmul(x, packed, scale, activations="int8") - exact) / jnp.linalg.norm(exact)
    assert 0.007 < error < 0.009


def test_a_tpu_without_int8_says_so(tpu_interpreted):
    positional, keywords = CASES["bfloat16"].operands()
    with pytest.raises(NotImplementedError, match="matrix units of tpu7x take no int8"):
        kernel(tpu_interpreted, positional, keywords, activations="int8", kind="TPU7x")
    with pytest.raises(ValueError, match='must be "as they are" or "int8"'):
        int4_matmul(*positional, activations="int4")  # type: ignore[arg-type]


def test_a_planted_race_is_found(tpu_races):
    """A kernel that reads what it has not waited for: if this is not found, no absence of races means anything."""

    def hasty(x_hbm, out, buffer, semaphore):
        copy = pltpu.make_async_copy(x_hbm, buffer, semaphore)
        copy.start()
        out[...] = buffer[...]
        copy.wait()

    def run(x):
        return pl.pallas_call(
            hasty,
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA(())],
            interpret=pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager"),
        )(x)

    jax.block_until_ready(jax.jit(run)(jnp.ones((8, 128))))
    assert tpu_races()


def test_memory_that_was_not_written_is_no_number(tpu_races):
    def lazy(out):
        del out

    params = pltpu.InterpretParams()
    out = jax.jit(pl.pallas_call(lazy, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32), interpret=params))()
    assert np.isnan(out).all()
    assert not tpu_races()


@pytest.mark.parametrize("name", GENERATIONS)
@pytest.mark.parametrize("group", [-1, 32, 128])
def test_every_shape_of_a_model_has_a_cut(name: str, group: int):
    chip = GENERATIONS[name]
    shapes = [(576, 576), (960, 576), (3072, 576), (576, 1536), (6144, 4096), (4096, 14336), (3072, 2048), (9728, 896)]
    for n, k in shapes:
        if k % group:
            continue
        groups = 1 if group == -1 else k // group
        for m in (1, 16, 33, 300, 2048):
            config, _ = choose_config(m, n, k, groups=groups, rank=64, chip=chip)
            config.check(n=n, k=k, groups=groups)
            assert vmem_bytes(config, k=k, groups=groups, rank=64) <= vmem_budget(chip)


@pytest.mark.parametrize(
    ("case", "message"),
    [(Case(m=8, n=64, k=128), "multiplies bfloat16, got float32"), (CASES["bfloat16"], "TPU v6e, TPU7x, not for cpu")],
)
def test_what_the_kernel_cannot_do_is_said(case: Case, message: str):
    positional, keywords = case.operands()
    with pytest.raises(NotImplementedError, match=message):
        int4_matmul(*positional, **keywords, implementation="mosaic_tpu")


def test_cuts_that_do_not_fit_are_refused():
    with pytest.raises(NotImplementedError, match=r"does not cut up a weight \[256, 256\]"):
        TpuConfig(block_m=8, block_n=96, block_k=128).check(n=256, k=256, groups=1)
    with pytest.raises(NotImplementedError, match="blocks of 128 columns do not hold whole groups of 256"):
        TpuConfig(block_m=8, block_n=128, block_k=128).check(n=256, k=512, groups=2)


def test_stored_cuts_come_first(monkeypatch):
    stored = {"block_m": 16, "block_n": 128, "block_k": 128}
    monkeypatch.setattr(tuning, "lookup", lambda operation, key, device: stored if device == "tpu-v6-lite" else None)
    shape = {"groups": 1, "rank": 0}
    assert choose_config(5, 512, 512, **shape, chip=generation(V6E)) == (TpuConfig(**stored), "tuned")
    config, source = choose_config(5, 512, 512, **shape, chip=generation("TPU7x"))
    assert source == "model"
    assert config in candidates(16, 512, 512, **shape, chip=generation("TPU7x"))
