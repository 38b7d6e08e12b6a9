"""Cases of `paged_attention` that tests and benchmarks share."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sequences of `lengths` keys, `heads` query heads in groups over `kv_heads`, head dimension `h`.

    `tokens` query tokens a sequence, 0 for one without an axis of its own, at positions from `starts` on; `kv_dtype` of
    pages of `page` tokens; `room` further entries in the page table.
    """

    lengths: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    h: int = 64
    page: int = 16
    tokens: int = 0
    starts: tuple[int, ...] | None = None
    window: int | None = None
    kv_dtype: str = "bfloat16"
    dtype: str = "bfloat16"
    room: int = 2
    spread: float = 1.0

    def operands(self, *, seed: int = 0) -> tuple[tuple[jax.Array, ...], dict]:
        """Draw random operands: positional (q, k_pages, v_pages, page_table, lengths) and keyword ones.

        Pages lie in random order. Whatever no query may see is NaN where the type has one (the scales otherwise), and
        unused entries of the table are numbers of poisoned pages or of none.
        """
        rng = np.random.default_rng(seed)
        b, tokens = len(self.lengths), max(1, self.tokens)
        counts = [-(-length // self.page) for length in self.lengths]
        spare = 2
        pages = sum(counts) + spare
        order = rng.permutation(sum(counts)) + spare
        entries = max(counts) + self.room
        nowhere = np.array([0, 1, -1, pages, 2**31 - 1], np.int64)
        table = rng.choice(nowhere, (b, entries))
        shape = (pages, self.kv_heads, self.page, self.h)
        known = np.zeros((pages, 1, self.page), bool)
        firsts = [length - tokens for length in self.lengths] if self.starts is None else self.starts
        for row, (length, count, first) in enumerate(zip(self.lengths, counts, firsts, strict=True)):
            low = 0 if self.window is None else max(0, first + 1 - self.window)
            skipped = low // self.page  # pages that the window has left, as a server gives them back
            own, order = order[:count], order[count:]
            table[row, skipped:count] = own[skipped:]
            for j in range(skipped, count):
                known[own[j], 0, : min(self.page, length - j * self.page)] = True
        q_shape = (b, *([self.tokens] if self.tokens else []), self.heads, self.h)
        q = jnp.asarray(rng.standard_normal(q_shape) * self.spread, self.dtype)
        k, v = (self._pages(rng, shape, known) for _ in range(2))
        keywords: dict = {"scale": 1 / math.sqrt(self.h)}
        if k[1] is not None:
            keywords |= {"k_scale": k[1], "v_scale": v[1]}
        if self.starts is not None:
            keywords["starts"] = jnp.asarray(self.starts, jnp.int32)
        if self.window is not None:
            keywords["window"] = jnp.int32(self.window)
        lengths = jnp.asarray(self.lengths, jnp.int32)
        return (q, k[0], v[0], jnp.asarray(table, jnp.int32), lengths), keywords

    def _pages(self, rng, shape, known) -> tuple[jax.Array, jax.Array | None]:
        if self.kv_dtype == "int8":
            pages = jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)
        else:
            poisoned = np.where(known[..., None], rng.standard_normal(shape), np.nan)
            pages = jnp.asarray(poisoned, self.kv_dtype)
        if pages.dtype.itemsize > 1:
            return pages, None
        step = 1 / 64 if self.kv_dtype == "int8" else 1.0
        factors = np.where(known, step * rng.uniform(0.5, 2, shape[:3]), np.nan)
        return pages, jnp.asarray(factors, jnp.float32)


CASES = {
    "decode": Case(lengths=(100, 64, 1)),
    "empty_sequences": Case(lengths=(0, 70, 0)),
    "one_head_a_group": Case(lengths=(40, 200), heads=2),
    "groups_of_three": Case(lengths=(65,), heads=6),
    "groups_of_eight": Case(lengths=(130, 17), heads=16, h=128),
    "pages_of_64": Case(lengths=(63, 128, 150), page=64),
    "pages_of_128": Case(lengths=(128, 300), page=128),
    "window": Case(lengths=(300, 20, 64), window=50),
    "window_of_one": Case(lengths=(130, 3), window=1),
    "large_scores": Case(lengths=(200, 90), spread=60.0),
    "int8": Case(lengths=(100, 0, 129), kv_dtype="int8"),
    "int8_window": Case(lengths=(200, 31), kv_dtype="int8", h=128, window=40),
    "fp8": Case(lengths=(100, 0, 129), kv_dtype="float8_e4m3fn"),
    "chunk": Case(lengths=(70, 200), tokens=40),
    "chunk_at_the_front": Case(lengths=(48, 16), tokens=48, starts=(0, 0)),
    "chunk_padded": Case(lengths=(90, 133), tokens=24, starts=(80, 125)),
    "chunk_window": Case(lengths=(90, 260), tokens=33, window=70),
    "chunk_int8": Case(lengths=(150, 40), tokens=40, kv_dtype="int8"),
    "chunk_fp8_window": Case(lengths=(150,), tokens=16, kv_dtype="float8_e4m3fn", window=30, page=32),
}
