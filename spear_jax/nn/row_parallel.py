"""Linears whose inputs are divided over devices, and a residual stream that sums their parts."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.int4_matmul import (
    Compensator,
    compensator_coordinates,
    gated_coordinates,
    int4_matmul,
    low_rank_output,
)
from pallas_kernels.peer_reduce import Inbox, PeerCompensator, Reduction, prepare, row_parallel
from pallas_kernels.tails import rmsnorm_project
from spear_jax.quant.qtensor import QuantTensor

if TYPE_CHECKING:
    from spear_jax.nn.linear import Linear

AXIS = "tp"
"""Name of the axis of devices that a model is divided over."""

MOST_ROWS = 64
"""Rows up to which sums go through inboxes; prompt chunks above are summed by `psum`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowCompensator:
    """A row-parallel linear's compensator in two forms: as it is, for `psum`, and as the kernels for GPUs read it."""

    plain: Compensator
    prepared: PeerCompensator

    @classmethod
    def of(cls, compensator: Compensator) -> "RowCompensator":
        """Give both forms.

        Raises:
            NotImplementedError: The kernels do not take such a compensator.
        """
        return cls(plain=compensator, prepared=prepare(compensator))


nnx.register_data_type(RowCompensator)


class RowParallel(nnx.Module):
    """A linear whose inputs are divided over `AXIS`: partial sums of the product and of `z = A x` are added up.

    The gate is not linear in z, so it is applied to the sum; each device then adds its share of `B z`. Up to
    `MOST_ROWS` rows with "dual-write" are not multiplied here but given as a `RowProduct`, for the next norm to sum.
    """

    def __init__(self, linear: "Linear", *, parts: int, reduction: Reduction = "psum") -> None:
        if linear.bias is not None:
            raise NotImplementedError("linears with a bias are not divided by their inputs")
        self.linear = linear
        self.parts = parts
        self.reduction: Reduction = reduction

    activation = None  # as `Linear` has it: nothing is applied to a part of a sum

    def __call__(
        self,
        x: Float[Array, "*B K"],
        *,
        compensator: Compensator | RowCompensator | None = None,
        z: Float[Array, "*B R"] | None = None,
    ) -> "Float[Array, '*B N'] | RowProduct":
        """Apply the layer to this device's inputs; all devices get the whole result.

        Coordinates of this device's inputs alone, gated as they are, would be no part of the whole's: `z` is not taken.
        """
        del z
        weight = self.linear.weight
        few = x.size // x.shape[-1] <= MOST_ROWS
        if self.reduction == "dual-write" and few and isinstance(weight, QuantTensor):
            return RowProduct(x=x, weight=weight, compensator=compensator)
        if isinstance(compensator, RowCompensator):
            compensator = compensator.plain
        total = None
        if compensator is not None:
            gate = compensator.gate
            if gate is not None and (gate.probe is not None or gate.w_rms is not None):
                raise NotImplementedError("gates that see more of x than z are not divided")
            partial = compensator_coordinates(x, dataclasses.replace(compensator, gate=None))
            total = jax.lax.psum(partial, AXIS)
            total = (total if gate is None else gated_coordinates(x, total, None, gate)) / self.parts
        if isinstance(weight, QuantTensor):
            y = int4_matmul(
                x, weight.packed, weight.scale, zero=weight.zero, compensator=compensator, z=total,
                out_dtype=jnp.float32, layout=weight.layout,
            )  # fmt: skip
        else:
            y = jnp.einsum("...k,nk->...n", x, weight[...], preferred_element_type=jnp.float32)
            if compensator is not None and total is not None:
                y = y + low_rank_output(total, compensator)
        return jax.lax.psum(y, AXIS).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowProduct:
    """A row-parallel product that is yet to be made, with the sum and the norm after it."""

    x: Any
    weight: QuantTensor
    compensator: Compensator | RowCompensator | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PeerResidual:
    """The residual stream h [B, T, D], and the inbox through which parts of sums come."""

    h: Any
    inbox: Inbox

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stream."""
        return self.h.shape

    def normed(
        self,
        update: Array | RowProduct | None,
        weight: Float[Array, " D"],
        *,
        eps: float,
        compensator: Compensator | None,
    ) -> "tuple[Float[Array, '*B D'], PeerResidual, Float[Array, '*B R'] | None]":
        """Do what `RMSNorm.of_sum` documents."""
        if not isinstance(update, RowProduct):
            x, h, z = rmsnorm_project(self.h, update, weight, eps=eps, compensator=compensator)
            return x, dataclasses.replace(self, h=h), z
        codes, own = update.weight, update.compensator
        if isinstance(own, RowCompensator):
            own = own.prepared
        # A gate's own projections are not the tail's.
        apart = compensator is not None and compensator.gate is not None and compensator.gate.probe is not None
        x, h, z, inbox = row_parallel(
            *(update.x, codes.packed, codes.scale, self.h, weight, self.inbox),
            axis=AXIS,
            eps=eps,
            zero=codes.zero,
            layout=codes.layout,
            compensator=own,
            following=None if apart else compensator,
        )
        if apart and compensator is not None:
            z = compensator_coordinates(x, compensator)
        assert inbox is not None
        return x, PeerResidual(h=h, inbox=inbox), z


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PeerCache:
    """A model's cache with the inbox of the device: both are donated to a step and come back from it."""

    cache: Any
    inbox: Inbox
