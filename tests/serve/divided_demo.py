"""Tokens of the demo checkpoint, divided over this process's devices and whole: a process of its own for its devices.

Arguments are how many tokens, and "cpu", or "tpu" for weights laid out for one, which XLA computes with as float32 is
not for its kernels. Prints both as JSON.
"""

import contextlib
import json
import sys

import jax
import numpy as np
from jax.sharding import Mesh

from pallas_kernels.dispatch import compiling_for
from serve.config import ServeConfig
from serve.request import SamplingParams
from serve.runner import Runner
from serve.startup import prepare
from serve.tpu import lay_out_for_tpu
from spear_jax.models.decoder import Decoder
from spear_jax.recovery import load_recovered
from spear_jax.sharding import divide, make_mesh

CHUNK = 32
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


def tokens(model: Decoder, prompt: list[int], count: int, mesh: Mesh | None = None) -> list[int]:
    runner = Runner(model, slots=2, context=64, buckets=(CHUNK,), lone_program=False, mesh=mesh)
    first = runner.prefill(prompt, slot=1, start=0, bucket=CHUNK, last=True, params=GREEDY)
    active = np.array([False, True])
    return [int(first), *(int(runner.decode(active)[1]) for _ in range(count - 1))]


def main() -> None:
    count, platform = int(sys.argv[1]), sys.argv[2]
    loaded = load_recovered(dtype="float32")
    prompt = loaded.tokenizer("The capital of France is")["input_ids"]
    config, mesh = ServeConfig(weights="packed"), make_mesh(len(jax.devices()))
    whole, *_ = prepare(loaded.model, config)
    expected = tokens(whole, prompt, count)
    with contextlib.nullcontext() if platform == "cpu" else compiling_for("tpu", kind="TPU v6 lite"):
        if platform == "cpu":
            divided, description, _ = prepare(loaded.model, config, mesh)
            assert description.endswith(f"divided over {mesh.size} devices")
        else:
            divided = divide(loaded.model, mesh, lay_out=lay_out_for_tpu, reduction="dual-write")
            assert divided.layers[0].qkv.weight.layout == "columns"
        got = tokens(divided, prompt, count, mesh)
    print(json.dumps({"whole": expected, "divided": got}))


if __name__ == "__main__":
    main()
