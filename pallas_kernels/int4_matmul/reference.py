"""The specification of `int4_matmul`, in plain XLA; every other backend is tested against it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from pallas_kernels.int4_matmul.operands import Activation, Activations, Compensator, Gate, Layout
from pallas_kernels.packing import SIDE, from_fragments, unpack_int4

_TINY_POWER = 1e-12
"""Mean square of x below which its logarithm is cut off."""


def dequantize(
    packed: Int8[Array, "*L N K/2"],
    scale: Float[Array, "*L N G"],
    zero: Int8[Array, "*L N G"] | None = None,
    *,
    dtype: jnp.dtype | type = jnp.float32,
) -> Float[Array, "*L N K"]:
    """Give the weight `scale * (code - zero)`, computed in float32 and rounded once to `dtype`.

    The K columns fall into G equal groups, each with one scale; G = 1 is one scale per output channel.
    """
    codes = unpack_int4(packed)
    groups = scale.shape[-1]
    grouped = codes.reshape(*codes.shape[:-1], groups, codes.shape[-1] // groups).astype(jnp.float32)
    if zero is not None:
        grouped = grouped - zero.astype(jnp.float32)[..., None]
    return (grouped * scale.astype(jnp.float32)[..., None]).astype(dtype).reshape(codes.shape)


def compensator_coordinates(x: Float[Array, "*B K"], compensator: Compensator) -> Float[Array, "*B R"]:
    """Compute the gated low-rank coordinates, `g(z) * z` with `z = A x`, in float32 (SPEAR, section 2)."""
    z = _project(x, compensator.rows_of_a(), compensator.a_scale)
    gate = compensator.gate
    if gate is None:
        return z
    probed = None if gate.probe is None else _project(x, gate.probe, gate.probe_scale)
    return gated_coordinates(x, z, probed, gate)


def gated_coordinates(
    x: Float[Array, "*B K"], z: Float[Array, "*B R"], probed: Float[Array, "*B P"] | None, gate: Gate
) -> Float[Array, "*B R"]:
    """Apply a gate to coordinates `z` in float32; `probed` are the gate's own projections of `x`, if it has any."""
    f32 = jnp.float32
    z = z.astype(f32)
    hidden = jnp.einsum("...r,rh->...h", z, gate.w_in.astype(f32)) + gate.b_in.astype(f32)
    if probed is not None:
        hidden = hidden + jnp.einsum("...p,ph->...h", probed.astype(f32), gate.w_probe.astype(f32))
    if gate.w_rms is not None:
        power = jnp.mean(jnp.square(x.astype(f32)), axis=-1, keepdims=True)
        hidden = hidden + 0.5 * jnp.log(power + _TINY_POWER) * gate.w_rms.astype(f32)
    out = jnp.einsum("...h,rh->...r", jax.nn.silu(hidden), gate.w_out.astype(f32)) + gate.b_out.astype(f32)
    match gate.form:
        case "tanh":
            return z * (1 + jnp.tanh(out))
        case "linear":
            return z * (1 + out)
        case "shift":
            return z + out


def _project(x: Float[Array, "*B K"], rows: Array, scale: Array | None) -> Float[Array, "*B R"]:
    return jnp.einsum("...k,rk->...r", x.astype(jnp.float32), _dequantize_rows(rows, scale))


def int4_matmul_xla(
    x: Float[Array, "*B K"],
    packed: Int8[Array, "N K/2"],
    scale: Float[Array, "N G"],
    zero: Int8[Array, "N G"] | None,
    bias: Float[Array, " N"] | None,
    compensator: Compensator | None,
    z: Float[Array, "*B R"] | None,
    out_dtype: jnp.dtype,
    *,
    layout: Layout = "rows",
    activation: Activation | None = None,
    activations: Activations = "as they are",
) -> Float[Array, "*B N"]:
    """Compute what `int4_matmul` documents: products of x's dtype, sums and epilogue in float32."""
    if activations == "int8":
        codes, x_scale = int8_rows(x)
        x = codes.astype(jnp.float32) * x_scale
    if layout != "rows":
        packed = from_fragments(packed) if layout == "fragments" else packed.T
        scale, zero = scale.T, None if zero is None else zero.T
    # One scale a row factors out of the sum, so codes, exact in any float type, are what gets multiplied.
    factored = scale.shape[-1] == 1 and zero is None
    weight = unpack_int4(packed).astype(x.dtype) if factored else dequantize(packed, scale, zero, dtype=x.dtype)
    y = jnp.einsum("...k,nk->...n", x, weight, preferred_element_type=jnp.float32)
    if factored:
        y = y * scale[:, 0].astype(jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if compensator is not None:
        if z is None:
            z = compensator_coordinates(x, compensator)
        y = y + low_rank_output(z, compensator)
    if activation is not None:
        pairs = y.reshape(*y.shape[:-1], -1, 2, SIDE)
        y = (jax.nn.silu(pairs[..., 0, :]) * pairs[..., 1, :]).reshape(*y.shape[:-1], -1)
    return y.astype(out_dtype)


def int8_rows(x: Float[Array, "*B K"]) -> tuple[Int8[Array, "*B K"], Float[Array, "*B 1"]]:
    """Round each row to the nearest of 255 codes, scale = max|x| / 127."""
    wide = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / 127, 1e-12)
    return jnp.round(wide / scale).astype(jnp.int8), scale


def low_rank_output(z: Float[Array, "*B R"], compensator: Compensator) -> Float[Array, "*B N"]:
    """Compute the compensator's output `B z` from its gated coordinates, in float32."""
    bt = compensator.b.T if compensator.bt is None else compensator.bt
    return jnp.einsum("...r,rn->...n", z.astype(jnp.float32), _dequantize_rows(bt, compensator.bt_scale))


def _dequantize_rows(factor: Array, scale: Array | None) -> Float[Array, "R F"]:
    factor = factor.astype(jnp.float32)
    return factor if scale is None else factor * scale.astype(jnp.float32)[:, None]
