"""The forms of a product that XLA's CPU back end runs fastest at the few rows of a decode step.

All figures: milliseconds for one product with a weight of 3072 x 576 on two cores of an x86 server, one with AVX2 or a
newer one with AVX-512.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int8

from pallas_kernels.int4_matmul import Compensator, compensator_coordinates, low_rank_output
from spear_jax.models.decoder import MODULES, Decoder, unstack
from spear_jax.nn.linear import Linear
from spear_jax.quant import QuantTensor

_FEW_ROWS = 16
"""Up to here a fused multiply and sum, which goes over the weights once with all cores, beats a matrix product: 0.57
against 0.99 for 8 rows with AVX2, 0.23 against 0.32 with AVX-512.

Tried for 8 rows with AVX-512 and not better: weights in bfloat16 widened in the sum (0.24), int8 codes as in `code_row`
(0.37). Tiles of 64 rows, transposed, take 0.18, but a prompt's matrix product takes half as long again on them, and a
second copy of the weights is 400 MB of the demo model."""

_LANES = 32
"""Columns that `code_row` multiplies at a time: they share a scale, and fill some vector registers."""

_SEGMENT = 576
"""Columns that `code_row` sums in one pass; in a longer one the compiler spills registers to memory."""


def dense(x: Float[Array, "*B K"], weight: Float[Array, "N K"]) -> Float[Array, "*B N"]:
    """Compute x W^T in float32, in the form that suits the number of rows."""
    rows = math.prod(x.shape[:-1])
    flat = x.reshape(rows, x.shape[-1])
    if 1 < rows <= _FEW_ROWS:
        out = (weight[:, None, :] * flat[None]).sum(-1).T
    else:
        out = jax.lax.dot_general(flat, weight, (((1,), (1,)), ((), ())))
    # Without the barrier XLA fuses the sum into each of its readers, and does the whole product again for every one.
    return jax.lax.optimization_barrier(out).reshape(*x.shape[:-1], -1)


def code_row(x: Float[Array, " K"], codes: Int8[Array, "N K"], scale: Float[Array, "N G"]) -> Float[Array, " N"]:
    """Compute x (scale * codes)^T in float32 for one row.

    Bound by reading the weights, so a byte a weight beats four: with AVX2 0.20 against 0.40 as a float32 product.
    Written as sums of slices, lane by lane, because a `sum` over the columns becomes a library call that widens the
    codes in memory.
    """
    k, groups = codes.shape[1], scale.shape[1]
    out = jnp.zeros((), jnp.float32)
    for first in range(0, k, _SEGMENT):
        lanes = None
        for start in range(first, min(first + _SEGMENT, k), _LANES):
            part = codes[:, start : start + _LANES].astype(jnp.float32)
            if groups > 1:
                part = part * scale[:, start * groups // k, None]
            part = part * x[start : start + _LANES]
            lanes = part if lanes is None else lanes + part
        assert lanes is not None
        width = _LANES
        while width > 1:
            width //= 2
            lanes = lanes[:, :width] + lanes[:, width:]
        out = out + jax.lax.optimization_barrier(lanes[:, 0])
    return jax.lax.optimization_barrier(out * scale[:, 0] if groups == 1 else out)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Arrays:
    """What a `CpuLinear` reads: float32 weight, bias, and codes with their scales where `code_row` can be used."""

    weight: Any
    bias: Any
    codes: Any
    scale: Any


@jax.jit
def _arrays(stack: Linear, layer: Int[Array, ""]) -> _Arrays:
    linear: Linear = jax.tree.map(lambda leaf: leaf[layer], stack)
    weight, bias = linear.weight, None if linear.bias is None else linear.bias[...]
    if not isinstance(weight, QuantTensor):
        return _Arrays(weight=weight[...], bias=bias, codes=None, scale=None)
    codes = scale = None
    if weight.shape[1] % _LANES == 0:
        codes, scale = weight.codes(), weight.scale.astype(jnp.float32)
        if weight.zero is not None:
            codes = codes - jnp.repeat(weight.zero, weight.shape[1] // scale.shape[1], axis=1)
    return _Arrays(weight=weight.dequantize(jnp.float32), bias=bias, codes=codes, scale=scale)


class CpuLinear(nnx.Module):
    """A linear for a CPU: float32 weights for several rows and, of an int4 weight, codes of a byte each for one."""

    activation = None  # as `Linear` has it: nothing is applied here

    def __init__(self, arrays: _Arrays) -> None:
        self.weight, self.bias, self.codes, self.scale = (
            None if array is None else nnx.Param(array)
            for array in (arrays.weight, arrays.bias, arrays.codes, arrays.scale)
        )

    @classmethod
    def layers_of(cls, linear: Linear) -> "list[CpuLinear]":
        """Take a stack of linears apart."""
        return [cls(_arrays(linear, np.int32(layer))) for layer in range(linear.weight.shape[0])]

    def __call__(
        self,
        x: Float[Array, "*B K"],
        *,
        compensator: Compensator | None = None,
        z: Float[Array, "*B R"] | None = None,
    ) -> Float[Array, "*B N"]:
        """Apply the layer; `z` are the compensator's gated coordinates where they are already known."""
        if self.codes is not None and self.scale is not None and math.prod(x.shape[:-1]) == 1:
            y = code_row(x.reshape(-1), self.codes[...], self.scale[...]).reshape(*x.shape[:-1], -1)
        else:
            assert self.weight is not None
            y = dense(x, self.weight[...])
        if self.bias is not None:
            y = y + self.bias[...]
        if compensator is not None:
            known = compensator_coordinates(x, compensator) if z is None else z
            y = jax.lax.optimization_barrier(y + low_rank_output(jax.lax.optimization_barrier(known), compensator))
        return y


def lay_out_for_cpu(model: Decoder) -> Decoder:
    """Give a float32 model of stacked layers with separate ones: each linear a `CpuLinear`, compensators in float32."""
    assert not isinstance(model.layers, nnx.List)
    rest = jax.tree.map(lambda leaf: leaf, model.layers)
    linears = {name: CpuLinear.layers_of(getattr(rest, name)) for name in MODULES}
    for name in MODULES:
        delattr(rest, name)
    separate = unstack(model.replace(layers=rest))
    assert isinstance(separate.layers, nnx.List)
    for i, layer in enumerate(separate.layers):
        for name in MODULES:
            setattr(layer, name, linears[name][i])
    for compensators in separate.compensators.values():
        compensators.layers = nnx.List([_in_float32(compensator) for compensator in compensators.layers])
    return separate


@jax.jit
def _in_float32(compensator: Compensator) -> Compensator:
    """Multiply int8 factors by their scales: the same values, without converting them in every step."""

    def rows(codes: Array, scale: Array | None) -> Array:
        return codes.astype(jnp.float32) * (1 if scale is None else scale.astype(jnp.float32)[:, None])

    gate = compensator.gate
    if gate is not None and gate.probe is not None:
        gate = dataclasses.replace(gate, probe=rows(gate.probe, gate.probe_scale), probe_scale=None)
    if gate is not None:
        gate = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gate)
    return Compensator(
        a=rows(compensator.a, compensator.a_scale), bt=rows(compensator.bt, compensator.bt_scale), gate=gate
    )


@jax.named_scope("head")
def cpu_logits(model: Decoder, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Compute next-token logits by `dense`."""
    table = model.embed if model.head is None else model.head
    assert isinstance(table, nnx.Variable), "expand the tables first"
    return dense(hidden, table[...])
