"""The engine: one thread that owns the device state and turns requests into streams of text."""

import collections
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import numpy as np
from jax.typing import ArrayLike

from serve.detokenize import Detokenizer, LogprobsHolder, StopMatcher
from serve.latency import LatencyTable
from serve.metrics import Metrics
from serve.request import FinishReason, Output, Request, SamplingParams, TokenLogprobs
from serve.sampling import Logprobs
from serve.slots import SlotScheduler, Step

log = logging.getLogger(__name__)

type Deliver = Callable[[list[tuple[Request, Output]]], None]

_IDLE_WAIT_SECONDS = 1.0

_MAX_IDLE_FAULTS = 3
"""Iterations in a row that may fail with nobody in a slot before the engine gives up."""


class StepRunner(Protocol):
    """The device as the engine sees it; results may still be being computed when a call returns."""

    slots: int

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

    def use_table(self, table: np.ndarray) -> None:
        """Give every slot its pages [S, M], from the next call on."""
        ...

    def decode(self, active: np.ndarray) -> ArrayLike:
        """Give the next token of every active slot [S]."""
        ...

    def logprobs(self, wanted: np.ndarray) -> Logprobs:
        """Judge the last token of every wanted slot [S], as the call before gave it."""
        ...

    def recover(self, error: Exception) -> None:
        """Make the state of idle slots anew after `error` in a call; raise if the device cannot be used any more."""
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
class _Call:
    """A device call whose tokens have not been looked at: one for each slot, or one alone; `rows` says whose they are.

    `predicted` is what the iteration that it ends was to take, where the device went from the one before straight to
    it; else 0.
    """

    token: ArrayLike
    rows: list[tuple[Request, int]]
    logprobs: Logprobs | None = None
    ends: bool = True
    predicted: float = 0.0


class Engine:
    """Serves requests by continuous batching; all but the public methods and properties is its thread's.

    Each iteration lets waiting requests into free slots, enqueues a few prompt chunks and one decode step of all slots,
    and only then looks at the tokens of the iteration before, so that the device computes while text is made. A request
    that ended in the tokens being looked at has one more token computed that nobody reads.

    A call of the device that fails costs time, not answers: the state is made anew, and those who held a slot are run
    again from their prompt and what was generated. If it fails again for the same ones, each of them goes on as the
    only one of them at a time; who has a slot then, when it fails, ends with an error.
    """

    def __init__(
        self,
        runner: StepRunner,
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
        self._in_flight: collections.deque[_Call] = collections.deque()
        self._outputs: list[tuple[Request, Output]] = []
        self._again: dict[Request, Request] = {}  # what a client's request is called after a fault
        self._suspects: collections.deque[_Live] = collections.deque()  # each to be tried without the others
        self._watched: _Live | None = None  # the one of those that is
        self._prompt_of: Request | None = None  # whose prompt is being handed to the device
        self._idle_faults = 0
        self._stopping = False
        self._beat = self._last_end = time.monotonic()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

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
        self._beat = time.monotonic()
        self._try_next_suspect()
        self._take_inbox()
        now = time.monotonic()
        for request in self._scheduler.reserve():
            self._preempted(request)
        for request, _ in self._scheduler.admit(now):
            self._begin(request, now)
        enqueued = self._enqueue(self._scheduler.next_step(now))
        while self._in_flight and (not enqueued or len(self._in_flight) > 1):
            self._settle(self._in_flight.popleft())
        self._set_gauges()

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
            call.rows[:] = [row for row in call.rows if row[0] is not request]
        self._live[request].uncompensated = 0
        self._metrics.preemptions.inc()

    def _enqueue(self, step: Step) -> bool:
        """Hand an iteration to the device; says whether there was anything to do."""
        calls: list[_Call] = []
        pages = self._scheduler.pages
        if pages is not None and pages.changed:
            self._runner.use_table(pages.table)
            pages.changed = False
        for request, chunk in step.chunks:
            self._prompt_of = None if calls else request
            end = chunk.start + chunk.length
            token = self._runner.prefill(
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
            self._metrics.prompt_tokens.inc(chunk.length)
            if chunk.level:
                self._live[request].uncompensated += chunk.length
                self._metrics.uncompensated.inc(chunk.length)
            calls.append(self._call(token, [(request, chunk.slot)] if chunk.last else []))
        self._prompt_of = None
        if rows := [(request, slot) for request, slot in self._scheduler.decoding.items() if step.run[slot]]:
            calls.append(self._call(self._runner.decode(step.run), rows))
        if calls:
            self._metrics.iteration_tokens.observe(len(rows) + sum(chunk.length for _, chunk in step.chunks))
            predicted = step.predicted if self._in_flight else 0.0
            calls[-1] = dataclasses.replace(calls[-1], ends=True, predicted=predicted)
        self._in_flight.extend(calls)
        self._metrics.skipped.inc(step.skipped)
        return bool(calls)

    def _call(self, token: ArrayLike, rows: list[tuple[Request, int]]) -> _Call:
        """Note what was just handed to the device, and ask for the log-probabilities that somebody wants of it."""
        wanted = np.zeros(self._runner.slots, bool)
        wanted[[slot for request, slot in rows if request.params.logprobs is not None]] = True
        logprobs = self._runner.logprobs(wanted) if wanted.any() else None
        return _Call(token=token, rows=rows, logprobs=logprobs, ends=False)

    def _settle(self, call: _Call) -> None:
        """Wait for a call's tokens and pass on the text they give."""
        tokens = np.asarray(call.token)
        logprobs: Logprobs | None = call.logprobs and jax.device_get(call.logprobs)
        now = time.monotonic()
        if call.ends:
            if call.predicted and self._scheduler.timing is not None:
                drift = self._scheduler.timing.drift
                drift.observe(predicted=call.predicted, observed=now - self._last_end)
                self._metrics.drift.set(drift.factor)
            self._last_end = now
        for request, slot in call.rows:
            live = self._live.get(request)
            if live is not None:
                token = int(tokens[slot] if tokens.ndim else tokens)
                entry = None
                if logprobs is not None and (count := request.params.logprobs) is not None:
                    entry = logprobs.of(slot, token=token, count=count, offset=live.characters)
                try:
                    self._advance(live, token, entry, now)
                except Exception:
                    log.exception("request %s fails: its token %d cannot be turned into text", live.client.id, token)
                    self._fail(live)
        self._flush()

    def _flush(self) -> None:
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            self._deliver(outputs)

    def _advance(self, live: _Live, token: int, entry: TokenLogprobs | None, now: float) -> None:
        request, metrics = live.client, self._metrics
        live.generated += 1
        live.tokens.append(token)
        metrics.generation_tokens.inc()
        self._scheduler.token_seen(live.request, token, now)
        if live.generated == 1:
            live.first_token = now
            metrics.ttft.observe(now - request.arrival)
            metrics.prefill_time.observe(now - live.admitted)
        else:
            live.worst_gap = max(live.worst_gap, now - live.last_token)
            metrics.itl.observe(now - live.last_token)
        live.last_token = now
        reason: FinishReason | None = None
        text, stopped = "", False
        if token in request.params.stop_token_ids:
            reason = "stop"
        else:
            if entry is not None:
                live.logprobs.push(entry)
            fresh = live.detokenizer.push(token)
            live.characters += len(fresh)
            text, stopped = live.stops.push(fresh)
            if stopped:
                reason = "stop"
            elif live.generated == request.params.max_tokens:
                reason = "length"
        if reason is not None:
            text += live.stops.flush()
            self._finish(live, reason)
        output = Output(
            text=text,
            tokens=1,
            finish_reason=reason,
            uncompensated=0 if reason is None else live.uncompensated,
            cached=0 if reason is None else live.cached,
            logprobs=live.logprobs.take(text, rest=reason is not None and not stopped),
        )
        self._outputs.append((request, output))

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
