"""The engine: one thread that owns the device state and turns requests into streams of text."""

import collections
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from jax.typing import ArrayLike

from serve.detokenize import Detokenizer, StopMatcher
from serve.metrics import Metrics
from serve.request import FinishReason, Output, Request, SamplingParams
from serve.scheduler import SlotScheduler

log = logging.getLogger(__name__)

type Deliver = Callable[[list[tuple[Request, Output]]], None]

_IDLE_WAIT_SECONDS = 1.0


class StepRunner(Protocol):
    """The device as the engine sees it; results may still be being computed when a call returns."""

    slots: int

    def prefill(
        self, tokens: Sequence[int], *, slot: int, start: int, bucket: int, last: bool, params: SamplingParams
    ) -> ArrayLike:
        """Run a chunk of a prompt; with `last`, give the first new token as a scalar."""
        ...

    def decode(self, active: np.ndarray) -> ArrayLike:
        """Give the next token of every active slot [S]."""
        ...


@dataclasses.dataclass(kw_only=True, eq=False)
class _Live:
    """What the engine knows of a request that it has not finished."""

    request: Request
    detokenizer: Detokenizer
    stops: StopMatcher
    enqueued: int = 0  # tokens asked of the device
    generated: int = 0  # tokens that came back
    first_token: float = 0.0
    last_token: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Step:
    """A device call whose tokens have not been looked at: `rows` says whose token stands where."""

    token: ArrayLike
    rows: list[tuple[Request, int | tuple[()]]]


class Engine:
    """Serves requests by continuous batching; all but the public methods and properties is its thread's.

    Each iteration lets waiting requests into free slots, enqueues a few prompt chunks and one decode step of all slots,
    and only then looks at the tokens of the iteration before, so that the device computes while text is made. A request
    that ended in the tokens being looked at has one more token computed that nobody reads.
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
        self._in_flight: collections.deque[_Step] = collections.deque()
        self._outputs: list[tuple[Request, Output]] = []
        self._stopping = False
        self._beat = time.monotonic()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Hand over a request; its outputs come through `deliver`, the last one with a finish reason. Thread-safe."""
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
    def seconds_since_beat(self) -> float:
        """Time since the thread last went round its loop; when idle it still does about once a second."""
        return time.monotonic() - self._beat

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._iterate()
            self._fail_all("abort", "the server is shutting down")
        except BaseException as error:
            log.exception("the engine failed; every request gets an error and /health says so")
            self.failure = error
            self._fail_all("error", "the engine failed")
            self._drain_after_failure()

    def _iterate(self) -> None:
        self._beat = time.monotonic()
        self._take_inbox()
        now = time.monotonic()
        for request, _ in self._scheduler.admit():
            self._metrics.queue_time.observe(now - request.arrival)
        enqueued = self._enqueue_prefill()
        enqueued |= self._enqueue_decode()
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

    def _enqueue_prefill(self) -> bool:
        chunks = self._scheduler.next_chunks()
        for request, chunk in chunks:
            token = self._runner.prefill(
                request.prompt[chunk.start : chunk.start + chunk.length],
                slot=chunk.slot,
                start=chunk.start,
                bucket=chunk.bucket,
                last=chunk.last,
                params=request.params,
            )
            self._metrics.prompt_tokens.inc(chunk.length)
            if chunk.last:
                self._live[request].enqueued = 1
                self._in_flight.append(_Step(token=token, rows=[(request, ())]))
        return bool(chunks)

    def _enqueue_decode(self) -> bool:
        active = np.zeros(self._runner.slots, bool)
        rows: list[tuple[Request, int | tuple[()]]] = []
        for request, slot in self._scheduler.decoding.items():
            live = self._live[request]
            if live.enqueued < request.params.max_tokens:
                live.enqueued += 1
                active[slot] = True
                rows.append((request, slot))
        if rows:
            self._in_flight.append(_Step(token=self._runner.decode(active), rows=rows))
        return bool(rows)

    def _settle(self, step: _Step) -> None:
        """Wait for a step's tokens and pass on the text they give."""
        tokens = np.asarray(step.token)
        now = time.monotonic()
        for request, row in step.rows:
            live = self._live.get(request)
            if live is not None:
                self._advance(live, int(tokens[row]), now)
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            self._deliver(outputs)

    def _advance(self, live: _Live, token: int, now: float) -> None:
        request, metrics = live.request, self._metrics
        live.generated += 1
        metrics.generation_tokens.inc()
        if live.generated == 1:
            live.first_token = now
            metrics.ttft.observe(now - request.arrival)
        else:
            metrics.itl.observe(now - live.last_token)
        live.last_token = now
        reason: FinishReason | None = None
        text = ""
        if token in request.params.stop_token_ids:
            reason = "stop"
        else:
            text, stopped = live.stops.push(live.detokenizer.push(token))
            if stopped:
                reason = "stop"
            elif live.generated == request.params.max_tokens:
                reason = "length"
        if reason is not None:
            text += live.stops.flush()
            self._finish(live, reason)
        self._outputs.append((request, Output(text=text, tokens=1, finish_reason=reason)))

    def _finish(self, live: _Live, reason: FinishReason) -> None:
        request, metrics = live.request, self._metrics
        self._scheduler.remove(request)
        del self._live[request]
        metrics.finished(reason)
        metrics.e2e.observe(live.last_token - request.arrival)
        metrics.request_prompt_tokens.observe(len(request.prompt))
        metrics.request_generation_tokens.observe(live.generated)
        if live.generated > 1:
            metrics.tpot.observe((live.last_token - live.first_token) / (live.generated - 1))

    def _take(self, request: Request) -> None:
        if self._stopping:
            self._deliver([(request, Output(finish_reason="abort", error="the server is shutting down"))])
            return
        self._live[request] = _Live(
            request=request,
            detokenizer=Detokenizer(self._decode, prompt=request.prompt),
            stops=StopMatcher(request.params.stop),
        )
        self._scheduler.submit(request)

    def _forget(self, request: Request) -> None:
        if self._live.pop(request, None) is not None:
            self._scheduler.remove(request)
            self._metrics.finished("abort")
            self._set_gauges()

    def _request_stop(self) -> None:
        self._stopping = True

    def _fail_all(self, reason: FinishReason, message: str) -> None:
        self._in_flight.clear()
        failed = list(self._live)
        for request in failed:
            self._scheduler.remove(request)
            self._metrics.finished(reason)
        self._live.clear()
        self._set_gauges()
        self._deliver([(request, Output(finish_reason=reason, error=message)) for request in failed])

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
        held = sum(done for _, done in scheduler.prefilling.values())
        held += sum(len(request.prompt) + self._live[request].enqueued for request in scheduler.decoding)
        metrics.kv_usage.set(held / self._cache_tokens)
