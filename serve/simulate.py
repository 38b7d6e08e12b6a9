"""`python -m serve.simulate`: replay a load against a scheduling policy and a latency table, without a device.

The scheduler is the server's own; the engine's order of things, by which an iteration is decided while the one before
runs, is followed to the letter. Time is the table's.
"""

import collections
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from serve.config import SchedulerConfig
from serve.latency import H200, LatencyTable, Profile, load_profile, roofline
from serve.load import Answer, Arrivals, Job, arrange, console, read_trace, show, summarize
from serve.pages import PagePool, pages_for
from serve.request import Request, SamplingParams, Slo
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
    measured) for an H200."""

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


def simulate(
    scheduler: SlotScheduler, truth: LatencyTable, jobs: Sequence[Job], *, slo: Slo
) -> tuple[list[Answer], float]:
    """Run jobs, in order of arrival, through a scheduler; give what became of each, and the seconds until the last end.

    `truth` is how long iterations really take; the scheduler may believe in another table.
    """
    requests = [
        Request(
            id=str(i), prompt=range(job.prompt), params=SamplingParams(max_tokens=job.output), slo=slo, arrival=job.at
        )
        for i, job in enumerate(jobs)
    ]
    coming = collections.deque(requests)
    times: dict[Request, list[float]] = {request: [] for request in requests}
    uncompensated: collections.Counter[Request] = collections.Counter()
    in_flight: collections.deque[_Call] = collections.deque()
    now = busy = 0.0
    while coming or in_flight or not scheduler.idle:
        if scheduler.idle and not in_flight:
            now = max(now, coming[0].arrival)
        while coming and coming[0].arrival <= now:
            request = coming.popleft()
            wait = scheduler.retry_after(request, now)
            if not (wait and scheduler.timing is not None and scheduler.timing.refuses):
                scheduler.submit(request, best_effort=wait > 0)
        for request in scheduler.reserve():
            uncompensated[request] = 0
            for call in in_flight:
                call.requests = [other for other in call.requests if other is not request]
        scheduler.admit(now)
        step = scheduler.next_step(now)
        calls = _calls(step, scheduler, truth, begin=max(now, busy))
        for request, chunk in step.chunks:
            uncompensated[request] += chunk.length if chunk.level else 0
        in_flight.extend(calls)
        busy = calls[-1].end if calls else busy
        while in_flight and (not calls or len(in_flight) > 1):
            call = in_flight.popleft()
            now = max(now, call.end)
            for request in call.requests:
                seen = times[request]
                seen.append(call.end - request.arrival)
                scheduler.token_seen(request, 0, now)
                if len(seen) == request.params.max_tokens:
                    scheduler.remove(request)
    answers = [
        Answer(times=seen, tokens=len(seen), prompt=len(request.prompt), uncompensated=uncompensated[request])
        for request, seen in times.items()
    ]
    return answers, busy


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
    profile = _profile(config)
    table, screen = profile.table, console()
    buckets = table.chunks[1:].astype(int).tolist()
    everything = read_trace(config.trace)
    fitting = [job for job in everything if job.prompt + job.output <= config.max_context]
    if not fitting:
        raise ValueError(f"no request of {config.trace} fits a context of {config.max_context} tokens")
    fitting = fitting[: config.requests or None]
    slo = default_slo(config.scheduler)
    results: dict[str, Any] = {"table": profile.source, "left_out": len(everything) - len(fitting), "runs": []}
    for rate in config.rates or (None,):
        jobs = arrange(fitting, config.arrivals, rate=rate, seed=config.seed)
        rows = {}
        for policy in config.policies:
            timing = timing_of(config.scheduler, profile)
            scheduler = make_scheduler(
                policy, buckets=buckets, slots=config.slots, stall_tokens=config.stall_tokens, timing=timing,
                pages=_pages(config),
            )  # fmt: skip
            begin = time.perf_counter()
            answers, seconds = simulate(scheduler, table, jobs, slo=slo)
            rows[policy] = summarize(answers, seconds=seconds, slo=slo)
            results["runs"].append({"policy": policy, "rate": rate} | rows[policy])
            screen.print(f"{policy}: {seconds:.0f} s simulated in {time.perf_counter() - begin:.1f} s", style="dim")
        how = f"{len(jobs)} requests at {len(jobs) / max(jobs[-1].at, 1e-9):.2f} a second, {config.arrivals} arrivals"
        screen.print(show(f"{how}; table {profile.source}", rows))
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


def _profile(config: SimulateConfig) -> Profile:
    if not config.table.startswith(_ROOFLINE):
        return load_profile(Path(config.table))
    return roofline(
        load_yaml(ModelConfig, config.table.removeprefix(_ROOFLINE)),
        H200,
        decodes=sorted({0, config.slots, *(2**i for i in range(config.slots.bit_length()))}),
        chunks=(0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024),
        contexts=(1, 1024, 4096, 16384),
    )


def main() -> None:
    """Run the command line."""
    run_main(lambda: print(json.dumps(compare(parse_flags(SimulateConfig, prog="python -m serve.simulate")))))


if __name__ == "__main__":
    main()
