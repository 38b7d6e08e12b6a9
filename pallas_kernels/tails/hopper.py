"""What stands before an int4 product in a decode step, for Hopper in Mosaic GPU: one launch, mostly waiting.

A cluster of blocks takes eight rows of x and shares their K columns, a piece for each warpgroup. Weights (those of the
norm, and A) come into shared memory while the kernel before still runs; then everything that it wrote is under way at
once. A warpgroup makes its piece of x and multiplies it with A on tensor cores. What must be summed over K meets first
in shared memory of the block and then of the cluster, always in the same order.

The norm does not make z wait for its row statistics: z = rstd * A (weight * h) is scaled at the end, so that sums of
squares and of products travel at the same time.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Float32, Shaped

from pallas_kernels.hopper import SHARED_BYTES, WGMMA, Accumulator, hold, shared_tile
from pallas_kernels.packing import RANK_STEP, SIDE
from pallas_kernels.tails.reference import Activation

ROWS = 8
"""Rows of x that a cluster takes: the fewest columns of a wgmma."""

MOST_ROWS = 64
"""Rows of x from which on separate operations are as good."""

_CLUSTER = 8
_WARPGROUPS = 4
_PIECE = 256
"""Columns that a warpgroup has in registers at a time; and the most that the copy engine moves along an axis."""

_LANES = 16
"""Threads that hold a row between them: see `_DATA`."""

_SPARE_BYTES = 2048
"""Shared memory for barriers and alignment."""

# A warp has two rows of eight, half of it each. In `_DATA` a thread holds four neighbouring columns of every 64, so
# that a sum over columns needs no other warp; in `_SUMS` it holds one of every 16.
_DATA = plgpu.Layout.TILED(
    plgpu.Tiling(((ROWS, SIDE), (2, SIDE), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
_SUMS = plgpu.Layout.TILED(
    plgpu.Tiling(((ROWS, _LANES), (2, _LANES), (1,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)

Kind = Literal["norm", "glu", "plain"]


def tail_hopper(
    kind: Kind,
    first: BFloat16[Array, "M _"],
    update: BFloat16[Array, "M K"] | None = None,
    weight: Float32[Array, " K"] | None = None,
    a: Shaped[Array, "R K"] | None = None,
    a_scale: Float32[Array, " R"] | None = None,
    *,
    eps: float = 0.0,
    activation: Activation = "silu",
    z_dtype: jnp.dtype | type = jnp.float32,
    cluster: int = _CLUSTER,
    warpgroups: int = _WARPGROUPS,
    overlap: bool = True,
    interpret: plgpu.InterpretGPUParams | bool = False,
) -> dict[str, Float[Array, "M _"]]:
    """Compute a subset of h [M, K], x [M, K] and z [M, R], by name, R a multiple of 16.

    "norm": h = first + update where there is an update; x = rmsnorm(h) * weight. "glu": x = activation(first[:, :K]) *
    first[:, K:]. "plain": x is first. h and x are bfloat16; z = a_scale * (x A^T) where there is A, int8 or bfloat16.

    Raises:
        NotImplementedError: There are more than 64 rows, or more than eight but no multiple of eight; K is no multiple
            of 64; R is more than 64; or it does not fit into shared memory.
    """
    m, k = first.shape[0], first.shape[1] // (2 if kind == "glu" else 1)
    rank = 0 if a is None else a.shape[0]
    if m > MOST_ROWS or (m > ROWS and m % ROWS):
        raise NotImplementedError(f"{m} rows are more than {MOST_ROWS}, or more than {ROWS} but no multiple")
    if k % SIDE or rank > SIDE:
        raise NotImplementedError(f"{k} columns are no multiple of {SIDE}, or rank {rank} is more than {SIDE}")
    assert rank % RANK_STEP == 0
    cluster = min(cluster, k // SIDE)
    warpgroups = min(warpgroups, -(-k // SIDE // cluster))
    kernel = _Tail(
        kind=kind,
        k=k,
        rank=rank,
        cluster=cluster,
        warpgroups=warpgroups,
        columns=SIDE * -(-k // SIDE // (cluster * warpgroups)),
        eps=eps,
        activation=activation,
        z_dtype=jnp.dtype(z_dtype),
        overlap=overlap and not interpret,
        interpret=bool(interpret),
    )
    optional = {"update": update, "weight": weight, "a": a, "a_scale": a_scale}
    given = {"first": first} | {name: operand for name, operand in optional.items() if operand is not None}
    shared = kernel.scratch(given)
    out = {"h": (m, k)} if update is not None else {}
    out = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in out.items()}
    if kind != "plain":
        out["x"] = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
    if rank:
        out["z"] = jax.ShapeDtypeStruct((m, rank), z_dtype)
    return kernel.launch("tail", given, out, shared, m=m, interpret=interpret)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tail:
    """The program of a block; `columns` is what a warpgroup has of K, the last ones less or nothing."""

    kind: Kind
    k: int
    rank: int
    cluster: int
    warpgroups: int
    columns: int
    eps: float
    activation: Activation
    z_dtype: jnp.dtype
    overlap: bool
    interpret: bool

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """First column and width of what a warpgroup treats at a time."""
        return [(at, min(_PIECE, self.columns - at)) for at in range(0, self.columns, _PIECE)]

    def launch(
        self, name: str, operands, out, shared, *, m: int, interpret, skip_device_barrier: bool = False
    ) -> dict[str, Array]:
        """Run over m rows, as a kernel called `name`; give what is in `out` by the names there.

        The program gets `operands`, in this order, and `shared` memory by their names, and outputs as `NAME_out`.
        """
        names = (*operands, *(f"{output}_out" for output in out), *shared)

        def tail(*refs):
            self(**dict(zip(names, refs, strict=True)))

        tail.__name__ = name
        run = plgpu.kernel(
            tail,
            out_type=list(out.values()),
            grid=(-(-m // ROWS),),
            grid_names=("rows",),
            cluster=(self.cluster,),
            cluster_names=("split",),
            num_threads=self.warpgroups,
            thread_name="warpgroup",
            scratch_types=list(shared.values()),
            compiler_params=plgpu.CompilerParams(approx_math=True, skip_device_barrier=skip_device_barrier),
            interpret=interpret,
        )
        return dict(zip(out, run(*operands.values()), strict=True))

    def scratch(self, given) -> dict:
        """Declare shared memory; raise NotImplementedError where it does not fit."""
        parts, columns = self.warpgroups, self.columns
        tile = shared_tile((parts, ROWS, columns), jnp.bfloat16, row=2 * SIDE)
        copies = 1 if self.kind == "plain" or (self.kind == "norm" and "update" not in given) else 2
        shared = {"first_tile": tile, "full": plgpu.Barrier(num_arrivals=copies, num_barriers=parts)}
        bytes_ = parts * ROWS * columns * 2
        static = 0
        if self.kind != "plain":
            shared["second_tile"] = tile
            bytes_ *= 2
        if self.kind == "norm":
            shared |= {
                "weight_tile": plgpu.SMEM((parts, columns), jnp.float32),
                "squares": plgpu.SMEM((parts, ROWS, SIDE), jnp.float32),
                "squares_full": plgpu.Barrier(num_arrivals=parts),
                "stats": shared_tile((self.cluster, ROWS, _LANES), jnp.float32),
                "stats_full": plgpu.Barrier(num_arrivals=self.cluster),
            }
            static += parts * len(self.pieces)
            bytes_ += 4 * (parts * (columns + ROWS * SIDE) + self.cluster * ROWS * _LANES)
        if self.rank:
            # Tiles of 64 rows as wgmma wants them begin every `rank` rows: what a tile has beyond its own gives rows
            # of the product that nobody looks at.
            rows = parts * self.rank + SIDE - self.rank
            dtype = given["a"].dtype
            shared |= {
                "a_tile": shared_tile((rows, columns), dtype, row=SIDE * dtype.itemsize),
                "products": plgpu.SMEM((parts, SIDE, ROWS), jnp.float32),
                "products_full": plgpu.Barrier(num_arrivals=parts),
                "sums": shared_tile((self.cluster, ROWS, self.rank), jnp.float32, row=4 * _LANES),
                "sums_full": plgpu.Barrier(num_arrivals=self.cluster),
                "z_tile": plgpu.SMEM((ROWS, self.rank), self.z_dtype),
            }
            static += parts
            bytes_ += rows * columns * dtype.itemsize + 4 * ROWS * (parts * SIDE + (self.cluster + 1) * self.rank)
            if "a_scale" in given:
                shared["a_scale_tile"] = plgpu.SMEM((self.rank,), jnp.float32)
                static += 1
        if static:
            shared["static_full"] = plgpu.Barrier(num_arrivals=static)
        if bytes_ + _SPARE_BYTES > SHARED_BYTES:
            raise NotImplementedError(f"{self.kind} of {self.k} columns and rank {self.rank} takes {bytes_} bytes")
        return shared

    def __call__(self, *, first, first_tile, full, update=None, second_tile: Any = None, **refs) -> None:
        warpgroup, split = lax.axis_index("warpgroup"), lax.axis_index("split")
        start = (split * self.warpgroups + warpgroup) * self.columns
        rows = pl.ds(lax.axis_index("rows") * ROWS, ROWS)
        columns = pl.ds(start, self.columns)
        self._copy_static(start, **refs)
        if self.overlap:
            plgpu.griddepcontrol_launch_dependents()
            plgpu.griddepcontrol_wait()
        arrived = full.at[warpgroup]
        plgpu.copy_gmem_to_smem(first.at[rows, columns], first_tile.at[warpgroup], arrived)
        if update is not None:
            plgpu.copy_gmem_to_smem(update.at[rows, columns], second_tile.at[warpgroup], arrived)
        if self.kind == "glu":
            other = pl.ds(self.k + start, self.columns)
            plgpu.copy_gmem_to_smem(first.at[rows, other], second_tile.at[warpgroup], arrived)

        if "static_full" in refs:
            plgpu.barrier_wait(refs["static_full"])
        left = self._left(0, warpgroup, **refs) if self.rank else None
        plgpu.barrier_wait(arrived)
        match self.kind:
            case "norm":
                x_tile = second_tile.at[warpgroup]
                self._weigh(first_tile.at[warpgroup], x_tile, summed=update is not None, **refs)
            case "glu":
                x_tile = first_tile.at[warpgroup]
                self._activate(x_tile, second_tile.at[warpgroup])
            case "plain":
                x_tile = first_tile.at[warpgroup]
        plgpu.commit_smem()
        if update is not None:
            plgpu.copy_smem_to_gmem(first_tile.at[warpgroup], refs["h_out"].at[rows, columns])
        if self.kind == "glu":
            plgpu.copy_smem_to_gmem(x_tile, refs["x_out"].at[rows, columns])
        if self.rank:
            self._project(left, x_tile, **refs)
        elif self.kind == "norm":
            self._send_statistics(**refs)
        if self.kind == "norm":
            plgpu.barrier_wait(refs["stats_full"])
            rstd = self._rstd(refs["stats"])
            self._normalise(first_tile.at[warpgroup], x_tile, rstd, refs["weight_tile"].at[warpgroup])
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(x_tile, refs["x_out"].at[rows, columns])
        if self.rank:

            @pl.when((split == 0) & (warpgroup == self.warpgroups - 1))
            def _():
                self._store_z(rows, **refs)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _copy_static(self, start, *, weight=None, a=None, a_scale=None, **refs) -> None:
        """Bring what the kernel before cannot have written."""
        warpgroup = lax.axis_index("warpgroup")
        if weight is not None:
            for at, width in self.pieces:
                target = refs["weight_tile"].at[warpgroup, pl.ds(at, width)]
                plgpu.copy_gmem_to_smem(weight.at[pl.ds(start + at, width)], target, refs["static_full"])
        if a is not None:
            target = refs["a_tile"].at[pl.ds(warpgroup * self.rank, self.rank)]
            plgpu.copy_gmem_to_smem(a.at[:, pl.ds(start, self.columns)], target, refs["static_full"])
        if a_scale is not None:

            @pl.when(warpgroup == 0)
            def _():
                plgpu.copy_gmem_to_smem(a_scale, refs["a_scale_tile"], refs["static_full"])

    def _left(self, piece: int, warpgroup, *, a_tile, **_) -> jax.Array:
        """Give A in bfloat16, a left operand of 64 rows."""
        at, width = self.pieces[piece]
        tile = a_tile.at[pl.ds(warpgroup * self.rank, SIDE), pl.ds(at, width)]
        return plgpu.load(tile, layout=WGMMA, optimized=False).astype(jnp.bfloat16)

    def _weigh(self, h_tile, x_tile, *, summed: bool, weight_tile, squares, squares_full, **_) -> None:
        """Sum the squares of h = residual + update, and where A follows leave weight * h in the tile of x."""
        warpgroup = lax.axis_index("warpgroup")
        total = None
        for at, width in self.pieces:
            columns = pl.ds(at, width)
            h = _load(h_tile.at[:, columns])
            if summed:
                h = (h + _load(x_tile.at[:, columns])).astype(jnp.bfloat16)
                h_tile[:, columns] = h
                h = h.astype(jnp.float32)
            for j in range(0, width, SIDE):
                square = h[:, j : j + SIDE] * h[:, j : j + SIDE]
                total = square if total is None else total + square
            if self.rank:
                factor = _down(_load_weight(weight_tile.at[warpgroup, columns]), h.shape)
                x_tile[:, columns] = (h * factor).astype(jnp.bfloat16)
        squares[warpgroup] = total
        plgpu.barrier_arrive(squares_full)

    def _send_statistics(self, *, squares, squares_full, stats, stats_full, **_) -> None:
        """Let one warpgroup sum the squares of its block, sixteen sums a row, and tell all blocks."""

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _():
            plgpu.barrier_wait(squares_full)
            places = [(part, at) for part in range(self.warpgroups) for at in range(0, SIDE, _LANES)]
            loads = [_load_sums(squares.at[part, :, pl.ds(at, _LANES)]) for part, at in places]
            total = functools.reduce(jnp.add, loads)
            for block in range(self.cluster):
                self._send(total, stats, stats_full, block)

    def _send(self, value, parts, barrier, block: int) -> None:
        split = lax.axis_index("split")
        if self.cluster == 1:
            parts[0] = value
            plgpu.barrier_arrive(barrier)
            return
        plgpu.async_store_smem(
            value, parts.at[split], barrier, cluster_idx=jnp.int32(block), cluster_dim="split", optimized=False
        )

    def _rstd(self, stats) -> Float32[Array, " 8"]:
        total = functools.reduce(jnp.add, [_load_sums(stats.at[i]) for i in range(self.cluster)])
        return lax.rsqrt(total.sum(axis=1) / self.k + self.eps)

    def _normalise(self, h_tile, x_tile, rstd, weight_tile) -> None:
        for at, width in self.pieces:
            columns = pl.ds(at, width)
            h = _load(h_tile.at[:, columns])
            x = h * _across(rstd, h.shape, _DATA) * _down(_load_weight(weight_tile.at[columns]), h.shape)
            x_tile[:, columns] = x.astype(jnp.bfloat16)

    def _activate(self, gate_tile, up_tile) -> None:
        """Write x in the place of its gate."""
        for at, width in self.pieces:
            columns = pl.ds(at, width)
            gate, up = _load(gate_tile.at[:, columns]), _load(up_tile.at[:, columns])
            inner = gate
            if self.activation == "gelu_tanh":  # 1 + tanh(y) is 2 sigmoid(2 y)
                inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
            gate_tile[:, columns] = (gate * lax.logistic(inner) * up).astype(jnp.bfloat16)

    def _project(self, left, x_tile, *, products, products_full, sums, sums_full, **refs) -> None:
        """Multiply a piece of x with A, sum over the block, and send that to the block that writes z."""
        warpgroup = lax.axis_index("warpgroup")

        def product(acc):
            for i, (at, width) in enumerate(self.pieces):
                a = self._left(i, warpgroup, **refs) if i else left
                plgpu.wgmma(acc, a, x_tile.at[:, pl.ds(at, width)].T)
                if i == 0 and self.kind == "norm":  # meanwhile
                    self._send_statistics(**refs)
                plgpu.wgmma_wait(0)
            return hold(acc[...], interpret=self.interpret)

        products[warpgroup] = pl.run_scoped(product, Accumulator((SIDE, ROWS), jnp.float32))
        plgpu.barrier_arrive(products_full)

        @pl.when(warpgroup == self.warpgroups - 1)
        def _():
            plgpu.barrier_wait(products_full)
            loads = [_load_sums(products.at[part, pl.ds(0, self.rank)].T) for part in range(self.warpgroups)]
            self._send(functools.reduce(jnp.add, loads), sums, sums_full, 0)

    def _store_z(self, rows, *, sums, sums_full, z_tile, z_out, a_scale_tile=None, stats=None, **_) -> None:
        plgpu.barrier_wait(sums_full)
        z = functools.reduce(jnp.add, [_load_sums(sums.at[i]) for i in range(self.cluster)])
        if stats is not None:
            z = z * _across(self._rstd(stats), z.shape, _SUMS)
        if a_scale_tile is not None:
            scale = plgpu.load(a_scale_tile, layout=_SUMS.reduce(0), optimized=False)
            z = z * plgpu.layout_cast(lax.broadcast_in_dim(scale, z.shape, (1,)), _SUMS)
        z_tile[...] = z.astype(self.z_dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(z_tile, z_out.at[rows])


def _load(ref) -> Float32[Array, "8 W"]:
    return plgpu.load(ref, layout=_DATA, optimized=False).astype(jnp.float32)


def _load_weight(ref) -> Float32[Array, " W"]:
    return plgpu.load(ref, layout=_DATA.reduce(0), optimized=False)


def _load_sums(ref) -> Float32[Array, "8 R"]:
    return plgpu.load(ref, layout=_SUMS, optimized=False)


def _across(rows, shape, layout) -> jax.Array:
    """Spread one value a row over the columns."""
    return plgpu.layout_cast(lax.broadcast_in_dim(rows, shape, (0,)), layout)


def _down(columns, shape) -> jax.Array:
    """Spread one value a column over the rows."""
    return plgpu.layout_cast(lax.broadcast_in_dim(columns, shape, (1,)), _DATA)
