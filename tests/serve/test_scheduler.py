"""What the policy decides, and that slots are given in order, prompts are cut whole, and everything comes back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.latency import LatencyTable, make_table
from serve.request import UNBOUNDED, Admission, BadParameterError, QueueFullError, Request, SamplingParams, Slo
from serve.scheduler import (
    Prompt,
    Running,
    begin_iteration,
    choose_chunk,
    drop_order,
    first_token_times,
    next_chunk,
    plan,
    queue_order,
    step_budget,
)
from serve.slots import SlotScheduler, Timing

BUCKETS = (16, 64, 256)


def request(length: int) -> Request:
    return Request(id="r", prompt=(1,) * length, params=SamplingParams(max_tokens=2))


@pytest.mark.parametrize(
    ("remaining", "limit", "expected"),
    [
        (1, 256, (1, 16)),
        (16, 256, (16, 16)),
        (17, 256, (16, 16)),  # a quarter of 64 would be used
        (40, 256, (40, 64)),
        (65, 256, (64, 64)),
        (130, 256, (130, 256)),
        (300, 256, (256, 256)),
        (300, 64, (64, 64)),
        (300, 1, (16, 16)),  # nothing is that small: the smallest
    ],
)
def test_choose_chunk(remaining: int, limit: int, expected: tuple[int, int]) -> None:
    largest = max(sum(bucket <= limit for bucket in BUCKETS) - 1, 0)
    tokens, index = choose_chunk(remaining, np.array(BUCKETS), largest=largest)
    assert (tokens, BUCKETS[index]) == expected


@given(
    lengths=st.lists(st.integers(1, 900), max_size=12), slots=st.integers(1, 4), stall=st.sampled_from([16, 64, 256])
)
def test_every_prompt_is_cut_whole_and_in_order(lengths: list[int], slots: int, stall: int) -> None:
    scheduler = SlotScheduler(num_slots=slots, buckets=BUCKETS, stall_tokens=stall)
    requests = [request(length) for length in lengths]
    done = dict.fromkeys(requests, 0)
    finished: list[Request] = []
    for r in requests:
        scheduler.submit(r)
    while not scheduler.idle:
        scheduler.admit(0.0)
        held = [slot for slot, _ in scheduler.prefilling.values()] + list(scheduler.decoding.values())
        assert len(set(held)) == len(held) <= slots
        decoding = scheduler.running.decoding.any()
        chunks = scheduler.next_step(0.0).chunks
        if decoding:
            assert sum(chunk.bucket for _, chunk in chunks) <= stall
        for r, chunk in chunks:
            assert chunk.start == done[r]
            assert 0 < chunk.length <= chunk.bucket
            done[r] += chunk.length
            assert chunk.last == (done[r] == len(r.prompt))
        if not chunks:
            oldest = next(iter(scheduler.decoding))
            assert scheduler.remove(oldest)
            finished.append(oldest)
    assert finished == requests
    assert all(done[r] == len(r.prompt) for r in requests)


def test_a_request_can_leave_from_anywhere() -> None:
    scheduler = SlotScheduler(num_slots=2, buckets=BUCKETS, stall_tokens=16)
    decoding, cutting, waiting = request(5), request(600), request(5)
    for r in (decoding, cutting, waiting):
        scheduler.submit(r)
    scheduler.admit(0.0)
    scheduler.next_step(0.0)
    scheduler.next_step(0.0)
    assert list(scheduler.decoding) == [decoding]
    assert list(scheduler.prefilling) == [cutting]
    assert all(scheduler.remove(r) for r in (waiting, cutting, decoding))
    assert scheduler.idle
    assert not scheduler.remove(waiting)
    for r in (request(1), request(1)):
        scheduler.submit(r)
    assert len(scheduler.admit(0.0)) == 2


def test_admission_counts_to_its_capacity() -> None:
    admission = Admission(3)
    admission.reserve(2)
    with pytest.raises(QueueFullError):
        admission.reserve(2)
    admission.reserve(1)
    admission.release(3)
    admission.reserve(3)
    with pytest.raises(BadParameterError, match="4 answers"):
        admission.reserve(4)


CHUNKS = (0, *BUCKETS)
SLOTS = 4


def table(*, sets: int = 2) -> LatencyTable:
    """1 ms a step, 0.5 ms a sequence, 1 ms for 16 prompt tokens; without compensators a chunk takes half as long."""
    decodes, contexts = (0, 1, SLOTS), (1, 1000)
    d, c, _ = np.meshgrid(decodes, CHUNKS, contexts, indexing="ij")
    seconds = [np.where(d + c > 0, 1e-3 + 0.5e-3 * d + 1e-3 * c / 16 / (1 + level), 0.0) for level in range(sets)]
    return make_table(np.stack(seconds), decodes=decodes, chunks=CHUNKS, contexts=contexts, longest=False)


def running(**columns: Any) -> Running:
    plain = {
        "decoding": np.ones(SLOTS, bool),
        "context": np.full(SLOTS, 100.0),
        "itl": np.full(SLOTS, UNBOUNDED),
        "tpot": np.full(SLOTS, UNBOUNDED),
        "first": np.zeros(SLOTS),
        "generated": np.full(SLOTS, 10.0),
    }
    return Running(**(plain | {name: np.asarray(column) for name, column in columns.items()}))


def decide(state: Running, **options: Any) -> tuple[list[int], int, int]:
    plain = {"start": 0, "joins": 0, "droppable": True, "urgent": False, "now": 1.0}
    budget = options.pop("share", 1.0) * step_budget(state, now=1.0)
    run, column, level = plan(table(), state, **(plain | {"budget": budget} | options))
    return np.flatnonzero(run).tolist(), int(column), int(level)


@pytest.mark.parametrize(
    ("milliseconds", "expected"),
    [(3.9, (1, 1)), (4.1, (1, 0)), (6.9, (1, 0)), (7.1, (2, 0)), (19.1, (3, 0)), (3.4, (0, 0)), (2.0, (0, 0))],
)
def test_the_largest_chunk_within_the_gap_is_taken(milliseconds: float, expected: tuple[int, int]) -> None:
    # Four sequences take 3 ms; chunks add 1, 4 and 16, without compensators half.
    assert decide(running(itl=[1.0, milliseconds / 1e3, 1.0, 1.0])) == ([0, 1, 2, 3], *expected)


def test_compensators_stay_where_a_request_asks_for_them_and_the_budget_has_a_margin() -> None:
    tight = running(itl=np.full(SLOTS, 3.9e-3))
    assert decide(tight)[1:] == (1, 1)
    assert decide(tight, droppable=False)[1:] == (0, 0)
    assert decide(running(itl=np.full(SLOTS, 4.1e-3)), share=0.9)[1:] == (1, 1)


def test_who_is_ahead_of_its_tpot_lends_its_time_and_waits_if_a_prompt_is_urgent() -> None:
    # Two are far ahead (10 tokens after 0.1 s of 50 ms each), two have a strict gap that leaves no room for 64 tokens.
    state = running(
        itl=[UNBOUNDED, UNBOUNDED, 6.4e-3, 6.4e-3], tpot=[0.05, 0.05, UNBOUNDED, UNBOUNDED], first=[0.9] * 4
    )
    assert decide(state) == ([0, 1, 2, 3], 1, 0)
    assert decide(state, urgent=True) == ([2, 3], 2, 0)
    behind = dataclasses.replace(state, first=np.array([0.0, 0.9, 0.9, 0.9]))
    assert decide(behind, urgent=True) == ([0, 1, 2, 3], 1, 0)


def test_a_request_behind_its_tpot_still_leaves_steps_of_its_tpot() -> None:
    state = running(tpot=[0.0075, 9.0, 9.0, 9.0])  # ten tokens were due long ago
    assert float(step_budget(state, now=1.0)) == 0.0075
    assert decide(state)[1:] == (2, 0)


def test_the_policy_decides_alike_inside_a_jitted_program() -> None:
    def draw(rng: np.random.Generator) -> tuple[Running, Prompt, Prompt]:
        strict = rng.random(SLOTS) < 0.5
        state = running(
            decoding=rng.random(SLOTS) < 0.7,
            context=rng.uniform(1, 900, SLOTS),
            itl=np.where(strict, rng.uniform(2e-3, 1e-2, SLOTS), UNBOUNDED),
            tpot=np.where(strict, UNBOUNDED, rng.uniform(5e-3, 2e-1, SLOTS)),
            first=rng.uniform(0.5, 1.0, SLOTS),
            generated=rng.integers(1, 40, SLOTS).astype(float),
        )
        drawn = [
            Prompt(
                slot=slot, start=np.int32(rng.integers(0, 900)), left=np.int32(rng.integers(1, 400)),
                limit=UNBOUNDED if rng.random() < 0.5 else 0.01, droppable=rng.random() < 0.5,
                urgent=rng.random() < 0.5, overdue=rng.random() < 0.1,
            )
            for slot in range(2)
        ]  # fmt: skip
        return state, *drawn

    def decided(table: LatencyTable | None, buckets: Any, state: Running, *prompts: Prompt) -> Any:
        so_far, found = begin_iteration(state, now=1.0, share=0.9, room=64), []
        for prompt in prompts:
            *chunk, so_far = next_chunk(table, buckets, state, so_far, prompt, now=1.0, share=0.9)
            found.append((*chunk, so_far.run, so_far.open))
        return found

    seen = set()
    jitted, buckets = jax.jit(decided), np.array(BUCKETS, np.int32)
    for seed in range(200):
        given, known = draw(np.random.default_rng(seed)), table() if seed % 4 else None
        expected = decided(known, buckets, *given)
        found = jitted(*jax.tree.map(jnp.asarray, (known, buckets, *given)))
        for chunk, wanted in zip(found, expected, strict=True):
            told = slice(1, None, 2) if wanted[1] < 0 else slice(None)  # without a chunk its length means nothing
            for one, other in zip(chunk[told], wanted[told], strict=True):
                np.testing.assert_array_equal(one, other)
            seen.add((known is not None, int(wanted[1]), int(wanted[2])))
    assert {(True, -1, 0), (True, 0, 1), (True, 0, 0), (True, 1, 0), (False, 1, 0)} <= seen


def order(now: float, *rows: tuple[int, float, float, float], begun: bool = False) -> list[int]:
    columns = zip(("priority", "arrival", "deadline", "work"), np.array(rows).T, strict=True)
    return queue_order(**dict(columns), begun=np.full(len(rows), begun), now=now, aging=10.0).tolist()


def test_the_queue_goes_by_priority_slack_and_age() -> None:
    never = UNBOUNDED
    assert order(1.0, (0, 0.0, never, 0), (0, 0.5, 2.0, 0), (0, 0.6, 1.8, 0)) == [2, 1, 0]
    assert order(1.0, (0, 0.0, 2.0, 0.1), (0, 0.5, 2.1, 0.9)) == [1, 0]  # a long prompt has less slack
    assert order(1.0, (0, 0.0, 2.0, 0.1), (0, 0.5, 2.1, 0.9), begun=True) == [0, 1]
    assert order(1.0, (1, 0.0, 1.5, 0), (0, 0.5, 9.0, 0)) == [1, 0]  # a lower priority goes first
    assert order(1.0, (0, 0.0, 0.9, 0), (0, 0.5, 9.0, 0)) == [1, 0]  # too late already: after those that can make it
    assert order(25.0, (2, 0.0, never, 0), (1, 24.0, 25.5, 0)) == [0, 1]  # two levels of age


def test_compensators_that_mend_little_for_their_time_go_first() -> None:
    assert drop_order(np.array([4.0, 1.0, 3.0]), np.array([4.0, 2.0, 1.0])).tolist() == [1, 0, 2]


def test_prompts_of_a_queue_go_through_one_after_another() -> None:
    times = first_token_times(np.array([10.0, 20.0, 5.0]), np.array([0.0, 0.0, 100.0]), pace=0.5)
    assert times.tolist() == [5.0, 15.0, 102.5]


def timed(**options: Any) -> SlotScheduler:
    timing = Timing(table=table(), **({"share": 1.0} | options))
    return SlotScheduler(num_slots=SLOTS, buckets=BUCKETS, stall_tokens=16, timing=timing)


def asking(length: int, *, arrival: float = 0.0, tokens: int = 50, **slo: float) -> Request:
    params = SamplingParams(max_tokens=tokens)
    return Request(id="r", prompt=(1,) * length, params=params, slo=Slo(**slo), arrival=arrival)


def test_chunks_beside_answers_follow_the_tightest_gap() -> None:
    scheduler = timed()
    scheduler.submit(asking(5, itl=7.6e-3))
    scheduler.admit(0.0)
    scheduler.next_step(0.0)
    scheduler.submit(asking(400))
    scheduler.admit(0.0)
    step = scheduler.next_step(0.0)  # 1.5 ms for the answer; 4 ms for 64 tokens, 16 for 256
    assert [chunk.bucket for _, chunk in step.chunks] == [64]
    assert step.predicted == pytest.approx(5.5e-3)
    scheduler.timing.drift.factor = 2.0  # type: ignore[union-attr]
    assert [chunk.bucket for _, chunk in scheduler.next_step(0.0).chunks] == [16]


def test_several_prompts_share_an_iteration_while_there_is_time() -> None:
    scheduler = timed()
    scheduler.submit(asking(5, itl=12e-3))
    scheduler.admit(0.0)
    scheduler.next_step(0.0)
    for _ in range(3):
        scheduler.submit(asking(60))
    scheduler.admit(0.0)
    assert [chunk.bucket for _, chunk in scheduler.next_step(0.0).chunks] == [64, 64]


def test_no_more_decode_together_than_the_gap_allows_and_nothing_starves() -> None:
    scheduler = timed(aging=5.0)
    for _ in range(SLOTS):
        scheduler.submit(asking(5, itl=2.1e-3, tokens=10_000))
    assert len(scheduler.admit(0.0)) == 2  # 2 ms for two
    while scheduler.prefilling:
        scheduler.next_step(0.0)
    assert not scheduler.admit(1.0)
    one = next(iter(scheduler.decoding))
    scheduler.remove(one)
    assert len(scheduler.admit(2.0)) == 1
    assert not scheduler.next_step(2.0).chunks  # no chunk fits beside the other, not even without compensators
    chunks = scheduler.next_step(6.0).chunks
    assert [(chunk.bucket, chunk.level) for _, chunk in chunks] == [(16, 1)]


def test_admission_simulates_the_queue() -> None:
    scheduler = timed(share=0.9)
    assert scheduler.retry_after(asking(600), 0.0) == 0  # asks for nothing
    assert scheduler.retry_after(asking(64, ttft=0.1), 0.0) == 0
    assert scheduler.retry_after(asking(64, itl=1e-3), 0.0) > 0  # one sequence takes 1.5 ms
    pace = float(table().at(0, 0)[0, -1] / 256)
    first = asking(600, ttft=600 * pace / 0.9 + 1e-3)
    assert scheduler.retry_after(first, 0.0) == 0
    scheduler.submit(first)
    wait = scheduler.retry_after(asking(600, ttft=first.slo.ttft), 0.0)
    assert wait == pytest.approx(600 * pace - 0.9e-3, rel=1e-6)
    # A short prompt in a hurry would go first, and make the one before it late.
    assert scheduler.retry_after(asking(256, ttft=256 * pace + 0.002), 0.0) == pytest.approx(256 * pace)
    scheduler.submit(asking(600, ttft=1e-6), best_effort=True)
    assert scheduler.slo[scheduler.waiting[-1]] == Slo()
