"""`python -m spear_jax.serve profile`: measure how long iterations take, for the server to keep limits on time by.

Takes the settings of the server, as the figures are those of its programs, its slots and its buckets.
"""

import itertools
import logging
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from serve.config import ServeConfig
from serve.latency import LatencyTable, Profile, make_table
from serve.request import SamplingParams
from serve.runner import Runner
from serve.scheduler import drop_order
from serve.startup import Phases, Prepared, load_prepared, make_runner, table_identity, table_path, with_planned_cache
from spear_jax.quant import CompensatorBank

log = logging.getLogger(__name__)

_REPEATS = 3
_CONTEXTS = 3


def profile(config: ServeConfig) -> int:
    """Measure the table of a model with the server's settings, and write it where the server looks for it.

    Raises:
        ValueError, OSError: The model or the settings cannot be used, or the file cannot be written.
    """
    path = table_path(config)
    if path is None:
        raise ValueError("scheduler.latency_table is none: name a file to write, or leave it at auto")
    console = Console(stderr=True)
    with Phases(console) as phases:
        prepared, plan = with_planned_cache(load_prepared(config, phases, score=True), config, phases)
        kept = compensator_sets(prepared, config, phases, pages=plan.pages)
        runner = _compiled(prepared, config, kept, phases, pages=plan.pages)
        table = measure(runner, context=prepared.context, sets=len(kept), phases=phases)
    made = Profile(table=table, kept=kept, identity=table_identity(config, prepared), source="measured")
    made.save(path)
    console.print(_shown(table))
    log.info("wrote %s", path)
    return 0


def measure(runner: Runner, *, context: int, sets: int, phases: Phases) -> LatencyTable:
    """Time iterations of a compiled runner over sequences, chunks, contexts and sets of compensators.

    A chunk is measured as the last one of its prompt, sampling included, and comes before the decode step, as the
    engine has it. Sets but the first are for the smallest chunk alone; larger ones are given the first set's times.
    """
    sizes = (0, *runner.buckets)
    decodes = sorted({0, runner.slots, *(2**i for i in range(runner.slots.bit_length()))})
    least, most = min(16, context // 2), context - runner.buckets[-1] - _REPEATS - 2
    if most <= least:
        raise ValueError(f"a context of {context} tokens is too short for chunks of {runner.buckets[-1]}")
    contexts = sorted({round(x) for x in np.linspace(least, most, _CONTEXTS)})
    seconds = np.zeros((sets, len(decodes), len(sizes), len(contexts)))
    grid = [where for where in itertools.product(*map(range, seconds.shape)) if where[0] == 0 or where[2] == 1]
    with phases.phase("measure", steps=len(grid)):
        for level, d, c, k in grid:
            if decodes[d] or sizes[c]:
                seconds[level, d, c, k] = statistics.median(
                    _iterations(runner, decodes=decodes[d], chunk=sizes[c], context=contexts[k], level=level)
                )
            phases.advance(f"{decodes[d]} sequences, {sizes[c]} of a prompt, {contexts[k]} tokens before")
    seconds[1:, :, 0], seconds[1:, :, 2:] = seconds[:1, :, 0], seconds[:1, :, 2:]
    return make_table(seconds, decodes=decodes, chunks=sizes, contexts=contexts, longest=not runner.in_pages)


def _iterations(runner: Runner, *, decodes: int, chunk: int, context: int, level: int) -> Iterator[float]:
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    active = np.arange(runner.slots) < decodes
    for repeat in range(_REPEATS + 1):
        runner.pretend(context)
        token: Any = None
        begin = time.perf_counter()
        if chunk:
            where: dict[str, Any] = {"slot": runner.slots - 1, "start": context, "bucket": chunk}
            token = runner.prefill([0] * chunk, **where, last=True, params=greedy, level=level)
        if decodes:
            token = runner.decode(active)
        jax.block_until_ready(token)
        if repeat:
            yield time.perf_counter() - begin


def compensator_sets(
    prepared: Prepared, config: ServeConfig, phases: Phases, *, pages: int
) -> tuple[tuple[str, ...], ...]:
    """Choose the sets of compensators, from all to none, that a chunk may be run with.

    In between, modules are left out in the order of what they mend for the time they take in the smallest chunk.
    """
    names = tuple(prepared.scores)
    count = min(config.scheduler.compensator_sets, len(names) + 1)
    if count <= 1:
        return (names,)
    if count == 2:
        return (names, ())
    without = [tuple(other for other in names if other != name) for name in names]
    runner = _compiled(prepared, config, (names, *without), phases, pages=pages)
    chunk = runner.buckets[0]
    taken = [
        statistics.median(_iterations(runner, decodes=0, chunk=chunk, context=1, level=level))
        for level in range(len(names) + 1)
    ]
    order = drop_order(np.array(list(prepared.scores.values())), np.maximum(taken[0] - np.array(taken[1:]), 0))
    dropped = [{names[i] for i in order[: round(n)]} for n in np.linspace(0, len(names), count)]
    return tuple(tuple(name for name in names if name not in out) for out in dropped)


def correction_scores(compensators: Mapping[str, CompensatorBank]) -> dict[str, float]:
    """Give for each module the size of what its compensators add, summed over layers: the Frobenius norm of B A.

    It stands for what they mend, which only calibration data could tell.
    """

    def rows(codes: Any, scale: Any) -> np.ndarray:
        return np.asarray(codes, np.float32) * (1 if scale is None else np.asarray(scale, np.float32)[:, None])

    def size(bank: CompensatorBank) -> float:
        a, bt = (
            rows(one[...], None if scale is None else scale[...])
            for one, scale in ((bank.a, bank.a_scale), (bank.bt, bank.bt_scale))
        )
        ends = np.cumsum(bank.ranks)[:-1]
        parts = zip(np.split(a, ends), np.split(bt, ends), strict=True)
        return float(sum(np.sqrt(np.sum((a @ a.T) * (bt @ bt.T))) for a, bt in parts))

    return {name: size(bank) for name, bank in compensators.items()}


def _compiled(
    prepared: Prepared, config: ServeConfig, kept: Sequence[Sequence[str]], phases: Phases, *, pages: int
) -> Runner:
    runner = make_runner(prepared, config, kept=kept, pages=pages)
    with phases.phase("compile", steps=runner.num_programs):
        for program in runner.warm_up():
            phases.advance(f"compiled {program}")
    return runner


def _shown(table: LatencyTable) -> Table:
    """Lay out the milliseconds at the shortest and the longest context, with all compensators."""
    shown = Table("sequences", *(f"+ {size:.0f}" if size else "alone" for size in table.chunks))
    shown.title = f"ms at {table.contexts[0]:.0f} and {table.contexts[-1]:.0f} tokens"
    for d, decodes in enumerate(table.decodes):
        cells = (f"{1e3 * near:.1f}  {1e3 * far:.1f}" for near, far in table.seconds[0, d][:, [0, -1]])
        shown.add_row(f"{decodes:.0f}", *cells)
    return shown
