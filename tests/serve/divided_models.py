"""Compare models divided over fake CPU devices with whole ones: a process of its own, as devices are made at its start.

Takes names of families; "checkpoint" restores one that is written from one device, "measures" has perplexity and steps
measured. Devices are from XLA_FLAGS.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax.sharding import Mesh

from pallas_kernels.int4_matmul import Gate
from serve.bench_step import StepConfig, bench
from serve.loop import Call, LoopRunner, LoopSettings, Ring
from serve.request import Request, SamplingParams, Slo
from serve.runner import Runner
from spear_jax.checkpoint import load_checkpoint, save_checkpoint
from spear_jax.config import ModelConfig
from spear_jax.evaluation import perplexity
from spear_jax.models.decoder import Decoder, unstack
from spear_jax.models.quantize import expand_model, quantize_model, quantize_tables
from spear_jax.quant import CompensatorBank, QuantSpec
from spear_jax.sharding import DividedModel, ShardingRules, divide, make_mesh
from spear_jax.testing import random_weights, tiny_config

PARTS = len(jax.devices())
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
SIZES = {"num_heads": 8, "num_kv_heads": 2, "tie_embeddings": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 20},
    "qwen2": {"family": "qwen2", "qkv_bias": True, "num_kv_heads": 8},
    "qwen3": {"family": "qwen3", "qk_norm": True},
    "gemma3": {
        "family": "gemma3", "qk_norm": True, "sandwich_norms": True, "activation": "gelu_tanh", "embed_scale": 8.0,
        "sliding_window": 20, "layer_is_global": (False, True, False), "rope_local_theta": 1e4, "num_kv_heads": 1,
        "tie_embeddings": True,
    },
}  # fmt: skip


def compensated(config: ModelConfig, *, group_size: int = -1) -> Decoder:
    model = Decoder.from_weights(config, random_weights(config), dtype=jnp.float32)
    model, rng = quantize_model(model, QuantSpec(group_size=group_size)), np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) * 0.1, jnp.float32)

    for name, (n, k) in config.module_shapes().items():
        gate = Gate(w_in=draw(6, 4), b_in=draw(3, 4), w_out=draw(6, 4), b_out=draw(6))
        model.compensators[name] = CompensatorBank((2, 1, 3), draw(6, k), draw(6, n), gate=gate).to_int8()
    return model


def generated(model: Decoder, mesh: Mesh | None, *, loop: bool = False) -> tuple[list[list[int]], np.ndarray]:
    """Answer two prompts in two slots, greedily; also give the log-probabilities of the likeliest last tokens.

    With `loop` the loop on the device must answer alike.
    """
    runner = Runner(model, slots=2, context=120, buckets=(16,), lone_program=False, greedy_program=True, mesh=mesh)
    list(runner.warm_up())
    prompts = [np.random.default_rng(seed).integers(0, 96, length).tolist() for seed, length in ((0, 37), (1, 9))]
    answers: list[list[int]] = []
    for slot, prompt in enumerate(prompts):
        token = None
        for start in range(0, len(prompt), 16):
            piece = prompt[start : start + 16]
            last = start + 16 >= len(prompt)
            token = runner.prefill(piece, slot=slot, start=start, bucket=16, last=last, params=GREEDY)
        answers.append([int(np.asarray(token))])
    for _ in range(24):
        for answer, token in zip(answers, np.asarray(runner.decode(np.ones(2, bool))), strict=True):
            answer.append(int(token))
    told = jax.device_get(runner.logprobs(np.ones(2, bool)))
    assert told.token[:, 0].tolist() == [answer[-1] for answer in answers]
    np.testing.assert_array_equal(told.chosen, told.top[:, 0])
    runner.check()
    assert not loop or looped(model, mesh, prompts, len(answers[0])) == answers
    return answers, told.top


def looped(model: Decoder, mesh: Mesh | None, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Answer the prompts by the loop on the device."""
    settings = LoopSettings(passes=7, stall_tokens=16)
    runner = LoopRunner(model, settings=settings, slots=2, context=120, buckets=(16,), lone_program=False, mesh=mesh)
    list(runner.warm_up())
    for slot, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=tokens, temperature=0.0)
        runner.stage(Request(id="", prompt=prompt, params=params), slot, slo=Slo())
    answers: list[list[int]] = [[], []]
    while rows := Ring.of(runner.advance(Call.of(slots=2, drop=np.zeros(2, bool), passes=7))).tokens:
        for answer, row in zip(answers, zip(*rows, strict=True), strict=True):
            answer += [token for token in row if token >= 0]
    runner.check()
    return answers


def compare(whole: Decoder, mesh: Mesh, *, loop: bool) -> None:
    wanted, told = generated(unstack(whole), None)
    for options in ({}, {"reduction": "dual-write"}, {"lay_out": lambda model: model}):
        answers, found = generated(divide(whole, mesh, **options), mesh, loop=loop)
        assert answers == wanted, (options, answers, wanted)
        np.testing.assert_allclose(found, told, rtol=1e-3, atol=1e-3)
    tied = whole.config.tie_embeddings  # such say the same again and again
    assert tied or len({token for answer in wanted for token in answer}) > 8, "the model says always the same"
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 96, (2, 40)), jnp.int32)

    @jax.jit
    def logits(model: Any) -> jax.Array:
        return model.logits(model(tokens)[0])

    right = np.asarray(logits(whole))
    for rules in (ShardingRules(), ShardingRules(vocab=None), ShardingRules(heads=None)):
        divided = DividedModel(parts=divide(whole, mesh, lay_out=lambda model: model, rules=rules), mesh=mesh)
        assert np.abs(np.asarray(logits(divided)) - right).max() < 1e-3 * np.abs(right).max()


def check(name: str) -> None:
    mesh = make_mesh(PARTS)
    if name in ("checkpoint", "measures"):
        {"checkpoint": restored, "measures": measured}[name](mesh)
        return
    config = tiny_config(**SIZES | FAMILIES[name])
    model = compensated(config)
    compare(model, mesh, loop=name == "llama")
    tables, tokens = quantize_tables(model), jnp.arange(30, dtype=jnp.int32)[None]
    for form in (tables, expand_model(tables, jnp.float32)):
        divided = DividedModel(parts=divide(form, mesh, lay_out=lambda model: model), mesh=mesh)
        got, right = (np.asarray(jax.jit(lambda m: m.logits(m(tokens)[0]))(model)) for model in (divided, form))
        assert np.abs(got - right).max() < 1e-3 * np.abs(right).max()


def restored(mesh: Mesh) -> None:
    """Write a checkpoint from one device, read it spread over all, and over half of them."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    config = tiny_config(**SIZES)
    model = compensated(config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        save_checkpoint(path, model, tokenizer, name="tiny")
        whole = load_checkpoint(path).model
        for smaller in (mesh, make_mesh(PARTS // 2)):
            stored = load_checkpoint(path, shardings=ShardingRules().placement(smaller)).model
            packed = stored.layers.down.weight.packed
            assert len(packed.sharding.device_set) == smaller.size
            assert packed.addressable_shards[0].data.size == packed.size // smaller.size
            assert generated(divide(stored, smaller), smaller)[0] == generated(unstack(whole), None)[0]


def measured(mesh: Mesh) -> None:
    """Measure perplexity, and time steps, of divided models."""
    config = tiny_config(**SIZES)
    model = compensated(config)
    tokens = np.random.default_rng(0).integers(0, 96, 300).astype(np.int32)
    divided = DividedModel(parts=divide(model, mesh, lay_out=lambda part: part), mesh=mesh)
    got, right = (perplexity(each, tokens, window=64, bos_id=None, batch_size=2) for each in (divided, model))
    assert abs(got.nll - right.nll) < 1e-4 * right.nll
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.yaml"
        values = {name: value for name, value in vars(config).items() if value is not None and value != ()}
        path.write_text(yaml.safe_dump(values))
        for reduction in ("psum", "dual-write"):
            (case,) = bench(
                StepConfig(
                    model=path, rows=(3,), ranks=(4,), context=20, steps=4, repeats=2, dtype="float32",
                    tensor_parallel=PARTS, reduction=reduction,
                )
            )["cases"]  # fmt: skip
            assert case["ms"] > 0


def main() -> None:
    for name in sys.argv[1:]:
        check(name)
        print(name, flush=True)


if __name__ == "__main__":
    main()
