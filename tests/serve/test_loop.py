"""The loop on the device gives the tokens of the engine that goes step by step, and comes back when it should."""

import dataclasses
import functools
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from serve.cache import whole_table
from serve.cpu import cpu_logits, lay_out_for_cpu
from serve.engine import Engine
from serve.latency import LatencyTable, make_table
from serve.loop import Call, LoopRunner, LoopSettings, Ring
from serve.metrics import Metrics
from serve.pages import PagePool
from serve.request import Output, Request, SamplingParams, Slo
from serve.runner import Runner
from serve.slots import SlotScheduler, Timing
from spear_jax.models.decoder import Decoder, Layer
from spear_jax.models.quantize import quantize_model
from spear_jax.quant import QuantSpec
from spear_jax.testing import random_weights, tiny_config

SLOTS, BUCKETS, CONTEXT, STALL = 3, (8, 16), 200, 8
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


@functools.cache
def model() -> Decoder:
    config = tiny_config(tie_embeddings=False)  # logits of order one: draws differ
    plain = Decoder.from_weights(config, random_weights(config), dtype=jnp.float32)
    return lay_out_for_cpu(quantize_model(plain, QuantSpec(group_size=32)))


def table(seconds: float = 0.01) -> LatencyTable:
    """A step takes 10 ms, 8 prompt tokens as long, and half of that without compensators."""
    decodes, chunks, contexts = (0, 1, SLOTS), (0, *BUCKETS), (1, CONTEXT)
    d, c, _ = np.meshgrid(decodes, chunks, contexts, indexing="ij")
    times = [np.where(d > 0, seconds, 0.0) + seconds * c / 8 / (1 + level) for level in range(2)]
    return make_table(np.stack(times), decodes=decodes, chunks=chunks, contexts=contexts, longest=False)


@functools.cache
def loop_runner(*, lone: bool = False) -> LoopRunner:
    settings = LoopSettings(passes=6, stall_tokens=STALL, table=None if lone else table())
    runner = LoopRunner(
        model(), settings=settings, slots=SLOTS, context=CONTEXT, buckets=BUCKETS, lone_program=lone,
        logits=cpu_logits, kept=() if lone else ((), ()),
    )  # fmt: skip
    assert len(list(runner.warm_up())) == runner.num_programs
    return runner


@functools.cache
def step_runner() -> Runner:
    runner = Runner(model(), slots=SLOTS, context=CONTEXT, buckets=BUCKETS, lone_program=False, logits=cpu_logits)
    list(runner.warm_up())
    return runner


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 96, length).tolist()


def mixed(count: int) -> list[Request]:
    """Requests of all kinds of sampling, with ends by length, by stop token, by a second one, and by stop string."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5, "logprobs": 3},
        {"temperature": 1.3, "top_p": 0.8, "min_p": 0.01},
        {"temperature": 0.0, "frequency_penalty": 0.6, "repetition_penalty": 1.3, "logit_bias": ((7, 1.5),)},
        {"temperature": 1.0, "presence_penalty": 0.5, "stop_token_ids": frozenset(range(0, 96, 7))},
        {"temperature": 1.0, "stop_token_ids": frozenset(range(20, 60))},  # more than the device looks for
        {"temperature": 1.0, "stop": ("[3", "4][")},
    ]
    rng = np.random.default_rng(count)
    return [
        Request(
            id=str(i), prompt=prompt_of(int(rng.integers(1, 80)), seed=i),
            params=SamplingParams(max_tokens=int(rng.integers(1, 60)), seed=i, **kinds[i % len(kinds)]),
        )
        for i in range(count)
    ]  # fmt: skip


def serve(
    runner: Runner | LoopRunner, requests: Sequence[Request], *, pages: int | None = None
) -> dict[str, list[Output]]:
    """Give what an engine answers to requests that all come at once, perhaps with too few pages for all slots."""
    outputs: dict[str, list[Output]] = {request.id: [] for request in requests}
    left = threading.Semaphore(0)

    def deliver(some: list[tuple[Request, Output]]) -> None:
        for request, output in some:
            outputs[request.id].append(output)
            if output.finish_reason is not None:
                left.release()

    pool = None if pages is None else PagePool(pages=pages, table=runner.table_shape)
    scheduler = SlotScheduler(num_slots=SLOTS, buckets=BUCKETS, stall_tokens=STALL, pages=pool)
    metrics = Metrics("m")
    engine = Engine(
        runner, scheduler, decode=lambda ids: "".join(f"[{i}]" for i in ids), deliver=deliver,
        metrics=metrics, context=CONTEXT,
    )  # fmt: skip
    engine.start()
    for request in requests:
        engine.submit(request)
    for _ in requests:
        assert left.acquire(timeout=60)
    assert engine.stop(timeout=20)
    assert engine.failure is None
    assert metrics.read("engine_faults_total") == 0
    if pool is not None:
        assert pool.available == pool.total
        assert metrics.read("num_preemptions_total") > 0
        runner.use_table(whole_table(slots=SLOTS, context=CONTEXT, padding=BUCKETS[-1], pages=runner.pages))
    assert scheduler.idle
    assert sorted(scheduler._free) == list(range(SLOTS))
    return outputs


def answers(outputs: dict[str, list[Output]]) -> dict[str, tuple[Any, ...]]:
    return {
        name: ("".join(o.text for o in some), some[-1].finish_reason, sum(o.tokens for o in some))
        for name, some in outputs.items()
    }


def test_answers_are_those_of_an_engine_that_goes_step_by_step() -> None:
    requests, runner = mixed(24), loop_runner()
    expected, compiled = serve(step_runner(), requests), []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    try:
        found = serve(runner, requests)
        assert answers(serve(runner, requests, pages=4)) == answers(expected)
    finally:
        jax.monitoring.clear_event_listeners()
    assert not compiled
    assert answers(found) == answers(expected)
    for name, some in expected.items():
        told, known = ([e for o in outputs for e in o.logprobs] for outputs in (found[name], some))
        assert [e.token for e in told] == [e.token for e in known]
        np.testing.assert_allclose([e.logprob for e in told], [e.logprob for e in known], atol=1e-5)
    reasons = [some[-1].finish_reason for some in found.values()]
    assert {"stop", "length"} == set(reasons)


def start(runner: LoopRunner, *requests: Request) -> None:
    """Empty the slots and put requests into the first ones."""
    Ring.of(runner.advance(Call.of(slots=SLOTS, drop=np.ones(SLOTS, bool))))
    for slot, one in enumerate(requests):
        runner.stage(one, slot, slo=one.slo)


def run(runner: LoopRunner, **options: Any) -> Ring:
    return Ring.of(runner.advance(Call.of(**({"slots": SLOTS, "drop": np.zeros(SLOTS, bool), "passes": 6} | options))))


def greedy(prompt: int, tokens: int, **options: Any) -> Request:
    params = SamplingParams(max_tokens=tokens, temperature=0.0)
    return Request(id="r", prompt=prompt_of(prompt, seed=prompt), params=params, **options)


def test_a_call_returns_at_first_and_last_tokens_and_when_nothing_is_left() -> None:
    runner = loop_runner()
    start(runner, greedy(20, 9), greedy(4, 4))
    first = run(runner)  # nobody decodes: the larger prompt is begun, and its end is the first token
    assert [chunk[:2] for chunk in first.chunks] == [[0, 16], [0, 4]]
    assert [max(tokens) >= 0 for tokens in first.tokens] == [False, True]
    assert first.predicted == pytest.approx(0.03)
    second = run(runner)  # the other prompt fits into the same iteration
    assert [chunk[:2] for chunk in second.chunks] == [[1, 4]]
    third = run(runner, passes=2)
    assert [[token >= 0 for token in tokens] for tokens in third.tokens] == [[True, True, False]] * 2
    ends = third.ends
    fourth = run(runner)
    assert len(fourth.tokens) == 1
    assert fourth.ends == ends + 1
    assert len(run(runner, waiting=True, ends=ends).tokens) == 1  # the host does not know yet: a newcomer may wait
    assert len(run(runner, waiting=True, ends=ends + 1, passes=3).tokens) == 3
    last = run(runner)
    assert (len(last.tokens), last.ends) == (1, ends + 2)
    assert run(runner).tokens == []
    start(runner, greedy(5, 30), greedy(20, 30))
    assert [chunk[:2] for chunk in run(runner, passes=1).chunks] == [[0, 5]]
    drop = np.array([True, False, False])
    # What the prompt that has gone took of the iteration stays taken: room for 8 of 16.
    assert [chunk[:2] for chunk in run(runner, passes=1, drop=drop).chunks] == [[1, 8]]


def test_who_leaves_makes_room_at_once() -> None:
    came, done = threading.Semaphore(0), threading.Semaphore(0)

    def deliver(some: list[tuple[Request, Output]]) -> None:
        for request, output in some:
            came.release()
            if request.id == "next" and output.finish_reason is not None:
                done.release()

    scheduler = SlotScheduler(num_slots=SLOTS, buckets=BUCKETS, stall_tokens=STALL)
    metrics = Metrics("m")
    engine = Engine(
        loop_runner(), scheduler, decode=lambda ids: "x" * len(ids), deliver=deliver, metrics=metrics, context=CONTEXT
    )
    engine.start()
    endless = [greedy(5, 150) for _ in range(SLOTS)]
    for one in endless:
        engine.submit(one)
    for _ in range(2 * SLOTS):
        assert came.acquire(timeout=60)
    engine.submit(dataclasses.replace(greedy(9, 4), id="next"))
    engine.abort(endless[0])
    assert done.acquire(timeout=60)
    assert metrics.read("generation_tokens_total") < 150 * SLOTS
    assert engine.stop(timeout=20)
    assert sorted(scheduler._free) == list(range(SLOTS))


def test_a_lone_sequence_takes_the_program_for_one() -> None:
    for one in mixed(4):
        assert answers(serve(loop_runner(lone=True), [one])) == answers(serve(step_runner(), [one]))


def test_the_device_decides_as_the_scheduler_of_the_simulator_does() -> None:
    """Both are given the same requests with limits; time is the table's."""
    runner, seen = loop_runner(), set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        timing = [Timing(table=table(), share=1.0, aging=0.5) for _ in range(2)]
        host, books = (SlotScheduler(num_slots=SLOTS, buckets=BUCKETS, stall_tokens=STALL, timing=t) for t in timing)
        requests = [
            greedy(
                int(rng.integers(1, 50)), int(rng.integers(2, 9)), droppable=bool(rng.random() < 0.6), arrival=0.0,
                slo=Slo(
                    ttft=float(rng.uniform(0.05, 0.3)),
                    **{"itl": rng.uniform(0.014, 0.022)} if rng.random() < 0.5 else {"tpot": rng.uniform(0.02, 0.1)},
                ),
            )
            for _ in range(SLOTS)
        ]  # fmt: skip
        for one in requests:
            for scheduler in (host, books):
                scheduler.submit(one)
        for scheduler in (host, books):
            scheduler.admit(0.0)
        holders, now, elapsed = books.holders, 0.0, 0.0
        start(runner, *(holders[slot] for slot in range(SLOTS)))
        while host.running.decoding.any() or host.prefilling:
            step = host.next_step(now)
            expected = [(chunk.slot, chunk.length, chunk.level) for _, chunk in step.chunks]
            prompts, begin, found = books.prompts(now), now, []
            while found != expected or step.run.any():
                ring = run(runner, passes=1, elapsed=elapsed, prompts=prompts)
                ((slot, length, level, skipped),), (tokens,) = ring.chunks, ring.tokens
                elapsed = ring.predicted
                now += elapsed
                if length:
                    found.append((slot, length, level))
                    books.chunk_seen(holders[slot], length, level, begin)
                    if tokens[slot] >= 0:
                        for scheduler in (host, books):
                            scheduler.token_seen(holders[slot], tokens[slot], now)
                    continue
                ran = [slot for slot in range(SLOTS) if tokens[slot] >= 0]
                for slot in ran:
                    books.step_seen(slot)
                assert ran == np.flatnonzero(step.run).tolist()
                assert skipped == step.skipped
                break
            assert found == expected
            seen |= {(length > 8, level) for _, length, level in found}
            assert now - begin == pytest.approx(step.predicted, abs=1e-6)
    assert {(True, 0), (False, 0), (False, 1)} <= seen


def test_a_branch_traces_one_layer_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    traced, unsummed = [], Layer.unsummed

    def count(self: Layer, *args: Any, **kwargs: Any) -> Any:
        traced.append(kwargs["layer"])
        return unsummed(self, *args, **kwargs)

    monkeypatch.setattr(Layer, "unsummed", count)
    settings = LoopSettings(passes=2, stall_tokens=STALL)
    options = {"slots": 5, "context": CONTEXT, "buckets": BUCKETS, "lone_program": True, "logits": cpu_logits}
    runner = LoopRunner(model(), settings=settings, **options)
    _, program, leaves, args = next(one for one in runner._programs() if one[0] == "loop")
    program.trace(leaves, runner._state, *args)
    assert len(traced) == len(BUCKETS) + 2  # a decode step of all, and of one
