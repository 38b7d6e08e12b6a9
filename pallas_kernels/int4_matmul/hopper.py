"""Int4 matmul for Hopper in Mosaic GPU: int4 codes become the left operands of the tensor cores in registers.

A block of threads computes `row_tiles` x 64 output channels for `tile_m` rows of x. The weight is the left operand of
wgmma (operands swapped), so that a few rows of x cost few columns of tensor-core work; codes become bfloat16 in the
registers that wgmma reads. Codes and x come into shared memory by TMA: codes need not be shared, but there more of
them can be under way than registers hold. The computing warpgroups begin the first copies, one further warpgroup the
others. K may be split over `k_parts` warpgroups of a block and over the `splits` blocks of a cluster; partial sums meet
in shared memory of the cluster, each block summing its share of the rows of x in fixed order, so that results do not
depend on timing.

The coordinates `z = A x` of a compensator are one more tile of rows, of a warpgroup of its own in each part of K: the
blocks of a row of clusters all compute them, which costs reading A from the second-level cache, and no launch.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int8, Shaped

from pallas_kernels.hopper import WGMMA, Accumulator, feed_and_compute, hold, row_values, whole_rows
from pallas_kernels.int4_matmul.feed import PAIRED_COLUMNS, Block
from pallas_kernels.int4_matmul.fragments import CODE_BYTES, CODE_ROWS, read_factor, read_words, unpack_words
from pallas_kernels.int4_matmul.plan import FEEDER_REGISTERS, RATIONED_ROWS, HopperConfig
from pallas_kernels.packing import RANK_STEP, SIDE
from pallas_kernels.signals import Peers, Sum, signal

_FLAG_ROWS = 8
"""Rows of a result that have a flag in peers' inboxes."""


def int4_matmul_hopper(
    x: BFloat16[Array, "M K"],
    packed: Int8[Array, "N K/2"],
    scale: Float[Array, "G N"],
    zero: Int8[Array, "G N"] | None,
    bias: Float[Array, " N"] | None,
    b: Shaped[Array, "N R"] | None,
    z: BFloat16[Array, "M R"] | None,
    a: BFloat16[Array, "R*K/64 64"] | None = None,
    *,
    config: HopperConfig,
    out_dtype: jnp.dtype,
    activation: Literal["silu"] | None = None,
    peers: Peers | None = None,
    interpret: plgpu.InterpretGPUParams | bool = False,
) -> Float[Array, "M N"] | None:
    """Compute `x W^T + bias + z b^T`, W in the order of `to_fragments`; R a multiple of 16.

    Coordinates are given as `z`, or computed as `A x` from `a` in the order of `factor_to_fragments`. With
    an activation, tiles of 64 output channels belong together two by two, and the result is [M, N / 2]:
    `activation(even tile) * odd tile`.
    With `peers` nothing is given: results, and the coordinates that `a` makes and no b is applied to, are written in
    float32 into the inboxes of all devices, each tile with a flag.
    The last block of rows of x may reach beyond M: the copy engine fills it with zeros and stores what is inside.

    Raises:
        NotImplementedError: The shapes cannot be cut up as `config` says, or M is over 8 and no multiple of it.
    """
    (m, k), n = x.shape, packed.shape[0]
    if whole_rows(m) != m:
        raise NotImplementedError(f"x must have up to 8 rows or a multiple of 8, got {m}")
    config.check(n=n, k=k, groups=scale.shape[0], projected=a is not None, paired=activation is not None)
    assert b is None or (b.shape[1] % RANK_STEP == 0 and (a is None) != (z is None))
    assert peers is None or (b is None and activation is None and out_dtype == jnp.float32)
    optional = {"zero": zero, "bias": bias, "b": b, "z": z, "a": a}
    given = {name: operand for name, operand in optional.items() if operand is not None}
    kernel = _Kernel(
        config,
        n=n,
        k=k,
        groups=scale.shape[0],
        rank=(0 if a is None else a.size // k) if b is None else b.shape[1],
        projected=a is not None,
        paired=activation is not None,
        out_dtype=out_dtype,
        interpret=bool(interpret),
        peers=peers,
    )
    shared = kernel.scratch(scale, zero, b)
    inboxes = {}
    if peers is not None:
        inboxes = {name: getattr(peers, name) for name in ("y", "z", "flags", "generation")}

    def int4_matmul(packed, scale, x, *rest):
        results = ("out",) if peers is None else ()
        refs = dict(zip((*given, *(f"{name}_inbox" for name in inboxes), *results, *shared), rest, strict=True))
        kernel(packed=packed, scale=scale, x=x, **refs)

    run = plgpu.kernel(
        int4_matmul,
        out_type=() if peers is not None else jax.ShapeDtypeStruct((m, n if activation is None else n // 2), out_dtype),
        grid=(n // (SIDE * config.row_tiles), -(-m // config.tile_m)),
        grid_names=("n", "m"),
        cluster=(config.splits,),
        cluster_names=("split",),
        num_threads=kernel.tiles * config.k_parts + 1,
        thread_name="warpgroup",
        scratch_types=list(shared.values()),
        compiler_params=plgpu.CompilerParams(skip_device_barrier=peers is not None),
        interpret=interpret,
    )
    y = run(packed.reshape(n // SIDE, -1, CODE_BYTES), scale, x, *given.values(), *inboxes.values())
    return y if peers is None else None


@dataclasses.dataclass(frozen=True)
class _Kernel(Block):
    """The program of a block."""

    def __call__(self, **refs) -> None:
        if self.overlap:  # as soon as all blocks have begun: what the next kernel reads first are its weights
            plgpu.griddepcontrol_launch_dependents()
        compute = self.tiles * self.config.k_parts
        # Large tiles take more registers than an even share; one warpgroup alone has as many as a thread can have.
        rationed = not self.interpret and self.config.tile_m >= RATIONED_ROWS and compute > 1
        feed_and_compute(
            functools.partial(self.feed, **refs),
            functools.partial(self._compute, **refs),
            compute=compute,
            feeder=FEEDER_REGISTERS if rationed else None,
        )

    def _compute(self, warpgroup, **refs) -> None:
        k_part, tile = warpgroup // self.tiles, warpgroup % self.tiles
        if not self.projected:
            self._multiply(k_part, tile, **refs)
            return
        coordinates = tile == self.config.row_tiles
        pl.when(coordinates)(lambda: self._project(k_part, **refs))
        pl.when(~coordinates)(lambda: self._multiply(k_part, tile, **refs))

    def _project(self, k_part, *, x_ring, a_ring, full, empty, z_tile, z_full=None, **refs) -> None:
        """Multiply A with a part of K and bring the parts together, for the other warpgroups to multiply with B."""
        config = self.config

        def run(acc):
            def step(i, _):
                slot = lax.rem(i, jnp.int32(self.slots))
                place = k_part * self.slots + slot
                plgpu.barrier_wait(full.at[place])
                for block in range(config.blocks):
                    lines = a_ring.at[k_part, slot, pl.ds(block * self.rank, self.rank)]
                    factor = read_factor(lines, 1, self.rank, interpret=self.interpret)
                    plgpu.wgmma(acc, factor, x_ring.at[k_part, slot, :, pl.ds(block * SIDE, SIDE)].T)
                    plgpu.wgmma_wait(1 if block + 1 < config.blocks else 0)
                plgpu.commit_smem()
                plgpu.barrier_arrive(empty.at[place])

            lax.fori_loop(0, self.steps, step, None)
            return hold(acc[...], interpret=self.interpret)

        def finish(z, first):
            if self.peers is not None:
                # All blocks of a row of clusters have them.
                number = refs["generation_inbox"][0]
                pl.when(lax.axis_index("n") == 0)(
                    lambda: self._send(z, first, z_tile, self.n // SIDE, number=number, **refs)
                )
                return
            z_tile.T[...] = plgpu.layout_cast(z.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            assert z_full is not None
            plgpu.barrier_arrive(z_full)

        z = pl.run_scoped(run, Accumulator((SIDE, config.tile_m), jnp.float32))
        self._reduce(z, finish, k_part=k_part, row_tile=config.row_tiles, **refs)

    def _multiply(self, k_part, row_tile, *, scale, code_ring, x_ring, full, empty, zero=None, **refs) -> None:
        """Multiply the codes of a tile of 64 output channels with a part of K."""
        config = self.config
        shared = {"code_ring": code_ring, "x_ring": x_ring, "full": full, "scale": scale, "zero": zero}
        self.fill(k_part, row_tile, **shared, **refs)
        if self.peers is not None:  # early: it is far away
            refs["number"] = refs["generation_inbox"][0]
        tile = lax.axis_index("n") * config.row_tiles + row_tile
        rows = pl.ds(tile * SIDE, SIDE)

        row_scale = row_zero = None
        if self.groups == 1:
            row_scale = row_values(scale.at[0, rows]).astype(jnp.float32)
            row_zero = None if zero is None else row_values(zero.at[0, rows]).astype(jnp.int32)

        def group_values(ring, slot, first, dtype):
            """Give the values of the groups of a block that begins at column `first` of a step."""
            channels, group = pl.ds(row_tile * SIDE, SIDE), self.k // self.groups
            places = [(first + j * self.piece) // group for j in range(self.pieces)]
            return tuple(row_values(ring.at[k_part, slot, place, channels]).astype(dtype) for place in places)

        def multiply(i, acc, total):
            slot = lax.rem(i, jnp.int32(self.slots))
            place = k_part * self.slots + slot
            plgpu.barrier_wait(full.at[place])
            for block in range(config.blocks):
                first = block * SIDE
                scales, zeros = (), () if row_zero is None else (row_zero,) * self.pieces
                if self.groups > 1:
                    scales = group_values(refs["scale_ring"], slot, first, jnp.float32)
                    zeros = () if zero is None else group_values(refs["zero_ring"], slot, first, jnp.int32)
                lines = pl.ds(block * CODE_ROWS, CODE_ROWS)
                weights = unpack_words(
                    read_words(code_ring.at[k_part, slot, row_tile, lines], 1, interpret=self.interpret),
                    columns=self.piece,
                    zeros=zeros,
                    scales=scales if self.scaled_weights else (),
                    interpret=self.interpret,
                )
                starts = [first + j * self.piece for j in range(self.pieces)]
                columns = [x_ring.at[k_part, slot, :, pl.ds(start, self.piece)] for start in starts]
                if acc is not None:
                    for weight, column in zip(weights, columns, strict=True):
                        plgpu.wgmma(acc, weight, column.T)
                    plgpu.wgmma_wait(self.pieces if block + 1 < config.blocks else 0)
                else:
                    total = total + self._scaled_sum(weights, columns, scales)
            plgpu.commit_smem()  # what threads have read is next written by the copy engine
            plgpu.barrier_arrive(empty.at[place])
            return total

        def run(acc):
            total = jnp.float32(0) if acc is not None else plgpu.layout_cast(self._zeros(), WGMMA)
            total = lax.fori_loop(0, self.steps, lambda i, total: multiply(i, acc, total), total)
            return total if acc is None else hold(acc[...], interpret=self.interpret)

        if self.groups == 1 or self.scaled_weights:
            y = pl.run_scoped(run, Accumulator((SIDE, config.tile_m), jnp.float32))
        else:
            y = run(None)
        finish = functools.partial(self._finish, row_tile=row_tile, tile=tile, row_scale=row_scale, **refs)
        self._reduce(y, finish, k_part=k_part, row_tile=row_tile, **refs)

    def _zeros(self) -> jax.Array:
        return jnp.zeros((SIDE, self.config.tile_m), jnp.float32)

    def _scaled_sum(self, weights, columns, scales) -> jax.Array:
        """Sum products of groups, each in accumulators of its own, times the groups' scales, in float32."""

        def products(*accs):
            for acc, weight, column in zip(accs, weights, columns, strict=True):
                plgpu.wgmma(acc, weight, column.T)
            plgpu.wgmma_wait(0)
            return [hold(acc[...], interpret=self.interpret) for acc in accs]

        shape = (SIDE, self.config.tile_m)
        sums = pl.run_scoped(products, *[Accumulator(shape, jnp.float32)] * len(weights))
        return functools.reduce(
            jnp.add, [part * lax.broadcast_in_dim(scale, shape, (0,)) for part, scale in zip(sums, scales, strict=True)]
        )

    def _reduce(self, y, finish, *, k_part, row_tile, **refs) -> None:
        """Bring the partial sums of a tile together and finish it."""
        config = self.config
        part = lax.axis_index("split") * config.k_parts + k_part
        if config.parts == 1:
            finish(y, 0)
            return
        sums, sums_full = refs["sums"], refs["sums_full"].at[row_tile]
        share = config.tile_m // config.reducers
        if config.splits == 1:
            sums[part, row_tile] = y
            plgpu.commit_smem()
            plgpu.barrier_arrive(sums_full)
        else:
            for i in range(config.reducers):
                piece, place = y[:, i * share : (i + 1) * share], sums.at[part, row_tile]
                plgpu.async_store_smem(piece, place, sums_full, cluster_idx=jnp.int32(i), cluster_dim="split")
        split = lax.axis_index("split")

        @pl.when((k_part == 0) & (split < config.reducers))
        def _():
            plgpu.barrier_wait(sums_full)
            total = plgpu.load(sums.at[0, row_tile], layout=WGMMA)
            for i in range(1, config.parts):
                total = total + plgpu.load(sums.at[i, row_tile], layout=WGMMA)
            finish(total, split * share if config.reducers > 1 else 0)

    def _finish(self, y, first, *, row_tile, tile, row_scale, bias=None, b=None, **refs) -> None:
        """Scale, add bias and low-rank term, and store the columns of y that are rows `first` on of the tile's x."""
        rows = pl.ds(tile * SIDE, SIDE)
        if row_scale is not None:
            y = y * lax.broadcast_in_dim(row_scale, y.shape, (0,))
        if bias is not None:
            y = y + lax.broadcast_in_dim(row_values(bias.at[rows]).astype(jnp.float32), y.shape, (0,))
        if b is not None:
            y = self._add_low_rank(y, first, row_tile, **refs)
        if not self.paired:
            self._store(y, first, row_tile, tile, **refs)
            return
        odd_tile, odd_full = refs["odd_tile"].at[row_tile // 2], refs["odd_full"].at[row_tile // 2]

        @pl.when(row_tile % 2 == 1)
        def _():
            odd_tile[...] = y.astype(odd_tile.dtype)
            plgpu.barrier_arrive(odd_full)

        @pl.when(row_tile % 2 == 0)
        def _():
            plgpu.barrier_wait(odd_full)
            self._store(y, first, row_tile // 2, tile // 2, **refs | {"odd_tile": odd_tile})

    def _store(self, y, first, row_tile, tile, *, y_tile, out: Any = None, odd_tile=None, **refs) -> None:
        if self.peers is not None:
            self._send(y, first, y_tile.at[row_tile], tile, **refs)
            return
        rows = pl.ds(tile * SIDE, SIDE)
        count = y.shape[1] if odd_tile is None else min(y.shape[1], PAIRED_COLUMNS)
        for i in range(0, y.shape[1], count):
            piece = y[:, i : i + count]
            if odd_tile is not None:
                odd = plgpu.load(odd_tile.at[:, pl.ds(i, count)], layout=WGMMA).astype(jnp.float32)
                piece = piece / (1 + jnp.exp(-piece)) * odd
            piece = plgpu.layout_cast(piece.astype(self.out_dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            y_tile.at[row_tile, pl.ds(i, count)].T[...] = piece
        plgpu.commit_smem()
        place = lax.axis_index("m") * self.config.tile_m + first
        plgpu.copy_smem_to_gmem(y_tile.at[row_tile], out.at[pl.ds(place, y.shape[1]), rows])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _send(self, value, first, scratch, tile, *, number, y_inbox, z_inbox, flags_inbox, **_) -> None:
        """Write 64 columns of y, or the coordinates as the tile after all those, into all inboxes, and say so."""
        assert self.peers is not None
        sum_ = Sum(number=number, axis=self.peers.axis, devices=self.peers.devices, columns=self.n)
        scratch.T[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        first, count = lax.axis_index("m") * self.config.tile_m + first, value.shape[1]
        rows = pl.ds(first, count)
        inbox, columns = y_inbox, pl.ds(tile * SIDE, SIDE)
        if isinstance(tile, int):
            inbox, columns = z_inbox, pl.ds(0, SIDE)
        for place in sum_.everybody(inbox):
            plgpu.copy_smem_to_gmem(scratch, place.at[sum_.line(sum_.me), rows, columns])
        plgpu.wait_smem_to_gmem(0)
        signal(flags_inbox, sum_, first // _FLAG_ROWS, tile, row_blocks=count // _FLAG_ROWS, interpret=self.interpret)

    def _add_low_rank(self, y, first, row_tile, *, b_tile, b_full, z_tile, z_full, **_) -> jax.Array:
        plgpu.barrier_wait(b_full)
        plgpu.barrier_wait(z_full)
        factor = plgpu.load(b_tile.at[pl.ds(row_tile * SIDE, SIDE)], layout=WGMMA, optimized=False)
        factor = factor.astype(jnp.bfloat16)
        if self.projected:
            z = z_tile.at[:, pl.ds(0, self.rank)]
        else:
            z = z_tile if y.shape[1] == self.config.tile_m else z_tile.at[pl.ds(first, y.shape[1])]

        def product(acc):
            acc[...] = y
            plgpu.wgmma(acc, factor, z.T)
            plgpu.wgmma_wait(0)
            return hold(acc[...], interpret=self.interpret)

        return pl.run_scoped(product, Accumulator(y.shape, jnp.float32))
