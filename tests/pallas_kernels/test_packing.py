import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels.packing import pack_int4, unpack_int4

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
