"""Public operations: they check their operands, then hand them to a backend. All run under `shard_map`."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from pallas_kernels import dispatch
from pallas_kernels.int4_matmul import Compensator
from pallas_kernels.int4_matmul.operands import Layout
from pallas_kernels.peer_reduce.inbox import Inbox
from pallas_kernels.peer_reduce.operands import PeerCompensator
from pallas_kernels.peer_reduce.reference import peer_reduce_psum, row_parallel_psum

__all__ = ["Reduction", "peer_reduce", "row_parallel"]

Reduction = Literal["psum", "dual-write"]
"""How parts are summed: by XLA's collective, or by what each device writes into the others' inboxes."""


def _reduce_mosaic_gpu(*args: Any, **kwargs: Any) -> Any:
    # Imported when first called: a program that never runs on a GPU does not wait for Mosaic.
    from pallas_kernels.peer_reduce.gpu import peer_reduce_mosaic_gpu

    return peer_reduce_mosaic_gpu(*args, **kwargs)


def _row_parallel_mosaic_gpu(*args: Any, **kwargs: Any) -> Any:
    from pallas_kernels.peer_reduce.gpu import row_parallel_mosaic_gpu

    return row_parallel_mosaic_gpu(*args, **kwargs)


def _reduce_mosaic_tpu(*args: Any, **kwargs: Any) -> Any:
    from pallas_kernels.peer_reduce.tpu import peer_reduce_mosaic_tpu

    return peer_reduce_mosaic_tpu(*args, **kwargs)


def _row_parallel_mosaic_tpu(*args: Any, **kwargs: Any) -> Any:
    from pallas_kernels.peer_reduce.tpu import row_parallel_mosaic_tpu

    return row_parallel_mosaic_tpu(*args, **kwargs)


_REDUCE_BACKENDS = {"mosaic_gpu": _reduce_mosaic_gpu, "mosaic_tpu": _reduce_mosaic_tpu, "xla": peer_reduce_psum}
_ROW_PARALLEL_BACKENDS = {
    "mosaic_gpu": _row_parallel_mosaic_gpu,
    "mosaic_tpu": _row_parallel_mosaic_tpu,
    "xla": row_parallel_psum,
}


def peer_reduce(
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
    implementation: dispatch.Implementation | None = None,
) -> tuple[Float[Array, "*B N"], Float[Array, "*B N"], Float[Array, "*B R2"] | None, Inbox | None]:
    """Sum y and z over devices; compute `h = residual + y + B gate(z)`, its norm x, and what a product makes of x.

    Parts are summed in the order of devices, so that all get the same bits.

    Args:
        y: This device's part of a row-parallel product; any leading axes.
        z: Its part of `A x`, with A's scales in it and no gate applied; None without a compensator.
        residual: Activations before, the same on all devices.
        weight: Factors of the next norm on the normalised columns.
        inbox: Where parts meet; None for sums by `psum`.
        axis: Name of the mesh axis of the devices.
        eps: Added to the mean square.
        compensator: Of the product that made y, `prepare`d or not; what makes coordinates in it is not looked at.
        following: Compensator of the product that takes x; only what makes coordinates is looked at.
        implementation: Backend; by default the best one for this platform that can do the case. "xla" is `psum`.

    Returns:
        x and h in residual's type, the coordinates of `following` as `int4_matmul` takes them or None, and the inbox
        in its new state, which the next sum must be given.

    Raises:
        ValueError: Shapes or types do not fit together; says which and what was expected.
        NotImplementedError: The backend that was asked for cannot do this case, or the gate sees more of x than z.
    """
    _check("peer_reduce", y.shape, z, residual, weight, compensator, following)
    options = {"axis": axis, "eps": eps, "compensator": compensator, "following": following}
    operands = (y, z, residual, weight, inbox)
    with jax.named_scope("peer_reduce"):
        if inbox is None:
            return peer_reduce_psum(*operands, **options, implementation=implementation)
        return dispatch.call("peer_reduce", _REDUCE_BACKENDS, implementation, *operands, **options)


def row_parallel(
    x: Float[Array, "*B K"],
    packed: Int8[Array, "N K/2"],
    scale: Float[Array, "N G"],
    residual: Float[Array, "*B N"],
    weight: Float[Array, " N"],
    inbox: Inbox | None,
    *,
    axis: str,
    eps: float,
    zero: Int8[Array, "N G"] | None = None,
    layout: Layout = "rows",
    compensator: Compensator | PeerCompensator | None = None,
    following: Compensator | None = None,
    implementation: dispatch.Implementation | None = None,
) -> tuple[Float[Array, "*B N"], Float[Array, "*B N"], Float[Array, "*B R2"] | None, Inbox | None]:
    """Multiply this device's columns of an int4 weight with its part of x, and do with the parts as `peer_reduce` does.

    x, packed, scale, zero and layout are as for `int4_matmul`, and so is `compensator`, whose A has this device's
    columns. Everything else is as for `peer_reduce`.
    """
    shape = (*x.shape[:-1], residual.shape[-1])
    _check("row_parallel", shape, None, residual, weight, compensator, following)
    options = {"axis": axis, "eps": eps, "compensator": compensator, "following": following}
    options |= {"zero": zero, "layout": layout}
    operands = (x, packed, scale, residual, weight, inbox)
    with jax.named_scope("row_parallel"):
        if inbox is None:
            return row_parallel_psum(*operands, **options, implementation=implementation)
        return dispatch.call("row_parallel", _ROW_PARALLEL_BACKENDS, implementation, *operands, **options)


def _check(op: str, shape: tuple[int, ...], z, residual, weight, compensator, following) -> None:
    n = residual.shape[-1]
    if residual.shape != shape or not jnp.issubdtype(residual.dtype, jnp.floating):
        got = f"{residual.dtype}{list(residual.shape)}"
        raise ValueError(f"{op}: residual must be floating {list(shape)} as the sum is, got {got}")
    if weight.shape != (n,):
        raise ValueError(f"{op}: weight must have shape [{n}], got {list(weight.shape)}")
    if z is not None:
        expected = None if compensator is None else (*shape[:-1], compensator.rank)
        if z.shape != expected:
            wanted = "a compensator with it" if expected is None else str(list(expected))
            raise ValueError(f"{op}: z needs {wanted}, got z {list(z.shape)}")
    elif op == "peer_reduce" and compensator is not None:
        raise ValueError(f"{op}: a compensator needs z, this device's part of A x")
    if isinstance(compensator, Compensator) and compensator.gate is not None:
        gate = compensator.gate
        if gate.probe is not None or gate.w_rms is not None:
            raise NotImplementedError(f"{op}: gates that see more of x than z are not divided among devices")
    if following is not None and following.a is not None and following.a.shape[-1] != n:
        raise ValueError(f"{op}: following.a must have shape [R, {n}], got {list(following.a.shape)}")
