import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels.packing import SIDE, from_fragments, pack_int4, to_fragments, unpack_int4

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.sampled_from([2, 4, 16]))


@settings(deadline=None, max_examples=30)
@given(hnp.arrays(np.int8, SHAPES, elements=st.integers(-8, 7)))
def test_unpack_inverts_pack(codes):
    packed = pack_int4(jnp.asarray(codes))
    assert packed.shape == (*codes.shape[:-1], codes.shape[-1] // 2)
    assert packed.dtype == jnp.int8
    np.testing.assert_array_equal(unpack_int4(packed), codes)


def test_the_low_nibble_holds_the_first_code():
    assert int(pack_int4(jnp.asarray([[3, -1]], jnp.int8))[0, 0]) & 0xFF == 0xF3


def test_an_odd_axis_is_refused():
    with pytest.raises(ValueError, match=r"must be even, got shape \(2, 3\)"):
        pack_int4(jnp.zeros((2, 3), jnp.int8))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 3), max_size=2), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_fragments_keep_every_code(lead, tiles, blocks, seed):
    shape = (*lead, SIDE * tiles, SIDE // 2 * blocks)
    packed = np.random.default_rng(seed).integers(-128, 128, shape, np.int8)
    fragments = to_fragments(jnp.asarray(packed))
    assert fragments.shape == shape
    assert fragments.dtype == jnp.int8
    np.testing.assert_array_equal(from_fragments(fragments), packed)
    for index in np.ndindex(*lead):  # each weight of a stack by itself
        np.testing.assert_array_equal(fragments[index], to_fragments(jnp.asarray(packed[index])))


def test_fragments_are_where_threads_of_a_warpgroup_look():
    """The documented order, written out: code (row, column) of a block by thread, word and nibble."""
    codes = np.random.default_rng(0).integers(-8, 8, (2 * SIDE, 3 * SIDE), np.int8)
    words = np.asarray(to_fragments(pack_int4(jnp.asarray(codes)))).reshape(2, 3, 128, 16).view("<u4")
    rng = np.random.default_rng(1)
    for tile, block, thread, step, register, second in rng.integers(0, [2, 3, 128, 4, 4, 2], (200, 6)):
        group, lane = thread % 32 // 4, thread % 4
        row = tile * SIDE + thread // 32 * 16 + group + 8 * (register % 2)
        column = block * SIDE + 16 * step + 2 * lane + 8 * (register // 2) + second
        nibble = words[tile, block, thread, step] >> (4 * (register + 4 * second)) & 15
        assert nibble == codes[row, column] + 8


@pytest.mark.parametrize("shape", [(32, 32), (64, 48), (96, 64)])
@pytest.mark.parametrize("reorder", [to_fragments, from_fragments])
def test_fragments_need_whole_blocks(reorder, shape):
    with pytest.raises(ValueError, match=rf"64 x 64: .* multiples, got \[{shape[0]}, {2 * shape[1]}\]"):
        reorder(jnp.zeros(shape, jnp.int8))
