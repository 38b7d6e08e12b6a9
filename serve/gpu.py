"""A model as a Hopper GPU runs it: codes in the order of its tensor cores, compensators as its kernel reads them."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from pallas_kernels.int4_matmul import Compensator
from pallas_kernels.packing import RANK_STEP, SIDE, factor_to_fragments
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


_ALONE = ("o", "down")
"""Linears whose input no norm makes."""


def lay_out_for_hopper(model: Decoder) -> Decoder:
    """Give a model of stacked layers with separate ones: int4 linears in fragments, B as [N, R], R filled up to 16s.

    Gates and what they gate alternate in blocks of 64 channels, so that the product applies the activation. Linears
    with a side that is no multiple of 64 stay as they are.
    """
    separate = unstack(model)
    assert isinstance(separate.layers, nnx.List)
    for layer in separate.layers:
        for name in MODULES:
            setattr(layer, name, _lay_out(getattr(layer, name), paired=name == "gate_up" and _paired(model)))
    for name, compensators in separate.compensators.items():
        paired = name == "gate_up" and _paired(model)
        compensators.layers = nnx.List([_prepare(one, name, paired=paired) for one in compensators.layers])
    return separate


def _paired(model: Decoder) -> bool:
    """Say whether the product of gate and up applies the activation."""
    config = model.config
    paired = config.activation == "silu" and config.intermediate_size % SIDE == 0
    return paired and _in_blocks(model.layer(0).gate_up.weight)


def _in_blocks(weight: object) -> bool:
    return isinstance(weight, QuantTensor) and not any(side % SIDE for side in weight.shape[-2:])


def _lay_out(linear: Linear, *, paired: bool) -> Linear:
    weight = linear.weight
    if not isinstance(weight, QuantTensor) or not _in_blocks(weight):
        return linear
    bias = None if linear.bias is None else linear.bias[...]
    if paired:
        weight, bias = jax.tree.map(alternate, (weight, bias))
    return Linear(jax.jit(QuantTensor.in_fragments)(weight), bias, activation="silu" if paired else None)


def alternate(rows: Array) -> Array:
    """Put blocks of 64 of the first half of the rows and of the second half by turns."""
    return jnp.swapaxes(rows.reshape(2, -1, SIDE, *rows.shape[1:]), 0, 1).reshape(rows.shape)


def _prepare(compensator: Compensator, name: str, *, paired: bool) -> Compensator:
    """Fill ranks up and transpose B.

    A norm computes coordinates of what it gives. Where none stands before, a static compensator gets an A in fragments,
    with the scales in it, for the product to compute them.
    """
    filled = fill_ranks(compensator)
    a, scale = filled.a, filled.a_scale
    b = alternate(filled.bt.T) if paired else filled.bt.T
    along = name in _ALONE and filled.gate is None and filled.bt_scale is None
    if along and a.shape[0] <= SIDE and a.shape[1] % SIDE == 0:
        a = a.astype(jnp.float32) if scale is None else a.astype(jnp.float32) * scale.astype(jnp.float32)[:, None]
        return Compensator(a_fragments=jax.jit(factor_to_fragments)(a.astype(jnp.bfloat16)), b=b)
    return dataclasses.replace(filled, b=b, bt=None)


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
