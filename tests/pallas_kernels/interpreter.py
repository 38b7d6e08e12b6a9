"""What our kernels use and the Mosaic GPU interpreter of jax 0.11.2 lacks; for tests only.

Added: wgmma with its left operand in registers; wgmma that runs until it is waited for (the interpreter's own is over
at once, and not looked at for races); writes to accumulators; stores to another block's memory; `griddepcontrol`.
"""

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax._src import callback
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import (
    gpu_callbacks,
    interpret_pallas_call,
    jaxpr_interpret,
    race_detection_state,
)
from jax._src.pallas.mosaic_gpu.interpret.shared_memory import GPULoggingInfo, HostAllocationKey
from jax._src.state.types import AbstractRef
from jax.experimental.pallas import mosaic_gpu as plgpu

PARAMS = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=64)
"""Many threads for asynchronous work: two that share one look ordered, which hides races between them."""

_SECONDS_TO_ALLOCATE = 60
"""Blocks of a cluster allocate their memory when their threads get there; one that never does has ended."""

_TOKEN = gpu_callbacks.TOKEN_SHAPE_DTYPE


@dataclasses.dataclass(frozen=True)
class Interpreted:
    """Runs functions whose kernels are interpreted with `PARAMS`."""

    states: list[Any]

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Give `function(*args)`; a race fails the test."""
        result, raced = self.watch(function, *args)
        assert not raced, "a race was found: see the output"
        return result

    def watch(self, function: Callable[..., Any], *args: Any) -> tuple[Any, bool]:
        """Give `function(*args)` and whether any of its kernels raced."""
        self.states.clear()
        result = jax.block_until_ready(jax.jit(function)(*args))
        assert self.states, "no kernel was interpreted with race detection"
        return result, any(state.races_found for state in self.states)


@contextlib.contextmanager
def extended_interpreter() -> Iterator[Interpreted]:
    """Extend jax's interpreter for as long as the context lasts."""
    states: list[Any] = []

    def watched(**settings):
        states.append(state(**settings))
        return states[-1]

    state = race_detection_state.GPURaceDetectionState
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxpr_interpret, "JaxprInterpreter", _Interpreter)
        patch.setattr(gpu_callbacks, "GPURaceDetectionState", watched)
        try:
            yield Interpreted(states)
        finally:
            interpret_pallas_call.reset_gpu_interpret_mode_state()


class _Interpreter(jaxpr_interpret.JaxprInterpreter):
    def interpret(self, jaxpr, token, *args):
        return super().interpret(jaxpr.replace(eqns=[_relayed(eqn) for eqn in jaxpr.eqns]), token, *args)

    def _interpret_commit_smem_p(self, eqn, token, read):
        if "relayed" not in eqn.params:
            return super()._interpret_commit_smem_p(eqn, token, read)
        eqn = eqn.params["relayed"]
        match eqn.primitive:
            case primitives.wgmma_ref_p:
                return self._wgmma(eqn, token, read)
            case primitives.wgmma_wait_p:
                return self._call(_wait, eqn, token, n=eqn.params["n"]), []
            case primitives.wgmma_accumulator_deref_p:
                if eqn.params["wait_n"] is not None:
                    token = self._call(_wait, eqn, token, n=eqn.params["wait_n"])
                token, value = self._interpret_wgmma_accumulator_deref_p(eqn, token, read)
                return token, [value]
            case primitives.wgmma_accumulator_store_p:
                accumulator, value = read()
                return self._call(_store_accumulator, eqn, token, accumulator=accumulator, value=value), [value]
            case primitives.async_store_smem_p:
                return self._store_to_block(eqn, token, read)
            case _:  # griddepcontrol: one kernel runs at a time
                return token, []

    def _call(self, function, eqn, token, **kwargs):
        location = {"mesh_location": self.mesh_location, "thread": self.thread}
        function = functools.partial(function, source_info=eqn.source_info)
        return callback.io_callback(function, _TOKEN, token=token, **location, **kwargs)

    def _wgmma(self, eqn, token, read):
        (*operands,) = read()
        trees = [eqn.params[f"{name}_transforms_tree"] or jax.tree.structure([]) for name in ("acc", "a", "b")]
        transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), operands[3:])
        resolved = [
            jaxpr_interpret.resolve_ref(var.aval, operand, transform) if isinstance(var.aval, AbstractRef) else operand
            for var, operand, transform in zip(eqn.invars[:3], operands[:3], transforms, strict=True)
        ]
        return self._call(_wgmma, eqn, token, operands=resolved), []

    def _store_to_block(self, eqn, token, read):
        if eqn.params["atomic"] is not None:
            raise NotImplementedError("atomic stores to another block are not interpreted")
        value, ref, barrier, block, *leaves = read()
        tree = eqn.params["ref_transforms_treedef"]
        ref = jaxpr_interpret.resolve_ref(eqn.invars[1].aval, ref, jax.tree.unflatten(tree, leaves[: tree.num_leaves]))
        barrier = jaxpr_interpret._get_barrier_allocation_key_from_inval(
            barrier, eqn.params["barrier_transforms_treedef"], leaves[tree.num_leaves :]
        )
        assert self.mesh is not None
        axis = self.mesh.cluster_names.index(eqn.params["cluster_dim"])
        stride = int(np.prod(self.cluster_dims[axis + 1 :], initial=1))
        block = self.thread.block_id + (block - self.mesh_location.block_coords[axis]) * stride
        return self._call(_store_to_block, eqn, token, value=value, ref=ref, barrier=barrier, block=block), []


_RELAYED = (
    primitives.wgmma_ref_p,
    primitives.wgmma_wait_p,
    primitives.wgmma_accumulator_deref_p,
    primitives.wgmma_accumulator_store_p,
    primitives.async_store_smem_p,
    primitives.griddepcontrol_wait_p,
    primitives.griddepcontrol_launch_dependents_p,
)


def _relayed(eqn):
    # jax's interpreter hands a token to the operations that it knows alone, so others travel inside one of those.
    if eqn.primitive not in _RELAYED:
        return eqn
    return eqn.replace(primitive=primitives.commit_smem_p, params={"relayed": eqn})


@gpu_callbacks.fail_on_exception
def _wgmma(*, token, mesh_location, thread, operands, source_info):
    memory, logging = gpu_callbacks._get_shared_memory(), GPULoggingInfo(mesh_location, thread, source_info)
    clock = _start(memory, thread)

    def access(ref):
        key, transforms = HostAllocationKey.from_array(ref[0]), gpu_callbacks._remove_noop_transforms(ref[1])
        return key, memory.access(key, jax.tree.map(int, transforms))

    def get(operand, *, shared):
        if not isinstance(operand, tuple):
            return np.asarray(operand)
        place = access(operand)
        if shared and clock is not None:
            # Tensor cores read shared memory as TMA does: what threads wrote there they see once it is committed.
            gpu_callbacks.get_races().check_read(thread, clock.async_smem_clock, *place, source_info=source_info)
        value = memory.get_buffer_content(*place, thread, increment_clock=False, logging_info=logging)[0]
        assert value is not None, f"{place} is outside of its buffer"
        return value

    total, a, b = (get(operand, shared=i > 0) for i, operand in enumerate(operands))
    total = total + a.astype(total.dtype) @ b.astype(total.dtype)
    memory.store_buffer_content(*access(operands[0]), total, thread, increment_clock=False, logging_info=logging)
    _running(memory, thread).append(clock)
    return token


@gpu_callbacks.fail_on_exception
def _wait(*, token, mesh_location, thread, n, source_info):
    memory = gpu_callbacks._get_shared_memory()
    running = _running(memory, thread)
    while len(running) > n:
        clock = running.popleft()
        if clock is not None:
            with memory.lock:
                memory.clocks[thread].update(clock)
    return token


@gpu_callbacks.fail_on_exception
def _store_accumulator(*, token, mesh_location, thread, accumulator, value, source_info):
    memory, key = gpu_callbacks._get_shared_memory(), HostAllocationKey.from_array(accumulator)
    memory.store_buffer_content(key, memory.access(key, ()), np.asarray(value), thread, increment_clock=False)
    return token


@gpu_callbacks.fail_on_exception
def _store_to_block(*, token, mesh_location, thread, value, ref, barrier, block, source_info):
    memory, logging = gpu_callbacks._get_shared_memory(), GPULoggingInfo(mesh_location, thread, source_info)
    key, barrier = (
        dataclasses.replace(HostAllocationKey.from_array(place), block_id=int(block)) for place in (ref[0], barrier)
    )
    deadline = time.monotonic() + _SECONDS_TO_ALLOCATE
    while not (key in memory.mem and barrier in memory.mem):
        memory.check_failed()
        if time.monotonic() > deadline:
            raise RuntimeError(f"{thread} stores to {key}, which does not exist: has block {int(block)} ended?")
        time.sleep(1e-3)
    access = memory.access(key, jax.tree.map(int, gpu_callbacks._remove_noop_transforms(ref[1])))
    clock = _start(memory, thread)
    if clock is not None:
        gpu_callbacks.get_races().check_write(thread, clock.generic_clock, key, access, source_info=source_info)
    memory.store_buffer_content(key, access, np.asarray(value), thread, increment_clock=False, logging_info=logging)
    memory.get_barrier(barrier).arrive(thread, clock, logging)
    return token


def _start(memory, thread):
    """Give the time of work that a thread starts now and that runs beside it, None without race detection."""
    if not memory.detect_races:
        return None
    clock = memory.incr_clock(thread)
    clock.inc(memory.get_next_tma_thread_id())
    return clock


def _running(memory, thread):
    """Give the times of a thread's wgmmas that have not been waited for."""
    return memory.__dict__.setdefault("running_wgmmas", collections.defaultdict(collections.deque))[thread]
