"""`paged_attention` on a TPU: a sequence's pages come to vector memory tile by tile, all key heads of a page at once.

jax's own `ragged_paged_attention` is not used: its pages hold keys and values side by side, [P, page, 2 K, H], its
window is static and its scales are one number, so that it would need a copy of the cache at every call.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.tpus import MIB, generation

_F32 = jnp.float32
_MASKED = float(jnp.finfo(jnp.float32).min)
_LANES = 128
_PAGE_STEP = 16
"""Tokens of a page are a multiple of this: rows of a tile of bfloat16."""

_BUFFER_BYTES = 8 * MIB
"""Vector memory that tiles of keys and values, two of each, may take."""

_KINDS = ("bfloat16", "int8", "float8_e4m3fn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuConfig:
    """How attention is cut up: `rows` query rows of each key head a program, `tile` keys a turn."""

    rows: int
    tile: int

    def check(self, *, page: int) -> None:
        """Raise NotImplementedError where tiles do not hold whole pages and vectors."""
        if self.tile % page or self.tile % _LANES or self.rows % _PAGE_STEP:
            raise NotImplementedError(f"{self} does not fit pages of {page} tokens")


def paged_attention_mosaic_tpu(
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
    config: TpuConfig | None = None,
    interpret: pltpu.InterpretParams | bool = False,
) -> Float[Array, "B T N H"]:
    """Compute what `paged_attention` documents; products in bfloat16, softmax in float32.

    Scales of 8-bit pages are gathered before the kernel, for all entries of the table. XLA copies the whole cache into
    tiles of vector memory's shape at every call where H is no multiple of 128, and 8-bit pages of 16 tokens on some
    TPUs: use 32 or more.

    Raises:
        NotImplementedError: The types, H or the pages are none that the kernel takes, or the TPU is not known.
    """
    chip = generation()
    b, t, n, h = q.shape
    heads, page = k_pages.shape[1:3]
    group = n // heads
    if q.dtype != jnp.bfloat16 or k_pages.dtype.name not in _KINDS:
        raise NotImplementedError(
            f"the TPU kernel takes bfloat16 with {', '.join(_KINDS)} pages, got {q.dtype}, {k_pages.dtype}"
        )
    if page % _PAGE_STEP or h % 64:
        raise NotImplementedError(
            f"the TPU kernel takes pages of a multiple of {_PAGE_STEP} tokens and an H of a multiple of 64, "
            f"got {page} and {h}"
        )
    if config is None:
        config = choose_config(t * group, heads, h, page=page, kv_bytes=k_pages.dtype.itemsize)
    config.check(page=page)
    more = -(t * group) % config.rows
    grouped = q.reshape(b, t, heads, group, h).swapaxes(1, 2).reshape(b, heads, t * group, h)
    rows = t * group + more
    operands: list[tuple[Array, pl.BlockSpec]] = [
        # Which of a sequence's query tokens each row is: dividing by any group is no operation on vectors.
        (
            (jnp.arange(rows, dtype=jnp.int32) // group)[:, None],
            pl.BlockSpec((config.rows, 1), lambda b, r, *_: (r, 0)),
        ),
        (
            jnp.pad(grouped, ((0, 0), (0, 0), (0, more), (0, 0))),
            pl.BlockSpec((pl.squeezed, heads, config.rows, h), lambda b, r, *_: (b, 0, r, 0)),
        ),
    ]
    for factors in (k_scale, v_scale):
        if factors is not None:
            gathered = _gather_scales(factors, page_table, config.tile)
            operands.append((gathered, pl.BlockSpec((pl.squeezed, *gathered.shape[1:]), lambda b, r, *_: (b, 0, 0))))
    operands += [(pages, pl.BlockSpec(memory_space=pl.ANY)) for pages in (k_pages, v_pages)]
    buffer = pltpu.VMEM((2, config.tile // page, heads, page, h), k_pages.dtype)
    out = pl.pallas_call(
        functools.partial(
            _kernel, tokens=t, group=group, scale=scale, scaled=k_scale is not None, windowed=window is not None
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(b, rows // config.rows),
            in_specs=[spec for _, spec in operands],
            out_specs=pl.BlockSpec((pl.squeezed, heads, config.rows, h), lambda b, r, *_: (b, 0, r, 0)),
            scratch_shapes=[
                buffer,
                buffer,
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.VMEM((heads, config.rows, _LANES), _F32),
                pltpu.VMEM((heads, config.rows, _LANES), _F32),
                pltpu.VMEM((heads, config.rows, h), _F32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((b, heads, rows, h), q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=chip.vmem // 2
        ),
        cost_estimate=_cost(b, n * t, h, page_table.shape[1] * page, k_pages),
        name="paged_attention",
        interpret=interpret,
    )(
        page_table,
        lengths,
        starts,
        jnp.zeros(1, jnp.int32) if window is None else window[None],
        *(array for array, _ in operands),
    )
    return out[:, :, : t * group].reshape(b, heads, t, group, h).swapaxes(1, 2).reshape(q.shape)


def choose_config(rows: int, heads: int, h: int, *, page: int, kv_bytes: int) -> TpuConfig:
    """Choose how to cut up `rows` query rows a key head: as many keys a turn as fit, up to 512.

    A rule, not a measurement: no TPU was.
    """
    least = math.lcm(page, _LANES)
    fitting = _BUFFER_BYTES // (4 * heads * max(h, _LANES) * kv_bytes) // least * least
    most = max(_PAGE_STEP, 2048 // heads // _PAGE_STEP * _PAGE_STEP)
    filled = -(-rows // _PAGE_STEP) * _PAGE_STEP
    return TpuConfig(rows=min(filled, most), tile=max(least, min(fitting, max(512 // least * least, least))))


def _gather_scales(factors: Float[Array, "P K page"], table: Int32[Array, "B M"], tile: int) -> Float[Array, "B K S"]:
    b, entries = table.shape
    heads, page = factors.shape[1:]
    flat = factors[table].astype(_F32).swapaxes(1, 2).reshape(b, heads, entries * page)
    return jnp.pad(flat, ((0, 0), (0, 0), (0, -flat.shape[2] % tile)))


def _cost(b: int, rows: int, h: int, keys: int, pages: Array) -> pl.CostEstimate:
    """Count as if half of the table were used."""
    moved = b * keys // 2 * pages.shape[1] * h * 2 * pages.dtype.itemsize + 4 * b * rows * h
    return pl.CostEstimate(flops=2 * b * rows * h * keys, bytes_accessed=moved, transcendentals=b * rows * keys // 2)


def _kernel(
    table: Any, lengths: Any, starts: Any, window: Any, offsets: Any, q: Any, *refs: Any,
    tokens: int, group: int, scale: float, scaled: bool, windowed: bool,
) -> None:  # fmt: skip
    """Attend from a block of rows to the tiles of a sequence's keys that some of them sees.

    The next tile is on its way while one is computed with.
    """
    k_factors, v_factors = refs[:2] if scaled else (None, None)
    k_hbm, v_hbm, out, k_buffer, v_buffer, arrived, top, total, sums = refs[2 * scaled :]
    _, pieces, heads, page, h = k_buffer.shape
    rows, tile = q.shape[1], pieces * page
    sequence, block = pl.program_id(0), pl.program_id(1)
    start, length = starts[sequence], lengths[sequence]
    first_token = block * rows // group
    last_token = jnp.minimum((block * rows + rows - 1) // group, tokens - 1)
    end = jnp.minimum(start + last_token + 1, length)
    begin = jnp.maximum(start + first_token - window[0] + 1, 0) if windowed else jnp.int32(0)
    first_tile, tiles = begin // tile, pl.cdiv(jnp.maximum(end, 0), tile)

    def transfer(turn: Array, action: str) -> None:
        """Start the copies of a tile, or wait for them: of the pages alone that hold a key which is seen."""
        slot = jax.lax.rem(turn, 2)

        @pl.loop(0, pieces)
        def _(piece: Array) -> None:
            entry = turn * pieces + piece

            @pl.when((entry * page < end) & ((entry + 1) * page > begin))
            def _() -> None:
                for i, (pages, buffer) in enumerate(((k_hbm, k_buffer), (v_hbm, v_buffer))):
                    source, target = pages.at[table[sequence, entry]], buffer.at[slot, piece]
                    getattr(pltpu.make_async_copy(source, target, arrived.at[i, slot]), action)()

    def load(buffer: Any, slot: Array, head: int) -> Array:
        return buffer[slot, :, head].astype(jnp.bfloat16).reshape(tile, h)

    top[...] = jnp.full_like(top, _MASKED)
    total[...] = jnp.zeros_like(total)
    sums[...] = jnp.zeros_like(sums)
    positions = start + offsets[...]
    pl.when(first_tile < tiles)(lambda: transfer(first_tile, "start"))

    @pl.loop(first_tile, tiles)
    def _(turn: Array) -> None:
        pl.when(turn + 1 < tiles)(lambda: transfer(turn + 1, "start"))
        transfer(turn, "wait")
        slot = jax.lax.rem(turn, 2)

        def keys(shape: tuple[int, int], axis: int) -> Array:
            return turn * tile + jax.lax.broadcasted_iota(jnp.int32, shape, axis)

        columns, lines = keys((rows, tile), 1), keys((tile, h), 0)
        seen = (columns <= positions) & (columns < length)
        if windowed:
            seen = seen & (columns > positions - window[0])
        brought = (lines >= begin) & (lines < end)
        here = pl.ds(pl.multiple_of(turn * tile, _LANES), tile)
        for head in range(heads):
            scores = _dot(q[head], load(k_buffer, slot, head), of_rows=True) * scale
            if k_factors is not None:
                scores = scores * k_factors[pl.ds(head, 1), here]
            scores = jnp.where(seen, scores, _MASKED)
            old = top[head, :, :1]
            new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
            weights = jnp.where(seen, jnp.exp(scores - new), 0.0)
            fade = jnp.exp(old - new)
            total[head] = total[head] * fade + jnp.sum(weights, axis=1, keepdims=True)
            top[head] = jnp.broadcast_to(new, top.shape[1:])
            if v_factors is not None:
                weights = jnp.where(seen, weights * v_factors[pl.ds(head, 1), here], 0.0)
            # Zero times what is no number is none, and what was not brought may be that.
            values = jnp.where(brought, load(v_buffer, slot, head).astype(_F32), 0.0).astype(jnp.bfloat16)
            sums[head] = sums[head] * fade + _dot(weights.astype(jnp.bfloat16), values)

    for head in range(heads):
        weight = total[head, :, :1]
        out[head] = (sums[head] / jnp.where(weight == 0, 1.0, weight)).astype(out.dtype)


def _dot(left: Array, right: Array, *, of_rows: bool = False) -> Array:
    return jax.lax.dot_general(left, right, (((1,), (int(of_rows),)), ((), ())), preferred_element_type=_F32)
