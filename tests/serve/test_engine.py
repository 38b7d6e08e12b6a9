"""The engine over a device made of Python: ends, stops, aborts, failures, and that every slot comes back."""

import asyncio
import dataclasses
import threading
import time
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine import Engine
from serve.gateway import Gateway, Ticket
from serve.latency import make_table
from serve.metrics import Metrics
from serve.pages import PAGE, PagePool
from serve.request import Admission, Output, Request, SamplingParams, Slo, TokenLogprobs, UnattainableError
from serve.sampling import Logprobs
from serve.slots import SlotScheduler, Timing

SLOTS = 2


class CountingRunner:
    """A device whose slot answers a prompt ending in token t with t+1, t+2, ...; can be told to fail or to be slow."""

    slots, buckets = SLOTS, (4, 8)
    mask_words = 4

    def __init__(self) -> None:
        self.last = np.zeros(SLOTS, np.int64)
        self.fail = False
        self.step_seconds = 0.0
        self.decoded: list[tuple[int, ...]] = []
        self.levels: list[int] = []
        self.judged: list[tuple[int, ...]] = []

    def prefill(
        self,
        tokens: Sequence[int],
        *,
        slot: int,
        start: int,
        bucket: int,
        last: bool,
        params: SamplingParams,
        level: int,
        first: bool,
        answered: int,
    ) -> np.ndarray:
        assert len(tokens) <= bucket
        assert level == 0 or bucket == 4
        self.levels.append(level)
        self.last[slot] = tokens[-1] + 1
        return self.last[slot].copy()

    def decode(self, active: np.ndarray) -> np.ndarray:
        if self.fail:
            raise RuntimeError("the device is gone")
        time.sleep(self.step_seconds)
        self.decoded.append(tuple(np.flatnonzero(active).tolist()))
        self.last[active] += 1
        return self.last.copy()

    def recover(self, error: Exception) -> None:
        raise error

    def use_table(self, table: np.ndarray) -> None:
        """It has no use for it."""

    def logprobs(self, wanted: np.ndarray) -> Logprobs:
        """Token t has log-probability -t, and tokens t+100, t+99, ... are the likeliest."""
        self.judged.append(tuple(np.flatnonzero(wanted).tolist()))
        top = self.last[:, None] + 100 - np.arange(20)
        return Logprobs(chosen=-self.last.astype(np.float32), top=-np.arange(20.0) + np.zeros((SLOTS, 1)), token=top)

    def redraw(self, wanted: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Take the first token that is allowed."""
        assert mask.shape == (SLOTS, self.mask_words)
        bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")
        self.last[wanted] = bits[wanted].argmax(axis=1)
        return self.last.copy()

    def prompt_logprobs(self, tokens: Sequence[int], *, bucket: int) -> Logprobs:
        """Token t of a prompt has log-probability -t."""
        assert len(tokens) <= bucket
        chosen = -np.array([*tokens, *[0] * (bucket - len(tokens))], np.float32)
        return Logprobs(chosen=chosen, top=np.zeros((bucket, 20)), token=np.full((bucket, 20), 999))


class PagedRunner(CountingRunner):
    """A device that reads its tokens back from pages, by the table: the next is made of all that are before it."""

    slots, buckets = 6, (16, 64)

    def __init__(self, pages: int) -> None:
        super().__init__()
        self.last, self.length = np.zeros(self.slots, np.int64), np.zeros(self.slots, np.int64)
        self.held = np.full((pages, PAGE), -1, np.int64)
        self.table = np.zeros((self.slots, 8), np.int32)

    def pool(self) -> PagePool:
        return PagePool(pages=len(self.held), table=self.table.shape)

    def use_table(self, table: np.ndarray) -> None:
        self.table = table.copy()

    def _append(self, slot: int, tokens: Sequence[int], start: int) -> None:
        places = start + np.arange(len(tokens))
        numbers = self.table[slot, places // PAGE]
        assert numbers.all(), "a token was written to the page that nobody owns"
        self.held[numbers, places % PAGE] = tokens
        self.length[slot] = start + len(tokens)
        self.last[slot] = following(self.held[self.table[slot]].reshape(-1)[: self.length[slot]])

    def prefill(self, tokens: Sequence[int], *, slot: int, start: int, last: bool, **_: object) -> np.ndarray:
        self._append(slot, tokens, start)
        return self.last[slot].copy()

    def decode(self, active: np.ndarray) -> np.ndarray:
        time.sleep(self.step_seconds)
        for slot in np.flatnonzero(active):
            self._append(slot, self.last[slot, None], self.length[slot])
        return self.last.copy()


def following(tokens: np.ndarray) -> int:
    """Give the token that comes after others."""
    return zlib.crc32(tokens.tobytes()) % 50


class Bench:
    """An engine with its runner, and the outputs of each request by id."""

    def __init__(self, timing: Timing | None = None, runner: CountingRunner | None = None) -> None:
        self.runner = CountingRunner() if runner is None else runner
        self.pages = self.runner.pool() if isinstance(self.runner, PagedRunner) else None
        self.scheduler = SlotScheduler(
            num_slots=self.runner.slots, buckets=self.runner.buckets, stall_tokens=4, timing=timing, pages=self.pages
        )
        self.metrics = Metrics("counting")
        self.outputs: dict[str, list[Output]] = {}
        self._changed = threading.Condition()
        self.engine = Engine(
            self.runner,
            self.scheduler,
            decode=lambda ids: "".join(f"[{i}]" for i in ids),
            deliver=self._deliver,
            metrics=self.metrics,
            context=100,
        )
        self.engine.start()

    def _deliver(self, outputs: list[tuple[Request, Output]]) -> None:
        with self._changed:
            for request, output in outputs:
                self.outputs.setdefault(request.id, []).append(output)
            self._changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout=20)

    def ended(self, name: str) -> bool:
        return name in self.outputs and self.outputs[name][-1].finish_reason is not None

    def answer(self, name: str) -> tuple[str, str | None, int]:
        self.wait(lambda: self.ended(name))
        pieces = self.outputs[name]
        return "".join(p.text for p in pieces), pieces[-1].finish_reason, sum(p.tokens for p in pieces)

    def gauge(self, name: str) -> float:
        value = self.metrics.registry.get_sample_value(f"spear:{name}", {"model_name": "counting"})
        assert value is not None
        return value


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    bench.engine.stop(timeout=20)


def request(name: str, first: int, **params: object) -> Request:
    return Request(id=name, prompt=(0, first), params=SamplingParams(**({"max_tokens": 3} | params)))  # type: ignore[arg-type]


def test_answers_end_by_length_stop_token_and_stop_string(bench: Bench) -> None:
    bench.engine.submit(request("length", 10))
    bench.engine.submit(request("token", 20, max_tokens=9, stop_token_ids=frozenset({23})))
    bench.engine.submit(request("string", 30, max_tokens=9, stop=("][33",)))
    assert bench.answer("length") == ("[11][12][13]", "length", 3)
    assert bench.answer("token") == ("[21][22]", "stop", 3)
    assert bench.answer("string") == ("[31][32", "stop", 3)


def test_log_probabilities_come_with_the_text_of_their_tokens(bench: Bench) -> None:
    told: dict[str, list[TokenLogprobs]] = {}
    bench.engine.submit(request("none", 60))
    bench.answer("none")
    assert not bench.runner.judged
    bench.engine.submit(request("length", 10, logprobs=2))
    bench.engine.submit(request("token", 20, max_tokens=9, stop_token_ids=frozenset({23}), logprobs=0))
    bench.engine.submit(request("string", 30, max_tokens=9, stop=("[33][3",), logprobs=0))
    bench.engine.submit(request("cut", 40, max_tokens=9, stop=("3][44",), logprobs=0))
    for name in ("length", "token", "string", "cut"):
        bench.answer(name)
        told[name] = [entry for output in bench.outputs[name] for entry in output.logprobs]
        shown = 0
        for output in bench.outputs[name]:
            assert all(shown <= entry.offset < shown + len(output.text) for entry in output.logprobs)
            shown += len(output.text)
    assert {name: [(e.token, e.logprob, e.offset) for e in entries] for name, entries in told.items()} == {
        "length": [(11, -11, 0), (12, -12, 4), (13, -13, 8)],
        "token": [(21, -21, 0), (22, -22, 4)],
        "string": [(31, -31, 0), (32, -32, 4)],
        "cut": [(41, -41, 0), (42, -42, 4), (43, -43, 8)],
    }
    assert [entry.top for entry in told["length"]] == [((t + 100, 0), (t + 99, -1)) for t in (11, 12, 13)]
    assert not told["token"][0].top


@pytest.mark.parametrize(("max_tokens", "text"), [(0, ""), (1, "[21]")])
def test_prompts_are_judged_chunk_by_chunk_and_told_with_the_first_token(
    bench: Bench, max_tokens: int, text: str
) -> None:
    params = SamplingParams(max_tokens=max_tokens, logprobs=1, prompt_logprobs=1)
    bench.engine.submit(Request(id="long", prompt=tuple(range(21)), params=params))
    bench.engine.submit(Request(id="one", prompt=(20,), params=params))
    assert bench.answer("long") == bench.answer("one") == (text, "length", max_tokens)
    (output,) = bench.outputs["long"]
    assert [(e.token, e.logprob) for e in output.prompt_logprobs] == [(t, -t) for t in range(1, 21)]
    assert [e.token for e in output.logprobs] == [21] * max_tokens
    (output,) = bench.outputs["one"]
    assert output.prompt_logprobs == ()
    bench.engine.submit(Request(id="stops", prompt=(20,), params=dataclasses.replace(
        params, max_tokens=3, stop_token_ids=frozenset({21}))))  # fmt: skip
    assert bench.answer("stops") == ("", "stop", 1)
    assert [e.token for output in bench.outputs["stops"] for e in output.logprobs] == [21]


class Steps:
    """A grammar of tokens that grow by ten, from 10 to 50; after 40 it fails to tell if it is a bad one."""

    def __init__(self, *, bad: bool, last: int = 0) -> None:
        self.bad, self.last = bad, last

    def copy(self) -> "Steps":
        return Steps(bad=self.bad, last=self.last)

    def fill(self, mask: np.ndarray) -> None:
        if self.bad and self.last == 40:
            raise ValueError("too hard")
        bits = np.zeros(mask.size * 32, np.uint8)
        bits[self.last + 10] = 1
        mask[:] = np.packbits(bits, bitorder="little").view(np.uint32)

    def push(self, token: int) -> bool:
        assert token == self.last + 10, "a step was made without the token before"
        self.last = token
        return token == 50


@pytest.mark.parametrize("slow", [False, True])
def test_answers_are_held_to_their_grammars_beside_free_ones(bench: Bench, slow: bool) -> None:
    bench.runner.step_seconds = 0.002 if slow else 0.0
    params = SamplingParams(max_tokens=20, constrained=True, logprobs=0)
    grammar = Steps(bad=False)
    bench.engine.submit(request("free", 200, max_tokens=12, logprobs=0))
    for i in range(3):
        bench.engine.submit(Request(id=f"held{i}", prompt=(7,) * (1 + 5 * i), params=params, grammar=grammar))
    bench.engine.submit(Request(id="bad", prompt=(7,), params=params, grammar=Steps(bad=True)))
    for i in range(3):
        assert bench.answer(f"held{i}") == ("[10][20][30][40][50]", "stop", 5)
        told = [e for output in bench.outputs[f"held{i}"] for e in output.logprobs]
        assert [(e.token, e.logprob) for e in told] == [(t, -t) for t in (10, 20, 30, 40, 50)]
    assert bench.answer("free") == ("".join(f"[{i}]" for i in range(201, 213)), "length", 12)
    assert bench.answer("bad")[:2] == ("[10][20][30][40]", "error")
    assert (bench.outputs["bad"][-1].error, bench.outputs["bad"][-1].client_error) == ("too hard", True)
    assert grammar.last == 0
    assert bench.engine.failure is None
    bench.wait(lambda: bench.gauge("num_requests_running") == 0 or time.sleep(0.01) is None)


def test_improbable_tokens_have_a_number() -> None:
    found = Logprobs(chosen=np.array([-np.inf]), top=np.array([[-1.0, np.nan]]), token=np.array([[4, 5]], np.int32)).of(
        0, token=3, count=2, offset=7
    )
    assert found == TokenLogprobs(token=3, logprob=-9999.0, top=((4, -1.0), (5, -9999.0)), offset=7)


def test_many_requests_share_the_slots_and_all_end(bench: Bench) -> None:
    names = [f"r{i}" for i in range(20)]
    for i, name in enumerate(names):
        bench.engine.submit(Request(id=name, prompt=(i,) * (1 + 3 * i), params=SamplingParams(max_tokens=1 + i % 4)))
    for i, name in enumerate(names):
        text, reason, tokens = bench.answer(name)
        assert (reason, tokens) == ("length", 1 + i % 4)
        assert text == "".join(f"[{i + 1 + j}]" for j in range(tokens))
    bench.wait(lambda: bench.gauge("num_requests_running") == 0 or time.sleep(0.01) is None)
    assert bench.engine.stop(timeout=20)
    assert bench.scheduler.idle
    assert bench.gauge("num_requests_running") == bench.gauge("kv_cache_usage_perc") == 0


def test_an_abort_frees_the_slot_without_another_word(bench: Bench) -> None:
    bench.runner.step_seconds = 0.002
    endless = [request(f"endless{i}", 0, max_tokens=10_000) for i in range(SLOTS)]
    for r in endless:
        bench.engine.submit(r)
    waiting = request("waiting", 50)
    bench.engine.submit(waiting)
    bench.wait(lambda: all(len(bench.outputs.get(r.id, ())) > 2 for r in endless))
    assert "waiting" not in bench.outputs
    bench.engine.abort(endless[0])
    assert bench.answer("waiting") == ("[51][52][53]", "length", 3)
    bench.engine.abort(endless[1])
    bench.engine.abort(endless[1])
    deadline = time.monotonic() + 20
    while bench.gauge("num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert bench.gauge("num_requests_running") == 0
    assert not any(bench.ended(r.id) for r in endless)


def test_nothing_is_computed_past_the_length_limit(bench: Bench) -> None:
    bench.engine.submit(request("r", 5, max_tokens=4))
    bench.answer("r")
    assert bench.runner.decoded == [(0,)] * 3


def test_a_failing_device_gives_every_request_an_error_and_is_reported(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.runner.step_seconds = 0.002
    for i in range(4):
        bench.engine.submit(request(f"r{i}", 0, max_tokens=10_000))
    bench.wait(lambda: len(bench.outputs.get("r0", ())) > 2)
    bench.runner.fail = True
    for i in range(4):
        bench.wait(lambda i=i: bench.ended(f"r{i}"))
        assert bench.outputs[f"r{i}"][-1].finish_reason == "error"
        assert bench.outputs[f"r{i}"][-1].error
    assert isinstance(bench.engine.failure, RuntimeError)
    assert "engine failed" in caplog.text
    bench.engine.submit(request("late", 0))
    bench.wait(lambda: bench.ended("late"))
    assert bench.outputs["late"][-1].error


def test_stopping_ends_what_is_running_with_an_error(bench: Bench) -> None:
    bench.runner.step_seconds = 0.002
    bench.engine.submit(request("r", 0, max_tokens=10_000))
    bench.wait(lambda: len(bench.outputs.get("r", ())) > 2)
    assert bench.engine.stop(timeout=20)
    assert bench.outputs["r"][-1].finish_reason == "abort"
    assert bench.engine.failure is None


def timing(*, refuses: bool) -> Timing:
    """10 ms a step; 4 prompt tokens 10 ms, without compensators 5."""
    seconds = np.zeros((2, 3, 3, 2))
    seconds[:, 1:], seconds[:, :, 1], seconds[:, :, 2] = 0.01, 0.01, 0.02
    seconds[:, 1:, 1:] += 0.01
    seconds[1, :, 1] -= 0.005
    table = make_table(seconds, decodes=(0, 1, SLOTS), chunks=(0, 4, 8), contexts=(1, 100), longest=False)
    return Timing(table=table, share=1.0, refuses=refuses)


@pytest.fixture
def benches():
    made: list[Bench] = []

    def make(**options: bool) -> Bench:
        made.append(Bench(timing(**options)))
        return made[-1]

    yield make
    for bench in made:
        bench.engine.stop(timeout=20)


def limited(name: str, length: int = 2, *, tokens: int = 3, **slo: float) -> Request:
    return Request(id=name, prompt=(7,) * length, params=SamplingParams(max_tokens=tokens), slo=Slo(**slo))


def test_limits_that_cannot_be_kept_are_refused_with_a_time_to_come_back(benches: Callable[..., Bench]) -> None:
    bench = benches(refuses=True)
    bench.engine.submit(limited("strict", itl=0.005))
    bench.wait(lambda: bench.ended("strict"))
    (refusal,) = bench.outputs["strict"]
    assert refusal.finish_reason == "abort"
    assert refusal.retry_after is not None
    assert refusal.retry_after > 0
    bench.engine.submit(limited("easy", ttft=60.0, itl=5.0))
    assert bench.answer("easy") == ("[8][9][10]", "length", 3)
    assert bench.outputs["easy"][0] == Output()
    assert bench.gauge("slo_unattainable_total") == 1
    bench.wait(lambda: bench.metrics.registry.get_sample_value(
        "spear:request_slo_total", {"model_name": "counting", "met": "true"}) == 1)  # fmt: skip


def test_or_they_are_served_without_them(benches: Callable[..., Bench]) -> None:
    bench = benches(refuses=False)
    bench.engine.submit(limited("strict", itl=0.005))
    assert bench.answer("strict")[1:] == ("length", 3)
    assert bench.gauge("slo_best_effort_total") == 1


def test_prompt_tokens_without_compensators_are_counted_and_told(benches: Callable[..., Bench]) -> None:
    bench = benches(refuses=False)
    bench.runner.step_seconds = 0.002
    bench.engine.submit(limited("running", tokens=10_000, itl=0.016))
    bench.wait(lambda: len(bench.outputs.get("running", ())) > 2)
    bench.scheduler.timing.drift.observe = lambda **_: None  # type: ignore[union-attr, method-assign]
    bench.scheduler.timing.drift.factor = 1.0  # type: ignore[union-attr]
    bench.engine.submit(limited("squeezed", 9))
    bench.answer("squeezed")
    assert bench.outputs["squeezed"][-1].uncompensated == 9
    assert bench.runner.levels[-3:] == [1, 1, 1]
    before = len(bench.runner.levels)
    bench.engine.submit(dataclasses.replace(limited("whole", 9), droppable=False))
    time.sleep(0.2)
    assert len(bench.runner.levels) == before
    assert bench.gauge("prompt_tokens_uncompensated_total") == 9


def test_a_ticket_learns_of_a_refusal_before_anything_is_sent(benches: Callable[..., Bench]) -> None:
    bench = benches(refuses=True)
    gateway = Gateway(Admission(8))
    gateway.engine = bench.engine

    async def ask(*requests: Request) -> list[tuple[int, Output]]:
        gateway.attach(asyncio.get_running_loop())
        bench._deliver = gateway.deliver  # type: ignore[method-assign]
        bench.engine._deliver = gateway.deliver
        gateway.admission.reserve(len(requests))
        ticket = Ticket(gateway, len(requests))
        try:
            ticket.submit(requests)
            await ticket.taken()
            return [output async for output in ticket.outputs()]
        finally:
            ticket.close()

    outputs = asyncio.run(ask(limited("a", itl=5.0), limited("b"), limited("c", ttft=60.0)))
    assert sorted(index for index, _ in outputs) == [0] * 3 + [1] * 3 + [2] * 3
    with pytest.raises(UnattainableError) as error:
        asyncio.run(ask(limited("d", itl=5.0), limited("e", itl=0.001)))
    assert error.value.retry_after > 0
    assert gateway.admission.held == 0


def submit_and_abandon_some(bench: Bench, requests: Sequence[Request], rng: np.random.Generator) -> list[Request]:
    """Submit all, and abandon three in ten, half of them at once; give those that are to be answered."""
    gone = {request.id for request in requests if rng.random() < 0.3}
    for request in requests:
        bench.engine.submit(request)
        if request.id in gone and rng.random() < 0.5:
            bench.engine.abort(request)
    for request in requests:
        if request.id in gone:
            bench.engine.abort(request)
    return [request for request in requests if request.id not in gone]


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**32), limits=st.booleans())
def test_a_thousand_requests_of_all_kinds_end_and_give_everything_back(seed: int, limits: bool) -> None:
    rng = np.random.default_rng(seed)
    bench = Bench(dataclasses.replace(timing(refuses=False), aging=0.05) if limits else None)
    requests = [
        dataclasses.replace(
            limited(
                f"r{i}", int(rng.integers(1, 40)), tokens=int(rng.integers(1, 12)), ttft=float(rng.uniform(0.01, 20)),
                **({"itl": float(rng.uniform(0.008, 0.1))} if rng.random() < 0.5 else {"tpot": 0.03}),
            ),
            priority=int(rng.integers(-2, 3)),
            droppable=bool(rng.random() < 0.5),
        )
        for i in range(1000)
    ]  # fmt: skip
    for request in submit_and_abandon_some(bench, requests, rng):
        text, reason, tokens = bench.answer(request.id)
        assert (reason, tokens) == ("length", request.params.max_tokens)
        assert text == "".join(f"[{8 + i}]" for i in range(tokens))
    bench.wait(lambda: bench.gauge("num_requests_running") == 0 or time.sleep(0.01) is None)
    assert bench.engine.stop(timeout=20)
    assert bench.scheduler.idle
    assert not bench.scheduler.slo
    assert not bench.scheduler.running.decoding.any()
    assert bench.gauge("kv_cache_usage_perc") == 0
    assert sorted(bench.scheduler._free) == list(range(SLOTS))


def expected_answer(prompt: Sequence[int], count: int) -> str:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(following(np.array(tokens)))
    return "".join(f"[{token}]" for token in tokens[len(prompt) :])


@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_thousand_requests_on_too_few_pages_all_end_and_give_every_page_back(seed: int) -> None:
    """Six slots share pages for hardly two of the longest; many prompts begin alike, three in ten are abandoned."""
    rng = np.random.default_rng(seed)
    bench = Bench(runner=PagedRunner(pages=14))
    assert bench.pages is not None
    beginnings = [tuple(rng.integers(0, 50, 200).tolist()) for _ in range(4)]
    requests, expected = [], {}
    for i in range(1000):
        prompt = (
            *beginnings[rng.integers(4)][: rng.integers(1, 200)],
            *rng.integers(0, 50, rng.integers(1, 30)).tolist(),
        )
        tokens = int(rng.integers(100, 250)) if rng.random() < 0.1 else int(rng.integers(1, 12))
        params = SamplingParams(max_tokens=tokens, repetition_penalty=float(rng.choice([1.0, 1.0, 1.2])))
        requests.append(Request(id=f"r{i}", prompt=prompt, params=params, priority=int(rng.integers(2))))
        expected[f"r{i}"] = expected_answer(prompt, tokens)
    for request in submit_and_abandon_some(bench, requests, rng):
        assert bench.answer(request.id) == (expected[request.id], "length", request.params.max_tokens)
    bench.wait(lambda: bench.gauge("num_requests_running") == 0 or time.sleep(0.01) is None)
    assert bench.engine.stop(timeout=20)
    assert bench.engine.failure is None
    assert bench.scheduler.idle
    assert bench.pages.available == bench.pages.total == 13
    assert not bench.pages.table.any()
    assert bench.gauge("kv_cache_usage_perc") == 0
    assert bench.gauge("num_preemptions_total") > 0
    assert bench.gauge("prefix_cache_hits_total") > 0
    assert bench.gauge("prefix_cache_hits_total") < bench.gauge("prefix_cache_queries_total")


def test_a_request_that_never_fits_is_refused_and_the_others_go_on() -> None:
    bench = Bench(runner=PagedRunner(pages=3))
    try:
        bench.engine.submit(request("whole", 3, max_tokens=2 * PAGE - 1))
        bench.engine.submit(request("endless", 3, max_tokens=2 * PAGE))
        assert bench.answer("endless")[1] == "error"
        assert "KV cache" in (bench.outputs["endless"][-1].error or "")
        assert bench.answer("whole") == (expected_answer((0, 3), 2 * PAGE - 1), "length", 2 * PAGE - 1)
    finally:
        bench.engine.stop(timeout=20)
