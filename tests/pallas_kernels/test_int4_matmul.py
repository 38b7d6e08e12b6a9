import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.int4_matmul import Compensator, compensator_coordinates, int4_matmul
from pallas_kernels.int4_matmul.cases import CASES, Case
from pallas_kernels.packing import unpack_int4
from spear_jax.testing import assert_close


def in_float64(x, packed, scale, *, zero=None, bias=None, compensator: Compensator | None = None):
    """The documented formula, written out in NumPy."""

    def f64(value):
        return np.asarray(value, np.float64)

    codes, groups = f64(unpack_int4(packed)), scale.shape[1]
    columns = codes.shape[1] // groups
    offset = 0 if zero is None else np.repeat(f64(zero), columns, axis=1)
    y = f64(x) @ (np.repeat(f64(scale), columns, axis=1) * (codes - offset)).T
    if bias is not None:
        y = y + f64(bias)
    if compensator is not None:
        a, bt = f64(compensator.a), f64(compensator.bt)
        if compensator.a_scale is not None:
            a, bt = a * f64(compensator.a_scale)[:, None], bt * f64(compensator.bt_scale)[:, None]
        z = f64(x) @ a.T
        gate = compensator.gate
        if gate is not None:
            hidden = z @ f64(gate.w_in) + f64(gate.b_in)
            hidden = hidden / (1 + np.exp(-hidden))
            z = z * (1 + np.tanh(hidden @ f64(gate.w_out).T + f64(gate.b_out)))
        y = y + z @ bt
    return y


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_xla_equals_the_formula(case: Case):
    positional, keywords = case.operands()
    y = jax.jit(lambda p, k: int4_matmul(*p, **k, implementation="xla"))(positional, keywords)
    assert y.dtype == case.dtype
    tolerance = 2e-2 if case.dtype == "bfloat16" else 1e-5
    assert_close(y.astype(jnp.float32), in_float64(*positional, **keywords), relative=tolerance)


def test_leading_axes_and_out_dtype():
    (x, packed, scale), _ = Case(m=6, n=32, k=64).operands()
    flat = int4_matmul(x, packed, scale)
    y = int4_matmul(x.reshape(2, 3, 64), packed, scale, out_dtype=jnp.bfloat16)
    assert y.shape == (2, 3, 32)
    assert y.dtype == jnp.bfloat16
    assert_close(y.reshape(6, 32).astype(jnp.float32), flat, relative=1e-2)


def test_known_coordinates_replace_the_first_factor():
    (x, packed, scale), keywords = Case(m=4, n=32, k=64, rank=4, gated=True).operands()
    compensator = keywords["compensator"]
    z = compensator_coordinates(x, compensator)
    given = int4_matmul(x, packed, scale, compensator=compensator, z=z)
    assert_close(given, int4_matmul(x, packed, scale, compensator=compensator), relative=1e-6)
    assert_close(
        int4_matmul(x, packed, scale, compensator=compensator, z=jnp.zeros_like(z)),
        int4_matmul(x, packed, scale),
        relative=1e-6,
    )


def test_a_gate_that_starts_at_zero_is_a_static_term():
    (x, packed, scale), keywords = Case(m=4, n=32, k=64, rank=4, gated=True).operands()
    gated = keywords["compensator"]
    zeros = {"w_out": jnp.zeros_like(gated.gate.w_out), "b_out": jnp.zeros_like(gated.gate.b_out)}
    neutral = Compensator(a=gated.a, bt=gated.bt, gate=type(gated.gate)(**(vars(gated.gate) | zeros)))
    static = Compensator(a=gated.a, bt=gated.bt)
    np.testing.assert_array_equal(
        int4_matmul(x, packed, scale, compensator=neutral), int4_matmul(x, packed, scale, compensator=static)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((2, 62))}, r"x must be floating \[..., 64\]"),
        ({"x": jnp.zeros((2, 64), jnp.int32)}, "x must be floating"),
        ({"packed": jnp.zeros((32, 32), jnp.uint8)}, r"packed must be int8 \[N, K/2\], got uint8\[32, 32\]"),
        ({"scale": jnp.ones((32, 3))}, r"scale must be \[32, G\] with G dividing 64"),
        ({"bias": jnp.ones(31)}, r"bias must have shape \[32\], got \[31\]"),
        ({"zero": jnp.zeros((32, 2), jnp.int8)}, r"zero must have shape \[32, 1\]"),
        ({"z": jnp.ones((2, 4))}, "z was given without a compensator"),
        (
            {"compensator": Compensator(a=jnp.ones((3, 64)), bt=jnp.ones((4, 32)))},
            r"compensator.a must have shape \[4,",
        ),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    operands = {"x": jnp.ones((2, 64)), "packed": jnp.zeros((32, 32), jnp.int8), "scale": jnp.ones((32, 1))}
    with pytest.raises(ValueError, match=message):
        int4_matmul(**(operands | change))


def test_dispatch_names_what_is_missing():
    (x, packed, scale), _ = Case(m=2, n=32, k=64).operands()
    with pytest.raises(ValueError, match="must be mosaic_gpu, mosaic_tpu or xla, got 'cuda'"):
        int4_matmul(x, packed, scale, implementation="cuda")  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="has no mosaic_tpu backend; it has xla"):
        dispatch.call("op", {"xla": lambda: None}, "mosaic_tpu")


def test_dispatch_gathers_every_refusal():
    def refuse():
        raise NotImplementedError("rank too large")

    with pytest.raises(ExceptionGroup) as caught:
        dispatch.call("op", {"xla": refuse}, None)
    assert "rank too large" in str(caught.value.exceptions[0])
