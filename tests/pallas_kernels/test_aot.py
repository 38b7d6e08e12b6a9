"""Programs compile for accelerators that this machine does not have."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spear_jax.models.decoder import Decoder
from spear_jax.models.quantize import quantize_model
from spear_jax.quant import QuantSpec
from spear_jax.testing import random_weights, tiny_config

pytestmark = pytest.mark.aot

TOPOLOGIES = {"v5e": ("tpu", "v5e:2x2"), "v6e": ("tpu", "v6e:2x2")}


@pytest.mark.parametrize("kind", TOPOLOGIES)
def test_a_quantized_model_compiles_with_weights_packed(kind: str):
    """Arguments of the program are the packed bytes: nothing widened the weights on their way in."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: uv run --group aot")
    from jax.experimental import topologies

    platform, name = TOPOLOGIES[kind]
    device = topologies.get_topology_desc(platform=platform, topology_name=name).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    config = tiny_config(hidden_size=256, intermediate_size=512, head_dim=64)
    model = Decoder.from_weights(config, random_weights(config), dtype=jnp.bfloat16)
    quantized = jax.eval_shape(lambda m: quantize_model(m, QuantSpec(group_size=64)), model)

    def on_device(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32, sharding=sharding)
    lowered = jax.jit(lambda m, t: m(t)[0]).trace(jax.tree.map(on_device, quantized), tokens).lower()
    memory = lowered.compile().memory_analysis()
    stored = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(quantized))
    assert memory.argument_size_in_bytes < 1.5 * stored + 2**20
