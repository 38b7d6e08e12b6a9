"""Interpret kernels of several TPUs on as many CPU devices: a process of its own, as devices are made at its start.

Takes an order of copies and names of cases, and devices from XLA_FLAGS; fails where a result is wrong or a race is
found. "planted" is a kernel that reads what it has not waited for: where no race is found in it, that is a failure.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from pallas_kernels import dispatch
from pallas_kernels.peer_reduce import empty_inbox
from pallas_kernels.peer_reduce.cases import CASES, Case

AXIS = "tp"
DEVICES = len(jax.devices())
SUMS = 2
MANY_ROWS = Case(m=300, n=128, rank=5, gated=True, following=16)


def _tests() -> Any:
    spec = importlib.util.spec_from_file_location("cases", Path(__file__).with_name("test_peer_reduce.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_devices(function: Any, own: Any, same: Any) -> Any:
    """Run a function of what a device has of its own and of what all have, on each."""

    def one(own: Any, same: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[None], function(jax.tree.map(lambda leaf: leaf[0], own), same))

    mesh = jax.make_mesh((DEVICES,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (PartitionSpec(AXIS), PartitionSpec()), "out_specs": PartitionSpec(AXIS), "check_vma": False}
    pltpu.reset_tpu_interpret_mode_state()
    out = jax.block_until_ready(jax.jit(jax.shard_map(one, mesh=mesh, **specs))(own, same))
    return out, interpreter.races is not None and interpreter.races.races_found


def check(case: Case, order: str, tests: Any) -> None:
    own, same = case.operands(DEVICES)
    run = tests.of_one_device(case, implementation="mosaic_tpu")

    def several(own: Any, same: Any) -> Any:
        inbox = empty_inbox(devices=DEVICES, rows=1, columns=1)
        return [run(own, same, inbox)[:3] for _ in range(SUMS)]

    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode=order)
    with dispatch.compiling_for("tpu", kind="TPU v5p"), pltpu.force_tpu_interpret_mode(params):
        results, raced = on_devices(several, own, same)
    assert not raced, "the interpreter found a race"
    for x, h, z in results:
        tests.assert_right(case, DEVICES, *jax.tree.map(np.asarray, (x, h, z)))


def plant(order: str) -> None:
    def hasty(x, out, inbox, sent, received):
        me = lax.axis_index(AXIS)
        peer = lax.rem(me + 1, DEVICES)
        barrier = pltpu.get_barrier_semaphore()
        pl.semaphore_signal(barrier, 1, device_id={AXIS: peer})
        pl.semaphore_wait(barrier, 1)
        copy = pltpu.make_async_remote_copy(x, inbox, sent, received, device_id={AXIS: peer})
        copy.start()
        out[...] = inbox[...]
        copy.wait()

    def run(x, _):
        return pl.pallas_call(
            hasty,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA(()), pltpu.SemaphoreType.DMA(())],
            compiler_params=pltpu.CompilerParams(collective_id=3),
            interpret=pltpu.InterpretParams(detect_races=True, dma_execution_mode=order),
        )(x)

    _, raced = on_devices(run, jnp.ones((DEVICES, 8, 128)), None)
    assert raced, "the interpreter found no race where there is one"


def main() -> None:
    order, *names = sys.argv[1:]
    tests = _tests()
    for name in names:
        if name == "planted":
            plant(order)
        else:
            check((CASES | {"many_rows": MANY_ROWS})[name], order, tests)
        print(name, flush=True)


if __name__ == "__main__":
    main()
