import json

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from pallas_kernels.int4_matmul import int4_matmul
from serve.bench_step import StepConfig, bench, random_model
from spear_jax.config import ModelConfig, load_yaml
from spear_jax.quant import QuantSpec
from spear_jax.testing import tiny_config

LLAMA = "configs/models/llama-3.1-8b.yaml"


def tiny_file(tmp_path):
    config = tiny_config()
    values = {name: value for name, value in vars(config).items() if value is not None and value != ()}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_steps_are_timed_and_written(tmp_path):
    output = tmp_path / "out" / "steps.json"
    config = StepConfig(
        model=tiny_file(tmp_path), rows=(1, 3), ranks=(0, 4), context=20, steps=4, repeats=2, dtype="float32",
        steps_per_call=(2,), output=output,
    )  # fmt: skip
    results = bench(config)
    assert json.loads(output.read_text()) == results
    assert [(case["rows"], case["rank"]) for case in results["cases"]] == [(1, 0), (3, 0), (1, 4), (3, 4)]
    assert all(case["ms"] > 0 for case in results["cases"])
    assert results["cases"][2]["weight_bytes"] > results["cases"][0]["weight_bytes"]


def test_random_weights_keep_activations_of_order_one():
    model = random_model(tiny_config(), spec=QuantSpec(), rank=2, dtype=jnp.float32)
    weight = model.layer(0).down.weight
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, weight.shape[1])), jnp.float32)
    assert 0.5 < float(jnp.std(int4_matmul(x, weight.packed, weight.scale))) < 2
    logits = model.logits(model(jnp.arange(8)[None])[0])
    assert jnp.isfinite(logits).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ()}, "rows"),
        ({"context": 0}, "context must be"),
        ({"tensor_parallel": 0}, "tensor_parallel must be at least 1"),
        ({"tensor_parallel": 1000}, "tensor_parallel must be from 1 to the"),
        ({"ranks": (-1,)}, "ranks at least 0"),
        ({"steps": 50, "steps_per_call": (1, 8)}, "multiple of each of steps_per_call"),
    ],
)
def test_settings_that_cannot_run_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        bench(StepConfig(model=tiny_file(tmp_path), **changes))


def test_the_8b_file_has_the_shapes_of_llama():
    config = load_yaml(ModelConfig, LLAMA)
    assert config.module_shapes() == {
        "qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336),
    }  # fmt: skip
