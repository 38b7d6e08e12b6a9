"""`paged_attention` on a TPU: a sequence's pages come to vector memory tile by tile, all key heads of a page at once.

jax's own `ragged_paged_attention` is not used: its pages hold keys and values side by side, [P, page, 2 K, H], its
window is static and its scales are one number, so that it would need a copy of the cache at every call.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels.paged_attention.reference import rotated
from pallas_kernels.paged_attention.tpu_kernel import LANES, PAGE_STEP, Attention, write_chunk
from pallas_kernels.tpus import MIB, generation

_F32 = jnp.float32

_BUFFER_BYTES = 8 * MIB
"""Vector memory that tiles of keys and values, two of each, may take."""

_SCALARS = 4
"""Operands that a program reads before its blocks: page table, lengths, starts and window."""

_KINDS = ("bfloat16", "int8", "float8_e4m3fn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuConfig:
    """How attention is cut up: `rows` query rows of each key head a program, `tile` keys a turn."""

    rows: int
    tile: int

    def check(self, *, page: int) -> None:
        """Raise NotImplementedError where tiles do not hold whole pages and vectors."""
        if self.tile % page or self.tile % LANES or self.rows % PAGE_STEP:
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
    places = (page_table, lengths, starts, window)
    options = {"scale": scale, "config": config, "interpret": interpret}
    return _attend(q, {"k_pages": k_pages, "v_pages": v_pages}, (k_scale, v_scale), places, None, **options)[0]


def paged_decode_mosaic_tpu(
    qkv: Float[Array, "B N+2K H"],
    rotation: Float32[Array, "B 2 H"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    page_table: Int32[Array, "B M"],
    lengths: Int32[Array, " B"],
    window: Int32[Array, ""] | None,
    *,
    scale: float,
    config: TpuConfig | None = None,
    interpret: pltpu.InterpretParams | bool = False,
) -> tuple[Float[Array, "B N H"], Float[Array, "P K page H"], Float[Array, "P K page H"]]:
    """Compute what `paged_decode` documents: XLA rotates, the kernel writes and attends.

    Raises:
        NotImplementedError: As `paged_attention_mosaic_tpu`, or pages are not of bfloat16.
    """
    if k_pages.dtype != jnp.bfloat16:
        raise NotImplementedError(f"the TPU kernel appends to pages of bfloat16, got {k_pages.dtype}")
    kv_heads = k_pages.shape[1]
    q, k = rotated(qkv, rotation, kv_heads=kv_heads)
    new = {"k_new": k.astype(k_pages.dtype), "v_new": qkv[:, -kv_heads:].astype(k_pages.dtype)}
    places = (page_table, lengths, lengths - 1, window)
    options = {"scale": scale, "config": config, "interpret": interpret}
    out, keys, values = _attend(
        q[:, None], {"k_pages": k_pages, "v_pages": v_pages}, (None, None), places, new, **options
    )
    return out[:, 0], keys, values


def paged_write_mosaic_tpu(
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    table: Int32[Array, " M"],
    start: Int32[Array, ""],
    *,
    interpret: pltpu.InterpretParams | bool = False,
) -> tuple[Float[Array, "P K page H"], Float[Array, "P K page H"]]:
    """Compute what `paged_write` documents, page by page.

    Raises:
        NotImplementedError: Pages are not of bfloat16, or H or the pages are none that the kernel takes.
    """
    chip = generation()
    tokens, heads, h = k.shape
    page = k_pages.shape[2]
    if k_pages.dtype != jnp.bfloat16:
        raise NotImplementedError(f"the TPU kernel writes pages of bfloat16, got {k_pages.dtype}")
    _check_pages(page, h)
    count = -(-(tokens - 1) // page) + 1  # pages that a chunk may touch
    touched = jnp.minimum(start // page + jnp.arange(count), (start + tokens - 1) // page)

    def in_place(new: Array) -> Float[Array, "K count*page H"]:
        rows = jnp.zeros((heads, count * page, h), k_pages.dtype)
        return jax.lax.dynamic_update_slice(rows, new.swapaxes(0, 1).astype(rows.dtype), (0, start % page, 0))

    chunk = pl.BlockSpec((heads, page, h), lambda i, *_: (0, i, 0))
    by_number = pl.BlockSpec((pl.squeezed, heads, page, h), lambda i, numbers, *_: (numbers[i], 0, 0, 0))
    return pl.pallas_call(
        write_chunk,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(count,),
            in_specs=[chunk, chunk, by_number, by_number],
            out_specs=[by_number, by_number],
        ),
        out_shape=[jax.ShapeDtypeStruct(k_pages.shape, k_pages.dtype)] * 2,
        input_output_aliases={5: 0, 6: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=chip.vmem // 2),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=12 * count * page * heads * h, transcendentals=0),
        name="paged_write",
        interpret=interpret,
    )(table[touched], start[None], start[None] + tokens, in_place(k), in_place(v), k_pages, v_pages)


def _check_pages(page: int, h: int) -> None:
    if page % PAGE_STEP or h % 64:
        raise NotImplementedError(
            f"the TPU kernel takes pages of a multiple of {PAGE_STEP} tokens and an H of a multiple of 64, "
            f"got {page} and {h}"
        )


def _attend(
    q: Float[Array, "B T N H"],
    pages: dict[str, Array],
    scales: tuple[Array | None, Array | None],
    places: tuple[Array, Array, Array, Array | None],
    new: dict[str, Float[Array, "B K H"]] | None,
    *,
    scale: float,
    config: TpuConfig | None,
    interpret: pltpu.InterpretParams | bool,
) -> list[Array]:
    """Attend; with the last keys and values given as `new`, write them, and give the pages too."""
    chip = generation()
    page_table, lengths, starts, window = places
    b, t, n, h = q.shape
    kind, (heads, page) = pages["k_pages"].dtype, pages["k_pages"].shape[1:3]
    group = n // heads
    if q.dtype != jnp.bfloat16 or kind.name not in _KINDS:
        raise NotImplementedError(
            f"the TPU kernel takes bfloat16 with {', '.join(_KINDS)} pages, got {q.dtype}, {kind}"
        )
    _check_pages(page, h)
    if config is None:
        config = choose_config(t * group, heads, h, page=page, kv_bytes=kind.itemsize)
    config.check(page=page)
    more = -(t * group) % config.rows
    grouped = q.reshape(b, t, heads, group, h).swapaxes(1, 2).reshape(b, heads, t * group, h)
    rows = t * group + more
    cores = chip.cores if b % chip.cores == 0 else 1
    each = b // cores

    def of_sequence(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((pl.squeezed, *shape), lambda c, i, r, *_: (c * each + i, *(0,) * len(shape)))

    of_rows = pl.BlockSpec((pl.squeezed, heads, config.rows, h), lambda c, i, r, *_: (c * each + i, 0, r, 0))
    operands: dict[str, tuple[Array, pl.BlockSpec]] = {
        # Which of a sequence's query tokens each row is: dividing by any group is no operation on vectors.
        "offsets": (
            (jnp.arange(rows, dtype=jnp.int32) // group)[:, None],
            pl.BlockSpec((config.rows, 1), lambda c, i, r, *_: (r, 0)),
        ),
        "q": (jnp.pad(grouped, ((0, 0), (0, 0), (0, more), (0, 0))), of_rows),
    }
    for name, factors in zip(("k_factors", "v_factors"), scales, strict=True):
        if factors is not None:
            gathered = _gather_scales(factors, page_table, config.tile)
            operands[name] = gathered, of_sequence(*gathered.shape[1:])
    for name, rows_ in (new or {}).items():
        operands[name] = rows_, of_sequence(heads, h)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    operands |= {name: (array, anywhere) for name, array in pages.items()}
    out = {"out": (jax.ShapeDtypeStruct((b, heads, rows, h), q.dtype), of_rows)}
    aliases = {}
    if new is not None:
        for name, array in pages.items():
            aliases[_SCALARS + list(operands).index(name)] = len(out)
            out[f"{name[0]}_out"] = jax.ShapeDtypeStruct(array.shape, kind), anywhere
    buffer = pltpu.VMEM((2, config.tile // page, heads, page, h), kind)
    of_head = pltpu.VMEM((heads, config.rows, LANES), _F32)
    scratch: dict[str, Any] = {
        "k_buffer": buffer,
        "v_buffer": buffer,
        "arrived": pltpu.SemaphoreType.DMA((2, 2)),
        "written": pltpu.SemaphoreType.DMA((2,)),
        "turn_of": pltpu.SMEM((1,), jnp.int32),
        "top": of_head,
        "total": of_head,
        "sums": pltpu.VMEM((heads, config.rows, h), _F32),
    }
    names = ["table", "lengths", "starts", "window", *operands, *out, *scratch]

    def kernel(*refs: Any) -> None:
        named = dict(zip(names, refs, strict=True))
        Attention(named, tokens=t, group=group, scale=scale, windowed=window is not None).run()

    attended, *written = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=_SCALARS,
            grid=(cores, each, rows // config.rows),
            in_specs=[spec for _, spec in operands.values()],
            out_specs=[spec for _, spec in out.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[shape for shape, _ in out.values()],
        input_output_aliases=aliases,
        # A program fetches for the next one: those of a core run in order.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=chip.vmem // 2
        ),
        cost_estimate=_cost(b, n * t, h, page_table.shape[1] * page, pages["k_pages"]),
        name="paged_attention" if new is None else "paged_decode",
        interpret=interpret,
    )(
        page_table,
        lengths,
        starts,
        jnp.zeros(1, jnp.int32) if window is None else window[None],
        *(array for array, _ in operands.values()),
    )
    attended = attended[:, :, : t * group].reshape(b, heads, t, group, h)
    return [attended.swapaxes(1, 2).reshape(q.shape), *written]


def choose_config(rows: int, heads: int, h: int, *, page: int, kv_bytes: int) -> TpuConfig:
    """Choose how to cut up `rows` query rows a key head: as many keys a turn as fit, up to 512.

    A rule, not a measurement: no TPU was.
    """
    least = math.lcm(page, LANES)
    fitting = _BUFFER_BYTES // (4 * heads * max(h, LANES) * kv_bytes) // least * least
    most = max(PAGE_STEP, 2048 // heads // PAGE_STEP * PAGE_STEP)
    filled = -(-rows // PAGE_STEP) * PAGE_STEP
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
