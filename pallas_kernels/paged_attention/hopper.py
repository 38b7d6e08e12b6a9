"""Attention to keys and values in pages, for Hopper in Mosaic GPU: decode with split keys, and chunks of a prompt.

A block of threads takes one key head of one sequence, up to 64 x `row_tiles` of its query rows (a row is a token and
one of the query heads that share the key head), and a share of its keys. One warpgroup brings tiles of 64 keys and
values into shared memory by TMA, page by page; the others hold 64 rows each, as wgmma wants, and go over the tiles with
a softmax that is rescaled as its maximum grows. With few rows most of those 64 are empty. That costs tensor-core time
that waiting for memory leaves over: 64 bfloat16 keys of 128 take an H200 1,700 cycles to read and 512 to multiply, and
in return scores become the left operand of the next product without leaving their registers. (Operands the other way
round, as in `int4_matmul`, would have them go through shared memory, and maxima across warps.)

`parts` warpgroups of a block take turns with tiles, so that one multiplies while another waits; their sums meet in
shared memory. `splits` blocks share the keys of a sequence; what each found, and the logarithm of its sum, meet in
shared memory of their cluster, in fixed order. A long single sequence may want more than the eight blocks that a
cluster can have: then both go to global memory, and XLA brings them together, which takes three launches more.

What a block of a cluster has found goes to the others transposed, 64 columns of the result by eight rows or a few times
that: a register array has 64 rows at least, of which decoding fills four, and all 64 would take longer than the keys.

A decode step may leave rotating and the write to the cache to the kernel too (`Problem.appends`): every block turns its
few query rows in shared memory, and the block with a sequence's last tile turns the new key, stores key and value by
TMA while older tiles are on their way, and fetches that tile last.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Float32, Int32, Shaped

from pallas_kernels.hopper import ROWS, WGMMA, Accumulator, feed_and_compute, hold, row_values
from pallas_kernels.paged_attention.feed import Block
from pallas_kernels.paged_attention.plan import ALIGNED, TILE, HopperConfig, Problem, Span

_FEEDER_REGISTERS = 72

_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED
_UPCAST = plgpu.Layout.WGMMA_UPCAST_2X


def paged_attention_hopper(
    q: BFloat16[Array, "B K R H"],
    k_pages: Shaped[Array, "P K page H"] | jax.Ref,
    v_pages: Shaped[Array, "P K page H"] | jax.Ref,
    k_scale: Float32[Array, "P K page"] | None,
    v_scale: Float32[Array, "P K page"] | None,
    page_table: Int32[Array, "B M"],
    lengths: Int32[Array, " B"],
    starts: Int32[Array, " B"],
    window: Int32[Array, "1"] | None,
    rotation: Float32[Array, "B 2 H"] | None = None,
    *,
    problem: Problem,
    config: HopperConfig,
    interpret: plgpu.InterpretGPUParams | bool = False,
) -> tuple[Float[Array, "S B K R H"], Float32[Array, "S B K R"] | None]:
    """Give what each split found, and the binary logarithms of the sums of its weights where there are several splits.

    q is padded to `problem.padded_rows`; R of the results is no less than `problem.rows`. Where the problem `appends`,
    q is [B, N + 2K, H] instead, all heads of the new tokens, keys and values behind queries; pages are mutable, and
    `rotation` is as `paged_decode` has it.
    """
    (b, h), kv_heads, padded = (q.shape[0], q.shape[-1]), k_pages.shape[1], problem.padded_rows(config)
    assert q.shape[1:3] == (((problem.group + 2) * kv_heads, h) if problem.appends else (kv_heads, padded))
    assert h % TILE == 0
    kernel = _Kernel(
        config,
        problem,
        h=h,
        kv_heads=kv_heads,
        page=k_pages.shape[2],
        capacity=page_table.shape[1],
        interpret=bool(interpret),
    )
    out_rows = problem.rows if padded <= TILE else padded
    assert not problem.appends or (padded <= TILE and config.row_tiles == 1)
    tiles = -(-padded // TILE)
    out = [jax.ShapeDtypeStruct((config.splits if config.apart else 1, b, kv_heads, out_rows, h), kernel.result_dtype)]
    if config.apart:
        out.append(jax.ShapeDtypeStruct((config.splits, b, kv_heads, tiles * TILE), jnp.float32))
    optional = {"k_scale": k_scale, "v_scale": v_scale, "window": window, "rotation": rotation}
    given = {name: operand for name, operand in optional.items() if operand is not None}
    shared = kernel.scratch(jnp.dtype(k_pages.dtype))
    names = (*given, "out", *(("sums_out",) if config.apart else ()), *shared)

    def body(q, k, v, table, lengths, starts, *rest):
        kernel(q=q, k=k, v=v, table=table, lengths=lengths, starts=starts, **dict(zip(names, rest, strict=True)))

    grid, names_of_grid = (kv_heads, b, tiles // config.row_tiles), ("head", "sequence", "rows")
    run = plgpu.kernel(
        body,
        out_type=out,
        grid=grid if config.cluster else (config.splits, *grid),
        grid_names=names_of_grid if config.cluster else ("split", *names_of_grid),
        cluster=(config.splits,) if config.cluster else (),
        cluster_names=("split",) if config.cluster else (),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=list(shared.values()),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    result = run(q, k_pages, v_pages, page_table, lengths, starts, *given.values())
    if not config.apart:
        return result[0], None
    if not problem.appends:
        return result[0], result[1][..., :out_rows]
    first = np.arange(kv_heads)[:, None] * problem.group % ALIGNED
    return result[0], result[1][:, :, np.arange(kv_heads)[:, None], first + np.arange(problem.group)]


@dataclasses.dataclass(frozen=True)
class _Kernel(Block):
    """The program of a block."""

    def __call__(self, **refs) -> None:
        if self.overlap:  # as soon as all blocks have begun: what the next kernel reads first are its weights
            plgpu.griddepcontrol_launch_dependents()
        compute = self.config.warpgroups
        rationed = not self.interpret and self.problem.tokens > 1 and compute > 1
        feed_and_compute(
            functools.partial(self.feed, **refs),
            functools.partial(self._compute, **refs),
            compute=compute,
            feeder=_FEEDER_REGISTERS if rationed else None,
        )

    def _compute(self, warpgroup, *, q_tile, q_full, k_ring, v_ring, **refs) -> None:
        """Attend from 64 rows to the tiles of a part."""
        config = self.config
        span = self.span(**refs)
        row_tile, part = warpgroup // config.parts, lax.rem(warpgroup, jnp.int32(config.parts))
        count, clear = span.turns(config, part)
        bound = functools.partial(self._bounds, span, row_tile)
        wide = refs["wide_tile"].at[warpgroup] if "wide_tile" in refs else None
        plgpu.barrier_wait(q_full)
        if self.problem.appends:
            self._rotate(q_tile.at[warpgroup], refs["rotation"].at[lax.axis_index("sequence")])

        def step(i, carry, *, masked: bool, last: bool):
            acc, top, total = carry
            turn = part + i * config.parts
            stage = lax.rem(turn, jnp.int32(config.stages))
            first = span.base + (span.begin + turn) * TILE
            scores = self._scores(q_tile.at[warpgroup], k_ring.at[stage], wide, stage, refs)
            plgpu.barrier_arrive(refs["k_empty"].at[stage])
            if masked:
                scores = jnp.where(bound(first), scores, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(axis=1))
            # A row that has seen nothing has no top: it must not turn into infinity minus infinity.
            finite = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            fade = jnp.exp2(top - finite)
            weights = jnp.exp2(scores - _across(finite, scores.shape))
            total = total * fade + weights.sum(axis=1)
            acc = acc * _across(fade, acc.shape)
            if wide is None:
                weights = weights.astype(jnp.bfloat16)
            plgpu.barrier_wait(refs["v_full"].at[stage])
            values = v_ring.at[stage]
            if wide is not None:
                factors = _column_values(refs["v_scales"].at[stage])
                self._widen(values, wide, span.high - first if last else None)
                values = wide
                weights = weights * _down(factors, weights.shape)
                if masked:  # scales beyond the last key may be anything
                    weights = jnp.where(bound(first), weights, 0.0)
            elif last:
                # q is not needed any more, and takes the values without what lies beyond the last key.
                self._widen(values, q_tile.at[warpgroup], span.high - first)
                values = q_tile.at[warpgroup]
            acc = self._add_product(acc, weights.astype(jnp.bfloat16), values)
            plgpu.barrier_arrive(refs["v_empty"].at[stage])
            return acc, new_top, total

        carry = (
            plgpu.layout_cast(jnp.zeros((TILE, self.h), jnp.float32), WGMMA),
            plgpu.layout_cast(jnp.full((TILE,), -jnp.inf, jnp.float32), ROWS),
            plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), ROWS),
        )
        ahead = jnp.maximum(count - 1, 0)
        if not self.problem.windowed:
            carry = lax.fori_loop(0, clear, functools.partial(step, masked=False, last=False), carry)
        if self.problem.windowed or self.problem.tokens > 1:
            carry = lax.fori_loop(clear, ahead, functools.partial(step, masked=True, last=False), carry)
        carry = lax.fori_loop(ahead, count, functools.partial(step, masked=True, last=True), carry)
        self._merge(carry, row_tile, part, **refs)

    def _scores(self, q, keys, wide, stage, refs) -> jax.Array:
        """Give scaled scores to base two."""
        plgpu.barrier_wait(refs["k_full"].at[stage])
        factors = None
        if wide is not None:
            factors = _column_values(refs["k_scales"].at[stage])
            self._widen(keys, wide, None)
            keys = wide

        def product(acc):
            plgpu.wgmma(acc, q, keys.T)
            plgpu.wgmma_wait(0)
            return hold(acc[...], interpret=self.interpret)

        scores = pl.run_scoped(product, Accumulator((TILE, TILE), jnp.float32))
        scores = scores * (self.problem.scale * math.log2(math.e))
        return scores if factors is None else scores * _down(factors, scores.shape)

    def _rotate(self, tile, rotation) -> None:
        """Turn each pair (i, i + H/2) of every row by the sequence's angles."""
        half = self.h // 2
        for first in range(0, half, TILE):
            low, high = pl.ds(first, TILE), pl.ds(half + first, TILE)
            x, y = (plgpu.load(tile.at[:, columns], layout=WGMMA).astype(jnp.float32) for columns in (low, high))
            cos, sin = (_column_values(rotation.at[i, columns]) for i, columns in ((0, low), (1, high)))
            cos, sin = _down(cos, x.shape), _down(sin, x.shape)
            tile[:, low] = (x * cos - y * sin).astype(jnp.bfloat16)
            tile[:, high] = (y * cos + x * sin).astype(jnp.bfloat16)
        plgpu.commit_smem()

    def _widen(self, source, target, count) -> None:
        """Copy a tile into `target` in bfloat16; where `count` is given, with zeros from that row on.

        Whatever was read of the stage before is committed too: TMA may then write there.
        """
        narrow = jnp.dtype(source.dtype).itemsize == 1
        layout = _UPCAST if narrow else WGMMA
        columns = min(self.h, 128 if narrow else 64)  # those of a swizzled piece: few registers at a time
        for first in range(0, self.h, columns):
            tile = plgpu.load(source.at[:, pl.ds(first, columns)], layout=layout)
            if tile.dtype == jnp.float8_e4m3fn:  # Hopper converts it to float16 alone
                tile = tile.astype(jnp.float16).astype(jnp.float32)
            tile = tile.astype(jnp.bfloat16)
            if count is not None:
                tile = jnp.where(plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=layout) < count, tile, 0.0)
            target[:, pl.ds(first, columns)] = tile
        plgpu.commit_smem()

    def _bounds(self, span: Span, row_tile, first) -> jax.Array:
        """Say which keys of a tile from key `first` on each row sees."""
        problem, shape = self.problem, (TILE, TILE)
        keys = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
        if problem.tokens == 1:
            seen = keys < span.high - first
            return seen if span.window is None else seen & (keys > span.start - span.window - first)
        rows = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA)
        rows = rows + (lax.axis_index("rows") * self.config.row_tiles + row_tile) * TILE
        position = span.start - first + lax.div(rows, jnp.full(shape, problem.group, jnp.int32))
        seen = (keys <= position) & (keys < span.length - first)
        return seen if span.window is None else seen & (keys > position - span.window)

    def _add_product(self, acc, weights, values) -> jax.Array:
        def product(total):
            total[...] = acc
            plgpu.wgmma(total, weights, values)
            plgpu.wgmma_wait(0)
            return hold(total[...], interpret=self.interpret)

        return pl.run_scoped(product, Accumulator(acc.shape, jnp.float32))

    def _merge(self, carry, row_tile, part, **refs) -> None:
        """Bring the parts together, and store."""
        config = self.config
        if config.parts == 1:
            self._store(carry, row_tile, **refs)
            return
        acc, top, total = carry
        places = [refs[name] for name in ("part_out", "part_top", "part_sum")]
        ready = refs["part_full"].at[row_tile]

        @pl.when(part > 0)
        def _():
            for place, value in zip(places, carry, strict=True):
                place[part - 1, row_tile] = value
            plgpu.barrier_arrive(ready)

        @pl.when(part == 0)
        def _():
            plgpu.barrier_wait(ready)
            out, high, sums = acc, top, total
            for other in range(config.parts - 1):
                other_acc = plgpu.load(places[0].at[other, row_tile], layout=WGMMA)
                other_top, other_sum = (row_values(place.at[other, row_tile]) for place in places[1:])
                new = jnp.maximum(high, other_top)
                finite = jnp.where(new == -jnp.inf, 0.0, new)
                fade, other_fade = jnp.exp2(high - finite), jnp.exp2(other_top - finite)
                out = out * _across(fade, out.shape) + other_acc * _across(other_fade, out.shape)
                high, sums = new, sums * fade + other_sum * other_fade
            self._store((out, high, sums), row_tile, **refs)

    def _store(self, carry, row_tile, *, out, out_tile, sums_out=None, sums_tile=None, **refs) -> None:
        acc, top, total = carry
        acc = acc * _across(jnp.where(total > 0, 1 / total, 0.0), acc.shape)
        split = lax.axis_index("split")
        place = (split if self.config.apart else 0, lax.axis_index("sequence"), lax.axis_index("head"))
        first = (lax.axis_index("rows") * self.config.row_tiles + row_tile) * TILE
        rows = min(TILE, out.shape[3])
        target = out.at[*place, pl.ds(0 if rows < TILE else first, rows)]
        sums = jnp.where(total > 0, top + jnp.log2(total), -jnp.inf)
        if self.config.cluster:
            self._send(acc, sums, out_tile.at[0], **refs)
            pl.when(split < self.reducers)(lambda: self._receive(target, rows, **refs))
            return
        if sums_tile is not None:
            sums_tile[row_tile] = sums
        for column in range(0, self.h, self.out_columns):
            columns = pl.ds(column, self.out_columns)
            out_tile[row_tile] = acc[:, column : column + self.out_columns].astype(self.result_dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_tile.at[row_tile, pl.ds(self.first_row(), rows)], target.at[:, columns])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if sums_out is not None and sums_tile is not None:
            plgpu.copy_smem_to_gmem(sums_tile.at[row_tile], sums_out.at[*place, pl.ds(first, TILE)])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _send(self, acc, sums, out_tile, *, all_out, all_sums, all_full, **_) -> None:
        """Give each of the blocks that bring results together its columns of this block's, and the sums."""
        split, columns = lax.axis_index("split"), all_out.shape[1]

        def send(value, place, blocks) -> None:
            out_tile[...] = value
            plgpu.commit_smem()
            piece = plgpu.load(out_tile.at[pl.ds(0, self.tile_rows)].T, layout=_TRANSPOSED, optimized=False)
            plgpu.commit_smem()  # all have read before any writes what comes next
            for block in blocks:
                plgpu.async_store_smem(piece, place.T, all_full, cluster_idx=jnp.int32(block), cluster_dim="split")

        send(_across(sums, (TILE, TILE)), all_sums.at[split], range(self.reducers))
        for i in range(self.h // TILE):
            send(acc[:, i * TILE : (i + 1) * TILE], all_out.at[split, i % columns], [i // columns])

    def _receive(self, target, count, *, all_out, all_sums, all_full, result_tile, **_) -> None:
        """Average what the blocks of the cluster found, each weighed by its sum, and store it."""
        plgpu.barrier_wait(all_full)
        splits, columns = range(self.config.splits), all_out.shape[1]
        sums = [plgpu.load(all_sums.at[i].T, layout=_TRANSPOSED) for i in splits]
        top = functools.reduce(jnp.maximum, sums)
        finite = jnp.where(top == -jnp.inf, 0.0, top)
        weights = [jnp.exp2(value - finite) for value in sums]
        total = functools.reduce(jnp.add, weights)
        factor = jnp.where(total > 0, 1 / total, 0.0)
        for j in range(columns):
            parts = [plgpu.load(all_out.at[i, j].T, layout=_TRANSPOSED) * weights[i] for i in splits]
            result_tile.at[j].T[...] = (functools.reduce(jnp.add, parts) * factor).astype(self.result_dtype)
        plgpu.commit_smem()
        for j in range(columns):
            place = pl.ds((lax.axis_index("split") * columns + j) * TILE, TILE)
            plgpu.copy_smem_to_gmem(result_tile.at[j, pl.ds(self.first_row(), count)], target.at[:, place])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _across(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat one value a row."""
    return lax.broadcast_in_dim(values, shape, (0,))


def _down(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat one value a column."""
    return lax.broadcast_in_dim(values, shape, (1,))


def _column_values(ref) -> jax.Array:
    return plgpu.load(ref, layout=_COLUMNS, optimized=False)
