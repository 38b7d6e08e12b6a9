"""What a compensator costs in time at each module, on this device."""

import math
import time
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from calibrate.weights import dense_weights, int4_weight
from pallas_kernels.int4_matmul import Compensator
from spear_jax.models.decoder import MODULES, Decoder
from spear_jax.nn.linear import Linear
from spear_jax.quant import CompensatorBank

_ROUNDS = 100
_LEAST_SHARE = 0.01
"""Added time below this share of the product's own cannot be told from noise, and counts as that much."""


def compensator_latency(base: Decoder, *, rank: int = 4, tokens: int = 1) -> Float[np.ndarray, " M"]:
    """Measure the seconds that a static int8 compensator adds to each module of a layer for a step of `tokens` tokens.

    Products run as a model is served: over int4 weights on an accelerator, over written out ones on a CPU.
    """
    dense = dense_weights(base) if jax.default_backend() == "cpu" else {}
    added = []
    for name in MODULES:
        weight = dense.get(name, int4_weight(base, name))
        layers, outputs, inputs = weight.shape
        keys = jax.random.split(jax.random.key(0), 3)
        sizes = zip(keys[:2], (inputs, outputs), strict=True)
        a, bt = (jax.random.normal(key, (layers * rank, size)) for key, size in sizes)
        bank = CompensatorBank((rank,) * layers, a, bt).to_int8()
        # Each layer's weights by themselves, as slices of a stack may be copied.
        linears = [Linear(jax.tree.map(lambda leaf, i=i: leaf[i], weight)) for i in range(layers)]
        x = jax.random.normal(keys[2], (tokens, inputs), base.dtype)
        plain, mended = _fastest(linears, x, ([None] * layers, [bank.at(i) for i in range(layers)]))
        added.append(max(mended - plain, _LEAST_SHARE * plain) / layers)
    return np.asarray(added)


@jax.jit
def _run(linears: list[Linear], x: Float[Array, "T K"], own: list[Compensator | None]) -> list[Float[Array, "T N"]]:
    return [linear(x, compensator=compensator) for linear, compensator in zip(linears, own, strict=True)]


def _fastest(linears: list[Linear], x: Array, cases: Sequence[list[Compensator | None]]) -> list[float]:
    """Give the shortest time of each case; they take turns, so that a device that slows down does so for all."""
    seconds = [math.inf] * len(cases)
    for case in cases:
        jax.block_until_ready(_run(linears, x, case))
    for _ in range(_ROUNDS):
        for i, case in enumerate(cases):
            begin = time.perf_counter()
            jax.block_until_ready(_run(linears, x, case))
            seconds[i] = min(seconds[i], time.perf_counter() - begin)
    return seconds
