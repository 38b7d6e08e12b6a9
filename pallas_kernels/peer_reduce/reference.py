"""The specification of `peer_reduce` and `row_parallel`: sums by `psum`, on any backend."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels import dispatch
from pallas_kernels.int4_matmul import (
    Compensator,
    compensator_coordinates,
    gated_coordinates,
    int4_matmul,
    low_rank_output,
)
from pallas_kernels.peer_reduce.inbox import Inbox
from pallas_kernels.peer_reduce.operands import PeerCompensator
from pallas_kernels.tails import rmsnorm_project


def peer_reduce_psum(
    y: Float[Array, "*B N"],
    z: Float[Array, "*B R"] | None,
    residual: Float[Array, "*B N"],
    weight: Float[Array, " N"],
    inbox: Inbox | None,
    *,
    axis: str,
    eps: float,
    compensator: Compensator | PeerCompensator | None = None,
    following: Compensator | None = None,
    implementation: dispatch.Implementation | None = "xla",
) -> tuple[Float[Array, "*B N"], Float[Array, "*B N"], Float[Array, "*B R2"] | None, Inbox | None]:
    """Compute what `peer_reduce` documents, `implementation` being that of the norm; the inbox is not looked at."""
    _refuse_prepared(compensator)
    update = jax.lax.psum(y.astype(jnp.float32), axis)
    if z is not None and isinstance(compensator, Compensator):
        total = gated(jax.lax.psum(z.astype(jnp.float32), axis), compensator)
        update = update + low_rank_output(total, compensator)
    x, h, following_z = rmsnorm_project(
        residual, update.astype(residual.dtype), weight, eps=eps, compensator=following, implementation=implementation
    )
    return x, h, following_z, inbox


def _refuse_prepared(compensator: Compensator | PeerCompensator | None) -> None:
    if isinstance(compensator, PeerCompensator):
        raise NotImplementedError("psum takes compensators as they are, and this one is in the form of the GPU kernels")


def gated(z: Float32[Array, "*B R"], compensator: Compensator) -> Float32[Array, "*B R"]:
    """Apply a compensator's gate to coordinates of all of x."""
    gate = compensator.gate
    return z if gate is None else gated_coordinates(z, z, None, gate)


def partial_coordinates(x: Float[Array, "*B K"], compensator: Compensator) -> Float32[Array, "*B R"]:
    """Compute this device's part of `A x`, to which the gate is not applied yet."""
    return compensator_coordinates(x, dataclasses.replace(compensator, gate=None))


def row_parallel_psum(
    x: Float[Array, "*B K"],
    packed: Array,
    scale: Array,
    residual: Float[Array, "*B N"],
    weight: Float[Array, " N"],
    inbox: Inbox | None,
    *,
    axis: str,
    eps: float,
    compensator: Compensator | PeerCompensator | None = None,
    following: Compensator | None = None,
    implementation: dispatch.Implementation | None = "xla",
    **quantized: Any,
) -> tuple[Float[Array, "*B N"], Float[Array, "*B N"], Float[Array, "*B R2"] | None, Inbox | None]:
    """Compute what `row_parallel` documents, `implementation` being that of the product and of the norm."""
    _refuse_prepared(compensator)
    y = int4_matmul(x, packed, scale, out_dtype=jnp.float32, implementation=implementation, **quantized)
    z = partial_coordinates(x, compensator) if isinstance(compensator, Compensator) else None
    options = {"compensator": compensator, "following": following, "implementation": implementation}
    return peer_reduce_psum(y, z, residual, weight, inbox, axis=axis, eps=eps, **options)
