import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.int4_matmul import Gate
from spear_jax.models.decoder import Decoder, unstack
from spear_jax.models.quantize import cast_model, expand_model, quantize_model, quantize_tables, weight_bytes
from spear_jax.quant import CompensatorBank, CompensatorVariable, QuantSpec, QuantTensor, round_to_nearest
from spear_jax.testing import assert_close, random_weights, tiny_config


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


SPECS = [QuantSpec(group_size=g, symmetric=s) for g in (-1, 32, 64, 128) for s in (True, False)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_weight_lands_within_half_a_step(spec):
    weight = draw(3, 8, 256)
    tensor = round_to_nearest(weight, spec)
    assert tensor.shape == weight.shape
    assert tensor.group_size == spec.group_size
    step = jnp.repeat(tensor.scale.astype(jnp.float32), 256 // tensor.scale.shape[-1], axis=-1)
    # A bfloat16 scale may be up to 2^-9 too small for the largest code, and a zero point is rounded: hence the slack.
    slack = 0.5 + 7 * 2.0**-8 + (0 if spec.symmetric else 0.5)
    assert bool(jnp.all(jnp.abs(tensor.dequantize() - weight) <= slack * step))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_weight_on_the_grid_comes_back(spec):
    codes = jnp.asarray(np.random.default_rng(1).integers(-7, 8, (4, 256)), jnp.int8).at[:, ::32].set(7)
    codes = codes.at[:, 1::32].set(-7 if spec.symmetric else -8)
    tensor = QuantTensor.from_codes(codes, jnp.full((4, spec.groups(256)), 0.25, spec.scale_dtype))
    np.testing.assert_allclose(
        round_to_nearest(tensor.dequantize(), spec).dequantize(), tensor.dequantize(), rtol=1e-6, atol=1e-6
    )


@settings(deadline=None, max_examples=25)
@given(st.floats(1e-20, 1e20), st.integers(0, 1000))
def test_scaling_a_weight_scales_its_quantization(factor, seed):
    weight = draw(2, 64, seed=seed)
    tensor, scaled = (round_to_nearest(w, QuantSpec()) for w in (weight, weight * jnp.float32(factor)))
    if factor > 1e-10:
        assert np.mean(np.asarray(tensor.codes()) != np.asarray(scaled.codes())) < 0.02
    assert bool(jnp.isfinite(scaled.dequantize()).all())


def test_a_zero_row_stays_zero():
    for symmetric in (True, False):
        tensor = round_to_nearest(jnp.zeros((2, 64)), QuantSpec(symmetric=symmetric))
        np.testing.assert_array_equal(tensor.dequantize(), np.zeros((2, 64)))


def test_bytes_are_those_of_codes_and_scales():
    tensor = round_to_nearest(draw(8, 256), QuantSpec(group_size=64, symmetric=False))
    assert tensor.nbytes == 8 * 128 + 8 * 4 * 2 + 8 * 4
    assert jax.tree.map(lambda leaf: leaf[2], round_to_nearest(draw(3, 8, 64), QuantSpec())).shape == (8, 64)


def test_group_sizes_are_checked():
    with pytest.raises(ValueError, match=r"group size must be one of .* got 48"):
        QuantSpec(group_size=48)
    with pytest.raises(ValueError, match="has 96 input columns, which groups of 64 do not divide"):
        round_to_nearest(draw(4, 96), QuantSpec(group_size=64))
    config = tiny_config(intermediate_size=96)
    model = Decoder.from_weights(config, random_weights(config), dtype=jnp.float32)
    with pytest.raises(ValueError, match="down has 96 input columns"):
        quantize_model(model, QuantSpec(group_size=64))


@pytest.fixture(scope="module")
def model() -> Decoder:
    config = tiny_config()
    return Decoder.from_weights(config, random_weights(config), dtype=jnp.float32)


def hidden(model: Decoder) -> jax.Array:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 12)))
    return jax.jit(lambda m, t: m(t)[0])(model, tokens)


def test_quantized_expanded_and_unstacked_models_agree(model):
    quantized = quantize_model(model, QuantSpec(group_size=32))
    expected = hidden(quantized)
    assert float(jnp.linalg.norm(expected - hidden(model)) / jnp.linalg.norm(expected)) > 0.01
    for same in (
        unstack(quantized),
        expand_model(quantized, jnp.float32),
        unstack(expand_model(quantized, jnp.float32)),
    ):
        assert_close(hidden(same), expected, relative=1e-5)
    linears = sum(np.prod(shape) for shape in model.config.module_shapes().values()) * model.config.num_layers
    assert weight_bytes(model) - weight_bytes(quantized) == linears * 4 - linears // 2 - linears // 32 * 2


@pytest.mark.parametrize("tied", [True, False])
def test_int8_tables_stay_close_and_expand_to_the_same(tied):
    config = tiny_config(tie_embeddings=tied)
    model = Decoder.from_weights(config, random_weights(config), dtype=jnp.float32)
    rounded = quantize_tables(model)
    logits = jax.jit(lambda m, t: m.logits(m(t)[0]))
    tokens = jnp.arange(20)[None]
    assert_close(logits(rounded, tokens), logits(model, tokens), relative=0.03)
    assert_close(logits(expand_model(rounded, jnp.float32), tokens), logits(rounded, tokens), relative=1e-5)
    saved = (1 if tied else 2) * config.vocab_size * (config.hidden_size * 3 - 4)
    assert weight_bytes(model) - weight_bytes(rounded) == saved
    assert quantize_tables(rounded).dtype == model.dtype


def bank(config, ranks, *, gated=True) -> CompensatorBank:
    n, k = config.module_shapes()["gate_up"]
    total, layers, width = sum(ranks), len(ranks), 2
    gate = Gate(
        w_in=draw(total, width, seed=1), b_in=draw(layers, width, seed=2),
        w_out=draw(total, width, seed=3), b_out=draw(total, seed=4),
    )  # fmt: skip
    return CompensatorBank(ranks, draw(total, k) * 0.1, draw(total, n, seed=5), gate=gate if gated else None)


@pytest.mark.parametrize("ranks", [(2, 0, 3), (0, 0, 1), (3, 3, 3), (0, 4, 0)], ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_a_scanned_bank_equals_an_unrolled_one(model, ranks, gated):
    compensated = quantize_model(model, QuantSpec())
    plain = hidden(compensated)
    compensated.compensators["gate_up"] = bank(model.config, ranks, gated=gated)
    assert_close(hidden(unstack(compensated)), hidden(compensated), relative=1e-5)
    assert float(jnp.linalg.norm(hidden(compensated) - plain)) > 0.1


def test_a_layer_of_rank_zero_has_no_compensator(model):
    assert bank(model.config, (2, 0, 3)).at(1) is None
    assert bank(model.config, (2, 0, 3)).at(2).a.shape[0] == 3
    empty = CompensatorBank((0, 0, 0), jnp.zeros((0, 64)), jnp.zeros((0, 256)))
    assert empty.at(jnp.int32(1)) is None
    with pytest.raises(ValueError, match="a has 4 rows for ranks that sum to 5"):
        CompensatorBank((2, 3), jnp.zeros((4, 64)), jnp.zeros((5, 256)))


def test_split_gives_exactly_the_compensators(model):
    compensated = quantize_model(model, QuantSpec())
    compensated.compensators["gate_up"] = bank(model.config, (2, 0, 3))
    _, trainable, rest = nnx.split(compensated, CompensatorVariable, ...)
    assert weight_bytes(trainable) == compensated.compensators["gate_up"].nbytes
    assert weight_bytes(rest) == weight_bytes(quantize_model(model, QuantSpec()))


def test_int8_factors_cost_little(model):
    exact = bank(model.config, (2, 0, 3))
    rounded = exact.to_int8()
    for layer in (0, 2):
        before, after = exact.at(layer), rounded.at(layer)
        assert after.a.dtype == after.bt.dtype == jnp.int8
        assert_close(after.a.astype(jnp.float32) * after.a_scale[:, None], before.a, relative=0.01)
        assert_close(after.bt.astype(jnp.float32) * after.bt_scale[:, None], before.bt, relative=0.01)
        np.testing.assert_array_equal(after.gate.w_in, before.gate.w_in)
    assert rounded.nbytes < 0.4 * exact.nbytes


def test_cast_leaves_norms_and_int4_weights_alone(model):
    cast = cast_model(quantize_model(model, QuantSpec()), jnp.bfloat16)
    assert cast.dtype == jnp.bfloat16
    assert cast.final_norm.weight.dtype == cast.layers.input_norm.weight.dtype == jnp.float32
    assert cast.layers.qkv.weight.scale.dtype == jnp.float32
    assert cast_model(model, jnp.bfloat16).layers.qkv.weight.dtype == jnp.bfloat16
