"""Work to offer a server: when requests come and how long they are, from traces or drawn; and what became of them."""

import csv
import dataclasses
import datetime
import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from serve.request import Slo

BLOCK_TOKENS = 512
"""Tokens of a block of Mooncake's traces."""

type Arrivals = Literal["trace", "poisson", "fixed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A request to come `at` so many seconds from the start, of `prompt` tokens, to be answered with `output`.

    `blocks` names the prompt's pieces of `BLOCK_TOKENS`, where a trace does: prompts that begin alike begin with the
    same names.
    """

    at: float
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()


def read_trace(path: Path) -> list[Job]:
    """Read an Azure LLM inference trace (`.csv`) or a Mooncake trace (`.jsonl`), in order of arrival from 0.

    Lines that ask for no tokens are left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is neither, or a line cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"trace {path} does not exist")
    try:
        with path.open(encoding="utf-8") as lines:
            read = _azure(lines) if path.suffix == ".csv" else _mooncake(lines)
    except (KeyError, TypeError, ValueError) as error:
        wanted = "an Azure (.csv) or a Mooncake (.jsonl) trace"
        raise ValueError(f"{path} is not {wanted}: {type(error).__name__} {error}") from None
    jobs = sorted((job for job in read if job.prompt > 0 and job.output > 0), key=lambda job: job.at)
    if not jobs:
        raise ValueError(f"{path} holds no requests")
    return [dataclasses.replace(job, at=job.at - jobs[0].at) for job in jobs]


def _azure(lines: Iterable[str]) -> list[Job]:
    return [
        Job(
            at=datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp(),
            prompt=int(row["ContextTokens"]),
            output=int(row["GeneratedTokens"]),
        )
        for row in csv.DictReader(lines)
    ]


def _mooncake(lines: Iterable[str]) -> list[Job]:
    rows = (json.loads(line) for line in lines if line.strip())
    return [
        Job(
            at=row["timestamp"] / 1e3,
            prompt=int(row["input_length"]),
            output=int(row["output_length"]),
            blocks=tuple(row.get("hash_ids", ())),
        )
        for row in rows
    ]


def arrange(jobs: Sequence[Job], arrivals: Arrivals, *, rate: float | None, seed: int) -> list[Job]:
    """Give jobs of the same lengths, in the same order, that arrive otherwise: `rate` is in requests a second.

    `trace` keeps the times, stretched to the rate where one is given; `poisson` draws them; `fixed` spaces them evenly.

    Raises:
        ValueError: Poisson or evenly spaced arrivals without a rate.
    """
    if arrivals == "trace":
        stretch = 1.0 if rate is None else len(jobs) / max(jobs[-1].at, 1e-9) / rate
        return [dataclasses.replace(job, at=job.at * stretch) for job in jobs]
    if rate is None:
        raise ValueError(f"{arrivals} arrivals need a rate, in requests a second")
    gaps = np.full(len(jobs), 1 / rate)
    if arrivals == "poisson":
        gaps = np.random.default_rng(seed).exponential(1 / rate, len(jobs))
    times = np.cumsum(gaps) - gaps[0]
    return [dataclasses.replace(job, at=float(at)) for job, at in zip(jobs, times, strict=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of a request: seconds from its start to each token, or to each piece of text of several tokens.

    `times` is empty where it was refused; `tokens` and `prompt` count tokens, `cached` those of the prompt that were in
    the cache already.
    """

    times: Sequence[float]
    tokens: int = 0
    prompt: int = 0
    uncompensated: int = 0
    cached: int = 0

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [later - earlier for earlier, later in itertools.pairwise(self.times)]

    @property
    def tpot(self) -> float:
        """Mean seconds between tokens; 0 with a single one."""
        return (self.times[-1] - self.times[0]) / max(self.tokens - 1, 1)

    def keeps(self, slo: Slo) -> bool:
        """Say whether it was answered within limits."""
        return bool(self.times) and slo.met(ttft=self.times[0], worst_gap=max(self.gaps, default=0.0), tpot=self.tpot)


def summarize(answers: Sequence[Answer], *, seconds: float, slo: Slo) -> dict[str, Any]:
    """Give percentiles in milliseconds, tokens and requests a second, and what of it kept its limits.

    `attained` is the share of requests offered that did; `goodput` those a second.
    """
    done = [answer for answer in answers if answer.times]
    if not done:
        raise ValueError(f"none of {len(answers)} requests was answered")
    kept = sum(answer.keeps(slo) for answer in done)
    several = [answer for answer in done if answer.tokens > 1]
    spread = {
        "ttft_ms": [answer.times[0] for answer in done],
        "itl_ms": [gap for answer in several for gap in answer.gaps],
        "tpot_ms": [answer.tpot for answer in several],
        "e2e_ms": [answer.times[-1] for answer in done],
    }
    return {
        "requests": len(answers),
        "refused": len(answers) - len(done),
        "seconds": seconds,
        "output_tokens_per_second": sum(answer.tokens for answer in done) / seconds,
        "prompt_tokens_per_second": sum(answer.prompt for answer in done) / seconds,
        "requests_per_second": len(done) / seconds,
        "attained": kept / len(answers),
        "goodput": kept / seconds,
        "uncompensated_tokens": sum(answer.uncompensated for answer in done),
        "cached_share": sum(answer.cached for answer in done) / max(sum(answer.prompt for answer in done), 1),
    } | {name: _spread(values) for name, values in spread.items()}


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    p50, p90, p99 = 1e3 * np.percentile(values, (50, 90, 99))
    mean, most = 1e3 * np.mean(values), 1e3 * np.max(values)
    return {"mean": float(mean), "p50": float(p50), "p90": float(p90), "p99": float(p99), "max": float(most)}


def console() -> Console:
    """Give stderr, wide enough for `show` where it is no terminal."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else 130)


def show(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Lay summaries out, one a row under its name; `kept` and goodput are about limits."""
    table = Table("", title=title)
    groups = {"ttft_ms": ("mean", "p50", "p99"), "itl_ms": ("p50", "p99", "max"), "tpot_ms": ("p50", "p99")}
    for name, parts in groups.items():
        table.add_column(f"{name.removesuffix('_ms').upper()} ms\n{' '.join(parts)}", justify="right")
    for name in ("tokens/s", "kept", "goodput\nrequests/s", "refused"):
        table.add_column(name, justify="right")
    for name, row in rows.items():
        cells = [
            "-" if row[group] is None else " ".join(f"{row[group][part]:.1f}" for part in parts)
            for group, parts in groups.items()
        ]
        kept = (f"{row['attained']:.1%}", f"{row['goodput']:.2f}", str(row["refused"]))
        table.add_row(name, *cells, f"{row['output_tokens_per_second']:.0f}", *kept)
    return table
