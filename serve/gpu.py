"""A model as a Hopper GPU runs it: codes in the order of its tensor cores, compensators as its kernel reads them."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from pallas_kernels.int4_matmul import Compensator
from pallas_kernels.packing import RANK_STEP, SIDE
from spear_jax.models.decoder import MODULES, Decoder, unstack
from spear_jax.nn.linear import Linear
from spear_jax.quant import QuantTensor

type CommandBuffers = Literal["default", "whole", "none"]

_COMMAND_BUFFERS = "xla_gpu_enable_command_buffer"
_CAPTURED = ("FUSION", "CUBLAS", "CUBLASLT", "CUDNN", "CUSTOM_CALL", "DYNAMIC_SLICE_FUSION", "CONDITIONAL")
"""What XLA of jax 0.11.2 captures by default."""


def command_buffer_options(buffers: CommandBuffers) -> dict[str, str]:
    """Give XLA's options for how much of a step it launches as one CUDA graph.

    By default all up to the choice of random or greedy sampling is one, and the host waits for that choice in every
    step, as branches with loops are left out; `whole` captures them too. `none` launches kernels one by one: only so
    can a kernel start before the one ahead of it has ended, which is lost where each is captured by itself.
    """
    kinds: dict[CommandBuffers, str | None] = {"default": None, "whole": ",".join((*_CAPTURED, "WHILE")), "none": ""}
    chosen = kinds[buffers]
    return {} if chosen is None else {_COMMAND_BUFFERS: chosen}


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
    """Transpose B, fill ranks up, and where there is no gate between them make one scale of A's and B's.

    Rows that are filled in add nothing, whatever the gate makes of them.
    """
    more = -compensator.a.shape[0] % RANK_STEP

    def fill(rows: Array | None) -> Array | None:
        return None if rows is None else jnp.pad(rows, ((0, more), *((0, 0),) * (rows.ndim - 1)))

    gate = compensator.gate
    if gate is not None:
        gate = dataclasses.replace(gate, w_in=fill(gate.w_in), w_out=fill(gate.w_out), b_out=fill(gate.b_out))
    bt, a_scale, bt_scale = fill(compensator.bt), fill(compensator.a_scale), fill(compensator.bt_scale)
    assert bt is not None
    if gate is None and a_scale is not None and bt_scale is not None:
        a_scale, bt_scale = a_scale * bt_scale, None
    return Compensator(a=fill(compensator.a), b=bt.T, a_scale=a_scale, bt_scale=bt_scale, gate=gate)
