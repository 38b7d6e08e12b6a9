"""Parts of a model on several devices compute together what the whole does; `vmap` stands for the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels.int4_matmul import Gate
from spear_jax.checkpoint import named_arrays
from spear_jax.models.decoder import Decoder, unstack
from spear_jax.models.quantize import quantize_model
from spear_jax.nn.linear import Linear
from spear_jax.nn.row_parallel import AXIS, RowParallel
from spear_jax.quant import CompensatorBank, QuantSpec
from spear_jax.sharding import ShardingRules, logical_axes, make_mesh, part, part_of, sum_rows
from spear_jax.testing import assert_close, random_weights, tiny_config


def quantized(*, probed: bool = False, group_size: int = -1, **changes) -> Decoder:
    config = tiny_config(**{"tie_embeddings": False} | changes)
    model = Decoder.from_weights(config, random_weights(config), dtype=jnp.float32)
    model, rng = quantize_model(model, QuantSpec(group_size=group_size)), np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) * 0.3, jnp.float32)

    for name in ("qkv", "o", "down"):
        n, k = config.module_shapes()[name]
        seen = {"w_rms": draw(3, 4)} if probed else {}
        gate = Gate(w_in=draw(6, 4), b_in=draw(3, 4), w_out=draw(6, 4), b_out=draw(6), **seen)
        model.compensators[name] = CompensatorBank((2, 2, 2), draw(6, k), draw(6, n), gate=gate)
    return model


@pytest.mark.parametrize("parts", [2, 4])  # keys' and values' heads are two
def test_parts_compute_what_the_whole_does(parts: int):
    whole, tokens = quantized(), jnp.arange(12)[None]
    divided = [sum_rows(unstack(part(whole, i, parts)), parts=parts) for i in range(parts)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *divided)
    logits = jax.jit(jax.vmap(lambda model: model.logits(model(tokens)[0]), axis_name=AXIS))(stacked)
    wanted = whole.logits(whole(tokens)[0])
    for own in logits:
        assert_close(own, wanted, relative=1e-5)


def test_what_is_stored_of_a_part_is_its_share():
    whole = quantized(group_size=32, tie_embeddings=True)
    sizes = {name: leaf.size for name, leaf in named_arrays(whole)}
    for name, leaf in named_arrays(part(whole, 1, 2)):
        name = name.replace("embed.rows", "embed")
        divided = not {"vocab", "heads", "mlp"}.isdisjoint(logical_axes(name))
        assert leaf.size * (2 if divided else 1) == sizes[name], name


def test_what_cannot_be_divided_is_said():
    with pytest.raises(ValueError, match="tp 3 does not divide num_heads 4"):
        part_of(tiny_config(), 3)
    with pytest.raises(ValueError, match="tp 4 does not divide num_kv_heads 6, nor the other way round"):
        part_of(tiny_config(num_heads=12, num_kv_heads=6), 4)
    with pytest.raises(ValueError, match="tp 64 does not divide vocab_size 96"):
        part_of(tiny_config(num_heads=64), 64)
    with pytest.raises(ValueError, match=r"layers.o.weight.scale: 2 of \[3, 64, 2\] cannot be divided over 4 devices"):
        part(quantized(group_size=32), 0, 4)
    with pytest.raises(ValueError, match="o: gates that see more of x than z"):
        part(quantized(probed=True), 0, 2)
    with pytest.raises(NotImplementedError, match="linears with a bias"):
        RowParallel(Linear(jnp.ones((4, 4)), jnp.ones(4)), parts=2)
    with pytest.raises(ValueError, match=r"from 1 to the \d+ devices there are, got 1000"):
        make_mesh(1000)
    with pytest.raises(ValueError, match="mlp is divided over 'tp' or None, got 'x'"):
        ShardingRules(mlp="x")


def test_arrays_are_placed_where_they_divide():
    placed = ShardingRules(vocab=None).placement(make_mesh(1))
    assert placed("layers.down.weight.packed", (3, 64, 64)).spec == PartitionSpec(None, None, AXIS)
    assert placed("layers.qkv.bias", (3, 64)).spec == PartitionSpec(None, AXIS)
    assert placed("compensators.o.bt", (6, 64)).spec == PartitionSpec()
    assert placed("embed", (96, 64)).spec == PartitionSpec(None, None)
