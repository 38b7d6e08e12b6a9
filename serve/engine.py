"""The engine: one thread that owns the device state and turns requests into streams of text."""

import collections
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import jax
import numpy as np
from jax.typing import ArrayLike

from serve.detokenize import Detokenizer, LogprobsHolder, StopMatcher
from serve.latency import LatencyTable
from serve.loop import Call, Ring
from serve.metrics import Metrics
from serve.request import FinishReason, Grammar, Output, Request, SamplingParams, Slo, TokenLogprobs
from serve.sampling import Logprobs
from serve.slots import Chunk, SlotScheduler
from spear_jax.models.decoder import Decoder

log = logging.getLogger(__name__)

type Deliver = Callable[[list[tuple[Request, Output]]], None]

_IDLE_WAIT_SECONDS = 1.0

_MAX_IDLE_FAULTS = 3
"""Iterations in a row that may fail with nobody in a slot before the engine gives up."""

_CALL_SECONDS = 0.04
"""How long calls of the loop without prompts may take: tokens come so far apart, and newcomers wait up to twice."""

_PACE_RATE = 0.2


class DeviceRunner(Protocol):
    """What the engine asks of every device; results may still be being computed when a call returns."""

    slots: int
    buckets: tuple[int, ...]
    mask_words: int

    def use_table(self, table: np.ndarray) -> None:
        """Give every slot its pages [S, M], from the next call on."""
        ...

    def logprobs(self, wanted: np.ndarray) -> Logprobs:
        """Judge the last token of every wanted slot [S], as the call before gave it."""
        ...

    def redraw(self, wanted: np.ndarray, mask: np.ndarray) -> ArrayLike:
        """Draw the last tokens of the wanted slots [S] anew, of those in a mask [S, W]; give those of all slots."""
        ...

    def prompt_logprobs(self, tokens: Sequence[int], *, bucket: int) -> Logprobs:
        """Judge the tokens that follow those of the prompt's chunk that ran last."""
        ...

    def replacement(self, model: Decoder) -> Any:
        """Give what `swap` takes, made of a model of the same architecture; ValueError if it is another one."""
        ...

    def swap(self, replacement: Any) -> None:
        """Run the steps to come by another model."""
        ...

    def recover(self, error: Exception) -> None:
        """Make the state of idle slots anew after `error` in a call; raise if the device cannot be used any more."""
        ...


class StepRunner(DeviceRunner, Protocol):
    """A device that is handed each chunk and each decode step."""

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
    ) -> ArrayLike:
        """Run a chunk of a prompt with a set of compensators; with `last`, give the first new token as a scalar.

        It may be the `first` that is run in its slot, and end with `answered` tokens that were generated before.
        """
        ...

    def decode(self, active: np.ndarray) -> ArrayLike:
        """Give the next token of every active slot [S]."""
        ...


class LoopedRunner(DeviceRunner, Protocol):
    """A device that chooses by itself what to do in up to `passes` chunks and decode steps of a call."""

    passes: int

    def stage(self, request: Request, slot: int, *, slo: Slo, cached: int, answer: Sequence[int], since: float) -> None:
        """Put a request into a slot, with `cached` tokens in its pages.

        `answer` was generated before it lost a slot; its first token came `since` seconds after the last call began.
        """
        ...

    def advance(self, call: Call) -> ArrayLike:
        """Start a call; `Ring.of` reads what it did."""
        ...


@dataclasses.dataclass(kw_only=True, eq=False)
class _Live:
    """What the engine knows of a request that it has not finished.

    `request` is the one the scheduler knows: after a fault of the device, the client's with what was generated at the
    end of its prompt.
    """

    request: Request
    client: Request
    detokenizer: Detokenizer
    stops: StopMatcher
    logprobs: LogprobsHolder = dataclasses.field(default_factory=LogprobsHolder)
    best_effort: bool = False
    prompt_logprobs: dict[int, TokenLogprobs] = dataclasses.field(default_factory=dict)  # by position, until told
    grammar: Grammar | None = None
    characters: int = 0  # of all text that is certain, held back or not
    tokens: list[int] = dataclasses.field(default_factory=list)
    strikes: int = 0  # faults that it may have caused, as others may
    generated: int = 0
    cached: int = 0  # prompt tokens that were in the cache when it first got one
    uncompensated: int = 0  # prompt tokens that went without some compensators
    admitted: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    worst_gap: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scored:
    """What is known of tokens of a prompt, the first of which is at `start`."""

    request: Request
    start: int
    tokens: Sequence[int]
    logprobs: Logprobs


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """A device call whose tokens have not been looked at: one for each slot, or one alone; `rows` says whose they are.

    `drawn` is False while tokens of rows are to be drawn anew, of those that a grammar allows, which is known only once
    the tokens before have been looked at. `predicted` is what the iteration that it ends was to take, where the device
    went from the one before straight to it; else 0. It was handed over at `begin`.
    """

    token: ArrayLike
    rows: list[tuple[Request, int]]
    begin: float
    logprobs: Logprobs | None = None
    scored: _Scored | None = None
    drawn: bool = True
    ends: bool = True
    predicted: float = 0.0


@dataclasses.dataclass(kw_only=True)
class _Loop:
    """A call of the loop on the device, of `passes` at most, that has not been looked at, and who has which slot in it.

    Where grammars or prompts that are judged ask for it, what it did is known already, and nothing was told of it yet.
    `alone`: it may have had to wait for the host, so that its time says nothing.
    """

    ring: ArrayLike | Ring
    passes: int
    holders: dict[int, Request]
    logprobs: Logprobs | None
    scored: _Scored | None
    alone: bool
    begin: float


class Engine:
    """Serves requests by continuous batching; all but the public methods and properties is its thread's.

    Each iteration lets waiting requests into free slots, enqueues a few prompt chunks and one decode step of all slots,
    and only then looks at the tokens of the iteration before, so that the device computes while text is made. A request
    that ended in the tokens being looked at has one more token computed that nobody reads.

    A call of the device that fails costs time, not answers: the state is made anew, and those who held a slot are run
    again from their prompt and what was generated. If it fails again for the same ones, each of them goes on as the
    only one of them at a time; who has a slot then, when it fails, ends with an error.

    A `LoopedRunner` is handed calls of several such iterations instead, one ahead; it chooses chunks and ends answers
    by itself, and says afterwards what it did.
    """

    THREAD = "engine"

    def __init__(
        self,
        runner: StepRunner | LoopedRunner,
        scheduler: SlotScheduler,
        *,
        decode: Callable[[Sequence[int]], str],
        deliver: Deliver,
        metrics: Metrics,
        context: int,
    ):
        self._runner = runner
        self._scheduler = scheduler
        self._decode = decode
        self._deliver = deliver
        self._metrics = metrics
        self._cache_tokens = context * runner.slots
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._live: dict[Request, _Live] = {}
        self._in_flight: collections.deque[_Call | _Loop] = collections.deque()
        self._ends = 0  # answers that the device said have ended
        self._pace: dict[int, float] = {}  # seconds of a decode step, by the number of those who decode
        self._outputs: list[tuple[Request, Output]] = []
        self._again: dict[Request, Request] = {}  # what a client's request is called after a fault
        self._suspects: collections.deque[_Live] = collections.deque()  # each to be tried without the others
        self._watched: _Live | None = None  # the one of those that is
        self._prompt_of: Request | None = None  # whose prompt is being handed to the device
        self._idle_faults = 0
        self._stopping = False
        self._beat = self._last_end = self._last_call = self._settled = time.monotonic()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=self.THREAD, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Hand over a request; its outputs come through `deliver`, the last one with a finish reason. Thread-safe.

        If this engine refuses what cannot be done in time, a request with limits gets an empty output once it is taken,
        or one with `retry_after`.
        """
        self._inbox.put(lambda: self._take(request))
        if self.failure is not None:
            self._drain_after_failure()

    def abort(self, request: Request) -> None:
        """Forget a request and free its slot, without another output; unknown ones are fine. Thread-safe."""
        self._inbox.put(lambda: self._forget(request))

    def abort_all(self) -> None:
        """End every request with an error and take no more. Thread-safe."""
        self._inbox.put(self._request_stop)

    def swap(self, model: Decoder) -> None:
        """Go on with another model of the same architecture from the next step on. Thread-safe.

        Raises:
            ValueError: It is another one; says what differs.
        """
        replacement = self._runner.replacement(model)
        self._inbox.put(lambda: self._swap(replacement))

    def stop(self, *, timeout: float) -> bool:
        """End the thread, ending what is unfinished with an error; says whether it ended in `timeout` seconds."""
        self.abort_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def table(self) -> LatencyTable | None:
        """The latency table that limits are judged by, if there is one."""
        return None if self._scheduler.timing is None else self._scheduler.timing.table

    @property
    def refuses(self) -> bool:
        """Whether requests whose limits cannot be kept are refused."""
        return self._scheduler.timing is not None and self._scheduler.timing.refuses

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def seconds_since_beat(self) -> float:
        """Time since the thread last went round its loop; when idle it still does about once a second."""
        return time.monotonic() - self._beat

    def _run(self) -> None:
        try:
            while not self._stopping:
                try:
                    self._iterate()
                except Exception as error:
                    self._recover(error)
            self._fail_all("abort", "the server is shutting down")
        except BaseException as error:
            log.exception("the engine failed; every request gets an error and /health says so")
            self.failure = error
            self._fail_all("error", "the engine failed")
            self._drain_after_failure()

    def _recover(self, error: Exception) -> None:
        """Go on after an iteration that failed.

        Raises:
            Exception: The device is lost, or it fails again and again while nothing runs.
        """
        slots = (*self._scheduler.prefilling, *self._scheduler.decoding)
        holders = [self._live[request] for request in slots if request in self._live]
        log.exception("a step failed while %d requests held a slot", len(holders))
        self._metrics.faults.inc()
        self._idle_faults = 0 if holders else self._idle_faults + 1
        if self._idle_faults > _MAX_IDLE_FAULTS:
            raise error
        accused = self._accused()
        self._flush()
        holders = [live for live in holders if live.request in self._live]
        guilty = self._guilty([live for live in holders if accused in (None, live.request)])
        for live in holders:
            self._scheduler.remove(live.request)
        if guilty is not None:
            self._fail(guilty)
        self._runner.recover(error)
        self._ends = 0
        if self._scheduler.pages is not None:
            self._scheduler.pages.forget()
        for live in reversed([live for live in holders if live is not guilty]):
            self._retry(live)

    def _accused(self) -> Request | None:
        """Say whose prompt it was that the device refused, if that was not what is left of an earlier failure."""
        accused, self._prompt_of = self._prompt_of, None
        try:
            while accused is not None and self._in_flight:
                self._settle(self._in_flight.popleft())
        except Exception:
            accused = None
        self._in_flight.clear()
        return accused

    def _guilty(self, suspects: Sequence[_Live]) -> _Live | None:
        """Say whom a fault is put down to; if to nobody yet, count it against all who may have caused it."""
        if self._watched in suspects:
            return self._watched
        for live in suspects:
            live.strikes += 1
        return suspects[0] if len(suspects) == 1 and suspects[0].strikes > 1 else None

    def _retry(self, live: _Live) -> None:
        """Put a request that lost its slot before all who wait, or aside if it may be what makes steps fail."""
        client = live.client
        del self._live[live.request]
        params = dataclasses.replace(client.params, max_tokens=client.params.max_tokens - live.generated)
        live.request = dataclasses.replace(client, prompt=(*client.prompt, *live.tokens), params=params)
        self._again[client] = live.request
        self._live[live.request] = live
        self._metrics.retries.inc()
        if live.strikes > 1:
            self._suspects.append(live)
        else:
            self._scheduler.submit(live.request, best_effort=live.best_effort, first=True)

    def _try_next_suspect(self) -> None:
        watched = self._watched
        if self._suspects and (watched is None or watched.request not in self._live):
            self._watched = live = self._suspects.popleft()
            self._scheduler.submit(live.request, best_effort=live.best_effort, first=True)

    def _fail(self, live: _Live) -> None:
        """End a request that cannot be served with an error."""
        self._scheduler.remove(live.request)
        self._drop(live)
        self._metrics.finished("error")
        message = "this request cannot be served: the step that it takes part in fails"
        self._deliver([(live.client, Output(finish_reason="error", error=message))])

    def _drop(self, live: _Live) -> None:
        del self._live[live.request]
        self._again.pop(live.client, None)
        if live in self._suspects:
            self._suspects.remove(live)

    def _iterate(self) -> None:
        self._beat, busy = time.monotonic(), time.thread_time()
        self._try_next_suspect()
        self._take_inbox()
        now = time.monotonic()
        if hasattr(self._runner, "advance"):
            enqueued = self._enqueue_loop(cast(LoopedRunner, self._runner), now)
        else:
            enqueued = self._enqueue(cast(StepRunner, self._runner), now)
        while self._in_flight and (not enqueued or len(self._in_flight) > 1):
            self._settle(self._in_flight.popleft())
        if self._in_flight and isinstance(last := self._in_flight[-1], _Call) and not last.drawn:
            self._in_flight[-1] = self._draw(last)
        self._set_gauges()
        self._metrics.host_seconds.inc(time.thread_time() - busy)

    def _take_inbox(self) -> None:
        """Run what other threads asked for; with nothing else to do, wait for it."""
        try:
            if self._scheduler.idle and not self._in_flight:
                self._inbox.get(timeout=_IDLE_WAIT_SECONDS)()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            pass

    def _begin(self, request: Request, now: float) -> None:
        """Note that a request got a slot, and what it found in the cache."""
        live, metrics = self._live[request], self._metrics
        found, uncompensated = self._scheduler.found[request]
        live.uncompensated += uncompensated
        if not live.admitted:
            live.admitted, live.cached = now, found
            metrics.queue_time.observe(now - request.arrival)
            metrics.prefix_queries.inc(len(request.prompt))
            metrics.prefix_hits.inc(found)

    def _preempted(self, request: Request) -> None:
        """Forget what is in flight of a request that lost its slot: it will be computed again."""
        for call in self._in_flight:
            if isinstance(call, _Loop):
                call.holders = {slot: holder for slot, holder in call.holders.items() if holder is not request}
            else:
                call.rows[:] = [row for row in call.rows if row[0] is not request]
        self._live[request].uncompensated = 0
        self._metrics.preemptions.inc()

    def _use_table(self) -> None:
        pages = self._scheduler.pages
        if pages is not None and pages.changed:
            self._runner.use_table(pages.table)
            pages.changed = False

    def _enqueue(self, runner: StepRunner, now: float) -> bool:
        """Hand an iteration to the device; says whether there was anything to do."""
        for request in self._scheduler.reserve():
            self._preempted(request)
        for request, _ in self._scheduler.admit(now):
            self._begin(request, now)
        step = self._scheduler.next_step(now)
        calls: list[_Call] = []
        self._use_table()
        for request, chunk in step.chunks:
            self._prompt_of = None if calls else request
            end = chunk.start + chunk.length
            token = runner.prefill(
                self._scheduler.prompt[request][chunk.start : end],
                slot=chunk.slot,
                start=chunk.start,
                bucket=chunk.bucket,
                last=chunk.last,
                params=request.params,
                level=chunk.level,
                first=chunk.first,
                answered=max(end - max(chunk.start, len(self._live[request].client.prompt)), 0),
            )
            self._count_prompt(self._live[request], chunk.length, chunk.level)
            rows = [(request, chunk.slot)] if chunk.last else []
            # All before a first token is known.
            scored = self._score(request, chunk)
            calls.append(self._draw(_Call(token=token, rows=rows, begin=time.monotonic(), scored=scored, ends=False)))
        self._prompt_of = None
        if rows := [(request, slot) for request, slot in self._scheduler.decoding.items() if step.run[slot]]:
            call = _Call(token=runner.decode(step.run), rows=rows, begin=time.monotonic(), ends=False)
            held = any(request.params.constrained for request, _ in rows)
            calls.append(dataclasses.replace(call, drawn=False) if held else self._draw(call))
        if calls:
            self._metrics.iteration_tokens.observe(len(rows) + sum(chunk.length for _, chunk in step.chunks))
            predicted = step.predicted if self._in_flight else 0.0
            calls[-1] = dataclasses.replace(calls[-1], ends=True, predicted=predicted)
        self._in_flight.extend(calls)
        self._metrics.skipped.inc(step.skipped)
        return bool(calls)

    def _judges(self, request: Request) -> bool:
        """Say whether the tokens of a request's prompt are to be judged, and have not been told."""
        live = self._live.get(request)
        return live is not None and request.params.prompt_logprobs is not None and not live.first_token

    def _score(self, request: Request, chunk: Chunk) -> _Scored | None:
        """Ask for the log-probabilities of the tokens that follow those of a chunk, if its request wants them."""
        if not self._judges(request):
            return None
        start = chunk.start + 1
        tokens = request.prompt[start : start + chunk.length]
        logprobs = self._runner.prompt_logprobs(tokens, bucket=chunk.bucket)
        return _Scored(request=request, start=start, tokens=tokens, logprobs=logprobs)

    def _draw(self, call: _Call) -> _Call:
        """Hold tokens of a call to their grammars, then ask for the log-probabilities that somebody wants of them."""
        redrawn, logprobs = self._redrawn(call.rows), None
        wanted = np.zeros(self._runner.slots, bool)
        wanted[[slot for request, slot in call.rows if request.params.logprobs is not None]] = True
        if wanted.any():
            logprobs = self._runner.logprobs(wanted)
        token = call.token if redrawn is None else redrawn
        return dataclasses.replace(call, token=token, logprobs=logprobs, drawn=True)

    def _redrawn(self, rows: Sequence[tuple[Request, int]]) -> ArrayLike | None:
        """Draw tokens anew of those who are held to grammars, all tokens before being known; gives those of all slots.

        None if nobody is.
        """
        held = np.zeros(self._runner.slots, bool)
        mask = None
        for request, slot in rows:
            if (live := self._live.get(request)) is not None and live.grammar is not None:
                if mask is None:
                    mask = np.full((self._runner.slots, self._runner.mask_words), 2**32 - 1, np.uint32)
                try:
                    live.grammar.fill(mask[slot])
                    held[slot] = True
                except ValueError as error:
                    self._refuse(live, str(error))
        return None if mask is None or not held.any() else self._runner.redraw(held, mask)

    def _enqueue_loop(self, runner: LoopedRunner, now: float) -> bool:
        """Start a call of the loop; says whether there was anything to do."""
        scheduler, timing = self._scheduler, self._scheduler.timing
        passes = self._passes(runner.passes)
        # The tokens of the calls in flight are not counted yet.
        ahead = sum(call.passes for call in self._in_flight if isinstance(call, _Loop))
        for request in scheduler.reserve(ahead + passes):
            self._preempted(request)
        for request, slot in scheduler.admit(now):
            self._begin(request, now)
            self._stage(runner, request, slot)
        holders = scheduler.holders
        if not holders:
            return False
        self._use_table()
        wanted = np.zeros(runner.slots, bool)
        wanted[[slot for slot, request in holders.items() if request.params.logprobs is not None]] = True
        careful = any(request.params.constrained or self._judges(request) for request in holders.values())
        passes = 1 if careful or wanted.any() else min(passes, self._passes(runner.passes))
        call = Call.of(
            slots=runner.slots, drop=scheduler.left.copy(), passes=passes, waiting=bool(scheduler.waiting),
            ends=self._ends, elapsed=now - self._last_call, drift=1.0 if timing is None else timing.drift.factor,
            prompts=scheduler.prompts(now),
        )  # fmt: skip
        self._last_call = now
        scheduler.left[:] = False
        ring, scored = runner.advance(call), None
        if careful:
            ring, scored = self._look_at(ring, holders)
        logprobs = runner.logprobs(wanted) if wanted.any() else None
        alone = not self._in_flight
        self._in_flight.append(
            _Loop(ring=ring, passes=passes, holders=holders, logprobs=logprobs, scored=scored, alone=alone, begin=now)
        )
        return True

    def _look_at(self, packed: ArrayLike, holders: dict[int, Request]) -> tuple[Ring, _Scored | None]:
        """Judge the chunk of a call of one pass, and hold its tokens to grammars, once it is known what it did."""
        while self._in_flight:
            self._settle(self._in_flight.popleft())
        ring, scored = Ring.of(packed), None
        for (place, length, level, _), row in zip(ring.chunks, ring.tokens, strict=True):
            request = holders.get(place) if length else None
            if request in self._live:
                start = self._scheduler.prefilling[request][1]
                bucket = next(size for size in self._runner.buckets if size >= length)
                chunk = Chunk(slot=place, start=start, length=length, bucket=bucket, last=False, level=level)
                scored = self._score(request, chunk)
            rows = [(request, slot) for slot, request in holders.items() if row[slot] >= 0]
            if (redrawn := self._redrawn(rows)) is not None:
                tokens = np.asarray(redrawn).tolist()
                for _, slot in rows:
                    row[slot] = tokens[slot]
        return ring, scored

    def _stage(self, runner: LoopedRunner, request: Request, slot: int) -> None:
        live, scheduler = self._live[request], self._scheduler
        self._prompt_of = request
        runner.stage(
            live.client, slot, slo=scheduler.slo[request], cached=scheduler.found[request][0],
            answer=scheduler.prompt[request][len(live.client.prompt) :], since=live.first_token - self._last_call,
        )  # fmt: skip
        self._prompt_of = None

    def _passes(self, most: int) -> int:
        """Choose how much a call may do: an iteration while there are prompts, else as many steps as may come at once.

        Those take no longer than anybody allows between tokens, and a newcomer must wait for up to two calls.
        """
        scheduler = self._scheduler
        if scheduler.prefilling:
            return min(2, most)
        share = 1.0 if scheduler.timing is None else scheduler.timing.share
        allowed = min(_CALL_SECONDS, share * scheduler.tightest_gap())
        step = self._pace.get(len(scheduler.decoding), _CALL_SECONDS)
        return min(max(int(allowed / step), 1), most)

    def _settle(self, call: _Call | _Loop) -> None:
        """Wait for what a call gives, and pass on the text of its tokens."""
        if isinstance(call, _Loop):
            self._settle_loop(call)
        else:
            self._settle_step(call)
        self._flush()

    def _settle_loop(self, call: _Loop) -> None:
        """Count what a call did."""
        ring = call.ring if isinstance(call.ring, Ring) else Ring.of(call.ring)
        self._note(call.scored)
        logprobs: Logprobs | None = call.logprobs and jax.device_get(call.logprobs)
        now, passes = self._settle_time(call.begin), len(ring.tokens)
        self._ends = ring.ends
        scheduler, metrics = self._scheduler, self._metrics
        if passes and not call.alone:
            seconds = now - self._last_end
            self._compare(predicted=ring.predicted, observed=seconds)
            if not any(length for _, length, _, _ in ring.chunks):
                count = sum(token >= 0 for token in ring.tokens[0])
                pace = self._pace.setdefault(count, seconds / passes)
                self._pace[count] = pace + _PACE_RATE * (seconds / passes - pace)
        self._last_end = now
        for (place, length, level, skipped), row in zip(ring.chunks, ring.tokens, strict=True):
            metrics.skipped.inc(skipped)
            metrics.iteration_tokens.observe(length or sum(token >= 0 for token in row))
            request = call.holders.get(place) if length else None
            if request in self._live:
                scheduler.chunk_seen(request, length, level, now)
                self._count_prompt(self._live[request], length, level)
            for slot, request in call.holders.items():
                live = self._live.get(request)
                if live is not None and (token := row[slot]) >= 0:
                    if not length:
                        scheduler.step_seen(slot)
                    self._give(live, token, slot, logprobs, now)

    def _note(self, scored: _Scored | None) -> None:
        """Keep what is known of tokens of a prompt until its first token comes."""
        if scored is not None and (live := self._live.get(scored.request)) is not None:
            told, count = jax.device_get(scored.logprobs), scored.request.params.prompt_logprobs or 0
            live.prompt_logprobs |= {
                scored.start + i: told.of(i, token=token, count=count, offset=0)
                for i, token in enumerate(scored.tokens)
            }

    def _settle_step(self, call: _Call) -> None:
        tokens = np.asarray(call.token)
        logprobs: Logprobs | None = call.logprobs and jax.device_get(call.logprobs)
        self._note(call.scored)
        now = self._settle_time(call.begin)
        if call.ends:
            self._compare(predicted=call.predicted, observed=now - self._last_end)
            self._last_end = now
        for request, slot in call.rows:
            live = self._live.get(request)
            if live is not None:
                self._give(live, int(tokens[slot] if tokens.ndim else tokens), slot, logprobs, now)

    def _give(self, live: _Live, token: int, slot: int, logprobs: Logprobs | None, now: float) -> None:
        """Give a request its next token."""
        entry = None
        if logprobs is not None and (count := live.client.params.logprobs) is not None:
            entry = logprobs.of(slot, token=token, count=count, offset=live.characters)
        try:
            self._advance(live, token, entry, now)
        except Exception:
            log.exception("request %s fails: its token %d cannot be turned into text", live.client.id, token)
            self._fail(live)

    def _flush(self) -> None:
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            self._deliver(outputs)

    def _count_prompt(self, live: _Live, tokens: int, level: int) -> None:
        """Count a chunk that went through with a set of compensators, 0 being all."""
        self._metrics.prompt_tokens.inc(tokens)
        if level:
            live.uncompensated += tokens
            self._metrics.uncompensated.inc(tokens)

    def _compare(self, *, predicted: float, observed: float) -> None:
        """Let the latency table, if there is one, be corrected by what took so long; 0 is no prediction."""
        if predicted > 0 and self._scheduler.timing is not None:
            drift = self._scheduler.timing.drift
            drift.observe(predicted=predicted, observed=observed)
            self._metrics.drift.set(drift.factor)

    def _settle_time(self, begin: float) -> float:
        """Count the time since the call before ended, or since this one began; gives the time now."""
        now = time.monotonic()
        self._metrics.step_seconds.inc(now - max(begin, self._settled))
        self._settled = now
        return now

    def _advance(self, live: _Live, token: int, entry: TokenLogprobs | None, now: float) -> None:
        request, metrics = live.client, self._metrics
        wanted = int(request.params.max_tokens > 0)
        live.generated += wanted
        live.tokens += [token] * wanted
        metrics.generation_tokens.inc(wanted)
        self._scheduler.token_seen(live.request, token, now)
        if not live.first_token:
            live.first_token = now
            metrics.ttft.observe(now - request.arrival)
            metrics.prefill_time.observe(now - live.admitted)
        else:
            live.worst_gap = max(live.worst_gap, now - live.last_token)
            metrics.itl.observe(now - live.last_token)
        live.last_token = now
        reason: FinishReason | None = None
        text, stopped = "", False
        if not wanted:
            reason = "length"
        elif token in request.params.stop_token_ids:
            reason = "stop"
            if entry is not None and request.params.prompt_logprobs is not None:
                live.logprobs.push(entry)  # who reads prompt and answer as one row counts on an entry for each token
        else:
            if entry is not None:
                live.logprobs.push(entry)
            fresh = live.detokenizer.push(token)
            live.characters += len(fresh)
            text, stopped = live.stops.push(fresh)
            try:
                complete = live.grammar is not None and live.grammar.push(token)
            except ValueError as error:
                self._refuse(live, str(error))
                return
            if stopped or complete:
                reason = "stop"
            elif live.generated == request.params.max_tokens:
                reason = "length"
        if reason is not None:
            text += live.stops.flush()
            self._finish(live, reason)
        output = Output(
            text=text,
            tokens=wanted,
            finish_reason=reason,
            uncompensated=0 if reason is None else live.uncompensated,
            cached=0 if reason is None else live.cached,
            logprobs=live.logprobs.take(text, rest=reason is not None and not stopped),
            prompt_logprobs=tuple(entry for _, entry in sorted(live.prompt_logprobs.items())),
        )
        live.prompt_logprobs.clear()
        self._outputs.append((request, output))

    def _refuse(self, live: _Live, message: str) -> None:
        """End an answer with an error that its request is to blame for."""
        self._scheduler.remove(live.request)
        self._drop(live)
        self._metrics.finished("error")
        self._deliver([(live.client, Output(finish_reason="error", error=message, client_error=True))])

    def _finish(self, live: _Live, reason: FinishReason) -> None:
        request, metrics = live.client, self._metrics
        self._scheduler.remove(live.request)
        self._drop(live)
        metrics.finished(reason)
        metrics.e2e.observe(live.last_token - request.arrival)
        metrics.decode_time.observe(live.last_token - live.first_token)
        metrics.inference_time.observe(live.last_token - live.admitted)
        metrics.request_max_tokens.observe(request.params.max_tokens)
        metrics.request_prompt_tokens.observe(len(request.prompt))
        metrics.request_generation_tokens.observe(live.generated)
        tpot = (live.last_token - live.first_token) / max(live.generated - 1, 1)
        if live.generated > 1:
            metrics.tpot.observe(tpot)
        if request.slo.declared:
            ttft = live.first_token - request.arrival
            metrics.slo(met=request.slo.met(ttft=ttft, worst_gap=live.worst_gap, tpot=tpot))

    def _take(self, request: Request) -> None:
        if self._stopping:
            self._deliver([(request, Output(finish_reason="abort", error="the server is shutting down"))])
            return
        if not self._scheduler.fits(request):
            error = "prompt and answer together have more tokens than the KV cache has room for"
            self._deliver([(request, Output(finish_reason="error", error=error))])
            return
        wait = self._scheduler.retry_after(request, time.monotonic())
        if wait and self.refuses:
            self._metrics.unattainable.inc()
            error = "this request's limits on time cannot be kept now"
            self._deliver([(request, Output(finish_reason="abort", error=error, retry_after=wait))])
            return
        if wait:
            self._metrics.best_effort.inc()
        self._live[request] = _Live(
            request=request,
            client=request,
            detokenizer=Detokenizer(self._decode, prompt=request.prompt),
            stops=StopMatcher(request.params.stop),
            best_effort=wait > 0,
            grammar=request.grammar and request.grammar.copy(),
        )
        self._scheduler.submit(request, best_effort=wait > 0)
        if self.refuses and request.slo.declared:
            self._deliver([(request, Output())])

    def _forget(self, request: Request) -> None:
        live = self._live.get(self._again.get(request, request))
        if live is not None:
            self._scheduler.remove(live.request)
            self._drop(live)
            self._metrics.finished("abort")
            self._set_gauges()

    def _swap(self, replacement: Any) -> None:
        self._runner.swap(replacement)
        if self._scheduler.pages is not None:
            self._scheduler.pages.renew()

    def _request_stop(self) -> None:
        self._stopping = True

    def _fail_all(self, reason: FinishReason, message: str) -> None:
        self._in_flight.clear()
        failed = list(self._live.values())
        for live in failed:
            self._scheduler.remove(live.request)
            self._drop(live)
            self._metrics.finished(reason)
        self._set_gauges()
        self._deliver([(live.client, Output(finish_reason=reason, error=message)) for live in failed])

    def _drain_after_failure(self) -> None:
        """Answer requests that reached the inbox of a failed engine; any thread may do it, as none owns it any more."""
        self._stopping = True
        try:
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            pass

    def _set_gauges(self) -> None:
        scheduler, metrics = self._scheduler, self._metrics
        metrics.running.set(scheduler.num_running)
        metrics.waiting.set(len(scheduler.waiting))
        held = scheduler.held_tokens / self._cache_tokens if scheduler.pages is None else scheduler.pages.usage
        metrics.kv_usage.set(held)
