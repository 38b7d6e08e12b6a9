"""How paged attention is cut up for Hopper: settings, and which tiles of keys a block goes over."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax

TILE = 64
"""Keys of a tile, and query rows of a warpgroup."""

CLUSTERS = (2, 4, 8)
"""Blocks that a cluster may have."""

ALIGNED = 8
"""Rows of which the copy engine brings whole multiples into a tile, from a multiple on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HopperConfig:
    """How the work is cut up.

    `row_tiles` warpgroups with 64 query rows each; `parts` warpgroups that share each row tile's keys; `splits` blocks
    that share a sequence's keys; `cluster` has those blocks, up to eight, bring their results together instead of XLA;
    `stages` tiles of keys and of values in shared memory, a multiple of `parts`; `overlap` lets the kernel start while
    the one before it still runs.
    """

    row_tiles: int = 1
    parts: int = 2
    splits: int = 1
    cluster: bool = False
    stages: int = 4
    overlap: bool = True

    def __post_init__(self) -> None:
        if min(self.row_tiles, self.parts, self.splits, self.stages) < 1 or self.stages % self.parts:
            raise ValueError(f"sizes must be positive, and stages a multiple of parts, got {self}")
        if self.cluster and (self.row_tiles > 1 or self.splits not in CLUSTERS):
            raise ValueError(f"a cluster is of {CLUSTERS} splits, for one tile of rows, got {self}")

    @property
    def apart(self) -> bool:
        """Say whether XLA is left to bring splits together."""
        return self.splits > 1 and not self.cluster

    @property
    def warpgroups(self) -> int:
        """Warpgroups that compute."""
        return self.row_tiles * self.parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What the kernel must know while it is traced.

    `tokens` query tokens a sequence, `group` query heads a key head; `windowed`: a window is given; `scale` on scores;
    `appends`: queries and keys are to be rotated, and each sequence's newest key and value written to its last page.
    """

    tokens: int
    group: int
    windowed: bool
    scale: float
    out_dtype: jnp.dtype
    appends: bool = False

    @property
    def rows(self) -> int:
        """Query rows of a key head of a sequence."""
        return self.tokens * self.group

    def padded_rows(self, config: HopperConfig) -> int:
        """Rows to which q is filled up: of whole tiles, or of the eight-row pieces that TMA copies."""
        if self.appends:
            return aligned_rows(self.group)
        if self.rows <= TILE and config.row_tiles == 1:
            return -(-self.rows // 8) * 8
        return -(-self.rows // (TILE * config.row_tiles)) * TILE * config.row_tiles


def aligned_rows(group: int) -> int:
    """Give the rows that hold any head's group of rows when they are read from a multiple of eight on."""
    return -(-(group + ALIGNED - math.gcd(group, ALIGNED)) // ALIGNED) * ALIGNED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """The tiles that a block goes over: from `begin` to `end`, of 64 keys each, from key `base` on; traced scalars.

    No row of the block sees a key below `base` or from `high` on. `start` is the position of the sequence's first query
    token and `length` its number of keys. Every row sees all keys of the tiles before `clear`.
    """

    base: Any
    high: Any
    begin: Any
    end: Any
    clear: Any
    length: Any
    start: Any
    window: Any

    @classmethod
    def of(
        cls,
        config: HopperConfig,
        problem: Problem,
        *,
        length: Any,
        start: Any,
        window: Any,
        piece: int,
        rows: Any,
        split: Any,
    ) -> "Span":
        """Give the tiles for a split's share of what the `rows`-th block of rows sees.

        With a window, tiles begin at a multiple of `piece`, the keys that are copied together: pages that the window
        has left are never touched.
        """
        size = TILE * config.row_tiles
        first_token = lax.div(rows * size, jnp.int32(problem.group))
        last_token = lax.div(jnp.minimum(rows * size + size, problem.rows) - 1, jnp.int32(problem.group))
        high = jnp.maximum(jnp.minimum(length, start + last_token + 1), 0)
        base = clear = jnp.int32(0)
        if window is None:
            clear = lax.div(jnp.maximum(jnp.minimum(length, start + first_token + 1), 0), jnp.int32(TILE))
        else:
            base = lax.div(jnp.maximum(start + first_token + 1 - window, 0), jnp.int32(piece)) * piece
        count = _divide_up(jnp.maximum(high - base, 0), TILE)
        share = _divide_up(count, config.splits)
        begin = jnp.minimum(split * share, count)
        end = jnp.minimum(begin + share, count)
        return cls(base=base, high=high, begin=begin, end=end, clear=clear, length=length, start=start, window=window)

    def turns(self, config: HopperConfig, part: Any) -> tuple[Any, Any]:
        """Give how many of the block's tiles are a part's, and how many of those before its last need no mask."""
        count = _divide_up(jnp.maximum(self.end - self.begin - part, 0), config.parts)
        clear = _divide_up(jnp.maximum(self.clear - self.begin - part, 0), config.parts)
        return count, jnp.clip(clear, 0, jnp.maximum(count - 1, 0))


def _divide_up(number: Any, by: int) -> Any:
    return lax.div(number + (by - 1), jnp.int32(by))
