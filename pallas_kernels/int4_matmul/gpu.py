"""`int4_matmul` on a Hopper GPU: brings operands into the kernel's form and chooses how to cut the product up."""

import dataclasses
import functools
import itertools
import math
from typing import Any, Literal

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int8, Shaped

from pallas_kernels import dispatch, tuning
from pallas_kernels.hopper import SHARED_BYTES, computing_registers, thread_registers, whole_rows
from pallas_kernels.int4_matmul.hopper import int4_matmul_hopper
from pallas_kernels.int4_matmul.operands import Activation, Activations, Compensator, Layout
from pallas_kernels.int4_matmul.plan import FEEDER_REGISTERS, MOST_PROJECTED_ROWS, RATIONED_ROWS, HopperConfig
from pallas_kernels.int4_matmul.projection import MOST_ROWS, project_hopper
from pallas_kernels.int4_matmul.reference import compensator_coordinates, gated_coordinates
from pallas_kernels.packing import RANK_STEP, SIDE, to_fragments

_PROJECTED_RANKS = 8
"""Ranks that `project_hopper` takes are multiples of this: the copy engine moves 16 bytes at least."""

_ROW_CLASSES = tuple(2**i for i in range(3, 14))
_TILES_M = (64, 128, 192, 256)
"""Rows of x that a block may take where there are more than 64."""

_RESIDENT = {1: 132, 2: 132, 4: 120, 8: 104}
"""Blocks that run at a time, by the size of their clusters: a cluster must fit into one of a GPU's processing clusters.

Measured on an H200: 128 blocks in clusters of four or eight take twice the time of 128 in clusters of two.
"""

_WAVE_COST = 40
"""What it costs to start a wave of blocks, in the time that a multiprocessor takes for a block of 64 x 64 codes."""

_SPARE_BYTES = 12_288
"""Shared memory left for scales of groups and low-rank factors."""

_BLOCK_REGISTERS = 40
_OTHER_REGISTERS = 24
"""Registers of a thread that two blocks of 64 x 64 codes take on their way, and that all else takes but sums.

Fitted to what ptxas reports: 65 to 113 registers, and spills where a thread has fewer.
"""

_MOST_SLOTS = 8

_MANY_ROWS = 64
"""Rows of x from which on the tensor cores' time counts, and the cost of a cut is what a model of it says."""

_ROW_MICROSECONDS = 0.16 / 128
"""What the tensor cores of a multiprocessor take for a row of x and 64 x 64 codes: 815 Tflop/s on an H100."""

_WAY_MICROSECONDS = 0.25
"""What a warpgroup takes for a block of 64 x 64 codes besides multiplying: waiting, reading, converting."""

_LATENCY_MICROSECONDS = 1.1
"""From a slot's being empty to its being full again: with one slot a block took 1.77 us, 0.57 of them to compute."""

_COPY_MICROSECONDS = 0.1
_BYTES_PER_MICROSECOND = 60_000
"""What the copy engine of a multiprocessor brings from the second-level cache, all of them at work; at least."""

_START_MICROSECONDS = 2.0
"""What a round of blocks takes besides its steps."""

_TURNS = 3
"""Copies that should be under way for each part of K: with two, a product of 58 MB took 7% longer on an H100."""

_WARPGROUPS = 4
"""Computing warpgroups that keep a multiprocessor of Hopper busy."""


def int4_matmul_mosaic_gpu(
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
    config: HopperConfig | None = None,
    interpret: plgpu.InterpretGPUParams | bool = False,
) -> Float[Array, "*B N"]:
    """Compute what `int4_matmul` documents; z in bfloat16, and group scales too for more than 16 rows of x.

    Weights laid out by rows are reordered at every call, `bt` is transposed and ranks are filled up to multiples of 16:
    for speed, bring weights into fragments, and compensators into such a `b` and into `a_fragments`, once. Static
    compensators in that form need no other kernel up to 64 rows of x.

    Raises:
        NotImplementedError: x is not bfloat16, the result neither that nor float32, the GPU is no Hopper, or the shape
            cannot be cut up as `config` says.
    """
    if x.dtype != jnp.bfloat16 or out_dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"the GPU kernel multiplies bfloat16, got {x.dtype} to {out_dtype}")
    if activations == "int8":
        raise NotImplementedError("the GPU kernel does not round x to int8")
    if layout == "columns":
        raise NotImplementedError("the GPU kernel reads rows or fragments, and this weight is laid out in columns")
    dispatch.refuse_other_gpus()
    *batch, k = x.shape
    n = packed.shape[0]
    rows = _whole(x.reshape(-1, k))
    m = rows.shape[0]
    if layout == "rows":
        rows, packed, scale, zero, bias = _pad_and_reorder(rows, packed, scale, zero, bias)
    a = b = None
    if compensator is not None and z is None and _projects_along(m, compensator):
        a, b = compensator.a_fragments, compensator.b
    elif compensator is not None:
        z = coordinates(rows[:, :k], compensator, interpret) if z is None else _whole(z.reshape(-1, z.shape[-1]))
        z, b = _low_rank(z, compensator, packed.shape[0])
    if config is None:
        problem = {
            "groups": scale.shape[0],
            "rank": 0 if a is None or b is None else b.shape[1],
            "paired": activation is not None,
            "wide": out_dtype == jnp.float32,
        }
        config, _ = choose_config(m, packed.shape[0], rows.shape[1], **problem)
    y = int4_matmul_hopper(
        *(rows, packed, scale, zero, bias, b, z, a),
        config=config,
        out_dtype=out_dtype,
        activation=activation,
        interpret=interpret,
    )
    assert y is not None
    columns = n if activation is None else n // 2
    return y[: math.prod(batch), :columns].reshape(*batch, columns)


def _whole(rows: Shaped[Array, "M K"]) -> Shaped[Array, "P K"]:
    return jnp.pad(rows, ((0, whole_rows(rows.shape[0]) - rows.shape[0]), (0, 0)))


def _projects_along(m: int, compensator: Compensator) -> bool:
    """Say whether the product itself can compute the coordinates of a compensator."""
    return (
        m <= MOST_PROJECTED_ROWS
        and compensator.gate is None
        and compensator.a_fragments is not None
        and compensator.b is not None
        and compensator.b.dtype in (jnp.int8, jnp.bfloat16)
    )


def _pad_and_reorder(x, packed, scale, zero, bias) -> tuple:
    """Bring operands laid out by rows into fragments, filling sides up to multiples of 64 with zeros."""
    (n, half), groups = packed.shape, scale.shape[1]
    more_n, k = -n % SIDE, 2 * half
    group = k if groups == 1 else k // groups
    more_k = -k % SIDE
    more_groups = 0 if groups == 1 else -(-(k + more_k) // group) - groups
    if groups > 1 and (k + more_k) % group:
        raise NotImplementedError(f"{k} columns in groups of {group} cannot be filled up to a multiple of {SIDE}")
    x = jnp.pad(x, ((0, 0), (0, more_k)))
    packed = to_fragments(jnp.pad(packed, ((0, more_n), (0, more_k // 2))))
    grouped = ((0, more_n), (0, more_groups))
    scale = jnp.pad(scale, grouped).T
    zero = None if zero is None else jnp.pad(zero, grouped).T
    bias = None if bias is None else jnp.pad(bias, (0, more_n))
    return x, packed, scale, zero, bias


def coordinates(
    x: Float[Array, "M K"], compensator: Compensator, interpret: plgpu.InterpretGPUParams | bool
) -> Float[Array, "M R"]:
    """Compute the gated coordinates with A in bfloat16, `A x` by a kernel of its own where there are few rows of x."""
    gate, rank = compensator.gate, compensator.rank
    if gate is not None and gate.probe is not None:
        return compensator_coordinates(x, compensator)
    a = compensator.rows_of_a()
    scale = None if compensator.a_scale is None else compensator.a_scale.astype(jnp.float32)
    if x.shape[0] > MOST_ROWS or x.shape[1] % SIDE:
        # In bfloat16, as x is: XLA would read x, widen it and multiply more slowly in float32.
        z = jnp.einsum("mk,rk->mr", x, a.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
        z = z if scale is None else z * scale
        return z if gate is None else gated_coordinates(x, z, None, gate)
    a = a if a.dtype == jnp.int8 else a.astype(jnp.bfloat16)
    more = -rank % _PROJECTED_RANKS
    if more:
        a = jnp.pad(a, ((0, more), (0, 0)))
        scale = None if scale is None else jnp.pad(scale, (0, more))
    # Where nothing more happens to z it is rounded at once, for the product with B.
    done = gate is None and compensator.bt_scale is None
    z = project_hopper(
        _whole(x), a, scale, out_dtype=jnp.dtype(jnp.bfloat16 if done else jnp.float32), interpret=interpret
    )
    z = z[: x.shape[0], :rank]
    return z if gate is None else gated_coordinates(x, z, None, gate)


def _low_rank(
    z: Float[Array, "M R"], compensator: Compensator, n: int
) -> tuple[Float[Array, "M P"], Shaped[Array, "N P"]]:
    """Give coordinates with B's scales in them, and B, at a rank that wgmma takes."""
    if compensator.bt_scale is not None:
        z = z * compensator.bt_scale.astype(z.dtype)
    b = compensator.bt.T if compensator.b is None else compensator.b
    b = b if b.dtype == jnp.int8 else b.astype(jnp.bfloat16)
    more = -b.shape[1] % RANK_STEP
    return jnp.pad(z.astype(jnp.bfloat16), ((0, 0), (0, more))), jnp.pad(b, ((0, n - b.shape[0]), (0, more)))


def choose_config(
    m: int,
    n: int,
    k: int,
    *,
    groups: int = 1,
    rank: int = 0,
    paired: bool = False,
    wide: bool = False,
    device: str | None = None,
) -> tuple[HopperConfig, Literal["tuned", "rule"]]:
    """Give the configuration tuned for a device and shape, or what a rule of thumb makes of it; and which it is.

    `rank` is that of a compensator whose coordinates the product computes, 0 for none; `paired` says that it ends with
    an activation, `wide` that its result is in float32. `device` is a folder of `tuned/`; by default that of this
    process's first device.

    Raises:
        NotImplementedError: No configuration fits the shape.
    """
    shape = Shape(n=n, k=k, groups=groups, rank=rank, paired=paired, wide=wide)
    key = {"tile_m": row_class(m), "n": n, "k": k, "groups": groups, "rank": rank}
    tuned = tuning.lookup("int4_matmul", key, device=device)
    if tuned is not None and shape.fits(config := HopperConfig(**tuned)):
        return config, "tuned"
    return _rule_of_thumb(m, shape), "rule"


def row_class(m: int) -> int:
    """Give the number of rows of x, a power of two, whose tuned settings are for m rows (`tile_m` in their keys).

    Up to 64 it is also how many of them a block takes.
    """
    return next((rows for rows in _ROW_CLASSES if rows >= m), _ROW_CLASSES[-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What a product's configuration must fit: a weight [n, k] in groups, and what goes on beside it.

    `rank`, `paired` and `wide` are as for `choose_config`.
    """

    n: int
    k: int
    groups: int = 1
    rank: int = 0
    paired: bool = False
    wide: bool = False

    def fits(self, config: HopperConfig) -> bool:
        """Say whether the product can be cut up so, and has shared memory enough."""
        try:
            config.check(n=self.n, k=self.k, groups=self.groups, projected=self.rank > 0, paired=self.paired)
        except NotImplementedError:
            return False
        tiles = config.row_tiles + (self.rank > 0)
        if tiles * config.k_parts > 1:
            if config.tile_m < RATIONED_ROWS:
                registers = thread_registers(tiles * config.k_parts + 1)
            else:
                registers = computing_registers(tiles * config.k_parts, feeder=FEEDER_REGISTERS)
            if config.tile_m // 2 + _BLOCK_REGISTERS + _OTHER_REGISTERS > registers:
                return False
        step = SIDE * config.blocks
        steps = self.k // SIDE // config.parts // config.blocks
        slot = config.tile_m * step * 2 + config.row_tiles * SIDE * step // 2 + self.rank * step * 2
        ring = config.k_parts * min(config.slots, steps) * slot
        share = config.tile_m // config.reducers
        sums = config.parts * tiles * SIDE * share * 4 if config.parts > 1 else 0
        result = config.row_tiles * share * SIDE * (4 if self.wide else 2)
        if self.paired and share == SIDE:  # odd tiles wait in float32: of fewer rows they fit into what is spare
            result += config.row_tiles * share * SIDE
        return ring + sums + result + _SPARE_BYTES <= SHARED_BYTES


@functools.cache
def _rule_of_thumb(m: int, shape: Shape) -> HopperConfig:
    fitting = candidates(m, shape)
    if not fitting:
        raise NotImplementedError(f"no configuration fits a weight [{shape.n}, {shape.k}] with {shape.groups} groups")
    return rank_by_rule(fitting, m, shape)[0]


def rank_by_rule(configs: list[HopperConfig], m: int, shape: Shape) -> list[HopperConfig]:
    """Sort configurations by what they should take, the best first.

    Up to 64 rows that is a guess from how evenly work is spread; above, a model in microseconds.
    """

    def modelled(config: HopperConfig) -> tuple:
        blocks = -(-m // config.tile_m) * shape.n // SIDE // config.row_tiles * config.splits
        waves = -(-blocks // _RESIDENT[config.splits])
        multiply = config.tile_m * _ROW_MICROSECONDS
        way = _WAY_MICROSECONDS + multiply
        slot_blocks = min(config.slots, shape.k // SIDE // config.parts // config.blocks) * config.blocks
        piece = config.k_parts * (config.tile_m * SIDE * 2 + config.row_tiles * SIDE * SIDE // 2)
        block = max(
            config.row_tiles * config.k_parts * multiply,
            way,
            (_LATENCY_MICROSECONDS + config.blocks * way) / slot_blocks,
            2 * _COPY_MICROSECONDS * config.k_parts / config.blocks,
            piece / _BYTES_PER_MICROSECOND,
        )
        microseconds = waves * (shape.k // SIDE // config.parts * block + _START_MICROSECONDS)
        return microseconds, config.splits, -config.row_tiles, -min(config.slots, _TURNS + 1), abs(config.blocks - 2)

    def guessed(config: HopperConfig) -> tuple:
        blocks = -(-m // config.tile_m) * shape.n // SIDE // config.row_tiles * config.splits
        waves = -(-blocks // _RESIDENT[config.splits])
        # A warpgroup waits more than it computes, so that up to four of them take no longer than one.
        work = _WARPGROUPS * (shape.k // SIDE // config.parts)
        # A copy is begun by one thread and takes it a tenth of a microsecond: few large ones, but three to take turns.
        steps = shape.k // SIDE // config.parts // config.blocks
        few = min(config.slots, steps) < min(_TURNS, steps)
        return waves * (work + _WAVE_COST), few, config.splits, -config.row_tiles, -config.blocks

    return sorted(configs, key=modelled if m > _MANY_ROWS else guessed)


def candidates(m: int, shape: Shape) -> list[HopperConfig]:
    """List the configurations that fit m rows of x and a shape, for tuning."""
    tiles = (row_class(m),) if m <= _MANY_ROWS else tuple(tile for tile in _TILES_M if tile < m + SIDE)
    found = []
    for tile_m, row_tiles, k_parts in itertools.product(tiles, (1, 2, 3, 4), (1, 2, 4)):
        large = tile_m >= RATIONED_ROWS
        if row_tiles * k_parts > _WARPGROUPS:
            continue
        paces = itertools.product((1, 2), (1, 2)) if large else itertools.product((1, 2, 4, 8), (1, 2, 4, 7, 8))
        for splits, blocks in paces:
            cut: dict[str, Any] = {"tile_m": tile_m, "row_tiles": row_tiles, "k_parts": k_parts}
            config = HopperConfig(**cut, splits=splits, blocks=blocks, slots=1)
            if shape.fits(config):
                found.append(_deepest(config, shape))
    return found


def _deepest(config: HopperConfig, shape: Shape) -> HopperConfig:
    """Give a configuration as many slots as fit, up to `_MOST_SLOTS`."""
    more = (dataclasses.replace(config, slots=slots) for slots in range(_MOST_SLOTS, config.slots, -1))
    return next((other for other in more if shape.fits(other)), config)


def variants(config: HopperConfig, shape: Shape) -> list[HopperConfig]:
    """List the configurations that cut a shape up like `config` but pace their work differently, for tuning."""
    paces = [(blocks, slots) for blocks in (1, 2, 4, 7, 8) for slots in (1, 2, 3, 4, 6, 8)]
    found = [dataclasses.replace(config, blocks=blocks, slots=slots) for blocks, slots in paces]
    return [other for other in found if other != config and shape.fits(other)]
