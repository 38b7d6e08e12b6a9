"""The four linears of a model's layers: their weights read, checked and replaced."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from spear_jax.checkpoint import named_arrays
from spear_jax.models.decoder import MODULES, Decoder, Layer
from spear_jax.nn.linear import Linear
from spear_jax.quant import QuantTensor


def float_weights(model: Decoder, dtype: Any = jnp.float32) -> dict[str, Float[Array, "L N K"]]:
    """Give the stacks of a model that has not been quantized."""
    weights = {}
    for name in MODULES:
        weight = getattr(model.layers, name).weight
        assert not isinstance(weight, QuantTensor), name
        weights[name] = weight[...].astype(dtype)
    return weights


def int4_weight(model: Decoder, name: str) -> QuantTensor:
    """Give the stack of a module that has been quantized."""
    weight = getattr(model.layers, name).weight
    assert isinstance(weight, QuantTensor), name
    return weight


@functools.partial(jax.jit, static_argnames=("dtype",))
def _dequantize(tensor: Any, *, dtype: Any) -> Array:
    return tensor.dequantize(dtype)


def dense_weights(base: Decoder) -> dict[str, Float[Array, "L N K"]]:
    """Give the stacks of a quantized model written out in the type of its activations."""
    return {name: _dequantize(int4_weight(base, name), dtype=jnp.dtype(base.dtype)) for name in MODULES}


def weight_errors(exact: Decoder, dense: dict[str, Array]) -> dict[str, Float[Array, "L N K"]]:
    """Give `W - W_q`, float32; `dense` are the quantized weights written out."""
    return {name: weight - dense[name].astype(jnp.float32) for name, weight in float_weights(exact).items()}


def with_weights(layers: Layer | nnx.List, weights: Mapping[str, Array | QuantTensor]) -> Layer:
    """Give a layer, or a stack of them, with other weights in some of its modules; biases stay."""
    assert isinstance(layers, Layer)
    changed = jax.tree.map(lambda leaf: leaf, layers)
    for name, weight in weights.items():
        bias = getattr(layers, name).bias
        setattr(changed, name, Linear(weight, None if bias is None else bias[...]))
    return changed


def check_weights(model: Decoder, *, source: str) -> None:
    """Refuse a model with a weight that is not a number.

    Raises:
        ValueError: Names the weight, and its layer.
    """
    for name, array in named_arrays(model):
        if bool(jnp.all(jnp.isfinite(array))):
            continue
        where = ""
        if name.startswith("layers."):
            flat = jnp.isfinite(array.reshape(array.shape[0], -1)).all(axis=1)
            where = f" in layer {int(jnp.argmin(flat))}"
        raise ValueError(f"{source}: {name}{where} holds NaN or infinite values")


def as_stored(model: Decoder) -> Decoder:
    """Give the model with embedding and head rounded to what a checkpoint stores, in the type they had."""

    def rounded(table: Any) -> Any:
        return None if table is None else nnx.Param(table[...].astype(jnp.bfloat16).astype(table[...].dtype))

    return model.replace(embed=rounded(model.embed), head=rounded(model.head))
