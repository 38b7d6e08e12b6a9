"""Times of kernels on a GPU, measured with weights that are not in its cache."""

import concurrent.futures
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.mosaic.gpu import profiler

_MEASURED = 20
"""Calls that a median is taken of, at least."""


_REPEATS = 5
"""Executions that are under way together, so that the time of starting one does not count."""


class _Turns(jax.stages.Wrapped):
    """A function without arguments, as `profiler.measure` takes it: each call takes the next weight.

    One small program is compiled and executed for each weight; a program of all of them would hold as many copies of
    the kernels, and take as many times as long to compile.
    """

    def __init__(self, run: Callable[..., Any], weights: Sequence[Any], rest: tuple[Any, ...]):
        self._run, self._rest = run, rest
        self._weights = itertools.cycle(weights)

    def __call__(self) -> Any:
        return self._run(next(self._weights), *self._rest)

    def trace(self) -> Any:
        raise NotImplementedError

    def lower(self) -> Any:
        raise NotImplementedError


def kernel_microseconds(
    call: Callable[..., Any], weights: Sequence[Any], *rest: Any, measured: int = _MEASURED
) -> float:
    """Give the median time of `call(weight, *rest)` in microseconds: its kernels alone, without gaps between them.

    Weights take turns, and each has at least one; `call` may be compiled already. Kernels of a call that overlap each
    count in full, waiting for one another included.

    Raises:
        RuntimeError: Nothing was measured; only GPUs can.
    """
    run = call if isinstance(call, (jax.stages.Wrapped, jax.stages.Compiled)) else jax.jit(call)
    calls = len(weights) * math.ceil(measured / len(weights))
    turns = profiler.measure(_Turns(run, weights, rest), aggregate=False, iterations=calls)
    times = turns()[1]
    if not times:
        raise RuntimeError("no kernel was measured: timing needs a GPU")
    return statistics.median(sum(time for _, time in kernels) * 1e3 for kernels in times)


def in_a_row(call: Callable[..., Any]) -> Callable[[Sequence[Any], tuple[Any, ...]], list[Any]]:
    """Give a function of weights and of `call`'s other arguments that calls `call` for one weight after the other."""
    return lambda weights, rest: [call(weight, *rest) for weight in weights]


def microseconds_in_a_row(run: Callable[..., Any], weights: Sequence[Any], *rest: Any, repeats: int = 9) -> float:
    """Give the time of one call where calls follow one another, gaps between kernels included and overlaps taken off.

    `run` is a compiled `in_a_row`: a program of one call for each weight, started again and again before the last has
    ended. This is what a CUDA graph of as many calls takes, which is how other libraries are timed.
    """
    weights = list(weights)
    jax.block_until_ready(run(weights, rest))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        done = None
        for _ in range(_REPEATS):
            done = run(weights, rest)
        jax.block_until_ready(done)
        times.append((time.perf_counter() - begin) / _REPEATS / len(weights))
    return statistics.median(times) * 1e6


def compile_all(
    programs: dict[str, tuple[Any, tuple[Any, ...]]], *, threads: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Compile jitted functions for arguments, several at a time; give those that compile, and why others do not."""
    compiled, failures = {}, {}
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting = {}
        for name, (function, arguments) in programs.items():
            try:
                waiting[name] = pool.submit(function.lower(*arguments).compile)
            except Exception as failure:
                failures[name] = failure_message(failure)
        for name, future in waiting.items():
            try:
                compiled[name] = future.result()
            except Exception as failure:
                failures[name] = failure_message(failure)
    return compiled, failures


def failure_message(failure: Exception) -> str:
    """Give an exception's type and the beginning of what it says, on one line."""
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:400]}"
