"""`python -m serve.simulate`: replay a load against a scheduling policy and a latency table, without a device.

The scheduler is the server's own; the engine's order of things, by which an iteration is decided while the one before
runs, is followed to the letter. Time is the table's.
"""

import collections
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from serve.config import SchedulerConfig
from serve.latency import LatencyTable, Profile, hardware, load_profile, roofline
from serve.load import BLOCK_TOKENS, Answer, Arrivals, Job, arrange, console, read_trace, show, summarize
from serve.pages import PagePool, pages_for
from serve.request import Request, SamplingParams, Slo
from serve.router import Arrival, Policy, PrefixCache, Router
from serve.slots import Chunk, SlotScheduler, Step, Timing, iteration_seconds
from serve.startup import default_slo, timing_of
from spear_jax.cli import parse_flags, run_main
from spear_jax.config import ModelConfig, load_yaml

_ROOFLINE = "roofline:"
_PROMPTS_FIRST_TOKENS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulateConfig:
    """Compare scheduling policies on a latency table. A table on stderr, JSON on stdout."""

    table: str
    """File that `python -m spear_jax.serve profile` wrote, or `roofline:ARCHITECTURE.yaml` for one computed (not
    measured) for an H200, `roofline:v5e:ARCHITECTURE.yaml` for another chip, `roofline:h200x4:...` for four."""

    trace: Path
    """Azure LLM inference trace (.csv) or Mooncake trace (.jsonl); with other arrivals, where lengths come from."""

    arrivals: Arrivals = "trace"
    """When requests come: as in the trace, by a Poisson process, or evenly spaced."""

    rates: tuple[float, ...] = ()
    """Requests a second to replay at, one after the other; by default the trace's own."""

    policies: tuple[str, ...] = (
        "slo",
        "chunk-64",
        "chunk-128",
        "chunk-256",
        "chunk-512",
        "prompts-first",
        "answers-first",
    )
    """slo: the server's with limits. chunk-N: N prompt tokens beside a decode step. prompts-first: no decode step while
    a prompt waits. answers-first: no prompt while an answer is being generated."""

    replicas: int = 1
    """Servers that share the work, each with the slots and the table."""

    router: tuple[Policy, ...] = ("prefix",)
    """How it is divided, one after the other. prefix: to who holds most of the prompt and is in time. slack: to who has
    most time left. round-robin: in turn."""

    prefix_cache_tokens: int = 0
    """Tokens of earlier prompts that each replica keeps, by blocks as a Mooncake trace names them; what a prompt has in
    common with them is not computed again."""

    attained: float | None = None
    """Look for the largest rate at which this share of requests is kept within limits, instead of `rates`."""

    requests: int = 2000
    """How many of the trace's requests; 0 for all."""

    slots: int = 64
    """Answers generated at the same time, at most as many as the table has."""

    max_context: int = 8192
    """Longer requests are left out, and counted."""

    kv_tokens: int | None = None
    """Tokens that the KV cache has room for, of all sequences together; without it sequences never run out of it."""

    stall_tokens: int = 64
    """For `slo`, prompt tokens beside answers without limits."""

    seed: int = 0
    """Of Poisson arrivals."""

    scheduler: SchedulerConfig = dataclasses.field(default_factory=lambda: SchedulerConfig(itl_slo_ms=22.0))
    """Limits on time, of every request."""

    output: Path | None = None
    """File for the results as well."""


class PromptsFirst(SlotScheduler):
    """Runs prompts alone as soon as there are any, as early servers with continuous batching did."""

    def cut(self, now: float) -> tuple[Bool[np.ndarray, " S"], list[tuple[Request, Chunk]]]:
        """Let nobody decode beside prompts but those that they belong to."""
        ready = self.running.decoding.copy()
        run, chunks = super().cut(now)
        return run & ~ready, chunks

    def prompt_tokens_beside(self, run: Bool[np.ndarray, " S"]) -> int:
        """Give the tokens of an iteration of prompts."""
        return _PROMPTS_FIRST_TOKENS


class AnswersFirst(SlotScheduler):
    """Runs prompts only when all answers have ended, a batch at a time."""

    def prompt_tokens_beside(self, run: Bool[np.ndarray, " S"]) -> int:
        """Give none beside answers."""
        return 0 if run.any() else _PROMPTS_FIRST_TOKENS


def make_scheduler(
    policy: str,
    *,
    buckets: Sequence[int],
    slots: int,
    stall_tokens: int,
    timing: Timing,
    pages: PagePool | None = None,
) -> SlotScheduler:
    """Give the scheduler of a policy.

    Raises:
        ValueError: There is no such policy.
    """
    options: dict[str, Any] = {"num_slots": slots, "buckets": buckets, "pages": pages}
    kind, _, size = policy.partition("-")
    if policy == "slo":
        return SlotScheduler(stall_tokens=stall_tokens, timing=timing, **options)
    if kind == "chunk" and size.isdigit():
        return SlotScheduler(stall_tokens=int(size), **options)
    if policy in (others := {"prompts-first": PromptsFirst, "answers-first": AnswersFirst}):
        return others[policy](stall_tokens=stall_tokens, **options)
    raise ValueError(f"policy {policy!r} is none of slo, chunk-N, {', '.join(others)}")


@dataclasses.dataclass(kw_only=True)
class _Call:
    """A device call: when it ends, and whose tokens it gives."""

    end: float
    requests: list[Request]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployment:
    """How replicas share the work, and the tokens of earlier prompts that each keeps."""

    router: Policy = "round-robin"
    cached_tokens: int = 0


class _Engine:
    """A replica: a scheduler, the order of things in the engine, and a cache of prefixes."""

    def __init__(self, scheduler: SlotScheduler, truth: LatencyTable, cache: PrefixCache, jobs: Mapping[Request, Job]):
        self._scheduler, self._truth, self._cache, self._jobs = scheduler, truth, cache, jobs
        self._in_flight: collections.deque[_Call] = collections.deque()
        self._now = 0.0
        self.busy = 0.0
        self.coming: collections.deque[Request] = collections.deque()
        self.times: dict[Request, list[float]] = {}
        self.uncompensated: collections.Counter[Request] = collections.Counter()
        self.cached: dict[Request, int] = {}
        self.events: list[tuple[float, bool, Request]] = []
        """When a request's first token came, or (True) it was over; in no order."""

    def run(self, until: float) -> None:
        """Go on until an iteration that ends at `until` or later, or there is nothing to do."""
        while self._now < until and (self.coming or self._in_flight or not self._scheduler.idle):
            self._iterate()

    def _iterate(self) -> None:
        scheduler, coming, in_flight = self._scheduler, self.coming, self._in_flight
        if scheduler.idle and not in_flight:
            self._now = max(self._now, coming[0].arrival)
        while coming and coming[0].arrival <= self._now:
            request = coming.popleft()
            wait = scheduler.retry_after(request, self._now)
            if wait and scheduler.timing is not None and scheduler.timing.refuses:
                self.events.append((self._now, True, request))
            else:
                scheduler.submit(request, best_effort=wait > 0)
        for request in scheduler.reserve():  # who had to leave for want of pages
            self.uncompensated[request] = 0
            for call in in_flight:
                call.requests = [other for other in call.requests if other is not request]
        for request, slot in scheduler.admit(self._now):
            held = min(self._cache.hits(self._jobs[request].blocks) * BLOCK_TOKENS, len(request.prompt) - 1)
            self.cached[request] = held
            if held:
                scheduler.prefilling[request] = (slot, held)
        step = scheduler.next_step(self._now)
        calls = _calls(step, scheduler, self._truth, begin=max(self._now, self.busy))
        for request, chunk in step.chunks:
            self.uncompensated[request] += chunk.length if chunk.level else 0
            if chunk.last:
                self._cache.add(self._jobs[request].blocks)
        in_flight.extend(calls)
        self.busy = calls[-1].end if calls else self.busy
        while in_flight and (not calls or len(in_flight) > 1):
            call = in_flight.popleft()
            self._now = max(self._now, call.end)
            for request in call.requests:
                seen = self.times.setdefault(request, [])
                seen.append(call.end - request.arrival)
                scheduler.token_seen(request, 0, self._now)
                if len(seen) == 1:
                    self.events.append((self._now, False, request))
                if len(seen) == request.params.max_tokens:
                    scheduler.remove(request)
                    self.events.append((self._now, True, request))


def simulate(
    scheduler: SlotScheduler, truth: LatencyTable, jobs: Sequence[Job], *, slo: Slo
) -> tuple[list[Answer], float]:
    """Run jobs, in order of arrival, through a scheduler; give what became of each, and the seconds until the last end.

    `truth` is how long iterations really take; the scheduler may believe in another table.
    """
    return simulate_replicas([scheduler], truth, jobs, slo=slo, deployment=Deployment())


def simulate_replicas(
    schedulers: Sequence[SlotScheduler],
    truth: LatencyTable,
    jobs: Sequence[Job],
    *,
    slo: Slo,
    deployment: Deployment,
    table: LatencyTable | None = None,
) -> tuple[list[Answer], float]:
    """Run jobs through one scheduler a replica; the router believes in `table`, and hears of tokens when they come."""
    requests = {
        Request(
            id=str(i), prompt=range(job.prompt), params=SamplingParams(max_tokens=job.output), slo=slo, arrival=job.at
        ): job
        for i, job in enumerate(jobs)
    }
    blocks = deployment.cached_tokens // BLOCK_TOKENS
    engines = [_Engine(scheduler, truth, PrefixCache(blocks), requests) for scheduler in schedulers]
    router = Router[int](
        deployment.router,
        slots=schedulers[0].num_slots,
        cache_blocks=blocks,
        block_tokens=BLOCK_TOKENS,
        table=table,
    )
    router.update(range(len(engines)))
    for request, job in requests.items():
        for engine in engines:
            engine.run(request.arrival)
            later = []
            for event in engine.events:
                if event[0] > request.arrival:
                    later.append(event)
                elif event[1]:
                    router.ended(event[2])
                else:
                    router.began(event[2])
            engine.events = later
        arrival = Arrival(blocks=job.blocks, tokens=job.prompt, slo=slo)
        chosen = router.rank(arrival)[0]
        router.sent(request, arrival, chosen)
        engines[chosen].coming.append(request)
    for engine in engines:
        engine.run(math.inf)
    times = {request: seen for engine in engines for request, seen in engine.times.items()}
    uncompensated = sum((engine.uncompensated for engine in engines), collections.Counter())
    cached = {request: held for engine in engines for request, held in engine.cached.items()}
    answers = [
        Answer(
            times=(seen := times.get(request, [])),
            tokens=len(seen),
            prompt=job.prompt,
            uncompensated=uncompensated[request],
            cached=cached.get(request, 0),
        )
        for request, job in requests.items()
    ]
    return answers, max(engine.busy for engine in engines)


def _calls(step: Step, scheduler: SlotScheduler, truth: LatencyTable, *, begin: float) -> list[_Call]:
    """Give the device calls of an iteration: each chunk by itself, and the decode step."""
    chunks = [chunk for _, chunk in step.chunks]
    # Contexts have been counted on already by the token that this iteration makes.
    total = iteration_seconds(truth, scheduler.running.context - step.run, step.run, chunks)
    calls = []
    end = begin
    for request, chunk in step.chunks:
        end += iteration_seconds(truth, scheduler.running.context, np.zeros_like(step.run), [chunk])
        calls.append(_Call(end=min(end, begin + total), requests=[request] if chunk.last else []))
    decoding = [request for request, slot in scheduler.decoding.items() if step.run[slot]]
    return [*calls, _Call(end=begin + total, requests=decoding)] if decoding else calls


def compare(config: SimulateConfig) -> dict[str, Any]:
    """Replay a load at every rate with every policy; give a summary of each.

    Raises:
        ValueError, OSError: The trace, the table, a policy or a setting cannot be used.
    """
    config.scheduler.check()
    if config.replicas < 1 or not config.router:
        raise ValueError(f"replicas must be at least 1 and have a router, got {config.replicas}, {config.router}")
    profile, screen = _profile(config), console()
    everything = read_trace(config.trace)
    fitting = [job for job in everything if job.prompt + job.output <= config.max_context]
    if not fitting:
        raise ValueError(f"no request of {config.trace} fits a context of {config.max_context} tokens")
    fitting = fitting[: config.requests or None]
    slo = default_slo(config.scheduler)
    results: dict[str, Any] = {"table": profile.source, "left_out": len(everything) - len(fitting), "runs": []}
    for rate in config.rates or (None,):
        rows = {}
        for name, run in _runs(config, profile).items():
            begin = time.perf_counter()
            if config.attained is None:
                used, (answers, seconds) = rate, run(jobs := _arranged(fitting, config, rate))
            else:
                used, answers, seconds = _largest_rate(config, fitting, run, slo=slo)
                jobs = _arranged(fitting, config, used)
            rows[name] = summarize(answers, seconds=seconds, slo=slo)
            results["runs"].append({"policy": name, "rate": used, "offered": _rate(jobs)} | rows[name])
            took = f"in {time.perf_counter() - begin:.1f} s"
            screen.print(f"{name}: {seconds:.0f} s simulated {took}, {_rate(jobs):.2f} requests/s", style="dim")
        how = f"{len(fitting)} requests, {config.arrivals} arrivals, "
        how += f"{_rate(_arranged(fitting, config, rate)):.2f}/s" if config.attained is None else "at the largest rate"
        screen.print(show(f"{how}; {config.replicas} replicas; table {profile.source}", rows))
    if config.output is not None:
        config.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _pages(config: SimulateConfig) -> PagePool | None:
    if config.kv_tokens is None:
        return None
    if config.kv_tokens < config.max_context:
        raise ValueError(f"kv_tokens {config.kv_tokens} do not hold a context of {config.max_context}")
    table = config.slots, pages_for(config.max_context)
    return PagePool(pages=1 + pages_for(config.kv_tokens), table=table, prefix_caching=False)


type _Run = Callable[[Sequence[Job]], tuple[list[Answer], float]]


def _runs(config: SimulateConfig, profile: Profile) -> dict[str, _Run]:
    """Give a simulation for each policy and router; a run makes its schedulers anew."""
    buckets = profile.table.chunks[1:].astype(int).tolist()

    def run(policy: str, router: Policy) -> _Run:
        def of(jobs: Sequence[Job]) -> tuple[list[Answer], float]:
            schedulers = [
                make_scheduler(
                    policy,
                    buckets=buckets,
                    slots=config.slots,
                    stall_tokens=config.stall_tokens,
                    timing=timing_of(config.scheduler, profile),
                    pages=_pages(config),
                )
                for _ in range(config.replicas)
            ]
            deployment = Deployment(router=router, cached_tokens=config.prefix_cache_tokens)
            slo = default_slo(config.scheduler)
            return simulate_replicas(
                schedulers, profile.table, jobs, slo=slo, deployment=deployment, table=profile.table
            )

        return of

    several = config.replicas > 1
    return {
        f"{policy} {router}" if several else policy: run(policy, router)
        for policy in config.policies
        for router in (config.router if several else config.router[:1])
    }


def _arranged(jobs: Sequence[Job], config: SimulateConfig, rate: float | None) -> list[Job]:
    return arrange(jobs, config.arrivals, rate=rate, seed=config.seed)


def _rate(jobs: Sequence[Job]) -> float:
    return len(jobs) / max(jobs[-1].at, 1e-9)


def _largest_rate(
    config: SimulateConfig, jobs: Sequence[Job], run: _Run, *, slo: Slo
) -> tuple[float, list[Answer], float]:
    """Find the largest rate, to 3%, at which enough is kept; give it, the answers and the seconds there.

    Raises:
        ValueError: Too few are kept at any rate, or enough at all.
    """
    kept: dict[float, tuple[list[Answer], float]] = {}

    def enough(rate: float) -> bool:
        answers, seconds = run(_arranged(jobs, config, rate))
        if sum(answer.keeps(slo) for answer in answers) < (config.attained or 0) * len(answers):
            return False
        kept[rate] = answers, seconds
        return True

    low = high = float(config.replicas)
    while enough(high):
        low, high = high, high * 2
        if high > 1e5:
            raise ValueError(f"{config.attained:.0%} are kept at any rate: give the scheduler limits")
    while low not in kept:
        low, high = low / 2, low
        if low < 1e-3:
            raise ValueError(f"{config.attained:.0%} are not kept at any rate: the limits are too tight")
        enough(low)
    while high > 1.03 * low:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low, *kept[low]


def _profile(config: SimulateConfig) -> Profile:
    if not config.table.startswith(_ROOFLINE):
        return load_profile(Path(config.table))
    *chip, architecture = config.table.removeprefix(_ROOFLINE).split(":", 1)
    return roofline(
        load_yaml(ModelConfig, architecture),
        hardware(*chip),
        decodes=sorted({0, config.slots, *(2**i for i in range(config.slots.bit_length()))}),
        chunks=(0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024),
        contexts=(1, 1024, 4096, 16384),
    )


def main() -> None:
    """Run the command line."""
    run_main(lambda: print(json.dumps(compare(parse_flags(SimulateConfig, prog="python -m serve.simulate")))))


if __name__ == "__main__":
    main()
