"""Parts of a model on several devices compute together what the whole does; `vmap` stands for the devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.int4_matmul import Gate
from serve.tensor_parallel import AXIS, RowParallel, divide_rows, gathered_logits, part, part_of
from spear_jax.models.decoder import Decoder, unstack
from spear_jax.models.quantize import quantize_model
from spear_jax.nn.linear import Linear
from spear_jax.quant import CompensatorBank, QuantSpec
from spear_jax.testing import assert_close, random_weights, tiny_config

PARTS = 2


def quantized(spec: QuantSpec | None = None, **sizes: int) -> Decoder:
    config = tiny_config(tie_embeddings=False, **sizes)
    model = Decoder.from_weights(config, random_weights(config), dtype=jnp.float32)
    model = quantize_model(model, QuantSpec() if spec is None else spec)
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) * 0.3, jnp.float32)

    for name in ("qkv", "o", "down"):
        n, k = config.module_shapes()[name]
        gate = Gate(w_in=draw(6, 4), b_in=draw(3, 4), w_out=draw(6, 4), b_out=draw(6))
        model.compensators[name] = CompensatorBank((2, 2, 2), draw(6, k), draw(6, n), gate=gate)
    return model


def separate(own: Decoder) -> Decoder:
    return divide_rows(unstack(own), parts=PARTS)


def test_parts_compute_what_the_whole_does():
    whole, tokens = quantized(), jnp.arange(12)[None]
    parts = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(separate(part(whole, i, parts=PARTS)) for i in range(PARTS))
    )

    def run(model: Decoder) -> jax.Array:
        return gathered_logits(model, model(tokens)[0])

    logits = jax.jit(jax.vmap(run, axis_name=AXIS))(parts)
    wanted = whole.logits(whole(tokens)[0])
    for own in logits:
        assert_close(own, wanted, relative=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_checkpoint_on_three_devices_gives_the_same_tokens(platform: str):
    """Three, because SmolLM2-135M has nine heads and three key heads."""
    root = Path(__file__).parents[2]
    settings = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=3",
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(root),
    }
    command = [sys.executable, str(Path(__file__).with_name("divided.py")), "8", platform]
    done = subprocess.run(command, env=os.environ | settings, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["divided"] == report["whole"]
    assert len(set(report["whole"])) > 3
    assert report["description"].endswith("divided over 3 devices")


def test_a_model_is_divided_as_it_is_stored():
    """Groups of inputs go with their codes; what is no whole number of groups, or no int4, is refused."""
    whole = quantized(QuantSpec(group_size=32, symmetric=False))
    own = part(whole, 1, parts=PARTS).layers
    np.testing.assert_array_equal(
        own.down.weight.dequantize(), jnp.split(whole.layers.down.weight.dequantize(), 2, 2)[1]
    )
    with pytest.raises(ValueError, match="tp 2 does not divide 3 of"):
        part(quantized(QuantSpec(group_size=32), intermediate_size=96), 0, parts=PARTS)
    config = tiny_config()
    dense = Decoder.from_weights(config, random_weights(config), dtype=jnp.float32)
    with pytest.raises(ValueError, match="only int4 models are divided: qkv is float32"):
        part(dense, 0, parts=PARTS)


def test_what_cannot_be_divided_is_said():
    with pytest.raises(ValueError, match="tp 3 does not divide num_heads 4"):
        part_of(tiny_config(), 3)
    with pytest.raises(NotImplementedError, match="only int4 linears"):
        RowParallel(Linear(jnp.ones((4, 4))), parts=2)(jnp.ones((1, 4)))
