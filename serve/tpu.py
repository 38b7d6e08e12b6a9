"""A model as a TPU runs it: codes in columns, ranks of compensators filled up."""

import dataclasses

import jax
from flax import nnx

from pallas_kernels.int4_matmul import Compensator
from pallas_kernels.int4_matmul.tpu_kernel import CODE_ROWS, LANES
from serve.gpu import alternate, fill_ranks
from spear_jax.models.decoder import MODULES, Decoder, unstack
from spear_jax.nn.linear import Linear
from spear_jax.quant import QuantTensor


def lay_out_for_tpu(model: Decoder) -> Decoder:
    """Give a model of stacked layers with separate ones, so that no program copies a layer out of the stack.

    Int4 linears are laid out in columns; those whose inputs are no multiple of 64 stay as they are. Gates and what they
    gate alternate in blocks of 64 channels, so that the product applies the activation.
    """
    separate = unstack(model)
    assert isinstance(separate.layers, nnx.List)
    paired = {"gate_up"} if _paired(model) else set()
    for layer in separate.layers:
        for name in MODULES:
            setattr(layer, name, _lay_out(getattr(layer, name), paired=name in paired))
    for name, compensators in separate.compensators.items():
        compensators.layers = nnx.List([_prepare(one, paired=name in paired) for one in compensators.layers])
    return separate


def _paired(model: Decoder) -> bool:
    """Say whether the product of gate and up applies the activation."""
    config = model.config
    return config.activation == "silu" and config.intermediate_size % LANES == 0 and _fits(model.layer(0).gate_up)


def _fits(linear: Linear) -> bool:
    return isinstance(linear.weight, QuantTensor) and linear.weight.shape[-1] % CODE_ROWS == 0


def _lay_out(linear: Linear, *, paired: bool) -> Linear:
    if not _fits(linear):
        return linear
    weight, bias = linear.weight, None if linear.bias is None else linear.bias[...]
    if paired:
        weight, bias = jax.tree.map(alternate, (weight, bias))
    return Linear(jax.jit(QuantTensor.in_columns)(weight), bias, activation="silu" if paired else None)


def _prepare(compensator: Compensator, *, paired: bool) -> Compensator:
    filled = fill_ranks(compensator)
    return dataclasses.replace(filled, bt=alternate(filled.bt.T).T) if paired else filled
