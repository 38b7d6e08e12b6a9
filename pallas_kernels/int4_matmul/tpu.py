"""`int4_matmul` on a TPU: brings operands into the kernel's form and chooses how to cut the product up."""

import dataclasses
import functools
import itertools
from typing import Any, Literal

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int8

from pallas_kernels import tuning
from pallas_kernels.int4_matmul.operands import Activation, Activations, Compensator, Gate, Layout
from pallas_kernels.int4_matmul.reference import compensator_coordinates, int8_rows
from pallas_kernels.int4_matmul.tpu_kernel import CODE_ROWS, LANES, LowRank, TpuConfig, int4_matmul_tpu
from pallas_kernels.packing import RANK_STEP, from_fragments
from pallas_kernels.tpus import MIB, STEP_CYCLES, Generation, generation

_BLOCKS_M = (16, 32, 64, 128, 256, 512, 1024)
_BLOCKS_N = (128, 256, 512, 1024, 2048)
_MOST_BLOCK_K = 4096

_SUMMED_ROWS = 64
"""Up to here group scales multiply sums: beyond, a product of each group costs more than scaling the weights does."""

_SCALED_WEIGHTS = 2000
"""Weights a cycle that are multiplied by their groups' scales, in float32, and rounded."""

_SCALE_ROWS = 16
"""Scales of groups in bfloat16 that a step takes lie in HBM as they should where there are multiples of so many."""

_PARTIAL_CYCLES = 0.6
"""Cycles to scale and add the part that a group has in 1,024 sums."""

_START_SECONDS = 1e-6
"""What it costs to start a kernel and its first copy: an assumption, no TPU was measured."""


def int4_matmul_mosaic_tpu(
    x: Float[Array, "*B K"],
    packed: Int8[Array, "N K/2"],
    scale: Float[Array, "N G"],
    zero: Int8[Array, "N G"] | None,
    bias: Float[Array, " N"] | None,
    compensator: Compensator | None,
    z: Float[Array, "*B R"] | None,
    out_dtype: jnp.dtype,
    *,
    layout: Layout = "rows",
    activation: Activation | None = None,
    activations: Activations = "as they are",
    config: TpuConfig | None = None,
    interpret: pltpu.InterpretParams | bool = False,
) -> Float[Array, "*B N"]:
    """Compute what `int4_matmul` documents; z in bfloat16, and group scales too for more than 64 rows of x.

    Weights not laid out in columns are reordered at every call, and ranks that are no multiple of 16 filled up.

    Raises:
        NotImplementedError: x is not bfloat16, the result neither that nor float32, the TPU is none that block sizes
            are known for, or the shape cannot be cut up as `config` says.
    """
    if x.dtype != jnp.bfloat16 or out_dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"the TPU kernel multiplies bfloat16, got {x.dtype} to {out_dtype}")
    chip = generation()
    *batch, k = x.shape
    rows = x.reshape(-1, k)
    m = rows.shape[0]
    if layout != "columns":
        packed = packed.T if layout == "rows" else from_fragments(packed).T
        if layout == "rows":
            scale, zero = scale.T, None if zero is None else zero.T
    low_rank = None
    if compensator is not None:
        low_rank = _low_rank(rows, compensator, None if z is None else z.reshape(m, -1))
    rows, packed, scale, zero, low_rank = _fill_up(rows, packed, scale, zero, low_rank)
    n = packed.shape[1]
    if config is None:
        rank = 0 if low_rank is None else low_rank.bt.shape[0]
        shape = {"groups": scale.shape[0], "rank": rank, "activation": activation}
        config, _ = choose_config(m, n, rows.shape[1], **shape, chip=chip)
    x_scale = None
    if activations == "int8":
        if not chip.int8_rate:
            raise NotImplementedError(f"the matrix units of {chip.name} take no int8")
        rows, x_scale = int8_rows(rows)
        config = dataclasses.replace(config, scaled="sums")
    y = int4_matmul_tpu(
        rows, packed, scale, zero, bias, low_rank,
        config=config, out_dtype=out_dtype, vmem_bytes=vmem_budget(chip), x_scale=x_scale, activation=activation,
        interpret=interpret,
    )  # fmt: skip
    return y.reshape(*batch, y.shape[1])


def vmem_budget(chip: Generation) -> int:
    """Give the vector memory that a kernel may take: the rest is left to what XLA keeps there."""
    return chip.vmem * 3 // 4


def _low_rank(x: Float[Array, "M K"], compensator: Compensator, z: Float[Array, "M R"] | None) -> LowRank:
    """Bring a compensator into the kernel's form; what its gate needs besides z is computed here, before the kernel."""
    bt = compensator.bt if compensator.b is None else compensator.b.T
    bt_scale, gate, more = compensator.bt_scale, compensator.gate, -compensator.a.shape[0] % RANK_STEP
    if z is None and gate is not None and (gate.probe is not None or gate.w_rms is not None):
        z = compensator_coordinates(x, compensator)
    bt = _fill(_int8_or_bfloat16(bt), more)
    if z is not None:
        known = z.astype(jnp.float32) * (1 if bt_scale is None else bt_scale.astype(jnp.float32))
        return LowRank(bt=bt, z=jnp.pad(known.astype(jnp.bfloat16), ((0, 0), (0, more))))
    a = _fill(_int8_or_bfloat16(compensator.a), more)
    if gate is not None:
        gate = Gate(
            w_in=_fill(gate.w_in, more), b_in=gate.b_in, w_out=_fill(gate.w_out, more), b_out=_fill(gate.b_out, more),
            form=gate.form,
        )  # fmt: skip

    def row(factors: Array | None) -> Array | None:
        return None if factors is None else _fill(factors.astype(jnp.float32), more)[None]

    return LowRank.gated_by(gate, bt=bt, a=a, a_scale=row(compensator.a_scale), bt_scale=row(bt_scale))


def _int8_or_bfloat16(factor: Any) -> Array:
    return factor if factor.dtype == jnp.int8 else factor.astype(jnp.bfloat16)


def _fill(rows: Array, more: int) -> Array:
    return jnp.pad(rows, ((0, more), *((0, 0),) * (rows.ndim - 1)))


def _fill_up(x, packed, scale, zero, low_rank) -> tuple:
    """Fill the K columns up with zeros to a multiple of 64."""
    k, groups = x.shape[1], scale.shape[0]
    more = -k % CODE_ROWS
    if not more:
        return x, packed, scale, zero, low_rank
    group = k if groups == 1 else k // groups
    if groups > 1 and (k + more) % group:
        raise NotImplementedError(f"{k} columns in groups of {group} cannot be filled up to a multiple of {CODE_ROWS}")
    more_groups = 0 if groups == 1 else more // group
    x, packed = jnp.pad(x, ((0, 0), (0, more))), _fill(packed, more // 2)
    scale, zero = _fill(scale, more_groups), None if zero is None else _fill(zero, more_groups)
    if low_rank is not None and low_rank.a is not None:
        low_rank = dataclasses.replace(low_rank, a=jnp.pad(low_rank.a, ((0, 0), (0, more))))
    return x, packed, scale, zero, low_rank


def choose_config(
    m: int, n: int, k: int, *, groups: int = 1, rank: int = 0, activation: Activation | None = None, chip: Generation
) -> tuple[TpuConfig, Literal["tuned", "model"]]:
    """Give the configuration stored for a TPU and shape, or the one the cost model predicts best; and which it is.

    Raises:
        NotImplementedError: No configuration fits the shape.
    """
    key = {"tile_m": block_rows(m), "n": n, "k": k, "groups": groups, "rank": rank}
    stored = tuning.lookup("int4_matmul", key, device=tuning.device_name(chip.kinds[0]))
    if stored is not None and (activation is None or stored["block_n"] % (2 * LANES) == 0):
        return TpuConfig(**stored), "tuned"
    return _predicted_best(block_rows(m), n, k, groups, rank, activation, chip), "model"


def block_rows(m: int) -> int:
    """Give the rows of x, rounded up, that block sizes are chosen for where there are m."""
    return next((rows for rows in _BLOCKS_M if rows >= m), -(-m // _BLOCKS_M[-1]) * _BLOCKS_M[-1])


@functools.cache
def _predicted_best(
    m: int, n: int, k: int, groups: int, rank: int, activation: Activation | None, chip: Generation
) -> TpuConfig:
    fitting = candidates(m, n, k, groups=groups, rank=rank, activation=activation, chip=chip)
    if not fitting:
        raise NotImplementedError(f"no configuration fits a weight [{n}, {k}] with {groups} groups on a {chip.name}")
    return min(fitting, key=lambda config: predicted_seconds(config, m, n, k, groups=groups, rank=rank, chip=chip))


def candidates(
    m: int, n: int, k: int, *, groups: int, rank: int, activation: Activation | None = None, chip: Generation
) -> list[TpuConfig]:
    """List the configurations that fit a shape and the vector memory."""
    found = []
    blocks_n = [size for size in _BLOCKS_N if n % size == 0] or [n]
    blocks_k = [size for size in range(LANES, min(k, _MOST_BLOCK_K) + 1, LANES) if k % size == 0] or [k]
    blocks_m = [size for size in _BLOCKS_M if size <= max(m, _BLOCKS_M[0])][-3:]
    cores = (1, chip.cores) if chip.cores > 1 else (1,)
    for bm, bn, bk, resident, share in itertools.product(blocks_m, blocks_n, blocks_k, (True, False), cores):
        scaled = "sums" if groups == 1 or bm <= _SUMMED_ROWS else "weights"
        config = TpuConfig(block_m=bm, block_n=bn, block_k=bk, resident=resident, cores=share, scaled=scaled)
        try:
            config.check(n=n, k=k, groups=groups, activation=activation)
        except NotImplementedError:
            continue
        if vmem_bytes(config, k=k, groups=groups, rank=rank) <= vmem_budget(chip):
            found.append(config)
    return found


def vmem_bytes(config: TpuConfig, *, k: int, groups: int, rank: int) -> int:
    """Estimate the vector memory of a configuration: every block twice, sums, and the codes as they are widened."""
    bm, bn, bk = config.block_m, config.block_n, config.block_k
    rows = bm * (k if config.resident else bk) * 2
    scales = 8 * max(groups * bk // k, 8) * bn
    factors = rank * (bk + bn) * 2 + bm * rank * 8
    widened = bk * bn * (6 if groups > 1 and config.scaled == "weights" else 2)
    return 2 * (rows + bk * bn // 2 + scales + factors + bm * bn * 4) + bm * bn * 8 + widened + 2 * MIB


def predicted_seconds(
    config: TpuConfig, m: int, n: int, k: int, *, groups: int = 1, rank: int = 0, chip: Generation
) -> float:
    """Predict the time of a product: the longer of copying and computing, and what cannot overlap with either.

    Constants are fitted to libtpu's static schedules (`tpus.Generation`), not to a TPU.
    """
    row_blocks, cores, whole_rows = -(-m // config.block_m), config.cores, config.resident or config.block_k == k
    steps = row_blocks * n // config.block_n * (k // config.block_k) // cores
    cycles = step_cycles(config, n=n, k=k, groups=groups, rank=rank, chip=chip)
    codes = config.block_n * (config.block_k / 2 + 4 * max(groups * config.block_k // k, 1))
    rows = 2 * m * k * (1 if whole_rows else n // config.block_n // cores)
    # The first blocks, and rows that stay, are waited for.
    first = codes + 2 * config.block_m * (k if whole_rows else config.block_k)
    copied = codes * steps + rows + rank * (n + k) + 2 * m * n / cores
    if groups > 1 and (groups * config.block_k // k) % _SCALE_ROWS and config.block_k < k:
        copied += 6 * groups * n / cores  # scales are read, and written in tiles that are not full, before
    computed = cycles * (steps + 1) / chip.clock
    return _START_SECONDS + max((copied + first) / chip.bandwidth, first / chip.bandwidth + computed)


def step_cycles(config: TpuConfig, *, n: int, k: int, groups: int, rank: int, chip: Generation) -> float:
    """Predict the cycles of a step: what widens codes runs beside what multiplies, but for a quarter of the shorter."""
    block = config.block_n * config.block_k
    widen = block / chip.weights
    if groups > 1 and config.scaled == "weights":
        widen += block / _SCALED_WEIGHTS
    multiply = config.block_m * config.block_k * (config.block_n + rank * config.block_n // n) / chip.macs
    cycles = max(widen, multiply) + min(widen, multiply) / 4
    if groups > 1 and config.scaled == "sums":
        cycles += _PARTIAL_CYCLES * config.block_m * config.block_n / 1024 * (groups * config.block_k // k)
    return cycles + STEP_CYCLES
