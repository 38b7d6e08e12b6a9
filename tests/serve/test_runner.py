"""Chunked prefill and decode through the cache give what the model gives without one, and never compile twice."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.int4_matmul.cases import Case
from serve.cpu import CpuLinear, cpu_logits, dense, lay_out_for_cpu
from serve.request import SamplingParams
from serve.runner import Runner
from spear_jax.config import ModelConfig
from spear_jax.models.decoder import Decoder, Layer, unstack
from spear_jax.models.quantize import quantize_model
from spear_jax.nn.linear import Linear
from spear_jax.quant import CompensatorBank, QuantSpec, round_to_nearest
from spear_jax.testing import assert_close, random_weights, tiny_config

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
CONFIGS = {
    "full": tiny_config(),
    "sliding": tiny_config(sliding_window=20, layer_is_global=(False, True, False)),
    "quantized": tiny_config(),
    "compensated": tiny_config(),
    "undecided": tiny_config(tie_embeddings=False),  # logits of order one: draws differ
}
NAMES = ["full", "sliding"]


@functools.cache
def model_of(name: str) -> Decoder:
    config: ModelConfig = CONFIGS[name]
    model = Decoder.from_weights(config, random_weights(config), dtype=jnp.float32)
    if name in ("quantized", "compensated"):
        model = quantize_model(model, QuantSpec(group_size=32))
    if name == "compensated":
        n, k = config.module_shapes()["down"]
        drawn = Case(m=1, n=n, k=k, rank=5, gated=True).operands(seed=1)[1]["compensator"]
        gate = dataclasses.replace(drawn.gate, b_in=jnp.stack([drawn.gate.b_in] * 3))
        model.compensators["down"] = CompensatorBank((2, 0, 3), drawn.a, drawn.bt, gate=gate).to_int8()
    return model


@functools.cache
def runner_of(name: str, layout: str) -> Runner:
    model = model_of(name)
    laid_out = {"stacked": lambda m: m, "separate": unstack, "cpu": lay_out_for_cpu}[layout](model)
    logits = cpu_logits if layout == "cpu" else Decoder.logits
    runner = Runner(laid_out, slots=3, context=240, buckets=(8, 16), lone_program=layout == "cpu", logits=logits)
    assert len(list(runner.warm_up())) == runner.num_programs
    return runner


def start(runner: Runner, slot: int, prompt: list[int], params: SamplingParams = GREEDY) -> int:
    done, token = 0, None
    while done < len(prompt):
        part = prompt[done : done + 16]
        last = done + len(part) == len(prompt)
        bucket = 16 if len(part) > 8 else 8
        token = runner.prefill(part, slot=slot, start=done, bucket=bucket, last=last, params=params)
        done += len(part)
    return int(np.asarray(token))


def generate(runner: Runner, slot: int, prompt: list[int], count: int, *, beside: tuple[int, ...] = ()) -> list[int]:
    tokens = [start(runner, slot, prompt)]
    active = np.isin(np.arange(runner.slots), (slot, *beside))
    return tokens + [int(np.asarray(runner.decode(active))[slot]) for _ in range(count - 1)]


@jax.jit
def logits_of(model: Decoder, tokens: jax.Array) -> jax.Array:
    return model.logits(model(tokens)[0])


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 96, length).tolist()


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name in NAMES for layout in ("stacked", "separate", "cpu")]
    + [("quantized", "separate"), ("quantized", "cpu"), ("compensated", "separate"), ("compensated", "cpu")],
)
def test_greedy_tokens_equal_those_without_a_cache(name: str, layout: str) -> None:
    model, prompt, count = model_of(name), prompt_of(37), 12
    tokens = generate(runner_of(name, layout), 1, prompt, count)
    sequence = np.zeros((1, len(prompt) + count), np.int32)
    sequence[0] = prompt + tokens
    assert np.asarray(logits_of(model, sequence))[0, len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


@pytest.mark.parametrize("name", NAMES)
def test_over_many_blocks_of_keys_and_beside_others_the_tokens_are_the_same(name: str) -> None:
    runner, prompt = runner_of(name, "cpu"), prompt_of(20)
    alone = generate(runner, 0, prompt, 200)
    start(runner, 2, prompt_of(50, seed=1))
    assert generate(runner, 1, prompt, 200, beside=(2,)) == alone


def test_a_slot_keeps_its_answer_while_another_is_prefilled() -> None:
    runner, prompt = runner_of("full", "cpu"), prompt_of(20)
    expected = generate(runner, 0, prompt, 6)
    tokens = [start(runner, 0, prompt)]
    active = np.array([True, False, False])
    for part in range(5):
        runner.prefill(prompt_of(16, part), slot=1, start=16 * part, bucket=16, last=False, params=GREEDY)
        tokens.append(int(np.asarray(runner.decode(active))[0]))
    assert tokens == expected
    second = prompt_of(16, 9)
    fresh = generate(runner, 2, second, 5)
    assert generate(runner, 1, second, 5, beside=(0,)) == fresh


def test_a_seed_gives_the_same_tokens_in_any_slot_and_company() -> None:
    runner, prompt = runner_of("undecided", "separate"), prompt_of(9)
    seeded = SamplingParams(max_tokens=1, temperature=1.0, seed=5)

    def draw(slot: int, beside: tuple[int, ...]) -> list[int]:
        for other in beside:
            start(runner, other, prompt_of(30, seed=other), SamplingParams(max_tokens=1, seed=other, top_k=3))
        tokens = [start(runner, slot, prompt, seeded)]
        active = np.isin(np.arange(3), (slot, *beside))
        return tokens + [int(np.asarray(runner.decode(active))[slot]) for _ in range(20)]

    alone = draw(0, ())
    assert draw(2, (0, 1)) == alone
    assert len(set(alone)) > 5


@pytest.mark.parametrize("layout", ["separate", "cpu"])
def test_a_program_traces_one_layer_of_all(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    jax.clear_caches()
    runner_of.cache_clear()
    traced, run = [], Layer.unsummed

    def count(self: Layer, *args: Any, **kwargs: Any) -> Any:
        traced.append(kwargs["layer"])
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Layer, "unsummed", count)
    runner = runner_of("compensated", layout)
    judging = 3 + (2 if layout == "cpu" else 1)  # programs of the head alone
    assert len(traced) == runner.num_programs - judging


@pytest.mark.parametrize("committed", [True, False])
def test_each_program_compiles_once_wherever_the_arrays_come_from(committed: bool) -> None:
    jax.clear_caches()
    device = jax.devices()[0]
    model = jax.tree.map(lambda leaf: jax.device_put(leaf, device) if committed else leaf, model_of("quantized"))
    compiled: list[str] = []

    def listen(event: str, seconds: float, **details: str | int) -> None:
        del seconds
        if event.endswith("backend_compile_duration"):
            compiled.append(str(details.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        runner = Runner(model, slots=2, context=64, buckets=(8, 16), lone_program=True)
        list(runner.warm_up())
        start(runner, 1, prompt_of(9))
        steps = (
            "prefill_step",
            "decode_step",
            "decode_lone",
            "all_logprobs",
            "_one_logprobs",
            "prompt_logprobs",
            "redraw",
        )
        assert sum(any(step in name for step in steps) for name in compiled) == runner.num_programs
    finally:
        jax.monitoring.clear_event_listeners()


def test_nothing_compiles_after_warm_up() -> None:
    runner = runner_of("full", "cpu")
    assert runner.temporary_bytes() > 0
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    try:
        for slot, length in enumerate((1, 16, 40)):
            start(runner, slot, prompt_of(length), SamplingParams(max_tokens=1, temperature=0.5 * slot, top_k=slot))
        for active in ([True, False, False], [False, True, True], [True, True, True]):
            runner.decode(np.array(active)).block_until_ready()
            jax.block_until_ready(runner.logprobs(np.array(active)))
        jax.block_until_ready(runner.prompt_logprobs([1, 2], bucket=8))
        runner.redraw(np.array([True, False, True]), np.ones((3, runner.mask_words), np.uint32)).block_until_ready()
        assert not compiled
        jax.jit(lambda x: x + 3)(np.float32(2)).block_until_ready()
        assert compiled, "the listener hears nothing, so this test proves nothing"
    finally:
        jax.monitoring.clear_event_listeners()


def test_steps_that_draw_nothing_take_the_greedy_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def runner_with(**options: Any) -> Runner:
        return Runner(model_of("full"), slots=2, context=64, buckets=(8, 16), lone_program=False, **options)

    runner, plain, thrice = runner_with(greedy_program=True), runner_with(), runner_with(steps_per_call=3)
    used: list[str] = []
    for name in ("_decode_greedy", "_decode_all"):
        program = getattr(runner, name)
        monkeypatch.setattr(runner, name, lambda *args, p=program, n=name: (used.append(n), p(*args))[1])
    drawn = SamplingParams(max_tokens=1, temperature=0.8, seed=3)
    for one in (runner, plain, thrice):
        start(one, 0, prompt_of(9))
        start(one, 1, prompt_of(12, seed=1), drawn)
    alone, both = np.array([True, False]), np.array([True, True])
    for active in (alone, alone, both, both, both):
        expected, got = (np.asarray(one.decode(active))[active] for one in (plain, runner))
        assert got.tolist() == expected.tolist()
    assert used == ["_decode_greedy"] * 2 + ["_decode_all"] * 3
    monkeypatch.setattr(thrice, "_state", jax.tree.map(jnp.copy, plain._state))
    expected = [np.asarray(plain.decode(both)).tolist() for _ in range(3)]
    assert np.asarray(thrice.decode(both)).tolist() == expected[-1]
    start(runner, 1, prompt_of(5))
    runner.decode(both)
    assert used[-1] == "_decode_greedy"


@pytest.mark.parametrize("name", ["undecided", "compensated"])
def test_log_probabilities_are_those_of_the_model_without_a_cache(name: str) -> None:
    runner, model, prompt = runner_of(name, "cpu"), model_of(name), prompt_of(21, seed=7)
    drawn = SamplingParams(max_tokens=1, temperature=1.0, seed=3, top_k=9, frequency_penalty=1.0, logprobs=20)
    start(runner, 2, prompt_of(12, seed=8))
    for params, others in ((GREEDY, False), (drawn, False), (drawn, True)):
        tokens, told = [start(runner, 1, prompt, params)], []
        wanted = np.array([False, True, False])
        for _ in range(6):
            # Of one slot, or of it and others.
            found = runner.logprobs(wanted | others)
            told.append(jax.device_get(found).of(1, token=tokens[-1], count=20, offset=0))
            tokens.append(int(np.asarray(runner.decode(np.array([False, True, others])))[1]))
        sequence = jnp.asarray([prompt + tokens[:5]], jnp.int32)
        expected = np.asarray(jax.nn.log_softmax(logits_of(model, sequence)[0, -6:]))
        np.testing.assert_allclose(
            [entry.logprob for entry in told], expected[np.arange(6), tokens[:6]], rtol=1e-4, atol=1e-4
        )
        for entry, row in zip(told, expected, strict=True):
            likeliest, values = zip(*entry.top, strict=True)
            assert len(set(likeliest)) == 20
            np.testing.assert_allclose(values, -np.sort(-row)[:20], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(row[list(likeliest)], values, rtol=1e-4, atol=1e-4)
            assert list(values) == sorted(values, reverse=True)
        if params is GREEDY:
            assert [entry.logprob for entry in told] == pytest.approx([entry.top[0][1] for entry in told])
        else:
            assert any(entry.token != entry.top[0][0] for entry in told) or name != "undecided"


@pytest.mark.parametrize(("layout", "chunks"), [("cpu", (16, 16, 5)), ("separate", (8, 3))])
def test_log_probabilities_of_prompts_are_those_of_the_model(layout: str, chunks: tuple[int, ...]) -> None:
    runner, prompt = runner_of("compensated", layout), prompt_of(sum(chunks), seed=9)
    told, done = [], 0
    for length in chunks:
        end, bucket = done + length, 16 if length > 8 else 8
        runner.prefill(prompt[done:end], slot=0, start=done, bucket=bucket, last=end == len(prompt), params=GREEDY)
        following = prompt[done + 1 : end + 1]
        found = jax.device_get(runner.prompt_logprobs(following, bucket=bucket))
        told += [found.of(i, token=token, count=3, offset=0) for i, token in enumerate(following)]
        done = end
    expected = np.asarray(jax.nn.log_softmax(logits_of(model_of("compensated"), np.array([prompt], np.int32))[0]))
    assert [entry.token for entry in told] == prompt[1:]
    rows = np.arange(len(prompt) - 1)
    np.testing.assert_allclose([e.logprob for e in told], expected[rows, prompt[1:]], rtol=1e-4, atol=1e-4)
    tops = [[value for _, value in entry.top] for entry in told]
    np.testing.assert_allclose(tops, -np.sort(-expected[:-1])[:, :3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beside", [(), (2,)])
def test_a_redrawn_token_is_the_likeliest_that_is_allowed_and_counts_once(beside: tuple[int, ...]) -> None:
    """A greedy answer of odd tokens only, each worth less the more often it was drawn, beside a free one."""
    runner, model, prompt = runner_of("undecided", "cpu"), model_of("undecided"), prompt_of(11, seed=3)
    params = SamplingParams(max_tokens=1, temperature=0.0, frequency_penalty=0.7, constrained=True)
    mask = np.full((3, runner.mask_words), 0xAAAAAAAA, np.uint32)
    wanted, active = np.array([False, True, False]), np.isin(np.arange(3), (1, *beside))
    free = [start(runner, 2, prompt, GREEDY)]
    start(runner, 1, prompt, params)
    tokens = [int(np.asarray(runner.redraw(wanted, mask))[1])]
    for _ in range(9):
        runner.decode(active)
        both = np.asarray(runner.redraw(wanted, mask))
        tokens.append(int(both[1]))
        free.append(int(both[2]))
    expected: list[int] = []
    for _ in range(10):
        hidden, _ = model(jnp.asarray([prompt + expected], jnp.int32))
        logits = np.asarray(model.logits(hidden[0, -1]), np.float64)
        logits -= 0.7 * np.bincount(expected, minlength=len(logits)) if expected else 0.0
        expected.append(int(np.where(np.arange(len(logits)) % 2, logits, -np.inf).argmax()))
    assert tokens == expected
    if beside:
        assert free == generate(runner, 0, prompt, 10)
    assert len({*tokens}) > 3


@pytest.mark.parametrize("beside", [(), (0, 2)])
def test_penalties_and_biases_go_by_the_prompt_and_the_answer_so_far(beside: tuple[int, ...]) -> None:
    runner, model, prompt = runner_of("undecided", "cpu"), model_of("undecided"), prompt_of(21, seed=5)
    params = SamplingParams(
        max_tokens=1, temperature=0.0, frequency_penalty=0.6, presence_penalty=0.2, repetition_penalty=1.3,
        logit_bias=((7, 0.8), (95, -100.0)),
    )  # fmt: skip
    start(runner, 1, prompt_of(30, seed=6), params)  # what it leaves must not count
    tokens = [start(runner, 1, prompt, params)]
    active = np.isin(np.arange(runner.slots), (1, *beside))
    tokens += [int(np.asarray(runner.decode(active))[1]) for _ in range(9)]
    expected: list[int] = []
    for _ in range(10):
        hidden, _ = model(jnp.asarray([prompt + expected], jnp.int32))
        logits = np.asarray(model.logits(hidden[0, -1]), np.float64)
        for token in set(prompt + expected):
            logits[token] *= 1 / 1.3 if logits[token] > 0 else 1.3
        for token in set(expected):
            logits[token] -= 0.2 + 0.6 * expected.count(token)
        logits[7] += 0.8
        logits[95] -= 100
        expected.append(int(logits.argmax()))
    assert tokens == expected
    assert len(set(tokens)) > 5


@pytest.mark.parametrize("rows", [1, 2, 16, 17])
def test_forms_of_a_dense_product_agree(rows: int) -> None:
    rng = np.random.default_rng(rows)
    x, weight = rng.normal(size=(rows, 96)).astype(np.float32), rng.normal(size=(40, 96)).astype(np.float32)
    assert_close(jax.jit(dense)(x[None], weight)[0], x.astype(np.float64) @ weight.T, relative=1e-6)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    "spec", [QuantSpec(), QuantSpec(group_size=32), QuantSpec(group_size=64, symmetric=False)], ids=str
)
@pytest.mark.parametrize("k", [192, 1216, 40])
def test_a_cpu_linear_equals_the_linear_it_stands_for(rows: int, spec: QuantSpec, k: int) -> None:
    if k % max(spec.group_size, 1):
        pytest.skip("groups do not divide the columns")
    rng = np.random.default_rng(rows)
    x, weight, bias = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((rows, k), (24, k), (24,)))
    compensator = Case(m=rows, n=24, k=k, rank=3, gated=True).operands()[1]["compensator"]
    for linear in (Linear(round_to_nearest(weight[None], spec), bias[None]), Linear(weight[None])):
        for chosen in (None, compensator):
            expected = jax.tree.map(lambda leaf: leaf[0], linear)(x, compensator=chosen)
            (for_cpu,) = CpuLinear.layers_of(linear)
            assert_close(jax.jit(for_cpu.__call__)(x, compensator=chosen), expected, relative=2e-6)


def test_the_codes_serve_a_lone_row_only_when_lanes_divide_the_columns() -> None:
    for k, coded in ((192, True), (40, False)):
        (linear,) = CpuLinear.layers_of(Linear(round_to_nearest(jnp.ones((1, 8, k)), QuantSpec())))
        assert (linear.codes is not None) == coded
