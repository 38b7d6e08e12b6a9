"""Compile a decode step and a prompt chunk of a few layers of Llama-3.1-8B for an H200, and say what is launched.

A process of its own, as XLA's flags are read at its start: they must have it dump to a folder, the first argument; the
second is the number of rows. Writes JSON to stdout: of each program its bytes and its launches in order.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import compiling_for
from pallas_kernels.topology import gpu_topology
from serve import runner
from serve.bench_step import random_model
from serve.gpu import command_buffer_options, lay_out_for_hopper
from serve.request import SamplingParams
from spear_jax.config import ModelConfig, load_yaml
from spear_jax.models.decoder import Decoder
from spear_jax.quant import QuantSpec

FOLDER, ROWS = Path(sys.argv[1]), int(sys.argv[2])
LAYERS, CHUNK = 3, 256
FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


def launches(hlo: str) -> list[str]:
    """Give the source of each instruction of the entry that runs something, in order."""
    entry = hlo[hlo.index("\nENTRY ") :].split("\n}")[0]
    found = []
    for line in entry.splitlines()[2:]:
        operation = re.search(r" = .*? ([\w\-]+)\(", line)
        if operation is not None and operation.group(1) not in FREE:
            source = re.search(r'op_name="([^"]*)"', line)
            name = re.sub(r"jit\(\w+\)/", "", source.group(1)) if source else ""
            found.append(f"{operation.group(1)} {name}")
    return found


def main() -> None:
    config = dataclasses.replace(load_yaml(ModelConfig, "configs/models/llama-3.1-8b.yaml"), num_layers=LAYERS)
    sharding = jax.sharding.SingleDeviceSharding(gpu_topology("h200").devices[0])

    def there(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    def build() -> tuple[Decoder, runner.DeviceState]:
        model = random_model(config, spec=QuantSpec(), rank=0, dtype=jnp.dtype(jnp.bfloat16))
        model = lay_out_for_hopper(model)
        return model, runner.empty_state(model, slots=ROWS, context=1500, padding=CHUNK)

    reports = {}
    with compiling_for("gpu"):
        model, state = jax.eval_shape(build)
        leaves, tree = jax.tree.flatten(model)
        chunk = runner.Runner._prefill_arguments([0] * CHUNK, slot=0, start=0, bucket=CHUNK, last=True, params=GREEDY)
        active = (jnp.ones(ROWS, bool),)
        programs = {
            "decode": (runner.decode_step, active),
            "greedy": (runner.greedy_step, active),
            "prefill": (runner.prefill_step, chunk),
            "logprobs": (runner.all_logprobs, ()),
            "prompt_logprobs": (runner.prompt_logprobs, (jnp.zeros(CHUNK, jnp.int32),)),
            "redraw": (runner.redraw, (*active, jnp.zeros((ROWS, -(-config.vocab_size // 32)), jnp.uint32))),
        }
        for name, (step, arguments) in programs.items():
            options = command_buffer_options("whole")
            program = runner._jit(tree, step, logits=Decoder.logits, options=options)
            compiled = program.lower(*there((leaves, state, *arguments))).compile()
            memory = compiled.memory_analysis()
            (thunks,) = FOLDER.glob(f"*{step.__name__}.thunk_sequence_after_thunk_passes.txt")
            outermost = [line.split()[1] for line in thunks.read_text().splitlines() if re.match(r"\d+:", line)]
            reports[name] = {
                "temporary_bytes": memory.temp_size_in_bytes,
                "aliased_bytes": memory.alias_size_in_bytes,
                "cache_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache)),
                "launches": launches(compiled.as_text()),
                "outermost": outermost,
            }
    json.dump(reports, sys.stdout)


if __name__ == "__main__":
    main()
