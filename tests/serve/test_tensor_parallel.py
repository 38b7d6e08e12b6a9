"""Parts of a model on several devices compute together what the whole does; `vmap` stands for the devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.int4_matmul import Gate
from serve.tensor_parallel import AXIS, RowParallel, divide_rows, gathered_logits, part_of
from spear_jax.models.decoder import Decoder, unstack
from spear_jax.models.quantize import quantize_model
from spear_jax.nn.linear import Linear
from spear_jax.quant import CompensatorBank, QuantSpec, QuantTensor
from spear_jax.testing import assert_close, random_weights, tiny_config

PARTS = 2


def quantized() -> Decoder:
    config = tiny_config(tie_embeddings=False)
    model = quantize_model(Decoder.from_weights(config, random_weights(config), dtype=jnp.float32), QuantSpec())
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) * 0.3, jnp.float32)

    for name in ("qkv", "o", "down"):
        n, k = config.module_shapes()[name]
        gate = Gate(w_in=draw(6, 4), b_in=draw(3, 4), w_out=draw(6, 4), b_out=draw(6))
        model.compensators[name] = CompensatorBank((2, 2, 2), draw(6, k), draw(6, n), gate=gate)
    return model


def rows_of(array: jax.Array, sizes: list[int], index: int, axis: int) -> jax.Array:
    """Give a device's share of each of several pieces that lie one after another."""
    pieces = jnp.split(array, np.cumsum(sizes)[:-1], axis=axis)
    return jnp.concatenate([jnp.split(piece, PARTS, axis=axis)[index] for piece in pieces], axis=axis)


def part(whole: Decoder, index: int) -> Decoder:
    config, h = whole.config, whole.config.head_dim
    outputs = {
        "qkv": [config.num_heads * h, config.num_kv_heads * h, config.num_kv_heads * h],
        "gate_up": [config.intermediate_size] * 2,
    }
    model = whole.replace()
    model.config = model.layers.config = part_of(config, PARTS)
    for name in ("qkv", "gate_up", "o", "down"):
        weight = getattr(whole.layers, name).weight
        if name in outputs:
            weight = QuantTensor(
                packed=rows_of(weight.packed, outputs[name], index, 1),
                scale=rows_of(weight.scale, outputs[name], index, 1),
            )
        else:
            weight = dataclasses.replace(weight, packed=jnp.split(weight.packed, PARTS, axis=2)[index])
        setattr(model.layers, name, Linear(weight))
    banks = {}
    for name, bank in whole.compensators.items():
        a, bt = bank.a[...], bank.bt[...]
        if name in outputs:
            bt = rows_of(bt, outputs[name], index, 1)
        else:
            a = jnp.split(a, PARTS, axis=1)[index]
        gate = jax.tree.map(lambda v: v[...], bank.gate, is_leaf=lambda v: isinstance(v, nnx.Variable))
        banks[name] = CompensatorBank(bank.ranks, a, bt, gate=gate)
    head = nnx.Param(jnp.split(whole.head[...], PARTS)[index])
    return divide_rows(unstack(model.replace(compensators=nnx.Dict(banks), head=head)), parts=PARTS)


def test_parts_compute_what_the_whole_does():
    whole, tokens = quantized(), jnp.arange(12)[None]
    parts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(part(whole, i) for i in range(PARTS)))

    def run(model: Decoder) -> jax.Array:
        return gathered_logits(model, model(tokens)[0])

    logits = jax.jit(jax.vmap(run, axis_name=AXIS))(parts)
    wanted = whole.logits(whole(tokens)[0])
    for own in logits:
        assert_close(own, wanted, relative=1e-5)


def test_what_cannot_be_divided_is_said():
    with pytest.raises(ValueError, match="tp 3 does not divide num_heads 4"):
        part_of(tiny_config(), 3)
    with pytest.raises(NotImplementedError, match="only int4 linears"):
        RowParallel(Linear(jnp.ones((4, 4))), parts=2)(jnp.ones((1, 4)))
