"""Slots are given in order, prompts are cut into chunks, and everything comes back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.request import Admission, BadParameterError, QueueFullError, Request, SamplingParams
from serve.scheduler import SlotScheduler, choose_chunk

BUCKETS = (16, 64, 256)


def request(length: int) -> Request:
    return Request(id="r", prompt=(1,) * length, params=SamplingParams(max_tokens=1))


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
    assert choose_chunk(remaining, BUCKETS, limit=limit) == expected


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
        scheduler.admit()
        held = [slot for slot, _ in scheduler.prefilling.values()] + list(scheduler.decoding.values())
        assert len(set(held)) == len(held) <= slots
        decoding = bool(scheduler.decoding)
        chunks = scheduler.next_chunks()
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
    waiting, cutting, decoding = request(5), request(600), request(5)
    for r in (decoding, cutting, waiting):
        scheduler.submit(r)
    scheduler.admit()
    scheduler.next_chunks()
    scheduler.next_chunks()
    assert list(scheduler.decoding) == [decoding]
    assert list(scheduler.prefilling) == [cutting]
    assert all(scheduler.remove(r) for r in (waiting, cutting, decoding))
    assert scheduler.idle
    assert not scheduler.remove(waiting)
    for r in (request(1), request(1)):
        scheduler.submit(r)
    assert len(scheduler.admit()) == 2


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
