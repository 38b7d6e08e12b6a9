"""`python -m serve.bench`: tokens per second and time to first token of a running OpenAI-compatible server."""

import asyncio
import dataclasses
import itertools
import json
import statistics
import time

import httpx
from rich.console import Console
from rich.table import Table

from spear_jax.cli import parse_flags, run_main

_PROMPT = "Write a long story about a lighthouse keeper who finds a map, number {number}. Describe every day in detail."


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Closed-loop load: a stream sends its next request when the last one ended. JSON on stdout, a table on stderr."""

    url: str = "http://127.0.0.1:8000"
    """The server, without /v1."""

    model: str | None = None
    """Model name; by default the first that the server lists."""

    streams: tuple[int, ...] = (1, 8)
    """Numbers of simultaneous streams to measure, one after the other."""

    tokens: int = 128
    """Tokens of each answer; the end of text is ignored."""

    requests: int = 3
    """Requests of each stream; one more is sent first and not counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sample:
    ttft: float
    gaps: list[float]
    tokens: int
    prompt_tokens: int


async def _request(client: httpx.AsyncClient, model: str, number: int, tokens: int) -> _Sample:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": _PROMPT.format(number=number)}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    begin = time.perf_counter()
    times: list[float] = []
    usage: dict[str, int] = {}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise ValueError(f"the server answered {response.status_code}: {(await response.aread()).decode()[:200]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if any(choice["delta"].get("content") for choice in event["choices"]):
                times.append(time.perf_counter())
            usage = event.get("usage") or usage
    if not times:
        raise ValueError("the server streamed no text")
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return _Sample(
        ttft=times[0] - begin,
        gaps=gaps,
        tokens=usage["completion_tokens"],
        prompt_tokens=usage["prompt_tokens"],
    )


async def _measure(config: BenchConfig, streams: int) -> dict[str, float]:
    async with httpx.AsyncClient(base_url=config.url, timeout=600) as client:
        listed = await client.get("/v1/models")
        if listed.status_code != 200:
            raise ValueError(f"{config.url}/v1/models answered {listed.status_code}: {listed.text[:200]}")
        model = config.model or listed.json()["data"][0]["id"]

        async def stream(first: int, count: int) -> list[_Sample]:
            return [await _request(client, model, first + i, config.tokens) for i in range(count)]

        await asyncio.gather(*(stream(i, 1) for i in range(streams)))
        begin = time.perf_counter()
        nested = await asyncio.gather(*(stream(100 * i, config.requests) for i in range(streams)))
        seconds = time.perf_counter() - begin
    samples = [sample for some in nested for sample in some]
    gaps = sorted(gap for sample in samples for gap in sample.gaps)
    return {
        "streams": streams,
        "requests": len(samples),
        "prompt_tokens": statistics.mean(sample.prompt_tokens for sample in samples),
        "tokens_per_second": sum(sample.tokens for sample in samples) / seconds,
        "ttft_ms_p50": 1e3 * statistics.median(sample.ttft for sample in samples),
        "ttft_ms_max": 1e3 * max(sample.ttft for sample in samples),
        "itl_ms_p50": 1e3 * statistics.median(gaps),
        "itl_ms_p99": 1e3 * gaps[int(0.99 * (len(gaps) - 1))],
    }


def bench(config: BenchConfig) -> int:
    """Measure each number of streams and print the figures.

    Raises:
        ValueError: The server cannot be reached or refuses the requests.
    """
    try:
        results = [asyncio.run(_measure(config, streams)) for streams in config.streams]
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"{config.url}: {error or type(error).__name__}") from None
    table = Table("streams", "tokens/s", "TTFT p50 ms", "TTFT max ms", "ITL p50 ms", "ITL p99 ms")
    for r in results:
        figures = (r["tokens_per_second"], r["ttft_ms_p50"], r["ttft_ms_max"], r["itl_ms_p50"], r["itl_ms_p99"])
        table.add_row(f"{r['streams']:.0f}", *(f"{figure:.1f}" for figure in figures))
    Console(stderr=True).print(table)
    print(json.dumps({"config": dataclasses.asdict(config), "results": results}))
    return 0


def main() -> None:
    """Run the benchmark named on the command line."""
    run_main(lambda: bench(parse_flags(BenchConfig, prog="python -m serve.bench")))


if __name__ == "__main__":
    main()
