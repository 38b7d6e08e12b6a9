"""Quantize and expand whole models, and count their bytes."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from spear_jax.models.decoder import MODULES, Decoder
from spear_jax.nn.linear import Linear
from spear_jax.quant.qtensor import QuantSpec, QuantTensor
from spear_jax.quant.rows import Int8Rows
from spear_jax.quant.rtn import round_to_nearest


def quantize_model(model: Decoder, spec: QuantSpec) -> Decoder:
    """Round the four linears of every layer to int4 (nearest code, min-max scales); embedding and head stay.

    Raises:
        ValueError: The group size does not divide a module's input size, or it is int4 already; names the module.
    """
    for name in MODULES:
        weight = getattr(model.layers, name).weight
        if isinstance(weight, QuantTensor):
            raise ValueError(f"{name} is int4 already: a quantized model cannot be rounded again")
        spec.groups(weight.shape[-1], name=name)
    return _map_linears(model, lambda linear: round_to_nearest(linear.weight[...], spec))


def quantize_tables(model: Decoder) -> Decoder:
    """Round embedding and head to int8, one scale a row: half their bytes."""

    def table(rows: Any) -> Any:
        return rows if rows is None or isinstance(rows, Int8Rows) else Int8Rows.from_dense(rows[...])

    return model.replace(embed=table(model.embed), head=table(model.head))


def expand_model(model: Decoder, dtype: Any) -> Decoder:
    """Give the model with int4 and int8 weights written out in `dtype`: the same function without unpacking."""

    def weight_of(linear: Linear) -> Array:
        weight = linear.weight
        return weight.dequantize(dtype) if isinstance(weight, QuantTensor) else weight[...]

    return expand_tables(_map_linears(model, weight_of), dtype)


def expand_tables(model: Decoder, dtype: Any) -> Decoder:
    """Give the model with an int8 embedding and head written out in `dtype`."""

    def table(rows: Any) -> Any:
        return nnx.Param(rows.dequantize(dtype)) if isinstance(rows, Int8Rows) else rows

    return model.replace(embed=table(model.embed), head=table(model.head))


def cast_model(model: Decoder, dtype: Any) -> Decoder:
    """Give the model with tables and dense weights in `dtype`; norms, biases and int4 weights stay as they are."""

    def cast(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        if isinstance(leaf, QuantTensor) or "norm" in name or name.endswith("bias"):
            return leaf
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree_util.tree_map_with_path(cast, model, is_leaf=lambda leaf: isinstance(leaf, QuantTensor))


def _map_linears(model: Decoder, weight_of: Any) -> Decoder:
    layers = jax.tree.map(lambda leaf: leaf, model.layers)
    for name in MODULES:
        linear: Linear = getattr(layers, name)
        setattr(layers, name, Linear(weight_of(linear), None if linear.bias is None else linear.bias[...]))
    return model.replace(layers=layers)


def weight_bytes(model: Any) -> int:
    """Count the bytes of all arrays of a model, or of any part of one, as stored."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(model))
