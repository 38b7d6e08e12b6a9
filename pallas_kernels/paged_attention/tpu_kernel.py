"""The kernel of `paged_attention` for a TPU, and one that writes a chunk's keys and values to their pages."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

LANES = 128
PAGE_STEP = 16
"""Tokens of a page are a multiple of this: rows of a tile of bfloat16."""

_F32 = jnp.float32
_MASKED = float(jnp.finfo(jnp.float32).min)


class Attention:
    """The program of a block of query rows of a sequence: attend to the tiles of keys that some of them sees.

    The next tile, of the next program where this one has no more, is on its way while one is computed with: programs of
    a core run in order, and `turn_of` says which of two buffers comes next. Where `refs` hold the last key and value of
    a sequence, `k_new` and `v_new`, they go into their places in vector memory, and from there to their page.
    """

    def __init__(self, refs: dict[str, Any], *, tokens: int, group: int, scale: float, windowed: bool) -> None:
        self.refs, self.table = refs, refs["table"]
        self.lengths, self.starts, self.window = refs["lengths"], refs["starts"], refs["window"]
        self.tokens, self.group, self.scale, self.windowed = tokens, group, scale, windowed
        self.q, self.out = refs["q"], refs["out"]
        # Pages that are written are read there too: what was given and what is given back is the same memory.
        self.pages = refs.get("k_out", refs["k_pages"]), refs.get("v_out", refs["v_pages"])
        self.buffers = refs["k_buffer"], refs["v_buffer"]
        _, self.pieces, self.heads, self.page, self.h = refs["k_buffer"].shape
        self.rows, self.tile = self.q.shape[1], self.pieces * self.page

    def run(self) -> None:
        """Do all that is to be done."""
        refs, turn_of = self.refs, self.refs["turn_of"]
        core, place, block = (pl.program_id(axis) for axis in range(3))
        places, blocks = pl.num_programs(1), pl.num_programs(2)
        sequence = core * places + place
        keys = self._seen(sequence, block)
        first, tiles = keys[2:]
        is_last = (place == places - 1) & (block == blocks - 1)
        ended = block == blocks - 1
        following = jnp.where(ended & ~is_last, sequence + 1, sequence), jnp.where(ended, 0, block + 1)

        def fetch_next(slot: Array) -> None:
            theirs = self._seen(*following)

            @pl.when(~is_last & (theirs[2] < theirs[3]))
            def _() -> None:
                self._transfer(following[0], theirs, theirs[2], slot, "start")

        @pl.when((place == 0) & (block == 0))
        def _() -> None:
            turn_of[0] = 0
            pl.when(first < tiles)(lambda: self._transfer(sequence, keys, first, 0, "start"))

        top, total, sums = (refs[name] for name in ("top", "total", "sums"))
        top[...] = jnp.full_like(top, _MASKED)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)
        turns = turn_of[0]
        pl.when(first >= tiles)(lambda: fetch_next(turns))

        @pl.loop(first, tiles)
        def _(turn: Array) -> None:
            slot = jax.lax.rem(turns + turn - first, 2)
            pl.when(turn + 1 < tiles)(lambda: self._transfer(sequence, keys, turn + 1, 1 - slot, "start"))
            pl.when(turn + 1 == tiles)(lambda: fetch_next(1 - slot))
            self._transfer(sequence, keys, turn, slot, "wait")
            if "k_new" in refs:
                pl.when(turn + 1 == tiles)(lambda: self._append(sequence, turn, slot))
            self._attend(sequence, keys, turn, slot)

        last_slot = jax.lax.rem(turns + tiles - first + 1, 2)
        if "k_new" in refs:

            @pl.when(first < tiles)
            def _() -> None:
                for copy in self._written(sequence, tiles - 1, last_slot):
                    copy.wait()

        turn_of[0] = jnp.where(first < tiles, 1 - last_slot, turns)
        for head in range(self.heads):
            weight = total[head, :, :1]
            self.out[head] = (sums[head] / jnp.where(weight == 0, 1.0, weight)).astype(self.out.dtype)

    def _seen(self, sequence: Any, block: Any) -> tuple[Array, Array, Array, Array]:
        """Give the first key that some row of a block sees, the end of them, and the tiles that hold them."""
        start = self.starts[sequence]
        first_token = _div(block * self.rows, self.group)
        last_token = jnp.minimum(_div(block * self.rows + self.rows - 1, self.group), self.tokens - 1)
        end = jnp.maximum(jnp.minimum(start + last_token + 1, self.lengths[sequence]), 0)
        begin = jnp.maximum(start + first_token - self.window[0] + 1, 0) if self.windowed else jnp.int32(0)
        return begin, end, _div(begin, self.tile), _div(end + self.tile - 1, self.tile)

    def _transfer(self, sequence: Any, keys: tuple, turn: Array, slot: Any, action: str) -> None:
        """Start the copies of a tile, or wait for them: of the pages alone that hold a key which is seen."""
        begin, end = keys[:2]

        @pl.loop(0, self.pieces)
        def _(piece: Array) -> None:
            entry = turn * self.pieces + piece

            @pl.when((entry * self.page < end) & ((entry + 1) * self.page > begin))
            def _() -> None:
                for i, (pages, buffer) in enumerate(zip(self.pages, self.buffers, strict=True)):
                    source, target = pages.at[self.table[sequence, entry]], buffer.at[slot, piece]
                    getattr(pltpu.make_async_copy(source, target, self.refs["arrived"].at[i, slot]), action)()

    def _append(self, sequence: Any, turn: Array, slot: Array) -> None:
        """Put the last key and value into the tile that is there, and send the rows around them to their page."""
        piece, row, lines = self._place(sequence, turn)
        for new, buffer in zip((self.refs["k_new"], self.refs["v_new"]), self.buffers, strict=True):
            for head in range(self.heads):
                here = (slot, piece, head, lines)
                old, added = buffer[here].astype(_F32), new[pl.ds(head, 1)].astype(_F32)
                at = jax.lax.broadcasted_iota(jnp.int32, old.shape, 0) == jax.lax.rem(row, PAGE_STEP)
                buffer[here] = jnp.where(at, added, old).astype(buffer.dtype)
        for copy in self._written(sequence, turn, slot):
            copy.start()

    def _written(self, sequence: Any, turn: Array, slot: Array) -> list[Any]:
        piece, _, lines = self._place(sequence, turn)
        number = self.table[sequence, turn * self.pieces + piece]
        return [
            pltpu.make_async_copy(
                buffer.at[slot, piece, :, lines], pages.at[number, :, lines], self.refs["written"].at[i]
            )
            for i, (pages, buffer) in enumerate(zip(self.pages, self.buffers, strict=True))
        ]

    def _place(self, sequence: Any, turn: Array) -> tuple[Array, Array, Any]:
        """Give the piece of a tile that holds a sequence's last key, its row there, and the rows that move with it."""
        position = self.lengths[sequence] - 1 - turn * self.tile
        row = jax.lax.rem(position, self.page)
        lines = pl.multiple_of(_div(row, PAGE_STEP) * PAGE_STEP, PAGE_STEP)
        return _div(position, self.page), row, pl.ds(lines, PAGE_STEP)

    def _attend(self, sequence: Any, keys_seen: tuple, turn: Array, slot: Array) -> None:
        begin, end, *_ = keys_seen
        refs, scale = self.refs, self.scale
        top, total, sums = (refs[name] for name in ("top", "total", "sums"))
        k_factors, v_factors = refs.get("k_factors"), refs.get("v_factors")
        positions = self.starts[sequence] + refs["offsets"][...]

        def keys(shape: tuple[int, int], axis: int) -> Array:
            return turn * self.tile + jax.lax.broadcasted_iota(jnp.int32, shape, axis)

        def load(buffer: Any, head: int) -> Array:
            return buffer[slot, :, head].astype(jnp.bfloat16).reshape(self.tile, self.h)

        columns, lines = keys((self.rows, self.tile), 1), keys((self.tile, self.h), 0)
        seen = (columns <= positions) & (columns < self.lengths[sequence])
        if self.windowed:
            seen = seen & (columns > positions - self.window[0])
        brought = (lines >= begin) & (lines < end)
        here = pl.ds(pl.multiple_of(turn * self.tile, LANES), self.tile)
        for head in range(self.heads):
            scores = _dot(self.q[head], load(self.buffers[0], head), of_rows=True) * scale
            if k_factors is not None:
                scores = scores * k_factors[pl.ds(head, 1), here]
            scores = jnp.where(seen, scores, _MASKED)
            old = top[head, :, :1]
            new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
            weights = jnp.where(seen, jnp.exp(scores - new), 0.0)
            fade = jnp.exp(old - new)
            total[head] = total[head] * fade + jnp.sum(weights, axis=1, keepdims=True)
            top[head] = jnp.broadcast_to(new, top.shape[1:])
            if v_factors is not None:
                weights = jnp.where(seen, weights * v_factors[pl.ds(head, 1), here], 0.0)
            # Zero times what is no number is none, and what was not brought may be that.
            values = jnp.where(brought, load(self.buffers[1], head).astype(_F32), 0.0).astype(jnp.bfloat16)
            sums[head] = sums[head] * fade + _dot(weights.astype(jnp.bfloat16), values)


def _div(count: Array, by: int) -> Array:
    """Divide what is not negative: `//` looks at signs, which takes several scalar operations."""
    return jax.lax.div(count, jnp.int32(by))


def _dot(left: Array, right: Array, *, of_rows: bool = False) -> Array:
    return jax.lax.dot_general(left, right, (((1,), (int(of_rows),)), ((), ())), preferred_element_type=_F32)


def write_chunk(
    numbers: Any, start: Any, end: Any, k_new: Any, v_new: Any, k_pages: Any, v_pages: Any, k_out: Any, v_out: Any
) -> None:
    """Write the tokens of a chunk that belong to one page; blocks beyond the chunk are its last page once more."""
    del numbers
    page = k_pages.shape[1]
    first = (_div(start[0], page) + pl.program_id(0)) * page

    @pl.when(first < end[0])
    def _() -> None:
        for new, old, out in ((k_new, k_pages, k_out), (v_new, v_pages, v_out)):
            position = first + jax.lax.broadcasted_iota(jnp.int32, old.shape, 1)
            given = (position >= start[0]) & (position < end[0])
            out[...] = jnp.where(given, new[...].astype(_F32), old[...].astype(_F32)).astype(out.dtype)
