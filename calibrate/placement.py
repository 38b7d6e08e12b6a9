"""Which module gets how much rank, under a budget in bytes."""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One module that may get a compensator.

    `gains[r]` is what rank r + 1 adds over rank r, in one unit for every module: energies of `calibrate.initialize`
    times the module's sensitivity. As many as there are ranks to give. `rank_bytes` is what each rank costs,
    `setup_bytes` what the first costs on top.
    """

    name: str
    gains: Sequence[float]
    rank_bytes: int
    setup_bytes: int = 0

    def __post_init__(self) -> None:
        gains = np.asarray(self.gains, np.float64)
        if gains.ndim != 1 or gains.size == 0:
            raise ValueError(f"{self.name}: gains must be a list of at least one rank, got shape {gains.shape}")
        if not np.all(np.isfinite(gains) & (gains >= 0)):
            raise ValueError(f"{self.name}: gains must be finite and at least 0, got {list(self.gains)[:8]}")
        if self.rank_bytes < 1 or self.setup_bytes < 0:
            raise ValueError(
                f"{self.name}: rank_bytes must be at least 1 and setup_bytes at least 0, "
                f"got {self.rank_bytes} and {self.setup_bytes}"
            )

    @property
    def max_rank(self) -> int:
        """Largest rank that this module can take."""
        return len(self.gains)

    def cost(self, rank: int) -> int:
        """Return the bytes of a compensator of this rank."""
        return rank * self.rank_bytes + (self.setup_bytes if rank else 0)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Ranks of all candidates in their order, and the bytes they take."""

    ranks: tuple[int, ...]
    nbytes: int
    gain: float


def place_by_gain(candidates: Sequence[Candidate], budget: int, *, max_rank: int | None = None) -> Placement:
    """Spend the budget where a byte gains most.

    Each module offers the upper concave envelope of its (bytes, gain) points; the envelopes' pieces are taken steepest
    first, and what no longer fits is passed over in favour of what does. What gains nothing is not bought. For gains
    that do not rise with the rank and without set-up bytes that is optimal up to the last piece, and optimal altogether
    where all ranks cost the same.

    Raises:
        ValueError: no candidate, a `max_rank` below 1, or a budget that does not pay for rank 1 of any.
    """
    _check(candidates, budget, max_rank)
    ranks = [0] * len(candidates)
    spent = 0
    heap: list[tuple[float, int, int]] = []

    def offer(index: int, room: int) -> None:
        best = _steepest(candidates[index], ranks[index], room, max_rank)
        if best is not None:
            heapq.heappush(heap, (-best[0], index, best[1]))

    for index in range(len(candidates)):
        offer(index, budget)
    while heap:
        _, index, rank = heapq.heappop(heap)
        candidate = candidates[index]
        price = candidate.cost(rank) - candidate.cost(ranks[index])
        if spent + price <= budget:
            ranks[index], spent = rank, spent + price
        # A piece that did not fit comes back shorter, if any part of it fits.
        offer(index, budget - spent)
    return _placement(candidates, ranks)


def _steepest(candidate: Candidate, rank: int, room: int, max_rank: int | None) -> tuple[float, int] | None:
    """Return (gain per byte, rank) of the best next piece that costs at most `room` and gains anything."""
    top = candidate.max_rank if max_rank is None else min(max_rank, candidate.max_rank)
    ranks = np.arange(rank + 1, top + 1)
    prices = (ranks - rank) * candidate.rank_bytes + (0 if rank else candidate.setup_bytes)
    fits = prices <= room
    if not fits.any():
        return None
    gains = np.cumsum(np.asarray(candidate.gains, np.float64)[rank:top])[fits]
    slopes = gains / prices[fits]
    best = int(np.argmax(slopes))
    # A slope may underflow to zero where the gain does not.
    return (float(slopes[best]), int(ranks[best])) if gains[best] > 0 else None


def place_uniformly(candidates: Sequence[Candidate], budget: int, *, max_rank: int | None = None) -> Placement:
    """Give every module the same rank; what is left pays for one more rank in modules spread evenly over the order.

    "The same" is up to `max_rank` and to the ranks that a module has.

    Raises:
        ValueError: as `place_by_gain`.
    """
    _check(candidates, budget, max_rank)
    # Multiples of the golden ratio visit an order evenly whenever they stop.
    order = np.argsort((np.arange(len(candidates)) * ((5**0.5 - 1) / 2)) % 1.0, kind="stable")
    ranks, room, whole_round = [0] * len(candidates), budget, True
    while whole_round:
        prices = [_next_price(candidate, rank, max_rank) for candidate, rank in zip(candidates, ranks, strict=True)]
        whole_round = any(prices) and sum(filter(None, prices)) <= room
        for index in order:
            price = prices[index]
            if price is not None and price <= room:
                ranks[index], room = ranks[index] + 1, room - price
    return _placement(candidates, ranks)


def place_randomly(
    candidates: Sequence[Candidate], budget: int, *, seed: int, max_rank: int | None = None
) -> Placement:
    """Give ranks one by one to modules drawn at random, until no further rank fits.

    Raises:
        ValueError: as `place_by_gain`.
    """
    _check(candidates, budget, max_rank)
    rng = np.random.default_rng(seed)
    ranks, room = [0] * len(candidates), budget
    open_to = list(range(len(candidates)))
    while open_to:
        index = open_to[int(rng.integers(len(open_to)))]
        price = _next_price(candidates[index], ranks[index], max_rank)
        if price is None or price > room:
            open_to.remove(index)
            continue
        ranks[index], room = ranks[index] + 1, room - price
    return _placement(candidates, ranks)


def _next_price(candidate: Candidate, rank: int, max_rank: int | None) -> int | None:
    top = candidate.max_rank if max_rank is None else min(max_rank, candidate.max_rank)
    return None if rank >= top else candidate.cost(rank + 1) - candidate.cost(rank)


def _placement(candidates: Sequence[Candidate], ranks: Iterable[int]) -> Placement:
    ranks = tuple(ranks)
    pairs = list(zip(candidates, ranks, strict=True))
    return Placement(
        ranks=ranks,
        nbytes=sum(candidate.cost(rank) for candidate, rank in pairs),
        gain=float(sum(np.sum(np.asarray(candidate.gains)[:rank]) for candidate, rank in pairs)),
    )


def _check(candidates: Sequence[Candidate], budget: int, max_rank: int | None) -> None:
    if not candidates:
        raise ValueError("no module to place a compensator at")
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank {max_rank} must be at least 1")
    cheapest = min(candidates, key=lambda candidate: candidate.cost(1))
    if budget < cheapest.cost(1):
        raise ValueError(
            f"budget of {budget} bytes is too small: rank 1 of the cheapest module, {cheapest.name}, takes "
            f"{cheapest.cost(1)} bytes"
        )
