"""Sums over TPUs: interpreted on several devices without a race, and compiled for machines that have them."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import dispatch
from pallas_kernels.int4_matmul import Compensator, Gate
from pallas_kernels.peer_reduce import empty_inbox, peer_reduce
from pallas_kernels.peer_reduce.cases import CASES
from pallas_kernels.topology import tpu_topology

AXIS = "tp"
FITTING = sorted(name for name, case in CASES.items() if case.n % 128 == 0)
QUICK = ("planted", "following", "many_rows")


def interpret(devices: int, order: str, names: tuple[str, ...] | list[str]) -> None:
    root = Path(__file__).parents[2]
    settings = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "NPROC": "32",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "PYTHONPATH": str(root),
    }
    command = [sys.executable, str(Path(__file__).with_name("interpret_tpu_peers.py")), order, *names]
    done = subprocess.run(command, env=os.environ | settings, cwd=root, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stdout.splitlines() if line in names] == list(names)


@pytest.mark.slow
def test_two_devices_sum_without_a_race():
    """And a race that is planted is found, without which the others would prove nothing."""
    interpret(2, "eager", QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["on_wait", "eager"])
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_every_case(devices: int, order: str):
    interpret(devices, order, ["planted", "many_rows", *FITTING])


def test_what_the_kernel_cannot_do_is_said():
    def refused(match: str, n: int, dtype: type) -> None:
        x, inbox = jax.ShapeDtypeStruct((2, n), dtype), empty_inbox(devices=2, rows=1, columns=1)
        call = functools.partial(peer_reduce, axis=AXIS, eps=0.1, implementation="mosaic_tpu")
        with dispatch.compiling_for("tpu", kind="TPU v5p"), pytest.raises(NotImplementedError, match=match):
            jax.eval_shape(lambda x, w: call(x, None, x, w, inbox), x, jax.ShapeDtypeStruct((n,), jnp.float32))

    refused("takes bfloat16 and a multiple of 128 columns, got bfloat16 with 192", 192, jnp.bfloat16)
    refused("got float32 with 128", 128, jnp.float32)
    refused("8 rows of 1048576 columns of 2 devices do not fit", 2**20, jnp.bfloat16)


@pytest.mark.aot
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("topology", "devices"),
    [
        ("v5e:2x2", 2),
        ("v5e:2x2", 4),
        ("v5e:2x4", 8),
        ("v6e:2x2", 4),
        ("v6e:2x4", 8),
        ("v5p:2x2x1", 4),
        ("tpu7x:2x2x1", 4),
    ],
)
def test_the_kernel_compiles(topology: str, devices: int):
    """Two sums of Llama-3.1-8B's width, each one kernel that nothing is copied for."""
    pytest.importorskip("libtpu")
    found = tpu_topology(topology).devices[:devices]
    mesh = jax.sharding.Mesh(np.array(found), (AXIS,))
    f32, n, rank = jnp.float32, 4096, 16

    def array(shape: tuple[int, ...], dtype: type, *spec: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    gate = Gate(
        w_in=array((rank, 8), f32), b_in=array((8,), f32), w_out=array((rank, 8), f32), b_out=array((rank,), f32)
    )
    factors = {"a": array((rank, n), jnp.int8), "bt": array((rank, n), jnp.int8), "bt_scale": array((rank,), f32)}
    compensator = Compensator(**factors, a_scale=array((rank,), f32), gate=gate)

    def one(y, z, residual, weight, compensator):
        inbox, x = empty_inbox(devices=devices, rows=1, columns=1), residual
        for _ in range(2):
            options = {"axis": AXIS, "eps": 1e-5, "compensator": compensator, "following": compensator}
            x, residual, _, inbox = peer_reduce(y[0], z[0], residual, weight, inbox, **options)
            y = x[None].astype(f32)
        return residual

    own, same = PartitionSpec(AXIS), PartitionSpec()
    run = jax.shard_map(one, mesh=mesh, in_specs=(own, own, same, same, same), out_specs=same, check_vma=False)
    for m in (1, 16, 256):
        with dispatch.compiling_for("tpu", kind=found[0].device_kind):
            lowered = jax.jit(run).lower(
                array((devices, m, n), f32, AXIS), array((devices, m, rank), f32, AXIS), array((m, n), jnp.bfloat16),
                array((n,), f32), compensator,
            )  # fmt: skip
        assert lowered.as_text().count("tpu_custom_call") == 2
        memory = lowered.compile().memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < 8 * m * n + 2**20
