"""A model as a TPU runs it: codes in columns, ranks of compensators filled up."""

import jax
from flax import nnx

from pallas_kernels.int4_matmul.tpu_kernel import CODE_ROWS
from serve.gpu import fill_ranks
from spear_jax.models.decoder import MODULES, Decoder, unstack
from spear_jax.nn.linear import Linear
from spear_jax.quant import QuantTensor


def lay_out_for_tpu(model: Decoder) -> Decoder:
    """Give a model of stacked layers with separate ones, so that no program copies a layer out of the stack.

    Int4 linears are laid out in columns; those whose inputs are no multiple of 64 stay as they are.
    """
    separate = unstack(model)
    assert isinstance(separate.layers, nnx.List)
    for layer in separate.layers:
        for name in MODULES:
            setattr(layer, name, _lay_out(getattr(layer, name)))
    for compensators in separate.compensators.values():
        compensators.layers = nnx.List([fill_ranks(compensator) for compensator in compensators.layers])
    return separate


def _lay_out(linear: Linear) -> Linear:
    weight = linear.weight
    if not isinstance(weight, QuantTensor) or weight.shape[-1] % CODE_ROWS:
        return linear
    return Linear(jax.jit(QuantTensor.in_columns)(weight), None if linear.bias is None else linear.bias[...])
