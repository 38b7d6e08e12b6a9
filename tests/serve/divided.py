"""Tokens of the demo checkpoint, divided over this process's devices and whole: a process of its own for its devices.

Arguments are how many tokens, and "cpu", or "tpu" for weights laid out for one, which XLA computes with as float32 is
not for its kernels. Prints both as JSON.
"""

import contextlib
import json
import sys

import jax
import numpy as np

from pallas_kernels.dispatch import compiling_for
from serve.config import ServeConfig
from serve.request import SamplingParams
from serve.runner import Runner
from serve.startup import divided_over, prepare
from spear_jax.models.decoder import Decoder
from spear_jax.recovery import load_recovered

CHUNK = 32
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


def tokens(model: Decoder, prompt: list[int], count: int, devices: list[jax.Device]) -> list[int]:
    runner = Runner(model, slots=2, context=64, buckets=(CHUNK,), lone_program=False, devices=devices)
    first = runner.prefill(prompt, slot=1, start=0, bucket=CHUNK, last=True, params=GREEDY)
    active = np.array([False, True])
    return [int(first), *(int(runner.decode(active)[1]) for _ in range(count - 1))]


def main() -> None:
    count, platform = int(sys.argv[1]), sys.argv[2]
    loaded = load_recovered(dtype="float32")
    prompt = loaded.tokenizer("The capital of France is")["input_ids"]
    config = ServeConfig(tp=len(jax.devices()), weights="packed")
    whole, *_ = prepare(loaded.model, ServeConfig(weights="packed"))
    expected = tokens(whole, prompt, count, [])
    with contextlib.nullcontext() if platform == "cpu" else compiling_for("tpu", kind="TPU v6 lite"):
        divided, description, _ = prepare(loaded.model, config)
        got = tokens(divided, prompt, count, divided_over(config))
    print(json.dumps({"whole": expected, "divided": got, "description": description}))


if __name__ == "__main__":
    main()
