import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tuning
from pallas_kernels.hopper import SHARED_BYTES
from pallas_kernels.paged_attention import gpu as gpu_backend
from pallas_kernels.paged_attention import paged_attention, paged_decode
from pallas_kernels.paged_attention.cases import CASES, Case
from pallas_kernels.paged_attention.gpu import (
    candidates,
    choose_config,
    paged_attention_mosaic_gpu,
    paged_decode_mosaic_gpu,
)
from pallas_kernels.paged_attention.plan import TILE, HopperConfig, Problem, Span

CONFIGS = {
    "by rule": None,
    "parts and splits": HopperConfig(parts=2, splits=2, stages=2),
    "one warpgroup": HopperConfig(parts=1, stages=1),
    "three splits": HopperConfig(parts=1, splits=3, stages=2),
    "more stages than tiles": HopperConfig(parts=2, stages=6),
    "cluster of two": HopperConfig(parts=2, splits=2, cluster=True, stages=2),
    "cluster of four": HopperConfig(parts=1, splits=4, cluster=True, stages=1),
    "cluster of eight": HopperConfig(parts=1, splits=8, cluster=True, stages=1),
    "two tiles of rows": HopperConfig(row_tiles=2, parts=1, stages=2),
    "two tiles of rows, split": HopperConfig(row_tiles=2, parts=2, splits=2, stages=2),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """Sequences that get a token each."""

    lengths: tuple[int, ...]
    group: int = 4
    kv_heads: int = 2
    h: int = 128
    page: int = 64
    config: HopperConfig | None = None

    def operands(self) -> tuple[jax.Array, ...]:
        rng, b = np.random.default_rng(0), len(self.lengths)
        entries = -(-max(self.lengths) // self.page) + 1

        def draw(*shape: int) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

        angles = rng.uniform(0, 6, (b, self.h // 2))
        cos, sin = np.cos(angles), np.sin(angles)
        rotation = np.stack([np.concatenate(pair, -1) for pair in ((cos, cos), (-sin, sin))], 1)
        pages = [draw(b * entries, self.kv_heads, self.page, self.h) for _ in range(2)]
        table = rng.permutation(b * entries).reshape(b, entries)
        qkv = draw(b, (self.group + 2) * self.kv_heads, self.h)
        lengths = jnp.asarray(self.lengths, jnp.int32)
        return qkv, jnp.asarray(rotation, jnp.float32), *pages, jnp.asarray(table, jnp.int32), lengths


def in_float64(
    q, k_pages, v_pages, page_table, lengths, *, scale, starts=None, window=None, k_scale=None, v_scale=None
):
    """The documented formula, one query and one head at a time."""

    def f64(value):
        return np.asarray(value.astype(jnp.float32), np.float64)

    k, v, table = f64(k_pages), f64(v_pages), np.asarray(page_table)
    if k_scale is not None:
        k, v = k * f64(k_scale)[..., None], v * f64(v_scale)[..., None]
    tokens = f64(q)[:, None] if q.ndim == 3 else f64(q)
    out = np.zeros_like(tokens)
    page, group = k.shape[2], tokens.shape[2] // k.shape[1]
    for b, t, n in np.ndindex(tokens.shape[:3]):
        position = int(lengths[b]) - tokens.shape[1] + t if starts is None else int(starts[b]) + t
        first = 0 if window is None else max(0, position - int(window) + 1)
        seen = range(first, min(position + 1, int(lengths[b])))
        if not len(seen):
            continue
        rows = [(table[b, j // page], n // group, j % page) for j in seen]
        scores = np.array([k[row] @ tokens[b, t, n] for row in rows]) * scale
        weights = np.exp(scores - scores.max())
        out[b, t, n] = (weights / weights.sum()) @ np.array([v[row] for row in rows])
    return out.reshape(q.shape)


def error(got, wanted) -> float:
    """Give the largest error beside the largest value of a head; NaN where anything is not finite."""
    got, wanted = (np.asarray(value, np.float64) for value in (got, wanted))
    if not np.isfinite(got).all():
        return math.nan
    size = np.abs(wanted).max(axis=-1, keepdims=True)
    return float(np.max(np.abs(got - wanted) / np.where(size == 0, 1e-3, size)))


def xla(operands, keywords):
    return paged_attention(*operands, **keywords, implementation="xla")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_xla_equals_the_formula(case: Case):
    operands, keywords = case.operands()
    out = jax.jit(xla)(operands, keywords)
    assert out.dtype == case.dtype
    assert out.shape == operands[0].shape
    assert error(out.astype(jnp.float32), in_float64(*operands, **keywords)) < 2.0**-8


def test_xla_in_float32():
    operands, keywords = Case(lengths=(70, 0, 33), dtype="float32", kv_dtype="float32", tokens=5).operands()
    assert error(xla(operands, keywords), in_float64(*operands, **keywords)) < 1e-5


def test_sequences_without_keys_give_zeros():
    operands, keywords = CASES["empty_sequences"].operands()
    out = np.asarray(xla(operands, keywords).astype(jnp.float32))
    assert (out[[0, 2]] == 0).all()
    assert (out[1] != 0).any()


def kernel(operands, keywords, *, config, interpret):
    q, k_pages, v_pages, page_table, lengths = operands
    tokens = q[:, None] if q.ndim == 3 else q
    starts = keywords.get("starts", lengths - tokens.shape[1])
    scales = keywords.get("k_scale"), keywords.get("v_scale")
    where = (page_table, lengths, starts, keywords.get("window"))
    out = paged_attention_mosaic_gpu(
        tokens, k_pages, v_pages, *scales, *where, scale=1 / math.sqrt(q.shape[-1]), config=config, interpret=interpret
    )
    return out.reshape(q.shape)


def _pairs():
    """Every case once, with configurations in turn."""
    names = itertools.cycle([name for name in CONFIGS if not name.startswith(("two", "cluster"))])
    yield from zip(CASES, names, strict=False)
    yield from [
        ("chunk_window", "two tiles of rows, split"),
        ("fp8", "parts and splits"),
        ("empty_sequences", "cluster of two"),
        ("window", "cluster of four"),
        *_SLOW,
    ]


_SLOW = [
    ("decode", "cluster of eight"),
    ("empty_sequences", "cluster of four"),
    ("int8", "cluster of two"),
    ("chunk", "two tiles of rows"),
    ("chunk_padded", "two tiles of rows, split"),
    ("chunk_int8", "two tiles of rows"),
    ("decode", "two tiles of rows"),
    ("empty_sequences", "three splits"),
    ("window", "parts and splits"),
]
"""Pairs that take seconds each and find what others of them do."""


@pytest.mark.parametrize(
    ("case", "config"),
    [pytest.param(*pair, marks=pytest.mark.slow if pair in _SLOW else ()) for pair in dict.fromkeys(_pairs())],
)
def test_the_hopper_kernel_equals_the_reference(interpreted, interpreter, case: str, config: str):
    operands, keywords = CASES[case].operands(seed=1)
    call = functools.partial(kernel, config=CONFIGS[config], interpret=interpreter.PARAMS)
    keywords.pop("scale")
    out = interpreted(call, operands, keywords)
    assert out.dtype == jnp.bfloat16
    wanted = in_float64(*operands, **keywords, scale=1 / math.sqrt(operands[0].shape[-1]))
    # Weights of the softmax are rounded to bfloat16, and so is the result.
    assert error(out.astype(jnp.float32), wanted) < 2.0**-6


DECODES = {
    "by rule": Decode(lengths=(100, 1, 64), config=None),
    "idle, splits": Decode(lengths=(65, 0, 200), config=HopperConfig(parts=2, splits=2, stages=2)),
    "groups of three": Decode(lengths=(65, 64), group=3, kv_heads=4, config=HopperConfig(parts=1, splits=2, stages=2)),
    "groups of eight": Decode(lengths=(70,), group=8, config=HopperConfig(parts=1, splits=2, stages=2)),
    "one head a group": Decode(lengths=(3, 70), group=1, kv_heads=8, config=HopperConfig(parts=1, stages=2)),
    "pages of 16": Decode(lengths=(130, 129), page=16, config=HopperConfig(parts=1, splits=3, stages=1)),
    "pages of 128": Decode(lengths=(300, 128), page=128, config=HopperConfig(parts=2, stages=2)),
    "cluster": Decode(lengths=(130, 0), config=HopperConfig(parts=2, splits=2, cluster=True, stages=2)),
    "heads of 256": Decode(lengths=(70,), h=256, config=None),
    "heads of 64": Decode(lengths=(70, 0), h=64, config=None),
    "few key heads": Decode(lengths=(70,), group=3, kv_heads=1, config=None),
}


@pytest.mark.parametrize("decode", DECODES.values(), ids=DECODES.keys())
def test_the_hopper_kernel_appends_as_the_reference_does(interpreted, interpreter, decode: Decode):
    operands = decode.operands()
    call = functools.partial(paged_decode_mosaic_gpu, scale=0.1, config=decode.config, interpret=interpreter.PARAMS)
    out, *pages = interpreted(call, *operands)
    expected, *expected_pages = jax.jit(functools.partial(paged_decode, scale=0.1, implementation="xla"))(*operands)
    assert error(out.astype(jnp.float32), expected.astype(jnp.float32)) < 2.0**-6
    for got, wanted in zip(pages, expected_pages, strict=True):
        np.testing.assert_array_equal(got.astype(jnp.float32), wanted.astype(jnp.float32))


def test_xla_appends_and_attends_as_apart():
    qkv, rotation, k_pages, v_pages, table, lengths = Decode(lengths=(100, 0, 64)).operands()
    out, keys, values = paged_decode(qkv, rotation, k_pages, v_pages, table, lengths, scale=0.1)
    angles = np.asarray(rotation)
    turned = np.array(qkv.astype(jnp.float32), np.float64)
    pairs = turned[..., :64] + 1j * turned[..., 64:]
    pairs = pairs * (angles[:, :1, :64] + 1j * angles[:, 1:, 64:])
    turned = np.concatenate([pairs.real, pairs.imag], axis=-1)
    wanted_k, wanted_v = (np.array(pages.astype(jnp.float32)) for pages in (k_pages, v_pages))
    for row in (0, 2):
        place = int(table[row, (int(lengths[row]) - 1) // 64]), slice(None), (int(lengths[row]) - 1) % 64
        wanted_k[place], wanted_v[place] = turned[row, 8:10], np.asarray(qkv[row, 10:].astype(jnp.float32))
    assert error(keys.astype(jnp.float32), wanted_k) < 2.0**-7
    np.testing.assert_array_equal(values.astype(jnp.float32), wanted_v)
    q = jnp.asarray(turned[:, :8], jnp.bfloat16)
    apart = paged_attention(q, keys, values, table, lengths, scale=0.1)
    assert error(out.astype(jnp.float32), apart.astype(jnp.float32)) < 2.0**-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": jnp.zeros((1, 4, 128))}, r"qkv and k_pages must be \[B, N \+ 2K, H\]"),
        ({"rotation": jnp.zeros((1, 2, 64))}, r"rotation must be float32 \[1, 2, 128\], got float32\[1, 2, 64\]"),
        ({"page_table": jnp.zeros((2, 2), jnp.int32)}, r"page_table must be int32 \[1, M\]"),
    ],
)
def test_operands_of_a_decode_that_do_not_fit_are_refused(change, message):
    names = ("qkv", "rotation", "k_pages", "v_pages", "page_table", "lengths")
    operands = dict(zip(names, Decode(lengths=(5,)).operands(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        paged_decode(*operands.values(), scale=1.0)


def test_a_window_may_be_traced():
    operands, keywords = CASES["window"].operands()
    window = keywords.pop("window")
    traced = jax.jit(lambda window: xla(operands, {**keywords, "window": window}))(window)
    static = xla(operands, {**keywords, "window": int(window)})
    np.testing.assert_array_equal(traced.astype(jnp.float32), static.astype(jnp.float32))


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("config", [c for c in CONFIGS.values() if c is not None])
def test_every_visible_key_is_some_parts_and_no_page_beyond_is_read(config: HopperConfig, windowed: bool):
    rng = np.random.default_rng(0)
    for _ in range(20):
        tokens, group, piece = int(rng.choice([1, 7, 100])), int(rng.choice([1, 3, 8])), int(rng.choice([16, 64]))
        length, window = int(rng.integers(0, 500)), int(rng.integers(1, 300))
        start = length - tokens + int(rng.integers(-3, 3))
        problem = Problem(tokens=tokens, group=group, windowed=windowed, scale=1.0, out_dtype=jnp.dtype("bfloat16"))
        size = TILE * config.row_tiles
        for rows in range(-(-problem.rows // size)):
            positions = [start + row // group for row in range(rows * size, min(rows * size + size, problem.rows))]
            seen = {
                key
                for position in positions
                for key in range(max(0, position - window + 1) if windowed else 0, min(position + 1, length))
            }
            tiles = []
            for split, part in np.ndindex(config.splits, config.parts):
                span = Span.of(
                    config,
                    problem,
                    length=jnp.int32(length),
                    start=jnp.int32(start),
                    window=jnp.int32(window) if windowed else None,
                    piece=piece,
                    rows=jnp.int32(rows),
                    split=jnp.int32(split),
                )
                count, clear = (int(n) for n in span.turns(config, jnp.int32(part)))
                firsts = [int(span.base) + (int(span.begin) + part + i * config.parts) * TILE for i in range(count)]
                tiles += firsts
                if not windowed:  # keys of tiles without a mask are seen by every row
                    assert all(first + TILE <= min([length] + [p + 1 for p in positions]) for first in firsts[:clear])
            assert len(set(tiles)) == len(tiles)
            assert seen <= {first + i for first in tiles for i in range(TILE)}
            if seen:
                assert min(tiles) // piece == min(seen) // piece if windowed else min(tiles) == 0
                assert max(tiles) <= max(seen)
            elif not windowed:
                assert not tiles


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((2, 4, 64), jnp.int32)}, r"q must be floating \[B, N, H\]"),
        ({"q": jnp.zeros((2, 3, 64))}, "K dividing the 3 heads"),
        ({"q": jnp.zeros((2, 4, 32))}, r"k_pages must be \[P, K, page, 32\]"),
        ({"k_pages": jnp.zeros((3, 2, 16, 64), jnp.int32)}, "k_pages must be float32, float16, bfloat16, int8"),
        ({"k_pages": jnp.zeros((3, 2, 8, 64))}, "16 or more tokens a page, got float32"),
        ({"v_pages": jnp.zeros((4, 2, 16, 64))}, r"v_pages must be float32\[3, 2, 16, 64\] as k_pages is"),
        ({"k_scale": jnp.zeros((3, 2, 16))}, "k_scale must be given for 8-bit pages and for no others"),
        ({"page_table": jnp.zeros((1, 2), jnp.int32)}, r"page_table must be int32 \[2, M\], got int32\[1, 2\]"),
        ({"lengths": jnp.zeros(2)}, r"lengths must be int32 \[2\], got float32"),
        ({"starts": jnp.zeros(3, jnp.int32)}, r"starts must be int32 \[2\]"),
        ({"window": 0}, "window must be one key or more, got 0"),
        ({"window": jnp.ones(2, jnp.int32)}, "window must be an integer, got int32"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    pages = jnp.zeros((3, 2, 16, 64))
    operands = {
        "q": jnp.zeros((2, 4, 64)),
        "k_pages": pages,
        "v_pages": pages,
        "page_table": jnp.zeros((2, 2), jnp.int32),
        "lengths": jnp.ones(2, jnp.int32),
    }
    with pytest.raises(ValueError, match=message):
        paged_attention(**(operands | change), scale=1.0)


def test_8_bit_pages_need_their_scales():
    operands, keywords = CASES["int8"].operands()
    del keywords["v_scale"]
    with pytest.raises(ValueError, match="v_scale must be given for 8-bit pages"):
        paged_attention(*operands, **keywords)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(lengths=(9,), dtype="float32"), "takes bfloat16 with bfloat16, int8 or float8_e4m3fn pages, got float32"),
        (Case(lengths=(9,), kv_dtype="float32"), "got bfloat16, float32"),
        (Case(lengths=(9,), h=80), "a multiple of 64 up to 256, got 80"),
        (Case(lengths=(9,), page=48), "pages must be of 16, 32 or a multiple of 64 tokens, got 48"),
    ],
)
def test_what_the_gpu_kernel_cannot_do_is_said(case: Case, message: str):
    operands, keywords = case.operands()
    with pytest.raises(NotImplementedError, match=message):
        paged_attention(*operands, **keywords, implementation="mosaic_gpu")


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="stages a multiple of parts"):
        HopperConfig(parts=2, stages=3)
    with pytest.raises(ValueError, match="a cluster is of"):
        HopperConfig(splits=3, cluster=True)


def test_a_single_sequence_is_split_and_many_are_not():
    shape = {"head_dim": 128, "page": 16, "capacity": 8192, "kv_bytes": 2}
    assert choose_config(1, 8, 4, **shape).splits >= 8
    assert choose_config(32, 8, 4, **shape).splits <= 2
    assert choose_config(1, 8, 1024, **shape).row_tiles == 2
    short = choose_config(1, 8, 4, **(shape | {"capacity": 1024}))
    assert (short.splits, short.cluster) == (8, True)


def test_tuned_settings_come_first(monkeypatch):
    keys = []

    def lookup(operation, key):
        keys.append((operation, key))
        return {"parts": 1, "splits": 5, "stages": 3}

    monkeypatch.setattr(tuning, "lookup", lookup)
    shape = {"head_dim": 128, "page": 16, "capacity": 8192, "kv_bytes": 2}
    assert gpu_backend.choose_config(1, 8, 4, **shape) == HopperConfig(parts=1, splits=5, stages=3)
    assert keys == [("paged_attention", {"sequences": 1, "kv_heads": 8, "rows": 4, **shape})]


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("kv_bytes", [1, 2])
def test_every_shape_has_a_configuration(head_dim: int, kv_bytes: int):
    for rows in (1, 4, 64, 65, 1024):
        found = candidates(rows, head_dim=head_dim, capacity=4096, kv_bytes=kv_bytes)
        assert any(config.splits > 1 for config in found)
        assert any(config.splits == 1 for config in found)
        assert all(2 * config.stages * TILE * head_dim * kv_bytes < SHARED_BYTES for config in found)
