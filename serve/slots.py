"""The books of the scheduler: which requests hold the slots, and each iteration as the policy decides it."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float

from serve.latency import Drift, LatencyTable
from serve.pages import PagePool, pages_for
from serve.request import UNBOUNDED, Request, Slo
from serve.scheduler import (
    Prompt,
    Running,
    begin_iteration,
    first_token_times,
    next_chunk,
    queue_order,
    step_budget,
    typical_context,
)

_EXPECTED_TOKENS = 256.0
"""Length of an answer, until some have ended."""

_AGING_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of a prompt to prefill: `tokens[start : start + length]` of the slot's prompt, padded to `bucket`.

    `level` is the set of compensators it is run with; 0 is all of them. `first`: none before it was run in this slot.
    """

    slot: int
    start: int
    length: int
    bucket: int
    last: bool
    level: int = 0
    first: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """An iteration: chunks in the order to run, then one token for each slot in `run` [S].

    `predicted` is the table's idea of its seconds, without drift, or 0; `skipped` counts who could decode and waits.
    """

    chunks: list[tuple[Request, Chunk]]
    run: Bool[np.ndarray, " S"]
    predicted: float = 0.0
    skipped: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """What deadlines are judged by: a table, its drift, the share of a budget to use, and seconds that age by a level.

    `refuses`: a request whose limits cannot be kept is refused; else it is served without them.
    """

    table: LatencyTable
    drift: Drift = dataclasses.field(default_factory=Drift)
    share: float = 0.9
    aging: float = _AGING_SECONDS
    refuses: bool = False


class SlotScheduler:
    """Gives slots to waiting requests and cuts their prompts into chunks.

    A request is waiting, then prefilling in a slot, then decoding there. Without `timing`, or while nobody who decodes
    has a limit on the time between tokens, at most `stall_tokens` of prompts (bucket padding included) run between two
    decode steps, so that a long prompt does not hold up the answers being streamed; with nothing decoding, the largest
    bucket's worth is run. With limits and a table, chunks are as large as the tightest limit allows.

    With `pages` sequences get them as they grow. Where there are too few the youngest have to leave: they wait again,
    with what they have generated as part of their prompt.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        buckets: Sequence[int],
        stall_tokens: int,
        timing: Timing | None = None,
        pages: PagePool | None = None,
    ):
        self.num_slots = num_slots
        self.timing = timing
        self.pages = pages
        self.stall_tokens = stall_tokens
        self.buckets = np.array(sorted(buckets))
        self.waiting: collections.deque[Request] = collections.deque()
        self.prefilling: dict[Request, tuple[int, int]] = {}  # slot, tokens done; in order of admission
        self.decoding: dict[Request, int] = {}  # slot
        self.running = Running(
            decoding=np.zeros(num_slots, bool),
            context=np.zeros(num_slots),
            itl=np.full(num_slots, UNBOUNDED),
            tpot=np.full(num_slots, UNBOUNDED),
            first=np.zeros(num_slots),
            generated=np.zeros(num_slots),
        )
        self.slo: dict[Request, Slo] = {}  # what each is held to, of those submitted and not removed
        self.prompt: dict[
            Request, Sequence[int]
        ] = {}  # of the same: what is to be prefilled, tokens generated before too
        self.found: dict[
            Request, tuple[int, int]
        ] = {}  # of those with a slot: tokens in the cache before, uncompensated
        self._answer: dict[Request, list[int]] = {}  # tokens that were seen
        self._first: dict[Request, float] = {}  # when the first of them was
        self.left = np.zeros(num_slots, bool)
        """Slots whose requests have gone since they got them, for who keeps books of its own; never cleared here."""
        self._free = list(range(num_slots))
        self._limit = np.zeros(num_slots)
        self._mean_tokens = _EXPECTED_TOKENS
        if timing is not None:
            chunks, most = timing.table.chunks, timing.table.decodes[-1]
            if chunks[1:].tolist() != self.buckets.tolist() or most < num_slots:
                raise ValueError(
                    f"the latency table has chunks {chunks[1:]} and {most:.0f} sequences at most; the server has "
                    f"buckets {self.buckets} and {num_slots} slots"
                )

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self.prefilling) + len(self.decoding)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.prefilling or self.decoding)

    @property
    def held_tokens(self) -> int:
        """Tokens in the cache, those being computed included."""
        slots = list(self.decoding.values())
        return sum(done for _, done in self.prefilling.values()) + int(self.running.context[slots].sum())

    def fits(self, request: Request) -> bool:
        """Say whether there would be pages for a request if it were alone."""
        return self.pages is None or pages_for(_most_tokens(request)) <= self.pages.total

    def submit(self, request: Request, *, best_effort: bool = False, first: bool = False) -> None:
        """Put a request at the end of the queue, or first; with `best_effort` it is not held to its limits."""
        assert self.fits(request), "who never fits is refused before"
        self.slo[request] = Slo() if best_effort else request.slo
        self.prompt[request], self._answer[request] = request.prompt, []
        (self.waiting.appendleft if first else self.waiting.append)(request)

    def admit(self, now: float) -> list[tuple[Request, int]]:
        """Give free slots to waiting requests, as far as all can decode in time and there are pages; says who got one.

        Every other sequence is left one page to grow, so that a newcomer need not leave at once.
        """
        admitted: list[tuple[Request, int]] = []
        if self._free and self.waiting:
            for request in self._ordered(self.waiting, now)[: len(self._free)]:
                if not self._can_join(request) or not self._begin(request, self._free[0]):
                    break
                self.waiting.remove(request)
                slot = self._free.pop(0)
                self.left[slot] = False
                self.prefilling[request] = (slot, self.found[request][0])
                admitted.append((request, slot))
        return admitted

    def _begin(self, request: Request, slot: int) -> bool:
        """Give a request pages for its prompt and a token more, if there are enough."""
        tokens, found = self.prompt[request], (0, 0)
        if self.pages is not None:
            begun = self.pages.begin(
                slot,
                tokens,
                room=min(len(tokens) + 1, _most_tokens(request)),
                spare=self.num_running,
                # What penalties go by, and what is told of a prompt, is made as the tokens run.
                shared=not request.params.penalized and request.params.prompt_logprobs is None,
                droppable=request.droppable,
            )
            if begun is None:
                return False
            found = begun
        self.found[request] = found
        return True

    def reserve(self, iterations: int = 1) -> list[Request]:
        """See that all who hold a slot have pages for so many decode steps; give those who had to leave for that.

        The youngest leave first, of those of the lowest priority; the oldest always goes on. Those who left wait again:
        their tokens that were not seen yet must be forgotten, as they will be computed again.
        """
        gone: list[Request] = []
        if self.pages is None:
            return gone
        holders = sorted([*self.decoding, *self.prefilling], key=lambda r: (r.priority, r.arrival))
        while holders:
            request = holders[0]
            if request in self.decoding:
                slot = self.decoding[request]
                held = int(self.running.context[slot])
                wanted = held + (iterations if self.running.decoding[slot] else 0)
            else:
                slot, wanted = self.prefilling[request][0], len(self.prompt[request]) + iterations
            if self.pages.reserve(slot, min(wanted, _most_tokens(request))):
                holders.pop(0)
            else:
                gone.append(holders.pop())
                self._leave(gone[-1])
                self.prompt[gone[-1]] = (*gone[-1].prompt, *self._answer[gone[-1]])
                self.waiting.appendleft(gone[-1])
        return gone

    def next_step(self, now: float) -> Step:
        """Decide an iteration: moves finished prompts to decoding, and counts the tokens it asks for."""
        running, ready = self.running, self.running.decoding.copy()
        run, chunks = ready, []
        if self.prefilling:
            run, chunks = self.cut(now)
        skipped = int((ready & ~run).sum())
        predicted = self._predict(run, chunks)
        running.generated[run] += 1
        running.context[run] += 1
        running.decoding[run] = running.generated[run] < self._limit[run]
        return Step(chunks=chunks, run=run, predicted=predicted, skipped=skipped)

    def prompt_tokens_beside(self, run: Bool[np.ndarray, " S"]) -> int:
        """Give how many prompt tokens may run in an iteration that has no limit on its time."""
        return self.stall_tokens if run.any() else int(self.buckets[-1])

    def token_seen(self, request: Request, token: int, now: float) -> None:
        """Say that a request's next token has come; with the first one its `tpot` begins to count."""
        answer, slot = self._answer[request], self.decoding.get(request)
        answer.append(token)
        if len(answer) == 1:
            self._first[request] = now
            if slot is not None:
                self.running.first[slot] = now
        if (
            self.pages is not None
            and slot is not None
            and len(request.prompt) + len(answer) - 1 > self.pages.length(slot)
        ):
            self.pages.written(slot, answer[-2:-1])  # it was chosen when the one before had been written

    def retry_after(self, request: Request, now: float) -> float:
        """Simulate the queue with a newcomer; 0 if it and those before it keep their limits, else how long to wait.

        Answers are taken to go on for their mean length, as they end: a queue is through its prompts one after another.
        """
        if self.timing is None or not request.slo.declared:
            return 0.0
        share, table = self.timing.share, self._table
        alone = float(table.at(min(self.num_running + 1, self.num_slots), self._length(request))[0, 0])
        if alone > share * self._limit_of(request):
            return self._mean_tokens * alone
        without, ahead = self._expected(now), self._expected(now, request)
        late = ahead[request] - share * request.slo.ttft
        delays = [
            ahead[r] - without[r] for r in without if r not in self._first and without[r] <= self.slo[r].ttft < ahead[r]
        ]
        return max(late, 0.0, *delays)

    def remove(self, request: Request) -> bool:
        """Forget a request wherever it is and free its slot; False if it is unknown."""
        for books in (self.slo, self.prompt, self._answer, self._first):
            books.pop(request, None)
        if request in self.waiting:
            self.waiting.remove(request)
            return True
        if (slot := self.decoding.get(request)) is not None:
            self._mean_tokens += 0.05 * (int(self.running.generated[slot]) - self._mean_tokens)
        return self._leave(request)

    def _leave(self, request: Request) -> bool:
        """Take a request's slot and pages back; False if it has none."""
        if request in self.prefilling:
            slot, _ = self.prefilling.pop(request)
        elif request in self.decoding:
            slot = self.decoding.pop(request)
            self.running.decoding[slot] = False
        else:
            return False
        del self.found[request]
        if self.pages is not None:
            self.pages.free(slot)
        self._free.append(slot)
        self._free.sort()
        self.left[slot] = True
        return True

    def _length(self, request: Request) -> int:
        return len(self.prompt.get(request, request.prompt))

    @property
    def holders(self) -> dict[int, Request]:
        """Who holds which slot."""
        return {slot: r for r, (slot, _) in self.prefilling.items()} | {slot: r for r, slot in self.decoding.items()}

    def prompts(self, now: float) -> list[Prompt]:
        """Give the prompts that have slots, in the order they are to go on."""
        return [self.prompt_of(request, now) for request in self._ordered(self.prefilling, now)]

    def chunk_seen(self, request: Request, length: int, level: int, now: float) -> None:
        """Count a chunk that the device chose and ran."""
        slot, start = self.prefilling[request]
        last = start + length == self._length(request)
        self._take(request, Chunk(slot=slot, start=start, length=length, bucket=length, last=last, level=level), now)

    def step_seen(self, slot: int) -> None:
        """Count a token of a decode step that the device chose and ran."""
        running = self.running
        running.generated[slot] += 1
        running.context[slot] += 1
        running.decoding[slot] = running.generated[slot] < self._limit[slot]

    def tightest_gap(self) -> float:
        """Give the seconds between tokens that are allowed to those who hold slots, by the strictest limit."""
        return min(map(self._limit_of, [*self.prefilling, *self.decoding]), default=UNBOUNDED)

    @property
    def _table(self) -> LatencyTable:
        assert self.timing is not None
        return self.timing.table.scaled(self.timing.drift.factor)

    def _pace(self, prompts: Sequence[Request], now: float) -> float:
        """Give the seconds that a token of such prompts takes, half-way through them, beside those who decode now.

        0 without a table.
        """
        if self.timing is None:
            return 0.0
        table, running, sizes = self._table, self.running, self.timing.table.chunks
        run, start = running.decoding, sum(map(self._length, prompts)) / len(prompts) / 2
        seconds = table.step(run.sum(), typical_context(table, running.context, run), start)[0]
        if (budget := step_budget(running, now=now)) < UNBOUNDED:
            column = np.searchsorted(seconds, self.timing.share * budget, side="right") - 1
        else:
            column = np.searchsorted(sizes, self.prompt_tokens_beside(run), side="right") - 1
        column = max(int(column), 1)
        return float(seconds[column] / sizes[column])

    def _limit_of(self, request: Request) -> float:
        """Give the seconds that a request allows between tokens, in one way or the other."""
        slo = self.slo.get(request, request.slo)
        return min(slo.itl, slo.tpot)

    def _ordered(self, requests: Iterable[Request], now: float) -> list[Request]:
        listed = list(requests)
        if len(listed) < 2:
            return listed
        arrival = np.array([r.arrival for r in listed])
        order = queue_order(
            # Whoever was answered before goes on as soon as possible, and has no first token to wait for.
            priority=np.array([r.priority - (r in self._first) for r in listed]),
            arrival=arrival,
            deadline=arrival + [UNBOUNDED if r in self._first else self.slo.get(r, r.slo).ttft for r in listed],
            work=self._pace(listed, now)
            * np.array([self._length(r) - self.prefilling.get(r, (0, 0))[1] for r in listed]),
            begun=np.array([r in self.prefilling for r in listed]),
            now=now,
            aging=_AGING_SECONDS if self.timing is None else self.timing.aging,
        )
        return [listed[i] for i in order]

    def _can_join(self, request: Request) -> bool:
        """Say whether one more can decode within the limits of all who hold a slot."""
        if self.timing is None or not self.num_running:
            return True
        holders = [request, *self.prefilling, *self.decoding]
        limit = min(map(self._limit_of, holders))
        context = (self._length(request) + self.held_tokens) / len(holders)
        return limit == UNBOUNDED or bool(self._table.at(len(holders), context)[0, 0] <= self.timing.share * limit)

    def cut(self, now: float) -> tuple[Bool[np.ndarray, " S"], list[tuple[Request, Chunk]]]:
        """Give who decodes in an iteration, and the chunks beside; prompts that end decode in it as well."""
        running = self.running
        table, share = (None, 1.0) if self.timing is None else (self._table, self.timing.share)
        room = self.prompt_tokens_beside(running.decoding)
        so_far = begin_iteration(running, now=now, share=share, room=room)
        chunks: list[tuple[Request, Chunk]] = []
        for request in self._ordered(self.prefilling, now):
            prompt = self.prompt_of(request, now)
            length, index, level, so_far = next_chunk(
                table, self.buckets, running, so_far, prompt, now=now, share=share
            )
            if index < 0:
                break
            chunk = Chunk(
                slot=prompt.slot, start=prompt.start, length=int(length), bucket=int(self.buckets[index]),
                last=bool(length == prompt.left), level=int(level), first=prompt.start == self.found[request][0],
            )  # fmt: skip
            self._take(request, chunk, now)
            chunks.append((request, chunk))
            if not chunk.last:
                break
        return so_far.run & running.decoding, chunks

    def prompt_of(self, request: Request, now: float) -> Prompt:
        """Give what the policy is told of a prompt that has a slot."""
        slot, done = self.prefilling[request]
        left, deadline = self._length(request) - done, request.arrival + self.slo[request].ttft
        timing = self.timing
        return Prompt(
            slot=slot,
            start=done,
            left=left,
            limit=self._limit_of(request),
            droppable=request.droppable,
            urgent=timing is not None and now < deadline < now + left * self._pace([request], now),
            overdue=timing is not None and now - request.arrival > timing.aging,
        )

    def _take(self, request: Request, chunk: Chunk, now: float) -> None:
        """Count a chunk as run; with its last one a request begins to decode."""
        slot, tokens = chunk.slot, self.prompt[request]
        if self.pages is not None:
            part = tokens[chunk.start : chunk.start + chunk.length]
            self.pages.written(slot, part, uncompensated=chunk.level > 0)
        if not chunk.last:
            self.prefilling[request] = (slot, chunk.start + chunk.length)
            return
        del self.prefilling[request]
        self.decoding[request] = slot
        running = self.running
        running.context[slot], running.first[slot] = len(tokens), self._first.get(request, now)
        running.generated[slot] = 1 + len(tokens) - len(request.prompt)
        running.itl[slot], running.tpot[slot] = self.slo[request].itl, self.slo[request].tpot
        self._limit[slot] = request.params.max_tokens
        running.decoding[slot] = running.generated[slot] < self._limit[slot]

    def _predict(self, run: Bool[np.ndarray, " S"], chunks: Sequence[tuple[Request, Chunk]]) -> float:
        """Give the table's seconds of an iteration, without drift; 0 without a table."""
        if self.timing is None:
            return 0.0
        return iteration_seconds(self.timing.table, self.running.context, run, [chunk for _, chunk in chunks])

    def _expected(self, now: float, *newcomers: Request) -> dict[Request, float]:
        """Give, for all who wait for their first token, the seconds from arrival to it."""
        holding = self._ordered(self.prefilling, now)
        queue = self._ordered([*self.waiting, *newcomers], now)
        everyone = [*holding, *queue]
        if not everyone:
            return {}
        step = float(self._table.at(max(len(self.decoding), 1), 0)[0, 0])
        left = np.minimum(self._limit - self.running.generated, self._mean_tokens)[list(self.decoding.values())]
        ends = np.concatenate([np.zeros(len(self._free)), np.sort(left) * step])
        ends = np.concatenate([ends, np.full(max(len(queue) - len(ends), 0), self._mean_tokens * step)])
        slot_free = np.concatenate([np.zeros(len(holding)), ends[: len(queue)]])
        tokens = np.array([self._length(r) - self.prefilling.get(r, (0, 0))[1] for r in everyone])
        until = first_token_times(tokens, slot_free, pace=self._pace(everyone, now))
        return {r: now - r.arrival + float(t) for r, t in zip(everyone, until, strict=True)}


def _most_tokens(request: Request) -> int:
    """Give how many tokens of a request may be in the cache: the last one is not read again."""
    return len(request.prompt) + max(request.params.max_tokens, 1) - 1


def iteration_seconds(
    table: LatencyTable, context: Float[np.ndarray, " S"], run: Bool[np.ndarray, " S"], chunks: Sequence[Chunk]
) -> float:
    """Give a table's seconds of an iteration in which the slots in `run`, with `context` tokens each, decode.

    Chunks after the first are taken to cost what they cost by themselves.
    """
    if not (chunks or run.any()):
        return 0.0
    count, typical = run.sum(), typical_context(table, context, run)
    if not chunks:
        return float(table.at(count, typical)[0, 0])
    first, *rest = chunks
    columns = np.searchsorted(table.chunks, [chunk.bucket for chunk in chunks])
    seconds = table.step(count, typical, first.start)[first.level, columns[0]]
    return float(seconds) + sum(float(table.at(0, c.start)[c.level, i]) for c, i in zip(rest, columns[1:], strict=True))
