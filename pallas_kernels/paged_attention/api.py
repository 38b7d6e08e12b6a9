"""Public paged attention: checks its operands, then hands them to a backend."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32, Shaped

from pallas_kernels import dispatch
from pallas_kernels.paged_attention.reference import paged_attention_xla, paged_decode_xla, paged_write_xla

__all__ = ["paged_attention", "paged_decode", "paged_write"]

_LEAST_PAGE = 16


def _mosaic_gpu(*args: Any, **kwargs: Any) -> Array:
    # Imported when first called: a program that never runs on a GPU does not wait for Mosaic.
    from pallas_kernels.paged_attention.gpu import paged_attention_mosaic_gpu

    return paged_attention_mosaic_gpu(*args, **kwargs)


def _decode_mosaic_gpu(*args: Any, **kwargs: Any) -> tuple[Array, Array, Array]:
    from pallas_kernels.paged_attention.gpu import paged_decode_mosaic_gpu

    return paged_decode_mosaic_gpu(*args, **kwargs)


def _mosaic_tpu(*args: Any, **kwargs: Any) -> Array:
    from pallas_kernels.paged_attention.tpu import paged_attention_mosaic_tpu

    return paged_attention_mosaic_tpu(*args, **kwargs)


def _decode_mosaic_tpu(*args: Any, **kwargs: Any) -> tuple[Array, Array, Array]:
    from pallas_kernels.paged_attention.tpu import paged_decode_mosaic_tpu

    return paged_decode_mosaic_tpu(*args, **kwargs)


def _write_mosaic_tpu(*args: Any, **kwargs: Any) -> tuple[Array, Array]:
    from pallas_kernels.paged_attention.tpu import paged_write_mosaic_tpu

    return paged_write_mosaic_tpu(*args, **kwargs)


_BACKENDS = {"mosaic_gpu": _mosaic_gpu, "mosaic_tpu": _mosaic_tpu, "xla": paged_attention_xla}
_DECODE_BACKENDS = {"mosaic_gpu": _decode_mosaic_gpu, "mosaic_tpu": _decode_mosaic_tpu, "xla": paged_decode_xla}
_WRITE_BACKENDS = {"mosaic_tpu": _write_mosaic_tpu, "xla": paged_write_xla}


def paged_attention(
    q: Float[Array, "B *T N H"],
    k_pages: Shaped[Array, "P K page H"],
    v_pages: Shaped[Array, "P K page H"],
    page_table: Int32[Array, "B M"],
    lengths: Int32[Array, " B"],
    *,
    scale: float,
    starts: Int32[Array, " B"] | None = None,
    window: int | Int[Array, ""] | None = None,
    k_scale: Float[Array, "P K page"] | None = None,
    v_scale: Float[Array, "P K page"] | None = None,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "B *T N H"]:
    """Attend from query tokens to the keys and values of their sequences, which are kept in pages.

    The key at position j of sequence b is row `j % page` of page `page_table[b, j // page]`. A query at position i sees
    keys j with `i - window < j <= i` and `j < lengths[b]`; one that sees none gets zeros. What lies beyond a sequence's
    last key, table entries of pages without a key that some query sees, and those pages, may hold anything.

    A page keeps all tokens of a key head side by side, so that the GPU's copy engine fetches it as one piece of memory,
    whole rows of H at a time; heads lie outside of tokens so that a cache can be divided among devices by heads.

    Args:
        q: One token a sequence, [B, N, H], or T tokens at rising contiguous positions, [B, T, N, H].
        k_pages: Keys, floating, or int8 or float8_e4m3fn with `k_scale`. N is a multiple of K: heads in groups of N / K
            share keys. 16 or more tokens a page.
        v_pages: Values, likewise.
        page_table: Numbers of pages; M x page positions at most are seen.
        lengths: Keys in each sequence, its query tokens' own included.
        scale: Factor on q k^T before the softmax.
        starts: Position of each sequence's first query token; `lengths - T` by default.
        window: How many keys a query sees at most, itself included; all by default.
        k_scale: Factors on 8-bit keys, one for each token and head: a new token then needs no other's rescaling.
        v_scale: Factors on 8-bit values.
        implementation: Backend; by default the best one for this platform that can do the case.

    Returns:
        Softmax in float32 applied to the values, in q's type.

    Raises:
        ValueError: Shapes or types do not fit together; says which and what was expected.
        NotImplementedError: The backend that was asked for cannot do this case.
    """
    _check(q, k_pages, v_pages, page_table, lengths, starts, window, k_scale, v_scale)
    tokens = q[:, None] if q.ndim == 3 else q
    if starts is None:
        starts = lengths - tokens.shape[1]
    if window is not None:
        window = jnp.asarray(window, jnp.int32)
    with jax.named_scope("paged_attention"):
        out = dispatch.call(
            "paged_attention",
            _BACKENDS,
            implementation,
            *(tokens, k_pages, v_pages, k_scale, v_scale, page_table, lengths, starts, window),
            scale=scale,
        )
    return out.reshape(q.shape)


def paged_decode(
    qkv: Float[Array, "B N+2K H"],
    rotation: Float32[Array, "B 2 H"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    page_table: Int32[Array, "B M"],
    lengths: Int32[Array, " B"],
    *,
    scale: float,
    window: int | Int[Array, ""] | None = None,
    implementation: dispatch.Implementation | None = None,
) -> tuple[Float[Array, "B N H"], Float[Array, "P K page H"], Float[Array, "P K page H"]]:
    """Rotate the heads of one new token a sequence, write its key and value to their page, and attend from it.

    It is rotary embedding, the write and `paged_attention` in one: a decode step launches one kernel for the three.
    A sequence of length 0 writes nothing and gets zeros. No two sequences may have their last key on the same page.

    Args:
        qkv: N query heads, K key heads and K value heads of the new tokens, as one product gives them.
        rotation: For each token cosines, then sines with those of the first half negated, both repeated to H columns:
            a head x becomes `x * rotation[0] + roll(x, H / 2) * rotation[1]`.
        k_pages: Keys, floating; donate them, or they are copied.
        v_pages: Values, likewise.
        page_table: Numbers of pages.
        lengths: Keys in each sequence, the new one included.
        scale: Factor on q k^T before the softmax.
        window: How many keys a query sees at most, itself included; all by default.
        implementation: Backend; by default the best one for this platform that can do the case.

    Returns:
        Softmax in float32 applied to the values, in qkv's type; keys; values.

    Raises:
        ValueError: Shapes or types do not fit together; says which and what was expected.
        NotImplementedError: The backend that was asked for cannot do this case.
    """
    if qkv.ndim != 3 or k_pages.ndim != 4 or qkv.shape[1] <= 2 * k_pages.shape[1]:
        shapes = f"{list(qkv.shape)} and {list(k_pages.shape)}"
        raise ValueError(f"paged_decode: qkv and k_pages must be [B, N + 2K, H] and [P, K, page, H], got {shapes}")
    if rotation.shape != (qkv.shape[0], 2, qkv.shape[2]) or rotation.dtype != jnp.float32:
        raise ValueError(
            f"paged_decode: rotation must be float32 [{qkv.shape[0]}, 2, {qkv.shape[2]}], "
            f"got {rotation.dtype}{list(rotation.shape)}"
        )
    queries = qkv[:, : qkv.shape[1] - 2 * k_pages.shape[1]]
    _check(queries, k_pages, v_pages, page_table, lengths, None, window, None, None)
    if window is not None:
        window = jnp.asarray(window, jnp.int32)
    with jax.named_scope("paged_decode"):
        return dispatch.call(
            "paged_decode",
            _DECODE_BACKENDS,
            implementation,
            *(qkv, rotation, k_pages, v_pages, page_table, lengths, window),
            scale=scale,
        )


def paged_write(
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    table: Int32[Array, " M"],
    start: Int[Array, ""],
    *,
    implementation: dispatch.Implementation | None = None,
) -> tuple[Float[Array, "P K page H"], Float[Array, "P K page H"]]:
    """Write the keys and values of T tokens of one sequence, at positions from `start` on, to their pages.

    Args:
        k: Keys, rotated where they are to be.
        v: Values, likewise.
        k_pages: Keys, floating; donate them, or they are copied.
        v_pages: Values, likewise.
        table: Numbers of the sequence's pages, one for each of the positions at least.
        start: Position of the first token.
        implementation: Backend; by default the best one for this platform that can do the case.

    Returns:
        Keys; values.

    Raises:
        ValueError: Shapes do not fit together; says which and what was expected.
        NotImplementedError: The backend that was asked for cannot do this case.
    """
    heads, h = k_pages.shape[1], k_pages.shape[3]
    if k.ndim != 3 or k.shape[1:] != (heads, h) or v.shape != k.shape or v_pages.shape != k_pages.shape:
        shapes = ", ".join(str(list(array.shape)) for array in (k, v, k_pages, v_pages))
        raise ValueError(
            f"paged_write: expected twice [T, {heads}, {h}] and twice [P, {heads}, page, {h}], got {shapes}"
        )
    with jax.named_scope("paged_write"):
        operands = (k, v, k_pages, v_pages, table, jnp.asarray(start, jnp.int32))
        return dispatch.call("paged_write", _WRITE_BACKENDS, implementation, *operands)


def _check(q, k_pages, v_pages, page_table, lengths, starts, window, k_scale, v_scale) -> None:
    def refuse(name: str, expected: str, got: Any) -> None:
        shown = f"{got.dtype}{list(got.shape)}" if hasattr(got, "dtype") else repr(got)
        raise ValueError(f"paged_attention: {name} must be {expected}, got {shown}")

    if q.ndim not in (3, 4) or not jnp.issubdtype(q.dtype, jnp.floating):
        refuse("q", "floating [B, N, H] or [B, T, N, H]", q)
    b, heads, h = q.shape[0], *q.shape[-2:]
    narrow = k_pages.dtype in (jnp.int8, jnp.float8_e4m3fn)
    if not (narrow or k_pages.dtype in (jnp.float32, jnp.float16, jnp.bfloat16)):
        refuse("k_pages", "float32, float16, bfloat16, int8 or float8_e4m3fn", k_pages)
    if k_pages.ndim != 4 or k_pages.shape[3] != h or k_pages.shape[2] < _LEAST_PAGE:
        refuse("k_pages", f"[P, K, page, {h}] with {_LEAST_PAGE} or more tokens a page", k_pages)
    if k_pages.shape[1] < 1 or heads % k_pages.shape[1]:
        refuse("k_pages", f"[P, K, page, {h}] with K dividing the {heads} heads of q", k_pages)
    if v_pages.shape != k_pages.shape or v_pages.dtype != k_pages.dtype:
        refuse("v_pages", f"{k_pages.dtype}{list(k_pages.shape)} as k_pages is", v_pages)
    for name, factors in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (factors is not None) != narrow:
            refuse(name, f"given for 8-bit pages and for no others: these are {k_pages.dtype}", factors)
        if factors is not None and (
            factors.shape != k_pages.shape[:3] or not jnp.issubdtype(factors.dtype, jnp.floating)
        ):
            refuse(name, f"floating {list(k_pages.shape[:3])}", factors)
    if page_table.ndim != 2 or page_table.shape[0] != b or page_table.shape[1] < 1 or page_table.dtype != jnp.int32:
        refuse("page_table", f"int32 [{b}, M]", page_table)
    for name, places in (("lengths", lengths), ("starts", starts)):
        if places is not None and (places.shape != (b,) or places.dtype != jnp.int32):
            refuse(name, f"int32 [{b}]", places)
    if isinstance(window, int) and window < 1:
        refuse("window", "one key or more", window)
    if not isinstance(window, int | None) and (window.shape != () or not jnp.issubdtype(window.dtype, jnp.integer)):
        refuse("window", "an integer", window)
