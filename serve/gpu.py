"""A model as a Hopper GPU runs it: codes in the order of its tensor cores, compensators as its kernel reads them."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from pallas_kernels.int4_matmul import Compensator
from pallas_kernels.packing import RANK_STEP, SIDE
from spear_jax.models.decoder import MODULES, Decoder, unstack
from spear_jax.nn.linear import Linear
from spear_jax.quant import QuantTensor


def lay_out_for_hopper(model: Decoder) -> Decoder:
    """Give a model of stacked layers with separate ones: int4 linears in fragments, B as [N, R], R filled up to 16s.

    Linears with a side that is no multiple of 64 stay as they are.
    """
    separate = unstack(model)
    assert isinstance(separate.layers, nnx.List)
    for layer in separate.layers:
        for name in MODULES:
            setattr(layer, name, _lay_out(getattr(layer, name)))
    for compensators in separate.compensators.values():
        compensators.layers = nnx.List([_prepare(compensator) for compensator in compensators.layers])
    return separate


def _lay_out(linear: Linear) -> Linear:
    weight = linear.weight
    if not isinstance(weight, QuantTensor) or any(side % SIDE for side in weight.shape[-2:]):
        return linear
    return Linear(jax.jit(QuantTensor.in_fragments)(weight), None if linear.bias is None else linear.bias[...])


def _prepare(compensator: Compensator) -> Compensator:
    """Fill ranks up and transpose B."""
    filled = fill_ranks(compensator)
    return dataclasses.replace(filled, b=filled.bt.T, bt=None)


def fill_ranks(compensator: Compensator) -> Compensator:
    """Fill ranks up to multiples of 16, and where there is no gate between them make one scale of A's and B's.

    Rows that are filled in add nothing, whatever the gate makes of them.
    """
    more = -compensator.a.shape[0] % RANK_STEP

    def fill(rows: Array | None) -> Array | None:
        return None if rows is None else jnp.pad(rows, ((0, more), *((0, 0),) * (rows.ndim - 1)))

    gate = compensator.gate
    if gate is not None:
        gate = dataclasses.replace(gate, w_in=fill(gate.w_in), w_out=fill(gate.w_out), b_out=fill(gate.b_out))
    a_scale, bt_scale = fill(compensator.a_scale), fill(compensator.bt_scale)
    if gate is None and a_scale is not None and bt_scale is not None:
        a_scale, bt_scale = a_scale * bt_scale, None
    return Compensator(a=fill(compensator.a), bt=fill(compensator.bt), a_scale=a_scale, bt_scale=bt_scale, gate=gate)
