"""Paged attention on Hopper: a block's shared memory, and how queries, keys and values get there."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.hopper import shared_tile
from pallas_kernels.paged_attention.plan import ALIGNED, TILE, HopperConfig, Problem, Span


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of threads: its shared memory, and the warpgroup that fills it."""

    config: HopperConfig
    problem: Problem
    h: int
    kv_heads: int
    page: int
    capacity: int
    interpret: bool

    @property
    def result_dtype(self) -> jnp.dtype:
        """Type of what is stored: float32 where splits are still to be brought together."""
        return jnp.dtype(jnp.float32) if self.config.apart else self.problem.out_dtype

    @property
    def out_columns(self) -> int:
        """Columns of the result that are stored at a time: float32 goes in halves, to leave shared memory to keys."""
        return TILE if self.config.cluster else self.h * 2 // self.result_dtype.itemsize

    @property
    def reducers(self) -> int:
        """Blocks of a cluster that bring results together, each for as many tiles of 64 columns."""
        return math.gcd(self.config.splits, self.h // TILE)

    @property
    def piece(self) -> int:
        """Keys that one copy brings."""
        return min(self.page, TILE)

    @property
    def tile_rows(self) -> int:
        """Rows of a tile of q in global memory."""
        return min(TILE, self.problem.padded_rows(self.config))

    @property
    def overlap(self) -> bool:
        """Say whether the kernel starts before the one ahead of it has ended; the interpreter runs one at a time."""
        return self.config.overlap and not self.interpret

    def first_row(self):
        """Give the row of the tile of q where the rows of this block's head begin."""
        return lax.rem(lax.axis_index("head") * self.problem.group, jnp.int32(ALIGNED)) if self.problem.appends else 0

    def scratch(self, kv_dtype) -> dict:
        """Declare shared memory and barriers, by name."""
        config, h = self.config, self.h
        quantized = kv_dtype.itemsize == 1
        copies = TILE // self.piece
        ring = shared_tile((config.stages, TILE, h), kv_dtype)
        full = plgpu.Barrier(num_arrivals=2 * copies if quantized else copies, num_barriers=config.stages)
        empty = plgpu.Barrier(num_arrivals=config.row_tiles, num_barriers=config.stages)
        shapes = {
            "q_tile": shared_tile((config.warpgroups, TILE, h), jnp.bfloat16),
            "q_full": plgpu.Barrier(num_arrivals=config.warpgroups),
            "k_ring": ring,
            "v_ring": ring,
            "k_full": full,
            "v_full": full,
            "k_empty": empty,
            "v_empty": empty,
            "out_tile": plgpu.SMEM(
                (config.row_tiles, TILE, self.out_columns), jnp.float32 if config.cluster else self.result_dtype
            ),
        }
        if config.cluster:
            rows, columns = self.tile_rows, self.h // TILE // self.reducers
            shapes["all_out"] = shared_tile((config.splits, columns, rows, TILE), jnp.float32)
            shapes["all_sums"] = shared_tile((config.splits, rows, TILE), jnp.float32)
            shapes["all_full"] = plgpu.Barrier(num_arrivals=config.splits * (columns + 1))
            shapes["result_tile"] = plgpu.SMEM((columns, rows, TILE), self.result_dtype)
        if self.problem.appends:
            shapes["new_rows"] = plgpu.SMEM((3, h), kv_dtype)
            shapes["new_full"] = plgpu.Barrier(num_arrivals=4)
        if quantized:
            shapes["wide_tile"] = shared_tile((config.warpgroups, TILE, h), jnp.bfloat16)
            shapes["k_scales"] = shapes["v_scales"] = plgpu.SMEM((config.stages, TILE), jnp.float32)
        if config.apart:
            shapes["sums_tile"] = plgpu.SMEM((config.row_tiles, TILE), jnp.float32)
        if config.parts > 1:
            others = (config.parts - 1, config.row_tiles)
            shapes["part_out"] = shared_tile((*others, TILE, h), jnp.float32)
            shapes["part_top"] = shapes["part_sum"] = plgpu.SMEM((*others, TILE), jnp.float32)
            shapes["part_full"] = plgpu.Barrier(num_arrivals=config.parts - 1, num_barriers=config.row_tiles)
        return shapes

    def span(self, lengths, starts, window=None, **_) -> Span:
        """Read what says which tiles are this block's."""
        if self.overlap:
            plgpu.griddepcontrol_wait()
        sequence = lax.axis_index("sequence")
        return Span.of(
            self.config,
            self.problem,
            length=jnp.minimum(lengths[sequence], self.capacity * self.page),
            start=starts[sequence],
            window=None if window is None else window[0],
            piece=self.piece,
            rows=lax.axis_index("rows"),
            split=lax.axis_index("split"),
        )

    def feed(self, *, q, k, v, table, q_tile, q_full, **refs) -> None:
        """Bring q, then tiles of keys and values, into shared memory."""
        config = self.config
        span = self.span(**refs)
        sequence, head = lax.axis_index("sequence"), lax.axis_index("head")
        for warpgroup in range(config.warpgroups):
            row = (lax.axis_index("rows") * config.row_tiles + warpgroup // config.parts) * TILE
            rows = pl.ds(0 if self.tile_rows < TILE else row, self.tile_rows)
            tile = q_tile.at[warpgroup, pl.ds(0, self.tile_rows)]
            if self.problem.appends:  # rows of other heads come along, and are used for nothing
                source = q.at[sequence, pl.ds(head * self.problem.group // ALIGNED * ALIGNED, self.tile_rows)]
            else:
                source = q.at[sequence, head, rows]
            plgpu.copy_gmem_to_smem(source, tile, q_full)
        last = jnp.maximum(lax.div(span.high - 1, jnp.int32(self.page)), 0)
        count = whole = span.end - span.begin
        appends: Any = None
        if self.problem.appends:
            appends = (span.high > span.base) & ((span.base + span.end * TILE) >= span.high) & (count > 0)
            whole = count - appends.astype(jnp.int32)  # tiles without the new key

            @pl.when(appends)
            def _():
                self._fetch_new(q.at[sequence], head, **refs)

        def pages(i):
            # Beyond the last key its page is read again: entries of the table beyond it may hold anything.
            first = span.base + (span.begin + i) * TILE
            places = [first + j * self.piece for j in range(TILE // self.piece)]
            return tuple(table[sequence, jnp.minimum(lax.div(at, jnp.int32(self.page)), last)] for at in places)

        def fill(i, numbers):
            stage = lax.rem(i, jnp.int32(config.stages))
            offset = lax.rem(span.base + (span.begin + i) * TILE, jnp.int32(self.page)) if self.page > TILE else 0
            for name, array in (("k", k), ("v", v)):

                @pl.when(i >= config.stages)
                def _(name=name):
                    plgpu.barrier_wait(refs[f"{name}_empty"].at[stage])

                for j, number in enumerate(numbers):
                    source, into = pl.ds(offset, self.piece), pl.ds(j * self.piece, self.piece)
                    full = refs[f"{name}_full"].at[stage]
                    plgpu.copy_gmem_to_smem(array.at[number, head, source], refs[f"{name}_ring"].at[stage, into], full)
                    if f"{name}_scale" in refs:
                        scales, places = refs[f"{name}_scale"].at[number, head, source], refs[f"{name}_scales"]
                        _copy_plain(scales, places.at[stage, into], full)

        # Page numbers of the first tiles are read all at once, then one tile ahead: each takes as long as a tile.
        ahead = [pages(jnp.int32(i)) for i in range(config.stages + 1)]
        for i in range(config.stages):

            @pl.when(i < whole)
            def _(i=i):
                fill(jnp.int32(i), ahead[i])

        new = None
        if self.problem.appends:
            number, row = table[sequence, last], lax.rem(span.high - 1, jnp.int32(self.page))
            new = tuple(array.at[number, head, row] for array in (k, v))

            @pl.when(appends)
            def _():
                self._store_new(new, **refs)

        def step(i, numbers):
            following = pages(i + 1)
            fill(i, numbers)
            return following

        lax.fori_loop(config.stages, whole, step, ahead[-1])
        if self.problem.appends:

            @pl.when(appends)
            def _():
                self._await_new()
                fill(count - 1, pages(count - 1))

        for i in range(config.stages):

            @pl.when(i < count)
            def _(i=i):
                plgpu.barrier_wait(refs["k_empty"].at[i])
                plgpu.barrier_wait(refs["v_empty"].at[i])

    def _fetch_new(self, heads, head, *, new_rows, new_full, **_) -> None:
        """Bring the new key, once more with its halves exchanged, and the new value into shared memory."""
        half, key = self.h // 2, self.problem.group * self.kv_heads + head
        plgpu.copy_gmem_to_smem(heads.at[key], new_rows.at[0], new_full)
        for first, source in ((0, half), (half, 0)):
            into = new_rows.at[1, pl.ds(first, half)]
            plgpu.copy_gmem_to_smem(heads.at[key, pl.ds(source, half)], into, new_full)
        plgpu.copy_gmem_to_smem(heads.at[key + self.kv_heads], new_rows.at[2], new_full)

    def _store_new(self, places, *, new_rows, new_full, rotation, **_) -> None:
        """Rotate the new key, and store it and the new value."""
        plgpu.barrier_wait(new_full)
        x, exchanged = (new_rows[i].astype(jnp.float32) for i in range(2))
        turn = rotation.at[lax.axis_index("sequence")]
        new_rows[0] = (x * turn[0] + exchanged * turn[1]).astype(new_rows.dtype)
        plgpu.commit_smem()
        for i, place in ((0, places[0]), (2, places[1])):
            plgpu.copy_smem_to_gmem(new_rows.at[i], place)

    def _await_new(self) -> None:
        """Wait until the copy engine sees in global memory what it has stored there."""
        plgpu.wait_smem_to_gmem(0)
        if not self.interpret:
            _fence_proxies()  # pyright: ignore[reportCallIssue]


def _copy_plain(source, target, barrier) -> None:
    """Copy consecutive values as plain bytes, which asks for an alignment of 16 bytes.

    A tensor copy asks for 128 in shared memory, where 16 scales take 64: an error on the device, which neither compiler
    nor interpreter sees. Mosaic takes the plain form where it need not check bounds.
    """
    plgpu.copy_gmem_to_smem(source, target, barrier, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


@plgpu.inline_mgpu()
def _fence_proxies(_) -> None:
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [], "fence.proxy.async;", "", has_side_effects=True)
