"""The kernel of `int4_matmul` for the matrix units of a TPU."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int8, Shaped

from pallas_kernels.int4_matmul.operands import Activation, Gate
from pallas_kernels.packing import SIDE

LANES = 128
"""Values side by side in a vector register: columns of a block are a multiple of them, or all there are."""

CODE_ROWS = 64
"""Inputs of a weight are a multiple of this: 32 rows of bytes fill a tile of vector memory, with two codes each."""

_F32 = jnp.float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuConfig:
    """How a product is cut up for a TPU.

    A step of the grid multiplies `block_m` rows of x by a block of `block_k` x `block_n` codes, which become bfloat16
    in vector memory. Steps over K come last, so that sums stay there. With `resident` all K columns of the rows of x
    are brought once, for all blocks of N; otherwise a block of them comes with every step. `cores` divide N.
    `scaled` says what group scales multiply: the float32 `sums` of each group, or the `weights`, rounded to bfloat16.
    """

    block_m: int
    block_n: int
    block_k: int
    resident: bool = True
    cores: int = 1
    scaled: Literal["sums", "weights"] = "sums"

    def check(self, *, n: int, k: int, groups: int, activation: Activation | None = None) -> None:
        """Raise NotImplementedError where a weight [n, k] with scales of `groups` cannot be cut up so."""
        if activation is not None and self.block_n % (2 * LANES):
            raise NotImplementedError(f"an activation takes blocks of a multiple of {2 * LANES} channels, not {self}")
        fits_n = n % (self.block_n * self.cores) == 0 and (self.block_n % LANES == 0 or self.block_n == n)
        fits_k = k % self.block_k == 0 and (self.block_k % LANES == 0 or self.block_k == k)
        if not (fits_n and fits_k and self.block_k % CODE_ROWS == 0):
            raise NotImplementedError(f"{self} does not cut up a weight [{n}, {k}]")
        if groups > 1 and self.block_k % (k // groups):
            raise NotImplementedError(f"blocks of {self.block_k} columns do not hold whole groups of {k // groups}")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["a", "a_scale", "bt", "bt_scale", "z", "w_in", "b_in", "w_out", "b_out"],
    meta_fields=["form"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank:
    """The low-rank term as the kernel takes it: either `z` [M, R], or what it is computed from; scales are [1, R].

    Shapes: a [R, K], bt [R, N], w_in [R, H], b_in [1, H], w_out [R, H], b_out [1, R]. `form` is the gate's, None for
    none.
    """

    bt: Any
    z: Any = None
    a: Any = None
    a_scale: Any = None
    bt_scale: Any = None
    w_in: Any = None
    b_in: Any = None
    w_out: Any = None
    b_out: Any = None
    form: str | None = None

    @classmethod
    def gated_by(cls, gate: Gate | None, **factors: Any) -> "LowRank":
        """Take a gate apart; its further features are not the kernel's."""
        if gate is None:
            return cls(**factors)
        network = {name: getattr(gate, name).astype(_F32) for name in ("w_in", "w_out")}
        network |= {name: getattr(gate, name).astype(_F32)[None] for name in ("b_in", "b_out")}
        return cls(**factors, **network, form=gate.form)


def int4_matmul_tpu(
    x: Float[Array, "M K"],
    packed: Int8[Array, "K/2 N"],
    scale: Float[Array, "G N"],
    zero: Int8[Array, "G N"] | None,
    bias: Shaped[Array, " N"] | None,
    low_rank: LowRank | None,
    *,
    config: TpuConfig,
    out_dtype: Any,
    vmem_bytes: int,
    x_scale: Float[Array, "M 1"] | None = None,
    activation: Activation | None = None,
    interpret: pltpu.InterpretParams | bool = False,
) -> Float[Array, "M N"]:
    """Compute `x W^T + bias + z B^T` for a weight laid out in columns.

    Codes stay packed in HBM and on their way to vector memory, where a byte [i, n], taken apart along rows, is codes
    2 i and 2 i + 1 of column n. `vmem_bytes` is how much vector memory the compiler may take. x is bfloat16, or int8
    with one scale a row; sums of int8 are exact, in int32. With an activation N / 2 columns are given.

    Raises:
        NotImplementedError: `config` does not fit the weight, or scales weights where x is int8.
    """
    if x_scale is not None and scale.shape[0] > 1 and config.scaled == "weights":
        raise NotImplementedError("weights that are scaled are no int8: group scales multiply sums where x is int8")
    (m, k), n, groups = x.shape, packed.shape[1], scale.shape[0]
    config.check(n=n, k=k, groups=groups, activation=activation)
    given = n if activation is None else n // 2
    bm, bn, bk = min(config.block_m, m), config.block_n, config.block_k
    columns, steps = n // bn // config.cores, k // bk
    group = bk if groups == 1 else k // groups

    def along_n(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, bn), lambda i, c, j, t: (0, c * columns + j))

    def whole(array: Array) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda i, c, j, t: (0,) * array.ndim)

    def of_groups(array: Array) -> tuple[Array, pl.BlockSpec]:
        if groups == 1:
            return array, along_n(1)
        # An axis of steps, because rows of a block would have to fill tiles.
        spec = pl.BlockSpec((pl.squeezed, bk // group, bn), lambda i, c, j, t: (t, 0, c * columns + j))
        return array.reshape(steps, bk // group, n), spec

    at_k = pl.BlockSpec((bm, bk), lambda i, c, j, t: (i, t))
    operands: dict[str, tuple[Array, pl.BlockSpec]] = {
        "x": (x, pl.BlockSpec((bm, k), lambda i, c, j, t: (i, 0)) if config.resident else at_k),
        "packed": (packed, pl.BlockSpec((bk // 2, bn), lambda i, c, j, t: (t, c * columns + j))),
        "scale": of_groups(scale),
    }
    if x_scale is not None:
        operands["x_scale"] = (x_scale, pl.BlockSpec((bm, 1), lambda i, c, j, t: (i, 0)))
    if zero is not None:
        operands["zero"] = of_groups(zero)
    if bias is not None:
        operands["bias"] = (bias[None], along_n(1))
    scratch: dict[str, Any] = {"sums": pltpu.VMEM((bm, bn), _F32)}
    if low_rank is not None:
        rank = low_rank.bt.shape[0]
        operands["bt"] = (low_rank.bt, along_n(rank))
        if low_rank.z is not None:
            operands["z"] = (low_rank.z, pl.BlockSpec((bm, rank), lambda i, c, j, t: (i, 0)))
        else:
            # A comes once, with the first column of blocks; after that its block stays the last.
            operands["a"] = (
                low_rank.a,
                pl.BlockSpec((rank, bk), lambda i, c, j, t: (0, jnp.where(j == 0, t, steps - 1))),
            )
            for name in ("a_scale", "bt_scale", "w_in", "b_in", "w_out", "b_out"):
                if (array := getattr(low_rank, name)) is not None:
                    operands[name] = (array, whole(array))
            scratch |= {"z_sums": pltpu.VMEM((bm, rank), _F32), "gated": pltpu.VMEM((bm, rank), jnp.bfloat16)}
    names = [*operands, "out", *scratch]

    def kernel(*refs: Any) -> None:
        step = _Step(dict(zip(names, refs, strict=True)), config=config, group=group, grouped=groups > 1, bk=bk)
        step.run(form=None if low_rank is None else low_rank.form, activation=activation)

    out = jax.ShapeDtypeStruct((m, given), out_dtype)
    cost = config_bytes(config, n=n, k=k, operands=[array for array, _ in operands.values()], out=out)
    rank = 0 if low_rank is None else low_rank.bt.shape[0]
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(m, bm), config.cores, columns, steps),
        in_specs=[spec for _, spec in operands.values()],
        out_specs=pl.BlockSpec((bm, bn * given // n), lambda i, c, j, t: (i, c * columns + j)),
        out_shape=out,
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            # What the first column of blocks leaves in `gated`, the others read: they run in order, on one core.
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_bytes,
        ),
        cost_estimate=pl.CostEstimate(flops=2 * m * (n * k + rank * (n + k)), bytes_accessed=cost, transcendentals=0),
        name="int4_matmul",
        interpret=interpret,
    )(*(array for array, _ in operands.values()))


def config_bytes(config: TpuConfig, *, n: int, k: int, operands: list[Any], out: Any) -> int:
    """Give the bytes that a product moves between HBM and vector memory; `operands` are x first, then all others.

    A block is brought again for each of the rows' blocks, and x without `resident` for each of the columns' blocks.
    """
    row_blocks = -(-out.shape[0] // config.block_m)
    x, *others, result = (array.size * jnp.dtype(array.dtype).itemsize for array in (*operands, out))
    again = config.cores if config.resident or config.block_k == k else n // config.block_n
    return x * again + row_blocks * sum(others) + result


class _Step:
    """One step of the grid, over the references of its blocks by name."""

    def __init__(self, refs: dict[str, Any], *, config: TpuConfig, group: int, grouped: bool, bk: int) -> None:
        self.refs, self.config, self.group, self.grouped, self.bk = refs, config, group, grouped, bk
        self.j, self.t = pl.program_id(2), pl.program_id(3)
        self.first, self.last = self.t == 0, self.t == pl.num_programs(3) - 1

    def __getattr__(self, name: str) -> Any:
        return self.refs.get(name)

    def run(self, *, form: str | None, activation: Activation | None) -> None:
        x = self._rows()
        if self.a is not None:
            pl.when(self.j == 0)(lambda: self._project(x, form))
        part = self._product(x)

        @pl.when(self.first)
        def _() -> None:
            self.sums[...] = part

        @pl.when(jnp.logical_not(self.first))
        def _() -> None:
            self.sums[...] += part

        pl.when(self.last)(lambda: self._finish(paired=activation is not None))

    def _rows(self) -> Array:
        if self.config.resident and self.x.shape[1] != self.bk:
            return self.x[:, pl.ds(pl.multiple_of(self.t * self.bk, LANES), self.bk)]
        return self.x[...]

    def _product(self, x: Array) -> Array:
        codes = pltpu.bitcast(self.packed[...], jnp.int4)
        if not self.grouped:
            part = dot(x, codes.astype(x.dtype))
            return part if self.zero is None else part - _row_sums(x) * self.zero[...].astype(_F32)
        scale = self.scale[...].astype(_F32)
        zero = None if self.zero is None else self.zero[...].astype(_F32)
        count, group = self.bk // self.group, self.group
        if self.config.scaled == "weights":
            weight = codes.astype(_F32).reshape(count, group, -1)
            if zero is not None:
                weight = weight - zero[:, None]
            return dot(x, (weight * scale[:, None]).reshape(self.bk, -1).astype(jnp.bfloat16))
        parts = []
        for g in range(count):
            inside = slice(g * group, (g + 1) * group)
            part = dot(x[:, inside], codes[inside].astype(x.dtype))
            if zero is not None:
                part = part - _row_sums(x[:, inside]) * zero[g : g + 1]
            parts.append(part * scale[g : g + 1])
        return sum(parts[1:], parts[0])

    def _project(self, x: Array, form: str | None) -> None:
        """Add to `z = A x`, and gate it when all of K has been."""
        part = dot(x.astype(jnp.bfloat16), self.a[...].astype(jnp.bfloat16), of_rows=True)
        z = jnp.where(self.first, part, self.z_sums[...] + part)  # what was there before the first is no number
        self.z_sums[...] = z

        @pl.when(self.last)
        def _() -> None:
            self.gated[...] = self._gated(z, form).astype(jnp.bfloat16)

    def _gated(self, z: Array, form: str | None) -> Array:
        if self.x_scale is not None:
            z = z * self.x_scale[...]
        if self.a_scale is not None:
            z = z * self.a_scale[...]
        if form is not None:
            network = (ref[...] for ref in (self.w_in, self.b_in, self.w_out, self.b_out))
            z = gated(z, *network, form=form)
        return z if self.bt_scale is None else z * self.bt_scale[...]

    def _finish(self, *, paired: bool) -> None:
        y = self.sums[...]
        if self.x_scale is not None:
            y = y * self.x_scale[...]
        if not self.grouped:
            y = y * self.scale[...].astype(_F32)
        if self.bias is not None:
            y = y + self.bias[...].astype(_F32)
        if self.bt is not None:
            z = self.gated if self.z is None else self.z
            y = y + dot(z[...], self.bt[...].astype(jnp.bfloat16))
        if not paired:
            self.out[...] = y.astype(self.out.dtype)
            return
        lower = jax.lax.broadcasted_iota(jnp.int32, (y.shape[0], LANES), 1) < SIDE
        for at in range(0, self.out.shape[1], LANES):  # two vectors, each of a gate and what it gates
            first, second = y[:, 2 * at : 2 * at + LANES], y[:, 2 * at + LANES : 2 * (at + LANES)]
            gate = jnp.where(lower, first, pltpu.roll(second, SIDE, 1))
            up = jnp.where(lower, pltpu.roll(first, SIDE, 1), second)
            self.out[:, at : at + LANES] = (jax.nn.silu(gate) * up).astype(self.out.dtype)


def gated(z: Array, w_in: Array, b_in: Array, w_out: Array, b_out: Array, *, form: str) -> Array:
    """Apply a gate that is fed by z alone; shapes as in `LowRank`."""
    hidden = dot(z, w_in, precise=True) + b_in
    out = dot(jax.nn.silu(hidden), w_out, of_rows=True, precise=True) + b_out
    match form:
        case "linear":
            return z * (1 + out)
        case "shift":
            return z + out
        case _:
            return z * (1 + jnp.tanh(out))


def dot(left: Array, right: Array, *, of_rows: bool = False, precise: bool = False) -> Array:
    """Multiply with the columns of `right`, or its rows: int8 and bfloat16 exactly, float32 only where `precise`."""
    dims = (((1,), (int(of_rows),)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if precise else None
    sums = jnp.int32 if left.dtype == jnp.int8 else _F32
    return jax.lax.dot_general(left, right, dims, preferred_element_type=sums, precision=precision).astype(_F32)


def _row_sums(x: Array) -> Array:
    return jnp.sum(x.astype(_F32), axis=1, keepdims=True)
