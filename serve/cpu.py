"""The forms of a dense product that XLA's CPU back end runs fastest at the few rows of a decode step."""

import math

import jax
from flax import nnx
from jaxtyping import Array, Float

from spear_jax.models.decoder import MODULES, Decoder, unstack
from spear_jax.nn.linear import Linear
from spear_jax.quant import QuantTensor

_FEW_ROWS = 16
"""Up to here a fused multiply and sum, which goes over the weights once with all cores, beats a matrix product: 0.78
against 0.95 ms for 8 rows and a weight of 3072 x 576 on two cores. One row is faster as a matrix-vector product (0.47
against 0.69)."""


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


class CpuLinear(nnx.Module):
    """A dense linear without compensator, by `dense`."""

    def __init__(self, weight: Array, bias: Array | None):
        self.weight = nnx.Param(weight)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: Float[Array, "*B K"], *, compensator: None = None) -> Float[Array, "*B N"]:
        """Apply the layer."""
        assert compensator is None, "expanded weights are served without compensators"
        y = dense(x, self.weight[...])
        return y if self.bias is None else y + self.bias[...]


def lay_out_for_cpu(model: Decoder) -> Decoder:
    """Give a model of dense float32 weights with separate layers, each linear a `CpuLinear`."""
    model = unstack(model)
    assert isinstance(model.layers, nnx.List)
    for layer in model.layers:
        for name in MODULES:
            linear: Linear = getattr(layer, name)
            assert not isinstance(linear.weight, QuantTensor), "expand the weights first"
            setattr(layer, name, CpuLinear(linear.weight[...], None if linear.bias is None else linear.bias[...]))
    return model


@jax.named_scope("head")
def cpu_logits(model: Decoder, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Compute next-token logits by `dense`."""
    table = model.embed if model.head is None else model.head
    assert isinstance(table, nnx.Variable), "expand the tables first"
    return dense(hidden, table[...])
