"""The coordinates `z = A x` of a compensator on Hopper: one launch, in which a cluster of blocks shares K.

R is small, so this is a matter of latency: every block takes a piece of K, all its copies are under way at once, and
partial sums meet in the cluster's shared memory in fixed order. The product that needs z may start meanwhile.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Shaped

from pallas_kernels.hopper import WGMMA, Accumulator, hold, row_values, shared_tile
from pallas_kernels.packing import SIDE

_CLUSTER = 8
_WARPGROUPS = 4
_SLOTS = 4
MOST_ROWS = 64
"""Rows of x from which on a plain product is as good."""


def project_hopper(
    x: BFloat16[Array, "M K"],
    a: Shaped[Array, "R K"],
    scale: Float32[Array, " R"] | None,
    *,
    out_dtype: jnp.dtype,
    overlap: bool = True,
    interpret: plgpu.InterpretGPUParams | bool = False,
) -> Shaped[Array, "M R"]:
    """Compute `scale * (x A^T)`, A in int8 or bfloat16, sums in float32; R a multiple of 8.

    Raises:
        NotImplementedError: There are more than 64 rows of x, or K is not a multiple of 64.
    """
    (m, k), rank = x.shape, a.shape[0]
    if m > MOST_ROWS or k % SIDE:
        raise NotImplementedError(f"projects up to {MOST_ROWS} rows of multiples of {SIDE} columns, got [{m}, {k}]")
    assert rank % 8 == 0
    cluster = _divisor(k // SIDE, _CLUSTER)
    warpgroups = _divisor(k // SIDE // cluster, _WARPGROUPS)
    kernel = _Projection(
        tile_m=-(-m // 8) * 8 if m > 8 else 8,
        cluster=cluster,
        warpgroups=warpgroups,
        steps=k // SIDE // cluster // warpgroups,
        out_dtype=out_dtype,
        overlap=overlap and not interpret,
        interpret=bool(interpret),
    )
    operands = {"x": x, "a": a} | ({} if scale is None else {"scale": scale})
    shared = kernel.scratch(a.dtype, scaled=scale is not None)

    def project(*refs):
        kernel(**dict(zip((*operands, "out", *shared), refs, strict=True)))

    run = plgpu.kernel(
        project,
        out_type=jax.ShapeDtypeStruct((m, rank), out_dtype),
        grid=(-(-rank // SIDE),),
        grid_names=("rank",),
        cluster=(cluster,),
        cluster_names=("split",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types=list(shared.values()),
        interpret=interpret,
    )
    return run(*operands.values())


def _divisor(number: int, most: int) -> int:
    return max(d for d in range(1, most + 1) if number % d == 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Projection:
    """The program of a block."""

    tile_m: int
    cluster: int
    warpgroups: int
    steps: int
    out_dtype: jnp.dtype
    overlap: bool
    interpret: bool

    @property
    def slots(self) -> int:
        return min(_SLOTS, self.steps)

    @property
    def share(self) -> int:
        """Rows of x that a block of the cluster sums."""
        return self.tile_m // math.gcd(self.cluster, self.tile_m // 8)

    def scratch(self, dtype, *, scaled: bool) -> dict:
        rings, parts = (self.warpgroups, self.slots), self.warpgroups * self.cluster
        scale = {"scale_tile": plgpu.SMEM((SIDE,), jnp.float32), "scale_full": plgpu.Barrier()} if scaled else {}
        return scale | {
            "x_ring": shared_tile((*rings, self.tile_m, SIDE), jnp.bfloat16, row=2 * SIDE),
            "a_ring": plgpu.SMEM((*rings, SIDE, SIDE), dtype),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=self.warpgroups * self.slots),
            "sums": shared_tile((parts, SIDE, self.share), jnp.float32, row=4 * self.share),
            "sums_full": plgpu.Barrier(num_arrivals=parts),
            "z_tile": shared_tile((self.share, SIDE), self.out_dtype, row=128),
        }

    def __call__(self, *, x, a, out, x_ring, a_ring, full, sums, sums_full, z_tile, scale=None, **scales) -> None:
        warpgroup, split = lax.axis_index("warpgroup"), lax.axis_index("split")
        part = split * self.warpgroups + warpgroup
        ranks = pl.ds(lax.axis_index("rank") * SIDE, SIDE)
        sums_up = (warpgroup == 0) & (split < self.tile_m // self.share)

        def copy(source, rows, ring, i):
            columns, slot = pl.ds((part * self.steps + i) * SIDE, SIDE), i % self.slots
            barrier = full.at[warpgroup * self.slots + slot]
            plgpu.copy_gmem_to_smem(source.at[rows, columns], ring.at[warpgroup, slot], barrier)

        copy_a = functools.partial(copy, a, ranks, a_ring)
        copy_x = functools.partial(copy, x, pl.ds(0, self.tile_m), x_ring)
        for i in range(self.slots):
            copy_a(i)
        if scale is not None:

            @pl.when(sums_up)
            def _():
                plgpu.copy_gmem_to_smem(scale.at[ranks], scales["scale_tile"], scales["scale_full"])

        if self.overlap:
            plgpu.griddepcontrol_launch_dependents()
            plgpu.griddepcontrol_wait()
        for i in range(self.slots):
            copy_x(i)

        def product(acc):
            for i in range(self.steps):
                slot = i % self.slots
                plgpu.barrier_wait(full.at[warpgroup * self.slots + slot])
                rows = plgpu.load(a_ring.at[warpgroup, slot], layout=WGMMA, optimized=False)
                plgpu.wgmma(acc, rows.astype(jnp.bfloat16), x_ring.at[warpgroup, slot].T)
                plgpu.wgmma_wait(0)
                if i + self.slots < self.steps:
                    plgpu.commit_smem()
                    copy_a(i + self.slots)
                    copy_x(i + self.slots)
            return hold(acc[...], interpret=self.interpret)

        y = pl.run_scoped(product, Accumulator((SIDE, self.tile_m), jnp.float32))
        self._reduce(y, part, sums, sums_full)

        @pl.when(sums_up)
        def _():
            plgpu.barrier_wait(sums_full)
            parts = [plgpu.load(sums.at[i], layout=WGMMA) for i in range(self.warpgroups * self.cluster)]
            z = functools.reduce(jnp.add, parts)
            if scale is not None:
                plgpu.barrier_wait(scales["scale_full"])
                factor = row_values(scales["scale_tile"])
                z = z * lax.broadcast_in_dim(factor, z.shape, (0,))
            z_tile.T[...] = plgpu.layout_cast(z.astype(self.out_dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            place = split * self.share if self.share < self.tile_m else 0
            plgpu.copy_smem_to_gmem(z_tile, out.at[pl.ds(place, self.share), ranks])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _reduce(self, y, part, sums, sums_full) -> None:
        if self.cluster == 1:
            sums[part] = y
            plgpu.commit_smem()
            plgpu.barrier_arrive(sums_full)
            return
        for i in range(self.tile_m // self.share):
            piece = y[:, i * self.share : (i + 1) * self.share]
            plgpu.async_store_smem(piece, sums.at[part], sums_full, cluster_idx=jnp.int32(i), cluster_dim="split")
