"""The tests' own interpreter computes what it should, and finds races that are planted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.mosaic_gpu import ACC  # pyright: ignore[reportPrivateImportUsage]

TILE = (64, 64)
STEPS = 3


def tiles(count: int, *, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(-4, 4, (count, *TILE)), jnp.bfloat16)


def multiply_all(x, *, interpret, first: str):
    """Sum `w x[i]` over i: x through one slot of shared memory, which TMA fills again once it is free."""

    def kernel(w, x, out, slot, full, empty):
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 1)
        def _():
            for i in range(STEPS):
                if i:
                    plgpu.barrier_wait(empty)
                plgpu.copy_gmem_to_smem(x.at[i], slot, full)
            plgpu.barrier_wait(empty)

        @pl.when(warpgroup == 0)
        def _():
            left = plgpu.load(w)

            def run(acc):
                plgpu.griddepcontrol_wait()
                acc[...] = jnp.ones(TILE, jnp.float32)
                for _ in range(STEPS):
                    plgpu.barrier_wait(full)
                    plgpu.wgmma(acc, left, slot)
                    if first == "wait":
                        plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty)
                plgpu.griddepcontrol_launch_dependents()
                return acc[...]

            out[...] = pl.run_scoped(run, ACC(TILE, jnp.float32))

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(TILE, jnp.float32),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM(TILE, jnp.bfloat16), plgpu.Barrier(), plgpu.Barrier()],
        interpret=interpret,
    )(tiles(1, seed=1)[0], x)


@pytest.mark.parametrize("first", ["wait", "free"])
def test_wgmma_reads_until_it_is_waited_for(interpreter, interpreted, first: str):
    x = tiles(STEPS)
    y, raced = interpreted.watch(functools.partial(multiply_all, interpret=interpreter.PARAMS, first=first), x)
    assert raced == (first == "free")
    np.testing.assert_array_equal(y, 1 + tiles(1, seed=1)[0].astype(jnp.float32) @ x.astype(jnp.float32).sum(0))


@pytest.mark.parametrize("commit", [True, False])
def test_wgmma_sees_what_was_committed(interpreter, interpreted, commit: bool):
    def kernel(x, out, shared):
        shared[...] = x[...]
        if commit:
            plgpu.commit_smem()

        def run(acc):
            plgpu.wgmma(acc, plgpu.load(x), shared)
            return acc[...]

        out[...] = pl.run_scoped(run, ACC(TILE, jnp.float32))

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(TILE, jnp.float32),
        scratch_types=[plgpu.SMEM(TILE, jnp.bfloat16)],
        interpret=interpreter.PARAMS,
    )
    x = tiles(1)[0]
    y, raced = interpreted.watch(run, x)
    assert raced != commit
    np.testing.assert_array_equal(y, x.astype(jnp.float32) @ x.astype(jnp.float32))


@pytest.mark.parametrize("wait", [True, False])
def test_a_store_to_another_block_is_seen_once_its_barrier_is(interpreter, interpreted, wait: bool):
    """Each block gives its tile to the next one of the cluster."""
    blocks = 4

    def kernel(x, out, shared, barrier):
        block = lax.axis_index("block")
        target = lax.rem(block + 1, jnp.int32(blocks))
        plgpu.async_store_smem(plgpu.load(x.at[block]), shared, barrier, cluster_idx=target, cluster_dim="block")
        if wait:
            plgpu.barrier_wait(barrier)
        out[block] = shared[...]
        if not wait:
            plgpu.barrier_wait(barrier)

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((blocks, *TILE), jnp.bfloat16),
        cluster=(blocks,),
        cluster_names=("block",),
        scratch_types=[plgpu.SMEM(TILE, jnp.bfloat16), plgpu.Barrier()],
        interpret=interpreter.PARAMS,
    )
    x = tiles(blocks)
    y, raced = interpreted.watch(run, x)
    assert raced != wait
    if wait:
        np.testing.assert_array_equal(y, jnp.roll(x, 1, axis=0))


def test_a_race_fails_a_test(interpreter, interpreted):
    run = functools.partial(multiply_all, interpret=interpreter.PARAMS, first="free")
    with pytest.raises(AssertionError, match="a race was found"):
        interpreted(run, tiles(STEPS))


def test_the_extension_ends_with_its_context(interpreter):
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret

    def patched():
        return jaxpr_interpret.JaxprInterpreter, vars(gpu_callbacks)["GPURaceDetectionState"]

    before = patched()
    with interpreter.extended_interpreter():
        assert set(patched()).isdisjoint(before)
    assert patched() == before
