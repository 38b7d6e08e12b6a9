"""Kernels before a product compile for TPUs, for few rows and for many."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.int4_matmul import Compensator, Gate
from pallas_kernels.tails import glu_project, rmsnorm_project
from pallas_kernels.topology import compiling_for_tpu
from pallas_kernels.tpus import GENERATIONS

pytestmark = [pytest.mark.aot, pytest.mark.timeout(300)]


@pytest.mark.parametrize("tpu", GENERATIONS)
def test_kernels_before_a_product_compile(tpu: str):
    pytest.importorskip("libtpu")
    with compiling_for_tpu(tpu) as device:
        array = functools.partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(device))

        def compensator(k: int, rank: int) -> Compensator:
            f32 = jnp.float32
            gate = Gate(
                w_in=array((rank, 32), f32), b_in=array((32,), f32),
                w_out=array((rank, 32), f32), b_out=array((rank,), f32),
            )  # fmt: skip
            factors = {"a": array((rank, k), jnp.int8), "a_scale": array((rank,), f32)}
            return Compensator(**factors, bt=array((rank, 128), jnp.int8), gate=gate)

        for m in (1, 16, 100, 1024):
            for k in (2048, 4096, 8192):
                x = array((m, k), jnp.bfloat16)
                norm = jax.jit(functools.partial(rmsnorm_project, eps=1e-5))
                lowered = norm.lower(x, x, array((k,), jnp.float32), compensator=compensator(k, 16))
                assert "tpu_custom_call" in lowered.as_text()
                lowered.compile()
            glu = jax.jit(functools.partial(glu_project, activation="gelu_tanh"))
            lowered = glu.lower(array((m, 2 * 14336), jnp.bfloat16), compensator=compensator(14336, 64))
            assert "tpu_custom_call" in lowered.as_text()
            lowered.compile()
