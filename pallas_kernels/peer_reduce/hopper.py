"""What follows a row-parallel product on several Hopper GPUs, in Mosaic GPU: one launch, mostly waiting.

The norm of `tails.hopper` whose update is what all devices have written into this one's inbox: each warpgroup waits for
its columns alone, sums them in the order of devices, and adds `B gate(z)`. The gate's network and B are small products
on tensor cores that every warpgroup does by itself, so that none waits for another one. With `own` parts, which a
kernel before has left in this device's memory alone, the kernel first writes those into all inboxes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Float32, Shaped

from pallas_kernels.hopper import WGMMA, Accumulator, hold, row_values, shared_tile
from pallas_kernels.packing import RANK_STEP, SIDE
from pallas_kernels.peer_reduce.inbox import FLAG_ROWS
from pallas_kernels.peer_reduce.operands import PeerCompensator
from pallas_kernels.signals import PATIENCE, Peers, Sum, meet, signal, wait
from pallas_kernels.tails.hopper import _DATA, _SUMS, MOST_ROWS, ROWS, _load, _load_sums, _Tail

assert FLAG_ROWS == ROWS


def peer_tail_hopper(
    peers: Peers,
    fault: jax.Ref,
    residual: BFloat16[Array, "M N"],
    weight: Float32[Array, " N"],
    compensator: PeerCompensator | None = None,
    a: Shaped[Array, "R N"] | None = None,
    a_scale: Float32[Array, " R"] | None = None,
    *,
    own: tuple[Float32[Array, "P N"], Float32[Array, "P R"] | None] | None = None,
    eps: float,
    z_dtype: jnp.dtype | type = jnp.float32,
    cluster: int = 8,
    warpgroups: int = 4,
    overlap: bool = True,
    patience: int = PATIENCE,
    interpret: plgpu.InterpretGPUParams | bool = False,
) -> dict[str, Float[Array, "M _"]]:
    """Compute h, x and, with A, z for the next product, and the next sum's `generation`, by name.

    `fault` [4] is that of an `Inbox`. `own` parts have whole blocks of eight rows, P.

    Raises:
        NotImplementedError: There are more than 64 rows, or more than eight but no multiple of eight; N is no multiple
            of 64; a rank or the gate is too large; or it does not fit into shared memory.
    """
    m, n = residual.shape
    most = peers.y.shape[1]
    if m > min(MOST_ROWS, most) or (m > ROWS and m % ROWS):
        raise NotImplementedError(f"{m} rows are more than {min(MOST_ROWS, most)}, or more than {ROWS} but no multiple")
    rank = 0 if compensator is None else compensator.b.shape[1]
    if n % SIDE or max(rank, 0 if a is None else a.shape[0]) > SIDE:
        raise NotImplementedError(f"{n} columns are no multiple of {SIDE}, or a rank is more than {SIDE}")
    if n > peers.y.shape[2]:
        raise ValueError(f"the inbox is for {peers.y.shape[2]} columns, got {n}")
    assert rank % RANK_STEP == 0
    cluster = min(cluster, n // SIDE)
    warpgroups = min(warpgroups, -(-n // SIDE // cluster))
    kernel = _PeerTail(
        kind="norm",
        k=n,
        rank=0 if a is None else a.shape[0],
        cluster=cluster,
        warpgroups=warpgroups,
        columns=SIDE * -(-n // SIDE // (cluster * warpgroups)),
        eps=eps,
        activation="silu",
        z_dtype=jnp.dtype(z_dtype),
        overlap=overlap and not interpret,
        interpret=bool(interpret),
        axis=peers.axis,
        devices=peers.devices,
        update_rank=rank,
        form=None if compensator is None else compensator.form,
        patience=patience,
    )
    optional = {"weight": weight, "a": a, "a_scale": a_scale} | ({} if compensator is None else compensator.factors())
    if own is not None:
        optional |= {"own_y": own[0], "own_z": own[1]}
    given = {"first": residual} | {name: operand for name, operand in optional.items() if operand is not None}
    shared = kernel.scratch(given | {"update": residual})
    out: dict[str, Any] = {name: jax.ShapeDtypeStruct((m, n), jnp.bfloat16) for name in ("h", "x")}
    if kernel.rank:
        out["z"] = jax.ShapeDtypeStruct((m, kernel.rank), z_dtype)
    out["generation"] = jax.ShapeDtypeStruct((1,), jnp.int32)
    inbox = {"y": peers.y, "z": peers.z, "flags": peers.flags, "fault": fault, "generation": peers.generation}
    return kernel.launch("peer_tail", inbox | given, out, shared, m=m, interpret=interpret, skip_device_barrier=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PeerTail(_Tail):
    """The program of a block."""

    axis: str
    devices: int
    update_rank: int
    form: str | None
    patience: int

    def scratch(self, given) -> dict:
        shared = super().scratch(given)
        parts, rank = self.warpgroups, self.update_rank
        shared["full"] = plgpu.Barrier(num_barriers=parts)  # of the residual alone
        if rank:
            shared |= {
                "b_tile": plgpu.SMEM((parts, self.columns, rank), given["factor_b"].dtype),
                "b_full": plgpu.Barrier(num_arrivals=len(self.pieces), num_barriers=parts),
                "gated_tile": shared_tile((parts, 2, ROWS, rank), jnp.bfloat16),
                "update_tile": shared_tile((parts, ROWS, self.columns), jnp.float32, row=128),
            }
        if self.form is not None:
            hidden = given["factor_w_out"].shape[-1]
            shared |= {
                "hidden_tile": shared_tile((parts, 2, ROWS, SIDE), jnp.bfloat16, row=2 * hidden),
                "opening_tile": shared_tile((parts, ROWS, SIDE), jnp.float32, row=4 * RANK_STEP),
            }
        return shared

    def __call__(self, *, first, first_tile, full, update=None, second_tile: Any = None, **refs) -> None:
        assert update is None, "the update comes through the inbox"
        generation, generation_out = refs["generation"], refs["generation_out"]
        warpgroup, split, row_block = (lax.axis_index(name) for name in ("warpgroup", "split", "rows"))
        start = (split * self.warpgroups + warpgroup) * self.columns
        rows, columns = pl.ds(row_block * ROWS, ROWS), pl.ds(start, self.columns)
        # A tile of the residual ends as h, and one of the update as x.
        h_tile, x_tile = first_tile.at[warpgroup], second_tile.at[warpgroup]
        self._copy_static(start, **refs)
        if self.update_rank:
            for at, width in self.pieces:
                target = refs["b_tile"].at[warpgroup, pl.ds(at, width)]
                source = refs["factor_b"].at[pl.ds(start + at, width)]
                plgpu.copy_gmem_to_smem(source, target, refs["b_full"].at[warpgroup])
        network = {name: self._network(name, **refs) for name in ("in", "out") if self.form is not None}
        if self.overlap:
            plgpu.griddepcontrol_launch_dependents()
            plgpu.griddepcontrol_wait()
        plgpu.copy_gmem_to_smem(first.at[rows, columns], h_tile, full.at[warpgroup])
        sum_ = Sum(number=generation[0], axis=self.axis, devices=self.devices, columns=self.k)

        @pl.when((split == 0) & (warpgroup == 0) & (row_block == 0))
        def _():
            generation_out[0] = sum_.number + 1

        if "own_y" in refs:
            self._push(sum_, row_block, start, **refs)
        wait(
            *(refs["flags"], refs["fault"], sum_, row_block, start // SIDE),
            tiles=self.columns // SIDE,
            coordinates=self.update_rank > 0,
            patience=self.patience,
            interpret=self.interpret,
        )
        self._receive(x_tile, sum_, rows, start, network, **refs)
        plgpu.barrier_wait(refs["static_full"])
        left = self._left(0, warpgroup, **refs) if self.rank else None
        plgpu.barrier_wait(full.at[warpgroup])
        self._weigh(h_tile, x_tile, summed=True, **refs)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(h_tile, refs["h_out"].at[rows, columns])
        if self.rank:
            self._project(left, x_tile, **refs)
        else:
            self._send_statistics(**refs)
        plgpu.barrier_wait(refs["stats_full"])
        rstd = self._rstd(refs["stats"])
        self._normalise(h_tile, x_tile, rstd, refs["weight_tile"].at[warpgroup])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x_tile, refs["x_out"].at[rows, columns])
        if self.rank:

            @pl.when((split == 0) & (warpgroup == self.warpgroups - 1))
            def _():
                self._store_z(rows, **refs)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _push(self, sum_: Sum, row_block, start, *, y, z, flags, own_y, own_z=None, **_) -> None:
        """Write this device's parts into all inboxes."""
        line, rows = sum_.line(sum_.me), pl.ds(row_block * ROWS, ROWS)
        first = (lax.axis_index("split") == 0) & (lax.axis_index("warpgroup") == 0)
        tell = functools.partial(signal, flags, sum_, row_block, interpret=self.interpret)
        for tile in range(self.columns // SIDE):
            at = start + tile * SIDE

            @pl.when(at < self.k)
            def _(at=at):
                columns = pl.ds(at, SIDE)
                value = plgpu.load(own_y.at[rows, columns], layout=_DATA, optimized=False)
                for inbox in sum_.everybody(y):
                    inbox[line, rows, columns] = value

        if own_z is not None:

            @pl.when(first)
            def _():
                ranks = pl.ds(0, self.update_rank)
                value = _load_sums(own_z.at[rows, ranks])
                for inbox in sum_.everybody(z):
                    inbox[line, rows, ranks] = value

        meet(interpret=self.interpret)
        for tile in range(self.columns // SIDE):
            pl.when(start + tile * SIDE < self.k)(lambda tile=tile: tell(start // SIDE + tile))
        if own_z is not None:
            pl.when(first)(lambda: tell(sum_.tiles))

    def _receive(self, x_tile, sum_: Sum, rows, start, network, *, y, **refs) -> None:
        """Sum what has come, in the order of devices, and leave the update in a tile."""
        warpgroup = lax.axis_index("warpgroup")
        tiles = range(0, self.columns, SIDE)
        totals = []
        for at in tiles:
            # The last warpgroups may have nothing to do: what they read is not used.
            column = jnp.minimum(start + at, self.k - SIDE)
            places = [y.at[sum_.line(sender), rows, pl.ds(column, SIDE)] for sender in range(self.devices)]
            totals.append(functools.reduce(jnp.add, [_load(place) for place in places]))
        if self.update_rank:
            self._low_rank(sum_, rows, network, **refs)
        for at, total in zip(tiles, totals, strict=True):
            if self.update_rank:
                total = total + _load(refs["update_tile"].at[warpgroup, :, pl.ds(at, SIDE)])
            if self.k < self.cluster * self.warpgroups * self.columns:
                inside = lax.broadcast_in_dim(start + at < self.k, total.shape, ())
                total = jnp.where(inside, total, jnp.zeros_like(total))
            x_tile[:, at : at + SIDE] = total.astype(jnp.bfloat16)

    def _low_rank(self, sum_: Sum, rows, network, *, z, b_tile, b_full, gated_tile, update_tile, **refs) -> None:
        """Multiply B with the gated sum of coordinates."""
        warpgroup, ranks = lax.axis_index("warpgroup"), pl.ds(0, self.update_rank)
        gated = gated_tile.at[warpgroup]
        total = functools.reduce(
            jnp.add, [_load_sums(z.at[sum_.line(sender), rows, ranks]) for sender in range(self.devices)]
        )
        if self.form is not None:
            total = self._gated(total, gated, network, **refs)
        if "factor_scale" in refs:
            scale = plgpu.load(refs["factor_scale"], layout=_SUMS.reduce(0), optimized=False)
            total = total * plgpu.layout_cast(lax.broadcast_in_dim(scale, total.shape, (1,)), _SUMS)
        gated[0] = total.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.barrier_wait(b_full.at[warpgroup])
        for at in range(0, self.columns, SIDE):
            b = plgpu.load(b_tile.at[warpgroup, pl.ds(at, SIDE)], layout=WGMMA, optimized=False).astype(jnp.bfloat16)
            self._transposed(self._product((b, gated.at[0])), update_tile.at[warpgroup, :, pl.ds(at, SIDE)])
        plgpu.commit_smem()

    def _network(self, name: str, **refs) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Load a layer of the gate: two parts of its weight, and its bias."""
        weight = refs[f"factor_w_{name}"]
        high, low = (plgpu.load(weight.at[i], layout=WGMMA, optimized=False) for i in range(2))
        return high, low, row_values(refs[f"factor_b_{name}"])

    def _gated(self, z, parts, network, *, hidden_tile, opening_tile, **_) -> Float32[Array, "8 R"]:
        """Apply the gate's network to coordinates, nearly in float32."""
        warpgroup = lax.axis_index("warpgroup")
        hidden_tile, opening_tile = hidden_tile.at[warpgroup], opening_tile.at[warpgroup]

        def layer(weights, x_tile):
            high, low, bias = weights
            x_high, x_low = x_tile.at[0], x_tile.at[1]
            value = self._product((high, x_high), (high, x_low), (low, x_high))
            return value + lax.broadcast_in_dim(bias, value.shape, (0,))

        high, low = _halves(z)
        parts[0], parts[1] = high, low
        plgpu.commit_smem()
        hidden = layer(network["in"], parts)
        for i, part in enumerate(_halves(hidden * lax.logistic(hidden))):
            self._transposed(part, hidden_tile.at[i])
        plgpu.commit_smem()
        width = network["out"][0].shape[1]
        self._transposed(layer(network["out"], hidden_tile.at[:, :, pl.ds(0, width)]), opening_tile)
        plgpu.commit_smem()
        opening = _load_sums(opening_tile.at[:, pl.ds(0, self.update_rank)])
        if self.form == "shift":
            return z + opening
        if self.form == "tanh":  # 1 + tanh(y) is 2 sigmoid(2 y)
            return z * (2.0 * lax.logistic(2.0 * opening))
        return z * (1.0 + opening)

    def _product(self, *pairs) -> Float32[Array, "64 8"]:
        """Sum the products of left operands with tiles of eight rows."""

        def run(acc):
            for left, right_tile in pairs:
                plgpu.wgmma(acc, left, right_tile.T)
            plgpu.wgmma_wait(0)
            return hold(acc[...], interpret=self.interpret)

        return pl.run_scoped(run, Accumulator((SIDE, ROWS), jnp.float32))

    def _transposed(self, value, tile) -> None:
        tile.T[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)


def _halves(value: Float32[Array, "..."]) -> tuple[jax.Array, jax.Array]:
    """Give two bfloat16 parts that nearly add up to float32 values."""
    high = value.astype(jnp.bfloat16)
    return high, (value - high.astype(jnp.float32)).astype(jnp.bfloat16)
