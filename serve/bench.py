"""`python -m spear_jax.serve bench`: offer a load to a server, or to an engine in this process, and measure answers."""

import asyncio
import dataclasses
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from serve.config import ServeConfig
from serve.load import Answer, Job, arrange, console, read_trace, show, summarize
from serve.request import UNBOUNDED, Admission, QueueFullError, Request, SamplingParams, Slo, UnattainableError
from serve.schema import TPOT_KEY, TTFT_KEY
from spear_jax.cli import parse_flags, run_main

_IDS = (100, 4000)
"""Prompts are drawn from these token ids, which the vocabularies of servers have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Offer a load, and measure what becomes of it.

    That is time to first token (TTFT), gaps (ITL), their mean (TPOT), whole answers (E2E), throughput and goodput; of
    an engine in this process also the share of the time that steps took, and what its thread did for them. A table and
    progress go to stderr, JSON to stdout. Prompts are random tokens, answers greedy and without an end of text. A
    server's gaps are those of events with text, which may hold several tokens.
    """

    url: str | None = None
    """An OpenAI-compatible server, without /v1; by default an engine in this process, with the settings in `serve`."""

    model: str | None = None
    """Model name at the server; by default the first that it lists."""

    load: Literal["closed", "poisson", "fixed", "trace"] = "closed"
    """closed: streams that send their next request when the last one ended. The others send at set times: drawn by a
    Poisson process, evenly spaced, or those of the trace."""

    streams: tuple[int, ...] = (1, 8)
    """closed: numbers of simultaneous streams, one after the other."""

    rates: tuple[float, ...] = ()
    """Not closed: requests a second, one after the other; a trace's own by default."""

    requests: int = 24
    """Requests of each run; one a stream is sent first and not counted. At least three a stream if closed."""

    trace: Path | None = None
    """Azure LLM inference trace (.csv) or Mooncake trace (.jsonl), where lengths are to come from."""

    max_tokens: int | None = None
    """With a trace, leave out requests of more tokens, prompt and answer together."""

    prompt_tokens: int = 48
    """Without a trace, tokens of each prompt."""

    tokens: int = 128
    """Without a trace, tokens of each answer."""

    ttft_slo_ms: float | None = None
    """Limit that is sent with each request and that answers are judged by."""

    tpot_slo_ms: float | None = None
    """The same for the mean gap."""

    itl_slo_ms: float | None = None
    """Largest gap by which answers are judged; a request cannot ask for it."""

    seed: int = 0
    """Of prompts and of Poisson arrivals."""

    serve: ServeConfig = dataclasses.field(default_factory=ServeConfig)
    """Settings of an engine in this process."""

    def check(self) -> None:
        """Refuse values that make no sense.

        Raises:
            ValueError: Names the setting and its value.
        """
        for name in ("requests", "prompt_tokens", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.streams, default=0) < 1:
            raise ValueError(f"streams must be positive numbers, got {self.streams}")
        if self.rates and min(self.rates) <= 0:
            raise ValueError(f"rates must be positive, got {self.rates}")
        if self.load == "trace" and self.trace is None:
            raise ValueError("load trace needs a trace")
        self.serve.check()


@dataclasses.dataclass(frozen=True)
class Send:
    """Sends a request and measures its answer; `spent` gives seconds of (steps, host) so far, where they are known."""

    call: Callable[[Job, Sequence[int]], Awaitable[Answer]]
    spent: Callable[[], tuple[float, float]] | None = None


@asynccontextmanager
async def _server(config: BenchConfig) -> AsyncIterator[Send]:
    """Send requests to a server."""
    assert config.url is not None
    limits = {TTFT_KEY: config.ttft_slo_ms, TPOT_KEY: config.tpot_slo_ms}
    headers = {key: str(limit) for key, limit in limits.items() if limit is not None}
    pool = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=config.url, timeout=600, headers=headers, limits=pool) as client:
        listed = await client.get("/v1/models")
        if listed.status_code != 200:
            raise ValueError(f"{config.url}/v1/models answered {listed.status_code}: {listed.text[:200]}")
        model = config.model or listed.json()["data"][0]["id"]

        async def send(job: Job, prompt: Sequence[int]) -> Answer:
            body = {
                "model": model,
                "prompt": list(prompt),
                "max_tokens": job.output,
                "temperature": 0,
                "stream": True,
                "ignore_eos": True,
                "stream_options": {"include_usage": True},
            }
            begin, times = time.perf_counter(), []
            usage: dict[str, Any] = {}
            async with client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code == 503:
                    return Answer(times=())
                if response.status_code != 200:
                    reason = (await response.aread()).decode()[:200]
                    raise ValueError(f"the server answered {response.status_code}: {reason}")
                async for line in response.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise ValueError(f"the server ended an answer: {event['error']}")
                    if any(choice.get("text") for choice in event["choices"]):
                        times.append(time.perf_counter() - begin)
                    usage = event.get("usage") or usage
            if not times:
                raise ValueError("the server streamed no text")
            dropped = (usage.get("prompt_tokens_details") or {}).get("uncompensated_tokens", 0)
            tokens = usage.get("completion_tokens", len(times))
            return Answer(times=times, tokens=tokens, prompt=len(prompt), uncompensated=dropped)

        yield Send(send)


@asynccontextmanager
async def _engine(config: BenchConfig) -> AsyncIterator[Send]:
    """Give requests to an engine in this process, past HTTP."""
    from serve.gateway import Gateway
    from serve.startup import default_slo, start_engine

    gateway = Gateway(Admission(config.serve.max_slots + config.serve.max_num_queued_reqs))
    gateway.attach(asyncio.get_running_loop())
    engine = await asyncio.to_thread(start_engine, config.serve, gateway, console())
    assert gateway.model is not None
    vocabulary, slo = gateway.model.vocab_size, default_slo(config.serve.scheduler)
    if config.ttft_slo_ms is not None:
        slo = dataclasses.replace(slo, ttft=config.ttft_slo_ms / 1e3)
    if config.tpot_slo_ms is not None:
        slo = dataclasses.replace(slo, tpot=config.tpot_slo_ms / 1e3, itl=UNBOUNDED)

    async def send(job: Job, prompt: Sequence[int]) -> Answer:
        begin, times = time.perf_counter(), []
        try:
            ticket = gateway.admit(1)
        except QueueFullError:
            return Answer(times=())
        dropped = 0
        try:
            params = SamplingParams(max_tokens=job.output, temperature=0.0)
            known = [token % vocabulary for token in prompt]
            ticket.submit([Request(id=ticket.id, prompt=known, params=params, slo=slo)])
            await ticket.taken()
            async for _, output in ticket.outputs():
                if output.error is not None:
                    raise ValueError(f"the engine ended an answer: {output.error}")
                times += [time.perf_counter() - begin] * output.tokens
                dropped += output.uncompensated
        except UnattainableError:
            return Answer(times=())
        finally:
            ticket.close()
        return Answer(times=times, tokens=len(times), prompt=len(prompt), uncompensated=dropped)

    metrics = gateway.metrics
    assert metrics is not None
    try:
        yield Send(send, lambda: (metrics.read("step_seconds_total"), metrics.read("engine_host_seconds_total")))
    finally:
        engine.stop(timeout=60)


async def _measure(config: BenchConfig) -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(config.seed)
    lengths = _lengths(config)
    slo = Slo.of_milliseconds(ttft=config.ttft_slo_ms, itl=config.itl_slo_ms, tpot=config.tpot_slo_ms)
    results: dict[str, dict[str, Any]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    screen = console()
    async with (_engine if config.url is None else _server)(config) as plain:
        with Progress(*columns, TimeRemainingColumn(), console=screen, disable=not screen.is_terminal) as progress:

            async def send(job: Job) -> Answer:
                answer = await plain.call(job, rng.integers(*_IDS, job.prompt).tolist())
                progress.advance(task)
                return answer

            for name, run in _runs(config, lengths).items():
                task = progress.add_task(name, total=len(run.jobs) + run.streams)
                await asyncio.gather(*(send(job) for job in run.warm_up))
                begin, before = time.perf_counter(), (0.0, 0.0) if plain.spent is None else plain.spent()
                answers = await (_closed(run, send) if config.load == "closed" else _open(run, send))
                seconds = time.perf_counter() - begin
                results[name] = summarize(answers, seconds=seconds, slo=slo)
                if plain.spent is not None:
                    steps, host = (now - then for now, then in zip(plain.spent(), before, strict=True))
                    tokens = sum(answer.tokens for answer in answers)
                    results[name] |= {
                        "step_share": steps / seconds, "host_ms_per_token": 1e3 * host / tokens,
                        "host_share": host / steps,
                    }  # fmt: skip
                    screen.print(
                        f"{name}: steps took {steps / seconds:.1%} of the time; the engine's thread had a processor "
                        f"for {1e3 * host / tokens:.2f} ms a token, {host / steps:.1%} of the steps",
                        style="dim",
                    )
    return results


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """One measurement: what is sent first and not counted, and what is; `streams` at once where closed."""

    warm_up: list[Job]
    jobs: list[Job]
    streams: int


def _lengths(config: BenchConfig) -> list[Job]:
    if config.trace is None:
        return [Job(at=0.0, prompt=config.prompt_tokens, output=config.tokens)]
    jobs = [job for job in read_trace(config.trace) if job.prompt + job.output <= (config.max_tokens or 10**9)]
    if not jobs:
        raise ValueError(f"no request of {config.trace} has {config.max_tokens} tokens or fewer")
    return jobs


def _runs(config: BenchConfig, lengths: list[Job]) -> dict[str, _Run]:
    """Lay the runs out, by their names."""

    def take(count: int) -> list[Job]:
        repeated = itertools.chain(lengths, itertools.cycle(lengths)) if config.load != "trace" else lengths
        return list(itertools.islice(repeated, count))

    if config.load == "closed":
        counts = {streams: -(-max(config.requests, 3 * streams) // streams) * streams for streams in config.streams}
        return {
            f"{streams} streams": _Run(warm_up=take(streams), jobs=take(count), streams=streams)
            for streams, count in counts.items()
        }
    if config.load != "trace" and not config.rates:
        raise ValueError(f"{config.load} arrivals need rates, in requests a second")
    runs = {}
    for rate in config.rates or (None,):
        jobs = arrange(take(config.requests), config.load, rate=rate, seed=config.seed)
        runs[f"{config.load} {'as it is' if rate is None else f'{rate:g}/s'}"] = _Run(
            warm_up=jobs[:1], jobs=jobs, streams=1
        )
    return runs


async def _closed(run: _Run, send: Callable[[Job], Awaitable[Answer]]) -> list[Answer]:
    async def stream(first: int) -> list[Answer]:
        return [await send(job) for job in run.jobs[first :: run.streams]]

    nested = await asyncio.gather(*(stream(i) for i in range(run.streams)))
    return [answer for some in nested for answer in some]


async def _open(run: _Run, send: Callable[[Job], Awaitable[Answer]]) -> list[Answer]:
    begin = time.perf_counter()

    async def later(job: Job) -> Answer:
        await asyncio.sleep(max(begin + job.at - time.perf_counter(), 0))
        return await send(job)

    return list(await asyncio.gather(*map(later, run.jobs)))


def bench(config: BenchConfig) -> int:
    """Measure every run and print the figures.

    Raises:
        ValueError, OSError: The server cannot be reached or refuses the requests, or a setting cannot be used.
    """
    config.check()
    try:
        results = asyncio.run(_measure(config))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"{config.url}: {error or type(error).__name__}") from None
    console().print(show(config.url or "an engine in this process", results))
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    print(json.dumps({"config": settings, "results": [{"name": name} | row for name, row in results.items()]}))
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the load named on the command line."""
    run_main(lambda: bench(parse_flags(BenchConfig, prog="python -m spear_jax.serve bench", args=arguments)))


if __name__ == "__main__":
    main()
