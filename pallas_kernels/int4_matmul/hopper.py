"""Int4 matmul for Hopper in Mosaic GPU: int4 codes become the left operands of the tensor cores in registers.

A block of threads computes `row_tiles` x 64 output channels for `tile_m` rows of x. The weight is the left operand of
wgmma (operands swapped), so that a few rows of x cost few columns of tensor-core work; codes become bfloat16 in the
registers that wgmma reads. Codes and x come into shared memory by TMA, which one further warpgroup issues: codes need
not be shared, but there more of them can be under way than registers hold. K may be split over `k_parts` warpgroups
of a block and over the `splits` blocks of a cluster; partial sums meet in shared memory of the cluster, each block
summing its share of the rows of x in fixed order, so that results do not depend on timing.

The coordinates `z = A x` of a compensator are one more tile of rows, of a warpgroup of its own in each part of K: the
blocks of a row of clusters all compute them, which costs reading A from the second-level cache, and no launch.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int8, Shaped

from pallas_kernels.hopper import WGMMA, Accumulator, feed_and_compute, hold, row_values, shared_tile, whole_rows
from pallas_kernels.int4_matmul.fragments import CODE_BYTES, CODE_ROWS, read_factor, read_words, unpack_words
from pallas_kernels.packing import RANK_STEP, SIDE

_FEEDER_REGISTERS = 40
_MOST_BLOCKS = 256 // CODE_ROWS
"""Blocks of 64 columns in a copy: the copy engine takes 256 lines."""

_PAIRED_COLUMNS = 32
RATIONED_ROWS = 128
"""Rows of x in a tile from which on the computing warpgroups get registers of the feeding one."""

_WARPGROUP = 128
_MOST_THREADS = 1024
MOST_PROJECTED_ROWS = 64
"""Rows of x up to which a product computes the coordinates of its compensator itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HopperConfig:
    """How a product is cut up.

    `tile_m` rows of x a block takes (a multiple of 8, at most 256); `row_tiles` warpgroups side by side, 64 output
    channels each; `k_parts` warpgroups and `splits` blocks of a cluster that share K; `blocks` of 64 columns in a step,
    which one copy brings and which are converted one by one, each while the one before is multiplied;
    `slots` steps that are in shared memory or on the way there; `overlap` lets the kernel start while the one before it
    still runs.
    """

    tile_m: int
    row_tiles: int = 1
    k_parts: int = 1
    splits: int = 1
    blocks: int = 2
    slots: int = 4
    overlap: bool = True

    def check(self, *, n: int, k: int, groups: int, projected: bool = False, paired: bool = False) -> None:
        """Raise NotImplementedError where a weight [n, k] with so many groups of columns cannot be cut up like this.

        `projected` says that coordinates are computed along with the product, `paired` that tiles belong together.
        """
        if (self.row_tiles + projected) * self.k_parts * _WARPGROUP + _WARPGROUP > _MOST_THREADS:
            raise NotImplementedError(f"{self.row_tiles} tiles x {self.k_parts} parts take more than 1,024 threads")
        if projected and self.tile_m > MOST_PROJECTED_ROWS:
            raise NotImplementedError(f"coordinates are for up to {MOST_PROJECTED_ROWS} rows, got {self.tile_m}")
        if paired and self.row_tiles % 2:
            raise NotImplementedError(f"paired tiles go two by two into a block, got row_tiles={self.row_tiles}")
        if self.tile_m % 8 or not 8 <= self.tile_m <= 256:
            raise NotImplementedError(f"tile_m must be a multiple of 8 up to 256, got {self.tile_m}")
        if self.blocks > _MOST_BLOCKS:
            raise NotImplementedError(f"a copy brings {_MOST_BLOCKS} blocks at most, got {self.blocks}")
        if n % (SIDE * self.row_tiles):
            raise NotImplementedError(f"{n} output channels are no multiple of {self.row_tiles} tiles of {SIDE}")
        share = SIDE * self.k_parts * self.splits * self.blocks
        if k % share:
            raise NotImplementedError(f"{k} columns are no multiple of {share}: 64 x k_parts x splits x blocks")
        step, group = SIDE * self.blocks, k // groups
        if groups > 1 and any(size % group and group % size for size in (step, SIDE)):
            raise NotImplementedError(f"groups of {group} columns, blocks of {SIDE}, steps of {step}: no multiples")

    @property
    def parts(self) -> int:
        """Pieces that K is cut into."""
        return self.k_parts * self.splits

    @property
    def reducers(self) -> int:
        """Blocks of a cluster that sum partial results, each for tile_m / reducers rows of x."""
        return math.gcd(self.splits, self.tile_m // 8)


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
    interpret: plgpu.InterpretGPUParams | bool = False,
) -> Float[Array, "M N"]:
    """Compute `x W^T + bias + z b^T`, W in the order of `to_fragments`; R a multiple of 16.

    Coordinates are given as `z`, or computed as `A x` from `a` in the order of `factor_to_fragments`. With
    an activation, tiles of 64 output channels belong together two by two, and the result is [M, N / 2]:
    `activation(even tile) * odd tile`.
    The last block of rows of x may reach beyond M: the copy engine fills it with zeros and stores what is inside.

    Raises:
        NotImplementedError: The shapes cannot be cut up as `config` says, or M is over 8 and no multiple of it.
    """
    (m, k), n = x.shape, packed.shape[0]
    if whole_rows(m) != m:
        raise NotImplementedError(f"x must have up to 8 rows or a multiple of 8, got {m}")
    config.check(n=n, k=k, groups=scale.shape[0], projected=a is not None, paired=activation is not None)
    assert b is None or (b.shape[1] % RANK_STEP == 0 and (a is None) != (z is None))
    optional = {"zero": zero, "bias": bias, "b": b, "z": z, "a": a}
    given = {name: operand for name, operand in optional.items() if operand is not None}
    kernel = _Kernel(
        config,
        n=n,
        k=k,
        groups=scale.shape[0],
        rank=0 if b is None else b.shape[1],
        projected=a is not None,
        paired=activation is not None,
        out_dtype=out_dtype,
        interpret=bool(interpret),
    )
    shared = kernel.scratch(scale, zero, b)

    def int4_matmul(packed, scale, x, *rest):
        refs = dict(zip((*given, "out", *shared), rest, strict=True))
        kernel(packed=packed, scale=scale, x=x, **refs)

    run = plgpu.kernel(
        int4_matmul,
        out_type=jax.ShapeDtypeStruct((m, n if activation is None else n // 2), out_dtype),
        grid=(n // (SIDE * config.row_tiles), -(-m // config.tile_m)),
        grid_names=("n", "m"),
        cluster=(config.splits,),
        cluster_names=("split",),
        num_threads=kernel.tiles * config.k_parts + 1,
        thread_name="warpgroup",
        scratch_types=list(shared.values()),
        interpret=interpret,
    )
    return run(packed.reshape(n // SIDE, -1, CODE_BYTES), scale, x, *given.values())


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The program of a block, for shapes and settings that are known while it is traced."""

    config: HopperConfig
    n: int
    k: int
    groups: int
    rank: int
    projected: bool
    paired: bool
    out_dtype: jnp.dtype
    interpret: bool

    @property
    def tiles(self) -> int:
        """Warpgroups that compute for a part of K: tiles of output channels, and one of coordinates."""
        return self.config.row_tiles + self.projected

    @property
    def part_blocks(self) -> int:
        return self.k // SIDE // self.config.parts

    @property
    def steps(self) -> int:
        return self.part_blocks // self.config.blocks

    @property
    def slots(self) -> int:
        return min(self.config.slots, self.steps)

    @property
    def piece(self) -> int:
        """Columns that one chain of wgmma takes: a block's, or a group's where those are fewer."""
        return min(SIDE, self.k // self.groups)

    @property
    def scaled_weights(self) -> bool:
        """Say whether group scales go onto weights, where accumulators for each group would take too many registers."""
        return self.groups > 1 and self.config.tile_m > 16

    @property
    def overlap(self) -> bool:
        return self.config.overlap and not self.interpret

    @property
    def pieces(self) -> int:
        """Chains of wgmma in a block."""
        return SIDE // self.piece

    @property
    def step_groups(self) -> int:
        """Groups of columns that a step has scales of."""
        return max(1, SIDE * self.config.blocks * self.groups // self.k)

    def scratch(self, scale, zero, b) -> dict:
        config = self.config
        step, tile_m, share = SIDE * config.blocks, config.tile_m, config.tile_m // config.reducers
        chunk = min(SIDE, self.piece)  # columns of a swizzled tile of x: no chain of wgmma may begin inside one
        rings = config.k_parts * self.slots
        codes = (config.k_parts, self.slots, config.row_tiles, config.blocks * CODE_ROWS, CODE_BYTES)
        shapes = {
            "code_ring": plgpu.SMEM(codes, jnp.int8),
            "x_ring": shared_tile((config.k_parts, self.slots, tile_m, step), jnp.bfloat16, row=chunk * 2),
            "full": plgpu.Barrier(
                num_arrivals=2 + self.projected + (self.groups > 1) * (1 if zero is None else 2), num_barriers=rings
            ),
            "empty": plgpu.Barrier(num_arrivals=self.tiles, num_barriers=rings),
            "y_tile": shared_tile((config.row_tiles // (1 + self.paired), share, SIDE), self.out_dtype, row=128),
        }
        if config.parts > 1:
            shapes["sums"] = shared_tile((config.parts, self.tiles, SIDE, share), jnp.float32, row=share * 4)
            shapes["sums_full"] = plgpu.Barrier(num_arrivals=config.parts, num_barriers=self.tiles)
        if self.paired:
            pairs = config.row_tiles // 2
            # In float32 a large tile would take the room of two slots.
            dtype = jnp.dtype(jnp.float32 if share <= SIDE else jnp.bfloat16)
            shapes["odd_tile"] = shared_tile(
                (pairs, SIDE, share), dtype, row=min(share, _PAIRED_COLUMNS) * dtype.itemsize
            )
            shapes["odd_full"] = plgpu.Barrier(num_barriers=pairs)
        if self.groups > 1:
            values = (config.k_parts, self.slots, self.step_groups, SIDE * config.row_tiles)
            shapes["scale_ring"] = plgpu.SMEM(values, scale.dtype)
            if zero is not None:
                shapes["zero_ring"] = plgpu.SMEM(values, zero.dtype)
        if b is not None:
            rank = b.shape[1]
            shapes["b_tile"] = plgpu.SMEM((SIDE * config.row_tiles, rank), b.dtype)
            shapes["b_full"] = plgpu.Barrier()
            z_shape = (share, SIDE) if self.projected else (tile_m, rank)
            shapes["z_tile"] = shared_tile(z_shape, jnp.bfloat16, row=rank * 2)
            shapes["z_full"] = plgpu.Barrier()
        if self.projected:
            shapes["a_ring"] = plgpu.SMEM((config.k_parts, self.slots, config.blocks * self.rank, SIDE), jnp.bfloat16)
        return shapes

    def __call__(self, **refs) -> None:
        compute = self.tiles * self.config.k_parts
        # Large tiles take more registers than an even share; one warpgroup alone has as many as a thread can have.
        rationed = not self.interpret and self.config.tile_m >= RATIONED_ROWS and compute > 1
        feed_and_compute(
            functools.partial(self._feed, **refs),
            functools.partial(self._compute, **refs),
            compute=compute,
            feeder=_FEEDER_REGISTERS if rationed else None,
        )

    def _copies(
        self, *, x: Any, packed: Any, x_ring: Any, code_ring: Any, full: Any, scale: Any, zero=None, a=None, **refs: Any
    ) -> tuple[Callable[..., None], Callable[..., None]]:
        """Give functions that bring a step's codes and groups' values, and its columns of x, into shared memory."""
        config = self.config
        first_tile = lax.axis_index("n") * config.row_tiles
        tiles, channels = pl.ds(first_tile, config.row_tiles), pl.ds(first_tile * SIDE, config.row_tiles * SIDE)
        rows = pl.ds(lax.axis_index("m") * config.tile_m, config.tile_m)

        def block(i, part):
            return (lax.axis_index("split") * config.k_parts + part) * self.part_blocks + i * config.blocks

        def copy_weights(i, part, slot):
            barrier, first = full.at[part * self.slots + slot], block(i, part)
            lines = pl.ds(first * CODE_ROWS, config.blocks * CODE_ROWS)
            plgpu.copy_gmem_to_smem(packed.at[tiles, lines], code_ring.at[part, slot], barrier)
            if a is not None:
                factors = pl.ds(first * self.rank, config.blocks * self.rank)
                plgpu.copy_gmem_to_smem(a.at[factors], refs["a_ring"].at[part, slot], barrier)
            if self.groups > 1:
                groups = pl.ds(first * SIDE * self.groups // self.k, self.step_groups)
                for name, values in {"scale_ring": scale, "zero_ring": zero}.items():
                    if values is not None:
                        plgpu.copy_gmem_to_smem(values.at[groups, channels], refs[name].at[part, slot], barrier)

        def copy_x(i, part, slot):
            columns = pl.ds(block(i, part) * SIDE, SIDE * config.blocks)
            plgpu.copy_gmem_to_smem(x.at[rows, columns], x_ring.at[part, slot], full.at[part * self.slots + slot])

        return copy_weights, copy_x

    def _fill(self, part, row_tile, **refs) -> None:
        """Fill the slots of a part of K for the first time, the warpgroups of its tiles a share each.

        A thread begins one copy after the other: one warpgroup alone would be at it for long.
        """
        copy_weights, copy_x = self._copies(**refs)

        def share(copy):
            def one(j, _):
                i = j * self.config.row_tiles + row_tile
                pl.when(i < self.slots)(lambda: copy(i, part, i))

            lax.fori_loop(0, -(-self.slots // self.config.row_tiles), one, None)

        share(copy_weights)
        if self.overlap:  # what comes next may be of the kernel before
            plgpu.griddepcontrol_wait()
        share(copy_x)

    def _feed(self, *, empty, b=None, z=None, **refs) -> None:
        """Bring further steps into shared memory as slots become free, and what the epilogue needs."""
        config = self.config
        copy_weights, copy_x = self._copies(**refs)
        if b is not None:
            channels = pl.ds(lax.axis_index("n") * config.row_tiles * SIDE, config.row_tiles * SIDE)
            plgpu.copy_gmem_to_smem(b.at[channels], refs["b_tile"], refs["b_full"])
        if self.overlap:
            plgpu.griddepcontrol_wait()
        if z is not None:
            rows = pl.ds(lax.axis_index("m") * config.tile_m, config.tile_m)
            plgpu.copy_gmem_to_smem(z.at[rows], refs["z_tile"], refs["z_full"])

        def step(i, _):
            slot = lax.rem(i, jnp.int32(self.slots))
            for part in range(config.k_parts):
                plgpu.barrier_wait(empty.at[part * self.slots + slot])
                copy_weights(i, part, slot)
                copy_x(i, part, slot)

        lax.fori_loop(self.slots, self.steps, step, None)
        for at in range(config.k_parts * self.slots):
            plgpu.barrier_wait(empty.at[at])
        if b is not None:  # a block that sums nothing does not use it, but may not end before it has come
            plgpu.barrier_wait(refs["b_full"])
        if z is not None:
            plgpu.barrier_wait(refs["z_full"])

    def _compute(self, warpgroup, **refs) -> None:
        k_part, tile = warpgroup // self.tiles, warpgroup % self.tiles
        if not self.projected:
            self._multiply(k_part, tile, **refs)
            return
        coordinates = tile == self.config.row_tiles
        pl.when(coordinates)(lambda: self._project(k_part, **refs))
        pl.when(~coordinates)(lambda: self._multiply(k_part, tile, **refs))

    def _project(self, k_part, *, x_ring, a_ring, full, empty, z_tile, z_full, **refs) -> None:
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

        def finish(z, _):
            z_tile.T[...] = plgpu.layout_cast(z.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            plgpu.barrier_arrive(z_full)

        z = pl.run_scoped(run, Accumulator((SIDE, config.tile_m), jnp.float32))
        if self.overlap:
            plgpu.griddepcontrol_launch_dependents()
        self._reduce(z, finish, k_part=k_part, row_tile=config.row_tiles, **refs)

    def _multiply(self, k_part, row_tile, *, scale, code_ring, x_ring, full, empty, zero=None, **refs) -> None:
        """Multiply the codes of a tile of 64 output channels with a part of K."""
        config = self.config
        shared = {"code_ring": code_ring, "x_ring": x_ring, "full": full, "scale": scale, "zero": zero}
        self._fill(k_part, row_tile, **shared, **refs)
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
        if self.overlap:
            plgpu.griddepcontrol_launch_dependents()
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

    def _store(self, y, first, row_tile, tile, *, out, y_tile, odd_tile=None, **_) -> None:
        rows = pl.ds(tile * SIDE, SIDE)
        # A few columns at a time: registers do not hold both tiles of a pair.
        count = y.shape[1] if odd_tile is None else min(y.shape[1], _PAIRED_COLUMNS)
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
