"""What a model is turned into for a GPU or a TPU computes the same; kernels are tested in pallas_kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import compiling_for
from pallas_kernels.int4_matmul import Gate
from serve.gpu import lay_out_for_hopper
from serve.layout import lay_out
from serve.tpu import lay_out_for_tpu
from spear_jax.checkpoint import save_checkpoint
from spear_jax.models.decoder import MODULES, Decoder
from spear_jax.models.quantize import quantize_model
from spear_jax.quant import CompensatorBank, QuantSpec, QuantTensor
from spear_jax.testing import assert_close, random_weights, tiny_config


def quantized(spec: QuantSpec, **sizes: int) -> Decoder:
    config = tiny_config(**({"hidden_size": 128, "intermediate_size": 192, "head_dim": 32} | sizes))
    model = quantize_model(Decoder.from_weights(config, random_weights(config), dtype=jnp.float32), spec)
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) * 0.3, jnp.float32)

    for name, ranks in {"qkv": (1, 0, 2), "down": (0, 3, 1)}.items():
        n, k = config.module_shapes()[name]
        t = sum(ranks)
        gate = Gate(w_in=draw(t, 4), b_in=draw(3, 4), w_out=draw(t, 4), b_out=draw(t))
        model.compensators[name] = CompensatorBank(ranks, draw(t, k), draw(t, n), gate=gate).to_int8()
    return model


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(group_size=32, symmetric=False)], ids=["channel", "group"])
def test_the_model_computes_the_same(spec: QuantSpec):
    model = quantized(spec)
    tokens = jnp.arange(12)[None]
    laid_out = lay_out_for_hopper(model)
    assert laid_out.compensators["down"].at(1).b.shape == (128, 16)
    assert all(getattr(laid_out.layer(1), name).weight.layout == "fragments" for name in MODULES)
    assert_close(jax.jit(lambda m: m(tokens)[0])(laid_out), model(tokens)[0], relative=1e-5)


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(group_size=32, symmetric=False)], ids=["channel", "group"])
def test_the_model_computes_the_same_laid_out_for_a_tpu(spec: QuantSpec):
    model = quantized(spec)
    tokens = jnp.arange(12)[None]
    laid_out = lay_out_for_tpu(model)
    assert laid_out.compensators["down"].at(1).bt.shape == (16, 128)
    assert all(getattr(laid_out.layer(1), name).weight.layout == "columns" for name in MODULES)
    assert_close(jax.jit(lambda m: m(tokens)[0])(laid_out), model(tokens)[0], relative=1e-5)


def test_the_layout_follows_the_platform():
    model = quantized(QuantSpec())
    assert lay_out(model) is model
    with compiling_for("tpu"):
        assert lay_out(model).layer(0).qkv.weight.layout == "columns"


def test_a_weight_that_does_not_fill_blocks_stays_as_it_is():
    layer = lay_out_for_hopper(quantized(QuantSpec(), intermediate_size=160)).layer(0)
    assert layer.down.weight.layout == "rows"
    assert layer.gate_up.weight.layout == "fragments"


@pytest.mark.parametrize("symmetric", [True, False])
def test_layouts_hold_the_same_weight(symmetric: bool):
    rng = np.random.default_rng(0)
    codes, scale = jnp.asarray(rng.integers(-8, 8, (2, 64, 128)), jnp.int8), jnp.asarray(rng.random((2, 64, 4)))
    zero = None if symmetric else jnp.asarray(rng.integers(-8, 8, (2, 64, 4)), jnp.int8)
    tensor = QuantTensor.from_codes(codes, scale, zero)
    fragments = tensor.in_fragments()
    assert fragments.shape == tensor.shape
    assert fragments.group_size == tensor.group_size == 32
    np.testing.assert_array_equal(fragments.dequantize(), tensor.dequantize())
    jax.tree.map(np.testing.assert_array_equal, fragments.in_rows(), tensor)
    columns = fragments.in_columns()
    assert columns.shape == tensor.shape
    assert columns.group_size == 32
    assert columns.packed.shape == (2, 64, 64)
    np.testing.assert_array_equal(columns.dequantize(), tensor.dequantize())
    jax.tree.map(np.testing.assert_array_equal, columns.in_rows(), tensor)
    jax.tree.map(np.testing.assert_array_equal, columns.in_fragments(), fragments)
    with pytest.raises(ValueError, match="multiples"):
        QuantTensor.from_codes(codes[:, :40], scale[:, :40]).in_fragments()


def test_what_is_laid_out_is_not_saved(tmp_path):
    model = quantized(QuantSpec())
    model.layers.o = type(model.layers.o)(model.layers.o.weight.in_fragments())
    with pytest.raises(ValueError, match="o is laid out for a GPU"):
        save_checkpoint(tmp_path / "c", model, None, name="tiny")
