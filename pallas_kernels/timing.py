"""Times of kernels on a GPU, measured with weights that are not in its cache."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.mosaic.gpu import profiler

CACHE_BYTES = 120 * 2**20
"""Bytes that go through the second-level cache between two uses of a weight; Hopper's holds 50 MiB."""


def copies(nbytes: int) -> int:
    """Give how many weights of `nbytes` to take turns with, so that none is in the cache when its turn comes."""
    return max(2, -(-CACHE_BYTES // nbytes))


def kernel_microseconds(call: Callable[..., Any], weights: Sequence[Any], *rest: Any, repeats: int = 5) -> float:
    """Give the median time of `call(weight, *rest)` in microseconds: its kernels alone, without gaps between them.

    Raises:
        RuntimeError: Nothing was measured; only GPUs can.
    """
    inner = jax.jit(call)
    measured = profiler.measure(
        jax.jit(lambda weights, rest: [inner(weight, *rest) for weight in weights]), aggregate=False, iterations=repeats
    )
    runs = measured(list(weights), rest)[1]
    if not runs:
        raise RuntimeError("no kernel was measured: timing needs a GPU")
    return statistics.median(sum(time for _, time in run) * 1e3 / len(weights) for run in runs)
