"""The specification of `rmsnorm_project` and `glu_project`, in plain XLA."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.int4_matmul.operands import Compensator
from pallas_kernels.int4_matmul.reference import compensator_coordinates

Activation = Literal["silu", "gelu_tanh"]


def rmsnorm(x: Float[Array, "*B K"], weight: Float[Array, " K"], *, eps: float) -> Float[Array, "*B K"]:
    """Divide by the root mean square of the last axis and multiply by a weight, in float32; the result has x's type.

    Source: Zhang and Sennrich, arXiv 1910.07467.
    """
    f = x.astype(jnp.float32)
    f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + eps)
    return (f * weight.astype(jnp.float32)).astype(x.dtype)


def rmsnorm_project_xla(
    residual: Float[Array, "*B K"],
    update: Float[Array, "*B K"] | None,
    weight: Float[Array, " K"],
    compensator: Compensator | None,
    *,
    eps: float,
) -> tuple[Float[Array, "*B K"], Float[Array, "*B K"], Float[Array, "*B R"] | None]:
    """Compute what `rmsnorm_project` documents."""
    h = residual if update is None else residual + update
    x = rmsnorm(h, weight, eps=eps)
    return x, h, None if compensator is None else compensator_coordinates(x, compensator)


def glu_project_xla(
    gate_up: Float[Array, "*B 2*K"], compensator: Compensator | None, *, activation: Activation
) -> tuple[Float[Array, "*B K"], Float[Array, "*B R"] | None]:
    """Compute what `glu_project` documents."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    x = (jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate, approximate=True)) * up
    return x, None if compensator is None else compensator_coordinates(x, compensator)
