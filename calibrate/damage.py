"""What quantizing one module alone does to the last hidden state, and the ranks that follow from it."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from calibrate.capture import Moments, run_layer
from calibrate.diagnose import CkaMoments, Diagnosis, diagnose
from calibrate.initialize import LowRank, whitened_svd
from calibrate.placement import Candidate, Placement, place_by_gain, place_randomly, place_uniformly
from calibrate.student import GateConfig, factor_bytes
from calibrate.weights import with_weights
from spear_jax.models.decoder import MODULES, Decoder
from spear_jax.nn.attention import Attend, causal_attend

type Strategy = Literal["cka", "gain", "uniform", "random"]
"""How ranks are placed: by marginal gain in the modules that the entropy of CKA damage covers, by marginal gain in all,
the same everywhere, or at random."""


@jax.jit
def _add(moments: CkaMoments, x: Array, y: Array) -> CkaMoments:
    return moments.add(x, y)


def module_damage(
    reference: Decoder,
    dense: dict[str, Float[Array, "L N K"]],
    tokens: Int[np.ndarray, "S T"],
    *,
    batch_size: int = 8,
    attend: Attend = causal_attend,
    progress: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, "L M"]:
    """Measure `1 - CKA` of the last hidden state, token by token, with each module quantized alone.

    The reference's states before each layer are computed once, so that a module of layer i costs the layers from i on.
    """
    config = reference.config
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), (1, tokens.shape[1]))
    ropes = reference.ropes(positions)
    layers = [reference.layer(i) for i in range(config.num_layers)]
    windows = [jnp.asarray(window, jnp.int32) for window in config.windows]
    table = [[CkaMoments.zeros(config.hidden_size) for _ in MODULES] for _ in layers]
    batches = range(0, len(tokens), batch_size)
    for number, start in enumerate(batches):
        states = [reference.embedded(jnp.asarray(tokens[start : start + batch_size]))]
        for layer, window in zip(layers, windows, strict=True):
            states.append(run_layer(layer, states[-1], ropes, window, attend=attend))
        last = reference.final_norm(states[-1])
        for i, layer in enumerate(layers):
            for column, name in enumerate(MODULES):
                x = run_layer(with_weights(layer, {name: dense[name][i]}), states[i], ropes, windows[i], attend=attend)
                for j in range(i + 1, config.num_layers):
                    x = run_layer(layers[j], x, ropes, windows[j], attend=attend)
                table[i][column] = _add(table[i][column], last, reference.final_norm(x))
            if progress:
                progress(number * len(layers) + i + 1, len(batches) * len(layers))
    return np.asarray([[moments.damage() for moments in row] for row in table])


def choose_ranks(
    errors: dict[str, Float[Array, "L N K"]],
    moments: Moments,
    damage: Float[np.ndarray, "L M"] | None,
    *,
    budget: int,
    strategy: Strategy,
    gate: GateConfig,
    max_rank: int = 16,
    seed: int = 0,
    flatten: float = 1.0,
    bits: int = 8,
    low_ranks: dict[str, LowRank] | None = None,
    latency: Float[np.ndarray, " M"] | None = None,
) -> tuple[dict[str, tuple[int, ...]], Placement, Diagnosis | None]:
    """Spend `budget` bytes on ranks; the gates' bytes are counted in.

    Rank r + 1 of a module gains `damage * energy[r] / total energy` of the whitened error, to the power `flatten`
    (below one: more even, as training moves factors away from the singular vectors that the energies belong to).
    With `latency`, what a compensator adds to each module's time, damage counts per time.
    `low_ranks` are the modules' decompositions where they are at hand; `bits` are those of a factor's entries.

    Raises:
        ValueError: The budget does not pay for a single rank.
    """
    layers = next(iter(errors.values())).shape[0]
    shapes = {name: (error.shape[1], error.shape[2]) for name, error in errors.items()}
    prices = factor_bytes(shapes, bits=bits)
    slowness = np.ones(len(MODULES)) if latency is None else latency / latency.mean()
    diagnosis = None if damage is None else diagnose(damage.reshape(-1), np.tile(slowness, layers))
    by_damage = strategy in ("cka", "gain")
    spectra = {}
    for name, error in errors.items():
        if by_damage:
            if low_ranks is None:
                low = whitened_svd(error, moments[name], rank=min(max_rank, *shapes[name]))
            else:
                low = low_ranks[name]
            share = low.energies / jnp.maximum(low.total[:, None], 1e-30)
            spectra[name] = np.maximum(np.asarray(share, np.float64)[:, :max_rank], 0)
        else:
            spectra[name] = np.ones((layers, max_rank))
    candidates = []
    # A bank stores a gate's part that is not of single ranks for every layer, with rank or without.
    fixed = layers * sum(gate.layer_bytes(inputs) for _, inputs in shapes.values())
    for layer in range(layers):
        for column, name in enumerate(MODULES):
            weight = 1.0
            if by_damage:
                assert damage is not None
                assert diagnosis is not None
                covered = strategy == "gain" or layer * len(MODULES) + column in diagnosis.chosen
                weight = damage[layer, column] / slowness[column] if covered else 0.0
            candidates.append(
                Candidate(
                    name=f"{name} of layer {layer}",
                    gains=(weight * spectra[name][layer]) ** flatten,
                    rank_bytes=prices[name] + gate.rank_bytes,
                )
            )
    match strategy:
        case "uniform":
            placed = place_uniformly(candidates, budget - fixed)
        case "random":
            placed = place_randomly(candidates, budget - fixed, seed=seed)
        case _:
            placed = place_by_gain(candidates, budget - fixed)
    table = np.asarray(placed.ranks).reshape(layers, len(MODULES))
    ranks = {name: tuple(int(r) for r in table[:, column]) for column, name in enumerate(MODULES)}
    return ranks, placed, diagnosis
