"""Answers that had to give up their pages on the way are those of a cache with room for all."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from serve.config import ServeConfig
from serve.engine import Engine
from serve.metrics import Metrics
from serve.pages import PAGE, PagePool
from serve.request import Output, Request, SamplingParams
from serve.runner import Runner
from serve.slots import SlotScheduler
from serve.startup import Phases, load_prepared, make_runner
from spear_jax.models.decoder import Decoder, unstack
from spear_jax.testing import random_weights, tiny_config

SLOTS, CONTEXT = 3, 4 * PAGE


def tiny(pages: int | None) -> Runner:
    config = tiny_config(num_layers=2)
    model = unstack(Decoder.from_weights(config, random_weights(config), dtype=jnp.float32))
    return Runner(model, slots=SLOTS, context=CONTEXT, buckets=(16, 64), lone_program=False, pages=pages)


def demo(pages: int | None) -> Runner:
    config = ServeConfig(max_slots=SLOTS, max_context=CONTEXT, prefill_buckets=(16, 64))
    with Phases(Console(stderr=True)) as phases:
        return make_runner(load_prepared(config, phases), config, kept=(), pages=pages)


def served(runner: Runner, requests: Sequence[Request]) -> tuple[dict[str, list[Output]], Metrics]:
    """Give the outputs of each request by its id, all sent at once, and what was counted."""
    pool, metrics = PagePool(pages=runner.pages, table=runner.table_shape), Metrics("m")
    outputs: dict[str, list[Output]] = {request.id: [] for request in requests}
    open_, done = set(outputs), threading.Event()

    def deliver(pieces: list[tuple[Request, Output]]) -> None:
        for request, output in pieces:
            outputs[request.id].append(output)
            if output.finish_reason is not None:
                open_.discard(request.id)
        if not open_:
            done.set()

    engine = Engine(
        runner,
        SlotScheduler(num_slots=SLOTS, buckets=runner.buckets, stall_tokens=64, pages=pool),
        decode=lambda ids: "".join(f"[{i}]" for i in ids),
        deliver=deliver,
        metrics=metrics,
        context=CONTEXT,
    )
    for request in requests:
        engine.submit(request)
    engine.start()
    assert done.wait(600)
    assert engine.stop(timeout=60)
    assert pool.available == pool.total
    return outputs, metrics


def count(metrics: Metrics, name: str) -> float:
    return metrics.registry.get_sample_value(f"spear:{name}_total", {"model_name": "m"}) or 0.0


@pytest.mark.parametrize("runner_of", [tiny, pytest.param(demo, marks=pytest.mark.slow)])
def test_answers_that_gave_up_their_pages_are_the_same(runner_of: Callable[[int | None], Runner]) -> None:
    rng = np.random.default_rng(0)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "seed": 5},
        {"temperature": 0.0, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
        {"temperature": 1.0, "seed": 7, "presence_penalty": 0.5, "top_k": 20},
    ]
    alike = rng.integers(0, 96, PAGE + 20).tolist()
    requests = []
    for i, kind in enumerate(2 * kinds):
        prompt = (*alike[: PAGE + 5 * (i // 4)], *rng.integers(0, 96, 3 + i).tolist())
        requests.append(Request(id=f"{i}", prompt=prompt, params=SamplingParams(max_tokens=130, **kind)))
    expected, roomy = served(runner_of(None), requests)
    got, crowded = served(runner_of(6), requests)  # each of three fills four pages in the end, and there are five
    assert count(roomy, "num_preemptions") == 0 < count(crowded, "num_preemptions")
    assert count(roomy, "prefix_cache_hits") > 0
    for name, outputs in expected.items():
        assert "".join(o.text for o in got[name]) == "".join(o.text for o in outputs), kinds[int(name) % 4]
        assert sum(o.tokens for o in got[name]) == 130
        assert got[name][-1].finish_reason == "length"
    cached = [outputs[-1].cached for outputs in expected.values()]
    assert set(cached) == {0, PAGE}
    assert cached[2] == 0, "what penalties go by is made as the prompt runs"
