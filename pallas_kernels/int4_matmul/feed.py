"""The int4 product on Hopper: a block's shared memory, and how codes, x and what else it takes get there."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import shared_tile
from pallas_kernels.int4_matmul.fragments import CODE_BYTES, CODE_ROWS
from pallas_kernels.int4_matmul.plan import HopperConfig
from pallas_kernels.packing import RANK_STEP, SIDE
from pallas_kernels.signals import Peers

PAIRED_COLUMNS = 32
"""Columns of a pair of tiles that an activation is applied to at a time: registers do not hold both tiles."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of threads: what is known of it while it is traced, its shared memory, and how that is filled."""

    config: HopperConfig
    n: int
    k: int
    groups: int
    rank: int
    projected: bool
    paired: bool
    out_dtype: jnp.dtype
    interpret: bool
    peers: Peers | None = None

    @property
    def tiles(self) -> int:
        """Warpgroups that compute for a part of K: tiles of output channels, and one of coordinates."""
        return self.config.row_tiles + self.projected

    @property
    def part_blocks(self) -> int:
        """Blocks of 64 columns in a part of K."""
        return self.k // SIDE // self.config.parts

    @property
    def steps(self) -> int:
        """Copies that bring a part of K."""
        return self.part_blocks // self.config.blocks

    @property
    def slots(self) -> int:
        """Places for steps in shared memory."""
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
        """Say whether the kernel starts before the one ahead of it has ended; the interpreter runs one at a time."""
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
        """Declare shared memory and barriers, by name."""
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
                (pairs, SIDE, share), dtype, row=min(share, PAIRED_COLUMNS) * dtype.itemsize
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
        elif self.projected:  # coordinates go to the inboxes
            shapes["z_tile"] = shared_tile((share, SIDE), jnp.float32, row=RANK_STEP * 4)
        if self.projected:
            shapes["a_ring"] = plgpu.SMEM((config.k_parts, self.slots, config.blocks * self.rank, SIDE), jnp.bfloat16)
        return shapes

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

    def fill(self, part, row_tile, **refs) -> None:
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

    def feed(self, *, empty, b=None, z=None, **refs) -> None:
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
