"""Which requests hold the slots and what runs next; pure bookkeeping without a device."""

import collections
import dataclasses
from collections.abc import Sequence

from serve.request import Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of a prompt to prefill: `tokens[start : start + length]` of the slot's prompt, padded to `bucket`."""

    slot: int
    start: int
    length: int
    bucket: int
    last: bool


def choose_chunk(remaining: int, buckets: Sequence[int], *, limit: int) -> tuple[int, int]:
    """Give (tokens, bucket) of the next chunk of a prompt with `remaining` tokens left.

    The whole rest goes into the smallest bucket that holds it when at least half of that bucket is used (or nothing
    smaller exists); else the largest full bucket goes first and the rest follows. `buckets` rise; none above `limit`
    is used.
    """
    allowed = [bucket for bucket in buckets if bucket <= limit] or [buckets[0]]
    full = [bucket for bucket in allowed if bucket <= remaining]
    holding = next((bucket for bucket in allowed if bucket >= remaining), None)
    if holding is not None and (2 * remaining >= holding or not full):
        return remaining, holding
    return full[-1], full[-1]


class SlotScheduler:
    """Gives slots to waiting requests, first come first served, and cuts their prompts into chunks.

    A request is waiting, then prefilling in a slot, then decoding there. Decoding requests run every iteration; of
    prompts, at most `stall_tokens` (bucket padding included) run between two decode steps, so that a long prompt does
    not hold up the answers being streamed. With nothing decoding, the largest buckets are used.
    """

    def __init__(self, *, num_slots: int, buckets: Sequence[int], stall_tokens: int):
        self.num_slots = num_slots
        self._buckets = tuple(sorted(buckets))
        self._stall_tokens = stall_tokens
        self._free = list(range(num_slots))
        self.waiting: collections.deque[Request] = collections.deque()
        self.prefilling: dict[Request, tuple[int, int]] = {}  # slot, tokens done; in order of admission
        self.decoding: dict[Request, int] = {}  # slot

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self.prefilling) + len(self.decoding)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.prefilling or self.decoding)

    def submit(self, request: Request) -> None:
        """Put a request at the end of the queue."""
        self.waiting.append(request)

    def admit(self) -> list[tuple[Request, int]]:
        """Give free slots to waiting requests; returns who got which."""
        admitted = []
        while self._free and self.waiting:
            request, slot = self.waiting.popleft(), self._free.pop(0)
            self.prefilling[request] = (slot, 0)
            admitted.append((request, slot))
        return admitted

    def next_chunks(self) -> list[tuple[Request, Chunk]]:
        """Take the prompt chunks to run before the next decode step; moves finished prompts to decoding."""
        budget = self._stall_tokens if self.decoding else self._buckets[-1]
        chunks: list[tuple[Request, Chunk]] = []
        for request in list(self.prefilling):
            slot, done = self.prefilling[request]
            length, bucket = choose_chunk(len(request.prompt) - done, self._buckets, limit=budget)
            if chunks and bucket > budget:
                break
            budget -= bucket
            last = done + length == len(request.prompt)
            chunks.append((request, Chunk(slot=slot, start=done, length=length, bucket=bucket, last=last)))
            if last:
                del self.prefilling[request]
                self.decoding[request] = slot
            else:
                self.prefilling[request] = (slot, done + length)
                break
        return chunks

    def remove(self, request: Request) -> bool:
        """Forget a request wherever it is and free its slot; False if it is unknown."""
        if request in self.prefilling:
            slot, _ = self.prefilling.pop(request)
        elif request in self.decoding:
            slot = self.decoding.pop(request)
        elif request in self.waiting:
            self.waiting.remove(request)
            return True
        else:
            return False
        self._free.append(slot)
        self._free.sort()
        return True
