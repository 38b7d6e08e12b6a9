"""Paged attention compiles for TPUs, and reads the cache where it lies."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.paged_attention import paged_attention, paged_decode, paged_write
from pallas_kernels.topology import compiling_for_tpu
from pallas_kernels.tpus import GENERATIONS

pytestmark = [pytest.mark.aot, pytest.mark.timeout(300)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Sequences of Llama-3.1-8B's shape, unless said otherwise."""

    sequences: int = 32
    kv_heads: int = 8
    group: int = 4
    tokens: int = 1
    head_dim: int = 128
    page: int = 32
    entries: int = 256
    kv_dtype: str = "bfloat16"
    windowed: bool = False

    def operands(self, device: jax.Device) -> tuple[list, dict]:
        """Describe what `paged_attention` takes."""

        def array(shape, dtype):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))

        b = self.sequences
        pages = array((b * self.entries, self.kv_heads, self.page, self.head_dim), jnp.dtype(self.kv_dtype))
        q = array((b, self.tokens, self.kv_heads * self.group, self.head_dim), jnp.bfloat16)
        keywords = {"starts": array((b,), jnp.int32)}
        if self.windowed:
            keywords["window"] = array((), jnp.int32)
        if pages.dtype.itemsize == 1:
            keywords |= dict.fromkeys(("k_scale", "v_scale"), array(pages.shape[:3], jnp.float32))
        return [q, pages, pages, array((b, self.entries), jnp.int32), array((b,), jnp.int32)], keywords


PROBLEMS = {
    "decode": Problem(),
    "one sequence": Problem(sequences=1),
    "groups of seven": Problem(group=7, kv_heads=4),
    "pages of 16": Problem(page=16, entries=512),
    "pages of 128": Problem(page=128, entries=64),
    "heads of 256": Problem(head_dim=256, kv_heads=1),
    "window": Problem(windowed=True),
    "int8": Problem(kv_dtype="int8"),
    "fp8": Problem(kv_dtype="float8_e4m3fn"),
    "chunk": Problem(sequences=2, tokens=256),
    "chunk, window, int8": Problem(sequences=2, tokens=256, windowed=True, kv_dtype="int8"),
    "32 key heads": Problem(sequences=8, kv_heads=32, group=1),
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("tpu", GENERATIONS)
def test_the_kernel_compiles_and_copies_no_cache(tpu: str, name: str):
    pytest.importorskip("libtpu")
    with compiling_for_tpu(tpu) as device:
        operands, keywords = PROBLEMS[name].operands(device)
        lowered = jax.jit(lambda *args, **named: paged_attention(*args, **named, scale=0.1)).lower(
            *operands, **keywords
        )
        memory = lowered.compile().memory_analysis()
    assert "tpu_custom_call" in lowered.as_text()
    assert memory is not None
    cache = 2 * operands[1].size * operands[1].dtype.itemsize
    scales = sum(keywords[name].size * 4 for name in ("k_scale", "v_scale") if name in keywords)
    # Scales lie in HBM with their tokens filled up to 128 lanes, and are gathered into rows of lanes.
    assert memory.temp_size_in_bytes < cache / 4 + 2 * scales * 128 // PROBLEMS[name].page


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("tpu", GENERATIONS)
def test_keys_and_values_are_written_where_they_lie(tpu: str, windowed: bool):
    """A decode step's attention and a chunk's writing: in place, with nothing as large as a sequence made besides."""
    pytest.importorskip("libtpu")
    with compiling_for_tpu(tpu) as device:
        (_, pages, _, table, lengths), keywords = Problem(page=64, entries=36, windowed=windowed).operands(device)
        b, kv_heads, h = lengths.shape[0], pages.shape[1], pages.shape[3]

        def array(shape, dtype):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=pages.sharding)

        def decode(k, v, qkv, rotation, table, lengths, window):
            return paged_decode(qkv, rotation, k, v, table, lengths, scale=0.1, window=window)

        def write(k_pages, v_pages, k, v, table, start):
            return paged_write(k, v, k_pages, v_pages, table, start)

        qkv, rotation = array((b, 6 * kv_heads, h), jnp.bfloat16), array((b, 2, h), jnp.float32)
        chunk, row, start = array((256, kv_heads, h), jnp.bfloat16), array((36,), jnp.int32), array((), jnp.int32)
        steps = {
            decode: (qkv, rotation, table, lengths, keywords.get("window")),
            write: (chunk, chunk, row, start),
        }
        for step, rest in steps.items():
            lowered = jax.jit(step, donate_argnums=(0, 1)).lower(pages, pages, *rest)
            assert lowered.as_text().count("tpu_custom_call") == 1
            memory = lowered.compile().memory_analysis()
            cache = 2 * pages.size * 2
            assert memory.alias_size_in_bytes >= cache
            assert memory.temp_size_in_bytes < cache / b
