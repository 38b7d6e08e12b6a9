"""What becomes of requests when a step fails: those without a part in it get the answers they would have had."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from serve.engine import Engine
from serve.metrics import Metrics
from serve.pages import PagePool
from serve.request import Output, Request, SamplingParams
from serve.runner import Runner
from serve.slots import SlotScheduler
from spear_jax.models.decoder import Decoder
from spear_jax.testing import random_weights, tiny_config

SLOTS, CONTEXT, BUCKETS = 3, 64, (8, 16)


class Faulty:
    """A device that fails as it is told to, before the call or, as XLA does, when its result is looked at."""

    def __init__(self, inner: Runner):
        self.inner, self.slots = inner, inner.slots
        self.holds: list[list[int]] = [[] for _ in range(inner.slots)]
        self.poison: int | None = None  # a prompt that holds this token makes decode steps fail
        self.poisoned_prefill: int | None = None
        self.failing = 0  # so many decode steps fail from now on
        self.steps = 0
        self.recovered = 0
        self.lost = False
        self.late = False

    def prefill(self, tokens: Sequence[int], *, slot: int, start: int, **rest: Any) -> Any:
        if self.poisoned_prefill in tokens:
            raise ValueError("a kernel cannot take this")
        self.holds[slot] = [*(self.holds[slot] if start else []), *tokens]
        return self.inner.prefill(tokens, slot=slot, start=start, **rest)

    def decode(self, active: np.ndarray) -> Any:
        self.steps += 1
        result = self.inner.decode(active)
        poisoned = any(self.poison in self.holds[slot] for slot in np.flatnonzero(active))
        if self.failing or poisoned:
            self.failing = max(self.failing - 1, 0)
            error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte")
            self.inner._state = jax.tree.map(lambda leaf: leaf.delete() or leaf, self.inner._state)
            if self.late:
                return _Late(error)
            raise error
        return result

    def logprobs(self, wanted: np.ndarray) -> Any:
        return self.inner.logprobs(wanted)

    def use_table(self, table: np.ndarray) -> None:
        self.inner.use_table(table)

    def recover(self, error: Exception) -> None:
        if self.lost:
            raise error
        self.recovered += 1
        self.inner.recover(error)


class _Late:
    def __init__(self, error: Exception):
        self.error = error

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise self.error


class Bench:
    """An engine on such a device, and the text and the end of each answer by its id."""

    def __init__(self, runner: Runner):
        runner.recover(RuntimeError())
        self.runner = Faulty(runner)
        self.metrics = Metrics("m")
        self.outputs: dict[str, list[Output]] = {}
        self.bad_token: int | None = None
        self._changed = threading.Condition()
        self.engine = Engine(
            self.runner,
            SlotScheduler(
                num_slots=SLOTS,
                buckets=BUCKETS,
                stall_tokens=16,
                pages=PagePool(pages=runner.pages, table=runner.table_shape),
            ),
            decode=self._decode,
            deliver=self._deliver,
            metrics=self.metrics,
            context=CONTEXT,
        )
        self.engine.start()

    def _decode(self, ids: Sequence[int]) -> str:
        if self.bad_token in ids:
            raise OverflowError("no such character")
        return "".join(f"[{i}]" for i in ids)

    def _deliver(self, outputs: list[tuple[Request, Output]]) -> None:
        with self._changed:
            for request, output in outputs:
                self.outputs.setdefault(request.id, []).append(output)
            self._changed.notify_all()

    def submit(self, *requests: Request) -> None:
        for request in requests:
            self.engine.submit(request)

    def text(self, name: str) -> str:
        return "".join(output.text for output in self.outputs.get(name, ()))

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout=60)

    def answer(self, name: str) -> tuple[str, str | None, int]:
        self.wait(lambda: name in self.outputs and self.outputs[name][-1].finish_reason is not None)
        pieces = self.outputs[name]
        return self.text(name), pieces[-1].finish_reason, sum(piece.tokens for piece in pieces)

    def count(self, name: str) -> float:
        value = self.metrics.registry.get_sample_value(f"spear:{name}", {"model_name": "m"})
        assert value is not None
        return value


@pytest.fixture(scope="module")
def runner() -> Runner:
    config = tiny_config(tie_embeddings=False)  # else it says the same word for ever
    model = Decoder.from_weights(config, random_weights(config), dtype=jnp.float32)
    runner = Runner(model, slots=SLOTS, context=CONTEXT, buckets=BUCKETS, lone_program=False)
    list(runner.warm_up())
    return runner


@pytest.fixture
def bench(runner: Runner) -> Iterator[Bench]:
    bench = Bench(runner)
    yield bench
    assert bench.engine.stop(timeout=20)


def requests(count: int = 5, *, tokens: int = 24) -> list[Request]:
    """Greedy ones and seeded ones, more than there are slots."""
    return [
        Request(
            id=f"r{i}", prompt=tuple(range(10 + i, 14 + 3 * i)),
            params=SamplingParams(max_tokens=tokens, temperature=float(i % 2), seed=i),
        )
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def expected(runner: Runner) -> dict[str, tuple[str, str | None, int]]:
    bench = Bench(runner)
    bench.submit(*requests())
    answers = {f"r{i}": bench.answer(f"r{i}") for i in range(5)}
    assert all(len(set(text.split("]["))) > 5 for text, _, _ in answers.values()), (
        "answers that could not be told apart"
    )
    assert bench.engine.stop(timeout=20)
    return answers


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("failing", [1, 2])
def test_a_step_that_fails_costs_nobody_an_answer(
    bench: Bench, expected: dict[str, Any], late: bool, failing: int
) -> None:
    bench.submit(*requests())
    bench.wait(lambda: len(bench.outputs.get("r0", ())) > 4)
    bench.runner.late, bench.runner.failing = late, failing
    assert {name: bench.answer(name) for name in expected} == expected
    assert bench.runner.recovered == bench.count("engine_faults_total") == failing
    assert bench.count("request_retries_total") >= failing
    assert bench.engine.failure is None
    assert bench.count("num_requests_running") == 0 or time.sleep(0.2) is None


@pytest.mark.parametrize("late", [False, True])
def test_a_request_that_makes_steps_fail_is_found_and_the_others_are_answered(
    bench: Bench, expected: dict[str, Any], late: bool
) -> None:
    bench.runner.late, bench.runner.poison = late, 90
    poisoned = [
        Request(id=f"p{i}", prompt=(7, 90, 3 + i), params=SamplingParams(max_tokens=9, temperature=0)) for i in range(2)
    ]
    asked = requests()
    bench.submit(asked[0], poisoned[0], *asked[1:3], poisoned[1], *asked[3:])
    assert {name: bench.answer(name) for name in expected} == expected
    for request in poisoned:
        assert bench.answer(request.id)[1] == "error"
        assert "cannot be served" in (bench.outputs[request.id][-1].error or "")
    assert bench.engine.failure is None
    bench.submit(Request(id="after", prompt=(5,), params=SamplingParams(max_tokens=4, temperature=0)))
    assert bench.answer("after")[1:] == ("length", 4)
    assert bench.runner.recovered < 10


def test_a_prompt_that_cannot_be_run_fails_alone(bench: Bench, expected: dict[str, Any]) -> None:
    bench.runner.poisoned_prefill = 90
    asked = requests()
    bad = Request(id="bad", prompt=(1, 90), params=SamplingParams(max_tokens=5))
    bench.submit(*asked[:2], bad, *asked[2:])
    assert bench.answer("bad")[1] == "error"
    assert {name: bench.answer(name) for name in expected} == expected
    assert bench.runner.recovered == 2


def test_a_token_that_cannot_be_shown_fails_its_request_alone(bench: Bench, expected: dict[str, Any]) -> None:
    text, _, _ = expected["r0"]
    bench.bad_token = next(
        int(token)
        for token in text[1:-1].split("][")[3:]
        if not any(f"[{token}]" in expected[f"r{i}"][0] for i in range(1, 5))
    )
    bench.submit(*requests())
    assert bench.answer("r0")[1] == "error"
    assert {f"r{i}": bench.answer(f"r{i}") for i in range(1, 5)} == {f"r{i}": expected[f"r{i}"] for i in range(1, 5)}
    assert bench.runner.recovered == 0


def test_who_goes_away_after_a_fault_is_forgotten(bench: Bench) -> None:
    asked = requests(3, tokens=50)
    bench.submit(*asked)
    bench.wait(lambda: all(len(bench.outputs.get(r.id, ())) > 2 for r in asked))
    bench.runner.failing = 2
    bench.wait(lambda: bench.runner.recovered == 2)
    for request in asked:
        bench.engine.abort(request)
    bench.submit(Request(id="next", prompt=(5,), params=SamplingParams(max_tokens=4)))
    assert bench.answer("next")[1:] == ("length", 4)
    assert not bench.engine._live
    assert not bench.engine._again
    assert not bench.engine._suspects


def test_a_model_of_another_kind_is_not_taken(runner: Runner) -> None:
    def model(dtype: Any = jnp.float32, **changes: Any) -> Decoder:
        config = tiny_config(tie_embeddings=False, **changes)
        return Decoder.from_weights(config, random_weights(config, seed=3), dtype=dtype)

    assert len(runner.replacement(model())) == 1
    with pytest.raises(ValueError, match="structure"):
        runner.replacement(model(num_layers=2))
    with pytest.raises(ValueError, match=r"an array is bfloat16\[.*\] where float32\[.*\] is served"):
        runner.replacement(model(jnp.bfloat16))


def test_a_lost_device_ends_everything_with_an_error(bench: Bench) -> None:
    asked = requests()
    bench.submit(*asked)
    bench.wait(lambda: len(bench.outputs.get("r0", ())) > 2)
    bench.runner.lost, bench.runner.failing = True, 1
    assert [bench.answer(r.id)[1] for r in asked] == ["error"] * 5
    assert isinstance(bench.engine.failure, RuntimeError)


def test_a_thread_that_is_ended_ends_everything_with_an_error(bench: Bench) -> None:
    asked = requests()
    bench.submit(*asked)
    bench.engine._inbox.put(lambda: (_ for _ in ()).throw(SystemExit))
    assert [bench.answer(r.id)[1] for r in asked] == ["error"] * 5
    assert isinstance(bench.engine.failure, SystemExit)


def test_faults_with_nobody_to_blame_end_the_engine(bench: Bench) -> None:
    for _ in range(4):
        assert bench.engine.failure is None
        bench.engine._inbox.put(lambda: 1 / 0)
    deadline = time.monotonic() + 20
    while bench.engine.failure is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert isinstance(bench.engine.failure, ZeroDivisionError)
