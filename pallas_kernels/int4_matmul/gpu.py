"""`int4_matmul` on a Hopper GPU: brings operands into the kernel's form and chooses how to cut the product up."""

import dataclasses
import functools
from typing import Literal

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int8, Shaped

from pallas_kernels import dispatch, tuning
from pallas_kernels.hopper import SHARED_BYTES
from pallas_kernels.int4_matmul.hopper import HopperConfig, int4_matmul_hopper
from pallas_kernels.int4_matmul.operands import Activations, Compensator, Layout
from pallas_kernels.int4_matmul.projection import MOST_ROWS, project_hopper
from pallas_kernels.int4_matmul.reference import compensator_coordinates, gated_coordinates
from pallas_kernels.packing import RANK_STEP, SIDE, to_fragments

_PROJECTED_RANKS = 8
"""Ranks that `project_hopper` takes are multiples of this: the copy engine moves 16 bytes at least."""

_TILES_M = (8, 16, 32, 64, 128, 256)
_RESIDENT = {1: 132, 2: 132, 4: 120, 8: 104}
"""Blocks that run at a time, by the size of their clusters: a cluster must fit into one of a GPU's processing clusters.

Measured on an H200: 128 blocks in clusters of four or eight take twice the time of 128 in clusters of two.
"""

_WAVE_COST = 40
"""What it costs to start a wave of blocks, in the time that a multiprocessor takes for a block of 64 x 64 codes."""

_SPARE_BYTES = 12_288
"""Shared memory left for scales of groups and low-rank factors."""

_MOST_SLOTS = 8

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
    activations: Activations = "as they are",
    config: HopperConfig | None = None,
    interpret: plgpu.InterpretGPUParams | bool = False,
) -> Float[Array, "*B N"]:
    """Compute what `int4_matmul` documents; z in bfloat16, and group scales too for more than 16 rows of x.

    Weights laid out by rows are reordered at every call, `bt` is transposed and ranks are filled up to multiples of 16:
    for speed, bring weights into fragments and compensators into such a `b` once.

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
    rows = x.reshape(-1, k)
    m = rows.shape[0]
    if layout == "rows":
        rows, packed, scale, zero, bias = _pad_and_reorder(rows, packed, scale, zero, bias)
    b = None
    if compensator is not None:
        z = _coordinates(x.reshape(m, k), compensator, interpret) if z is None else z
        z, b = _low_rank(z.reshape(m, -1), compensator, packed.shape[0])
    if config is None:
        config, _ = choose_config(
            m, packed.shape[0], rows.shape[1], groups=scale.shape[0], rank=0 if b is None else b.shape[1]
        )
    y = int4_matmul_hopper(
        rows, packed, scale, zero, bias, b, z, config=config, out_dtype=out_dtype, interpret=interpret
    )
    return y[:, :n].reshape(*batch, n)


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


def _coordinates(
    x: Float[Array, "M K"], compensator: Compensator, interpret: plgpu.InterpretGPUParams | bool
) -> Float[Array, "M R"]:
    """Compute the gated coordinates, `A x` by a kernel of its own where there are few rows of x."""
    gate, rank = compensator.gate, compensator.a.shape[0]
    if x.shape[0] > MOST_ROWS or x.shape[1] % SIDE or (gate is not None and gate.probe is not None):
        return compensator_coordinates(x, compensator)
    a = compensator.a if compensator.a.dtype == jnp.int8 else compensator.a.astype(jnp.bfloat16)
    scale = None if compensator.a_scale is None else compensator.a_scale.astype(jnp.float32)
    more = -rank % _PROJECTED_RANKS
    if more:
        a = jnp.pad(a, ((0, more), (0, 0)))
        scale = None if scale is None else jnp.pad(scale, (0, more))
    # Where nothing more happens to z it is rounded at once, for the product with B.
    done = gate is None and compensator.bt_scale is None
    z = project_hopper(x, a, scale, out_dtype=jnp.dtype(jnp.bfloat16 if done else jnp.float32), interpret=interpret)
    return z[:, :rank] if gate is None else gated_coordinates(x, z[:, :rank], None, gate)


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
    m: int, n: int, k: int, *, groups: int = 1, rank: int = 0, device: str | None = None
) -> tuple[HopperConfig, Literal["tuned", "rule"]]:
    """Give the configuration tuned for a device and shape, or what a rule of thumb makes of it; and which it is.

    `device` is a folder of `tuned/`; by default that of this process's first device.

    Raises:
        NotImplementedError: No configuration fits the shape.
    """
    key = {"tile_m": tile_rows(m), "n": n, "k": k, "groups": groups, "rank": rank}
    tuned = tuning.lookup("int4_matmul", key, device=device)
    return (_rule_of_thumb(m, n, k, groups), "rule") if tuned is None else (HopperConfig(**tuned), "tuned")


def tile_rows(m: int) -> int:
    """Give the rows of x that a block takes where there are m."""
    return next((tile for tile in _TILES_M if tile >= m), _TILES_M[-1])


@functools.cache
def _rule_of_thumb(m: int, n: int, k: int, groups: int) -> HopperConfig:
    fitting = candidates(tile_rows(m), n, k, groups=groups)
    if not fitting:
        raise NotImplementedError(f"no configuration fits a weight [{n}, {k}] with {groups} groups")
    return rank_by_rule(fitting, m, n, k)[0]


def rank_by_rule(configs: list[HopperConfig], m: int, n: int, k: int) -> list[HopperConfig]:
    """Sort configurations by what they should take, the best first: a guess from how evenly work is spread."""

    def cost(config: HopperConfig) -> tuple:
        blocks = -(-m // config.tile_m) * n // SIDE // config.row_tiles * config.splits
        waves = -(-blocks // _RESIDENT[config.splits])
        # A warpgroup waits more than it computes, so that up to four of them take no longer than one.
        work = _WARPGROUPS * (k // SIDE // config.parts)
        return waves * (work + _WAVE_COST), config.splits, -config.row_tiles, -config.blocks

    return sorted(configs, key=cost)


def candidates(tile_m: int, n: int, k: int, *, groups: int = 1) -> list[HopperConfig]:
    """List the configurations that fit a shape, for tuning."""
    found = []
    large = tile_m >= 128
    for row_tiles in (1, 2, 3, 4):
        for k_parts in (1,) if large else (1, 2, 4):
            for splits in (1, 2, 4) if large else (1, 2, 4, 8):
                for blocks in (1,) if groups > 1 else (1, 2):
                    if row_tiles * k_parts > (2 if large else _WARPGROUPS):
                        continue
                    config = HopperConfig(
                        tile_m=tile_m, row_tiles=row_tiles, k_parts=k_parts, splits=splits, blocks=blocks, slots=2
                    )
                    if _fits(config, n, k, groups):
                        found.append(_deepest(config, n, k, groups))
    return found


def _deepest(config: HopperConfig, n: int, k: int, groups: int) -> HopperConfig:
    """Give a configuration as many slots as fit, up to `_MOST_SLOTS`."""
    more = (dataclasses.replace(config, slots=slots) for slots in range(_MOST_SLOTS, config.slots, -1))
    return next((other for other in more if _fits(other, n, k, groups)), config)


def variants(config: HopperConfig, n: int, k: int, *, groups: int = 1) -> list[HopperConfig]:
    """List the configurations that cut a shape up like `config` but pace their work differently, for tuning."""
    paces = [(blocks, behind, slots) for blocks in (1, 2) for behind in (0, 1) for slots in (4, 6, 8, 12, 16)]
    found = [dataclasses.replace(config, blocks=blocks, behind=behind, slots=slots) for blocks, behind, slots in paces]
    return [other for other in found if other != config and _fits(other, n, k, groups)]


def _fits(config: HopperConfig, n: int, k: int, groups: int) -> bool:
    try:
        config.check(n=n, k=k, groups=groups)
    except NotImplementedError:
        return False
    step = SIDE * config.blocks
    steps = k // SIDE // config.parts // config.blocks
    slot = config.tile_m * step * 2 + config.row_tiles * SIDE * step // 2
    ring = config.k_parts * min(config.slots, steps) * slot
    share = config.tile_m // config.reducers
    sums = config.parts * config.row_tiles * SIDE * share * 4 if config.parts > 1 else 0
    result = config.row_tiles * share * SIDE * 2
    return ring + sums + result + _SPARE_BYTES <= SHARED_BYTES
