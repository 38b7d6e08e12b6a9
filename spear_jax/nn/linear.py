"""Linear layers whose weight is dense, int4, or int4 expanded for a CPU."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.int4_matmul import Activation, Compensator, compensator_coordinates, int4_matmul, low_rank_output
from pallas_kernels.tails import rmsnorm, rmsnorm_project
from spear_jax.nn.row_parallel import PeerResidual, RowProduct
from spear_jax.quant.qtensor import QuantTensor


class Linear(nnx.Module):
    """`y = x W^T + bias`, with W [N, K] dense or a `QuantTensor`, and an optional error compensator.

    With an `activation`, which takes a `QuantTensor`, channels alternate in blocks of 64 and `silu(even) * odd` is
    given: half as many.
    """

    def __init__(
        self, weight: Array | QuantTensor, bias: Array | None = None, *, activation: Activation | None = None
    ) -> None:
        assert activation is None or isinstance(weight, QuantTensor)
        self.weight = weight if isinstance(weight, QuantTensor) else nnx.Param(weight)
        self.bias = None if bias is None else nnx.Param(bias)
        self.activation: Activation | None = activation

    def __call__(
        self,
        x: Float[Array, "*B K"],
        *,
        compensator: Compensator | None = None,
        z: Float[Array, "*B R"] | None = None,
    ) -> Float[Array, "*B N"]:
        """Apply the layer; sums and epilogue in float32, the result in x's type.

        `z` are the compensator's gated coordinates of x where they are already known.
        """
        bias = None if self.bias is None else self.bias[...]
        if isinstance(self.weight, QuantTensor):
            w = self.weight
            options = {"layout": w.layout, "activation": self.activation}
            return int4_matmul(x, w.packed, w.scale, zero=w.zero, bias=bias, compensator=compensator, z=z, **options)
        y = jnp.einsum("...k,nk->...n", x, self.weight[...], preferred_element_type=jnp.float32)
        if bias is not None:
            y = y + bias.astype(jnp.float32)
        if compensator is not None:
            y = y + low_rank_output(compensator_coordinates(x, compensator) if z is None else z, compensator)
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """Divide by the root mean square of the last axis and multiply by a weight, in float32.

    Source: Zhang and Sennrich, arXiv 1910.07467.
    """

    def __init__(self, weight: Array, *, eps: float) -> None:
        self.weight = nnx.Param(weight)
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise x; the result has x's type."""
        return rmsnorm(x, self.weight[...], eps=self.eps)

    def of_sum(
        self,
        residual: Float[Array, "*B D"] | PeerResidual,
        update: Float[Array, "*B D"] | RowProduct | None,
        *,
        compensator: Compensator | None = None,
    ) -> tuple[Float[Array, "*B D"], Any, Float[Array, "*B R"] | None]:
        """Give the norm of a sum, the sum, and coordinates of the norm; on accelerators in one kernel."""
        if isinstance(residual, PeerResidual):
            return residual.normed(update, self.weight[...], eps=self.eps, compensator=compensator)
        assert not isinstance(update, RowProduct), "parts are summed through an inbox, and there is none"
        return rmsnorm_project(residual, update, self.weight[...], eps=self.eps, compensator=compensator)
