"""Interpret kernels of several GPUs on as many CPU devices: a process of its own, as devices are made at its start.

Takes names of cases, "case!fault" for one in which a fault is planted that must be found, and devices from XLA_FLAGS;
fails where a result is wrong. Beyond what `interpreter.py` adds, blocks write to other devices, and all devices begin
and end a kernel together: the interpreter copies a kernel's arrays in and out, so that what a device writes before the
other has begun, or after it has ended, would be lost. Races are not looked for: the flags that order devices are plain
memory to the interpreter.
"""

import dataclasses
import faulthandler
import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret, shared_memory
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec

from pallas_kernels import signals
from pallas_kernels.int4_matmul import hopper as product
from pallas_kernels.peer_reduce import Inbox, PeerLostError, empty_inbox, gpu
from pallas_kernels.peer_reduce import hopper as tail
from pallas_kernels.peer_reduce.cases import CASES, Case

AXIS = "tp"
DEVICES = len(jax.devices())
PARAMS = plgpu.InterpretGPUParams()
KERNELS = ("peer_reduce_mosaic_gpu", "row_parallel_mosaic_gpu")
SECONDS = 300
SUMS = 3
"""Sums one after another in one program: both halves of the inbox, and one of them again."""


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def extend(patch: pytest.MonkeyPatch) -> None:
    """Let references name other devices, and devices meet before and after a kernel."""
    resolve, update = jaxpr_interpret.resolve_ref, shared_memory.GPUSharedMemory.update_clocks_for_device_barrier

    def resolve_ref(aval, key, transforms):
        key, transforms = resolve(aval, key, transforms)
        for transform in transforms:
            if isinstance(transform, gpu_core.PeerMemRef):
                key = jnp.asarray(key).at[1].set(jnp.asarray(transform.device_id, jnp.int32))
        return key, tuple(t for t in transforms if not isinstance(t, gpu_core.PeerMemRef))

    def meet(self, device):
        self.barrier.wait()
        update(self, device)

    patch.setattr(jaxpr_interpret, "resolve_ref", resolve_ref)
    patch.setattr(shared_memory.GPUSharedMemory, "update_clocks_for_device_barrier", meet)
    # It looks at all devices, and those that are not done yet have some.
    patch.setattr(shared_memory.GPUSharedMemory, "assert_no_barriers_allocated", lambda self: None)


def lose_a_signal(patch: pytest.MonkeyPatch) -> None:
    """Let device 1 tell nobody what it has written."""

    def signal(flags, sum_, *args, **options):
        pl.when(sum_.me != 1)(lambda: signals.signal(flags, sum_, *args, **options))

    for module in (product, tail):
        patch.setattr(module, "signal", signal)


def mistake_the_generation(patch: pytest.MonkeyPatch) -> None:
    """Let device 1 be ahead."""
    given = gpu._open

    def ahead(inbox: Inbox, axis: str) -> Any:
        peers, fault = given(inbox, axis)
        more = (jax.lax.axis_index(axis) == 1).astype(jnp.int32)
        return dataclasses.replace(peers, generation=peers.generation + more), fault

    patch.setattr(gpu, "_open", ahead)


def mistake_the_place(patch: pytest.MonkeyPatch) -> None:
    """Let all devices write in one place."""
    patch.setattr(signals.Sum, "line", lambda self, sender: self.number % 2 * self.devices + 0 * sender)


FAULTS = {
    "signal": (lose_a_signal, PeerLostError, "device 0 waited in vain for the part of device 1 of sum 1"),
    "generation": (mistake_the_generation, PeerLostError, "waited in vain for the part of device"),
    "place": (mistake_the_place, AssertionError, None),
}
LOOKS = 200
"""Looks at a flag after which a device is lost, where it is."""


def check(case: Case, tests: Any) -> None:
    own, same = case.operands(DEVICES)
    inbox = empty_inbox(devices=DEVICES, rows=case.m, columns=case.n)
    inboxes = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (DEVICES, *leaf.shape)), inbox)
    run = tests.of_one_device(case, implementation="mosaic_gpu")

    def one(own: Any, same: Any, inbox: Inbox) -> Any:
        own, inbox = jax.tree.map(lambda leaf: leaf[0], (own, inbox))
        results = []
        for _ in range(SUMS):
            x, h, z, inbox = run(own, same, inbox)
            results.append((x, h, z))
        return jax.tree.map(lambda leaf: leaf[None], (results, inbox))

    mesh = jax.make_mesh((DEVICES,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    own_spec, all_spec = PartitionSpec(AXIS), PartitionSpec()
    specs = {"in_specs": (own_spec, all_spec, own_spec), "out_specs": own_spec, "check_vma": False}
    results, inboxes = jax.jit(jax.shard_map(one, mesh=mesh, **specs))(own, same, inboxes)
    inboxes.check()
    for x, h, z in results:
        tests.assert_right(case, DEVICES, *jax.tree.map(np.asarray, (x, h, z)))
    np.testing.assert_array_equal(inboxes.generation, np.full((DEVICES, 1), SUMS + 1))


def find(fault: str, case: Case, tests: Any) -> None:
    plant, error, message = FAULTS[fault]
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        for name in KERNELS:
            patch.setattr(gpu, name, functools.partial(getattr(gpu, name), patience=LOOKS))
        with pytest.raises(error, match=message):
            check(case, tests)


def main() -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    tests = _load("test_peer_reduce")
    with _load("interpreter").extended_interpreter(), pytest.MonkeyPatch.context() as patch:
        extend(patch)
        for name in KERNELS:
            patch.setattr(gpu, name, functools.partial(getattr(gpu, name), interpret=PARAMS))
        for argument in sys.argv[1:]:
            name, _, fault = argument.partition("!")
            if fault:
                find(fault, CASES[name], tests)
            else:
                check(CASES[name], tests)
            print(argument, flush=True)


if __name__ == "__main__":
    main()
