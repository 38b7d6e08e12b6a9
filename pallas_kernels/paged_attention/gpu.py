"""`paged_attention` on a Hopper GPU: brings operands into the kernel's form and chooses how to cut the work up."""

import itertools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels import dispatch, tuning
from pallas_kernels.hopper import SHARED_BYTES
from pallas_kernels.paged_attention.hopper import paged_attention_hopper
from pallas_kernels.paged_attention.plan import ALIGNED, CLUSTERS, TILE, HopperConfig, Problem, aligned_rows
from pallas_kernels.paged_attention.reference import append_xla

_KV_TYPES = (jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn)
_WIDEST_HEAD = 256
_RESIDENT = {1: 132, 2: 132, 4: 120, 8: 104}
"""Blocks that run at a time, by the size of their clusters; measured, see `int4_matmul.gpu`."""

_SPARE_BYTES = 6_144
"""Shared memory left for barriers, scales and sums."""

_START_COST = 4
"""What it costs to start a block, in the time that a multiprocessor takes to read a tile of keys and values."""

_COMBINE_COST = {"xla": 6, "cluster": 1}
"""What it costs to bring splits together, likewise: by three more kernels, or in a cluster."""


def paged_attention_mosaic_gpu(
    q: Float[Array, "B T N H"],
    k_pages: Shaped[Array, "P K page H"],
    v_pages: Shaped[Array, "P K page H"],
    k_scale: Float[Array, "P K page"] | None,
    v_scale: Float[Array, "P K page"] | None,
    page_table: Int32[Array, "B M"],
    lengths: Int32[Array, " B"],
    starts: Int32[Array, " B"],
    window: Int32[Array, ""] | None,
    *,
    scale: float,
    config: HopperConfig | None = None,
    interpret: plgpu.InterpretGPUParams | bool = False,
) -> Float[Array, "B T N H"]:
    """Compute what `paged_attention` documents; weights of the softmax are rounded to bfloat16.

    Raises:
        NotImplementedError: q is not bfloat16, pages are of another type than bfloat16, int8 or float8_e4m3fn, the GPU
            is no Hopper, or the sizes of heads or pages are none that the kernel takes.
    """
    _check(q, k_pages)
    b, t, n, h = q.shape
    kv_heads, page = k_pages.shape[1:3]
    group = n // kv_heads
    problem = Problem(tokens=t, group=group, windowed=window is not None, scale=scale, out_dtype=q.dtype)
    if config is None:
        config = choose_config(
            b,
            kv_heads,
            problem.rows,
            head_dim=h,
            page=page,
            capacity=page * page_table.shape[1],
            kv_bytes=k_pages.dtype.itemsize,
        )
    rows = jnp.swapaxes(q.reshape(b, t, kv_heads, group, h), 1, 2).reshape(b, kv_heads, problem.rows, h)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, problem.padded_rows(config) - problem.rows), (0, 0)))
    parts, sums = paged_attention_hopper(
        rows,
        k_pages,
        v_pages,
        None if k_scale is None else k_scale.astype(jnp.float32),
        None if v_scale is None else v_scale.astype(jnp.float32),
        page_table,
        lengths,
        starts,
        None if window is None else window.reshape(1),
        problem=problem,
        config=config,
        interpret=interpret,
    )
    out = parts[0] if sums is None else _combine(parts, sums).astype(q.dtype)
    out = out[:, :, : problem.rows].reshape(b, kv_heads, t, group, h)
    return jnp.swapaxes(out, 1, 2).reshape(q.shape)


def paged_decode_mosaic_gpu(
    qkv: Float[Array, "B N+2K H"],
    rotation: Float32[Array, "B 2 H"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    page_table: Int32[Array, "B M"],
    lengths: Int32[Array, " B"],
    window: Int32[Array, ""] | None = None,
    *,
    scale: float,
    config: HopperConfig | None = None,
    interpret: plgpu.InterpretGPUParams | bool = False,
) -> tuple[Float[Array, "B N H"], Float[Array, "P K page H"], Float[Array, "P K page H"]]:
    """Compute what `paged_decode` documents: in one kernel, or where heads do not fill tiles, partly by XLA.

    Raises:
        NotImplementedError: As `paged_attention_mosaic_gpu`, or pages are not of bfloat16, or there is a window.
    """
    if window is not None:
        raise NotImplementedError("the GPU kernel that appends has no window")
    if k_pages.dtype != jnp.bfloat16:
        raise NotImplementedError(f"the GPU kernel appends to pages of bfloat16, got {k_pages.dtype}")
    (b, heads, h), (kv_heads, page) = qkv.shape, k_pages.shape[1:3]
    group = (heads - 2 * kv_heads) // kv_heads
    problem = Problem(tokens=1, group=group, windowed=False, scale=scale, out_dtype=qkv.dtype, appends=True)
    most = problem.padded_rows(HopperConfig())
    last = (kv_heads - 1) * group // ALIGNED * ALIGNED  # where the copy for the last key head begins
    if h % (2 * TILE) or most > TILE or heads % ALIGNED or last + most > heads:
        q, k_pages, v_pages = append_xla(qkv, rotation, k_pages, v_pages, page_table, lengths)
        operands = (q[:, None], k_pages, v_pages, None, None, page_table, lengths, lengths - 1, None)
        out = paged_attention_mosaic_gpu(*operands, scale=scale, config=config, interpret=interpret)
        return out[:, 0], k_pages, v_pages
    _check(qkv, k_pages)
    if config is None:
        capacity = page * page_table.shape[1]
        config = choose_config(b, kv_heads, group, head_dim=h, page=page, capacity=capacity, kv_bytes=2)
    keys, values = jax.new_ref(k_pages), jax.new_ref(v_pages)
    parts, sums = paged_attention_hopper(
        *(qkv, keys, values, None, None, page_table, lengths, lengths - 1, None, rotation),
        problem=problem,
        config=config,
        interpret=interpret,
    )
    out = parts[0] if sums is None else _combine(parts, sums).astype(qkv.dtype)
    return out.reshape(b, kv_heads * group, h), jax.freeze(keys), jax.freeze(values)


def _check(q: Array, k_pages: Array) -> None:
    """Raise NotImplementedError for what the kernel cannot do."""
    h, page = k_pages.shape[-1], k_pages.shape[2]
    if q.dtype != jnp.bfloat16 or k_pages.dtype not in _KV_TYPES:
        raise NotImplementedError(
            f"the GPU kernel takes bfloat16 with bfloat16, int8 or float8_e4m3fn pages, got {q.dtype}, {k_pages.dtype}"
        )
    dispatch.refuse_other_gpus()
    if h % TILE or h > _WIDEST_HEAD:
        raise NotImplementedError(f"the head dimension must be a multiple of {TILE} up to {_WIDEST_HEAD}, got {h}")
    if page % 16 or (page % TILE and TILE % page):
        raise NotImplementedError(f"pages must be of 16, 32 or a multiple of {TILE} tokens, got {page}")


def _combine(parts: Float32[Array, "S B K R H"], sums: Float32[Array, "S B K R"]) -> Float32[Array, "B K R H"]:
    """Average what splits found, each weighed by its sum, of which `sums` are binary logarithms."""
    top = sums.max(axis=0)
    weights = jnp.exp2(sums - jnp.where(top == -jnp.inf, 0, top))
    total = weights.sum(axis=0)
    weights = weights / jnp.where(total == 0, 1, total)
    return (parts * weights[..., None]).sum(axis=0)


def choose_config(
    b: int, kv_heads: int, rows: int, *, head_dim: int, page: int, capacity: int, kv_bytes: int
) -> HopperConfig:
    """Give the tuned configuration for this device and problem, or what a rule of thumb makes of it.

    `rows` are a key head's query rows in a sequence, and `capacity` the keys that a row of the page table has room for.

    Raises:
        NotImplementedError: No configuration fits into shared memory.
    """
    key = {"sequences": b, "kv_heads": kv_heads, "rows": rows, "head_dim": head_dim}
    key |= {"page": page, "capacity": capacity, "kv_bytes": kv_bytes}
    tuned = tuning.lookup("paged_attention", key)
    if tuned is not None:
        return HopperConfig(**tuned)
    fitting = candidates(rows, head_dim=head_dim, capacity=capacity, kv_bytes=kv_bytes)
    if not fitting:
        raise NotImplementedError(f"no configuration fits heads of {head_dim}")
    return rank_by_rule(fitting, b, kv_heads, rows, capacity=capacity)[0]


def rank_by_rule(configs: list[HopperConfig], b: int, kv_heads: int, rows: int, *, capacity: int) -> list[HopperConfig]:
    """Sort configurations by what they should take for sequences that fill their table, the best first."""

    def cost(config: HopperConfig) -> tuple:
        tiles = -(-rows // (TILE * config.row_tiles))
        blocks = b * kv_heads * tiles * config.splits
        waves = -(-blocks // _RESIDENT[config.splits if config.cluster else 1])
        combine = 0 if config.splits == 1 else _COMBINE_COST["cluster" if config.cluster else "xla"]
        share = -(-capacity // TILE // config.splits)
        return (
            waves * (share + _START_COST) + combine,
            config.splits,
            -config.warpgroups,
            -config.stages,
        )

    return sorted(configs, key=cost)


def candidates(rows: int, *, head_dim: int, capacity: int, kv_bytes: int) -> list[HopperConfig]:
    """List the configurations that fit a problem, for tuning."""
    # Two warpgroups that hold 64 x 256 sums each would not have registers enough.
    cuts = [(1, 1)] if head_dim > 128 else [(1, 2), (1, 1)] if rows <= TILE else [(2, 1), (1, 2), (1, 1)]
    found = []
    for row_tiles, parts in cuts:
        for splits in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
            if splits > 1 and capacity < 2 * TILE * parts * splits:
                continue
            for cluster, stages in itertools.product((True, False), (8, 6, 4, 3, 2)):
                if stages % parts or (cluster and (splits not in CLUSTERS or rows > TILE)):
                    continue
                config = HopperConfig(row_tiles=row_tiles, parts=parts, splits=splits, cluster=cluster, stages=stages)
                if _shared_bytes(config, rows, head_dim, kv_bytes) <= SHARED_BYTES:
                    found.append(config)
    return found


def _shared_bytes(config: HopperConfig, rows: int, head_dim: int, kv_bytes: int) -> int:
    tile = TILE * head_dim
    ring = 2 * config.stages * (tile * kv_bytes + (4 * TILE if kv_bytes == 1 else 0))
    wide = config.warpgroups * tile * 2 * (2 if kv_bytes == 1 else 1)
    out = config.row_tiles * tile * 2
    merged = (config.parts - 1) * config.row_tiles * tile * 4
    gathered = 0
    if config.cluster:
        columns = head_dim // math.gcd(config.splits, head_dim // TILE)
        out, few = TILE * TILE * 4, aligned_rows(rows)
        gathered = few * (config.splits * (columns + TILE) * 4 + columns * 2)
    return ring + wide + out + merged + gathered + _SPARE_BYTES
