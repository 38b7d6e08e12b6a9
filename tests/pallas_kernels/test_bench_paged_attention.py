import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bench_paged_attention as bench
from pallas_kernels.paged_attention.plan import HopperConfig

SHAPE = bench.Shape(sequences=2, length=64, heads=4, kv_heads=2, head_dim=64)


def test_steps_cover_ours_and_the_peers():
    steps = bench.steps(["decode 32 x 8k", "decode 32 x 8k, fp8", "chunk of 256 after 8k"], 3)
    assert steps[0].variant == "bandwidth"
    of = {name: [step.variant for step in steps if step.shape == name] for name in bench.SHAPES}
    assert of["decode 32 x 8k"].count("ours") == 3
    assert {"triton", "cudnn", "xla"} <= set(of["decode 32 x 8k"])
    assert set(of["decode 32 x 8k, fp8"]) == {"ours", "xla"}
    configs = [HopperConfig(**step.config) for step in steps if step.variant == "ours" and step.config]
    assert len(set(configs)) > 1


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_bytes_are_those_of_keys_values_and_scales(kind: str):
    shape = bench.dataclasses.replace(SHAPE, kv_dtype=kind)
    assert sum(array.nbytes for array in bench._pages(shape, 0).values()) == shape.bytes


def test_pages_laid_out_for_others_hold_the_same_keys():
    q, table, lengths, starts = bench._queries(SHAPE)
    cache = bench._pages(SHAPE, 0)
    wanted = bench._xla(cache, q, table, lengths, starts)
    _, arrange = bench._variant(bench.Step(shape="", variant="cudnn"), SHAPE)
    contiguous = arrange(cache, table)
    with jax.numpy_dtype_promotion("standard"):
        out = jax.nn.dot_product_attention(q, contiguous["k"], contiguous["v"], scale=bench._scale(q))
    np.testing.assert_allclose(out.astype(jnp.float32), wanted.astype(jnp.float32), atol=2e-2)
    _, arrange = bench._variant(bench.Step(shape="", variant="triton"), SHAPE)
    assert arrange(cache, table)["k"].shape == (2, 8, 16, 64)


def test_a_step_that_fails_is_told_and_the_others_go_on(tmp_path: Path):
    """There is no GPU here: every step fails, each in its own process, and the command says so."""
    output = tmp_path / "out" / "results.json"
    command = [sys.executable, "-m", "pallas_kernels.bench_paged_attention", "--shapes", "decode 1 x 1k"]
    command += ["--tries", "1", "--step-seconds", "0.01", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    results = json.loads(output.read_text())["results"]
    assert [result["variant"] for result in results][:2] == ["bandwidth", "ours"]
    assert all(result["failure"] == "took longer than 0.01 s" for result in results)
    assert done.stdout.count("took longer than") == len(results)


def test_a_step_says_why_it_failed():
    result = bench.run(bench.Step(shape="decode 1 x 1k", variant="no such variant"), 120)
    assert "AssertionError: no such variant" in result["failure"]
