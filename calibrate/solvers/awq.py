"""AWQ (arXiv 2306.00978): a scale for each input channel that spares the channels with large activations."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from calibrate.solvers.grid import check_finite, check_problem, over_layers, row_error
from spear_jax.quant import QuantSpec, round_to_nearest


def search_channel_scales(
    weight: Float[Array, "*L N K"],
    second_moment: Float[Array, "*L K K"],
    spec: QuantSpec,
    *,
    steps: int = 20,
    activation_size: Float[Array, "*L K"] | None = None,
) -> Float[Array, "*L K"]:
    """Return the channel scale `c` that minimises `e R e^T` when `weight * c` is rounded to nearest.

    `c = size^alpha / sqrt(max * min)` for `steps` + 1 values of alpha from 0 to 1 (eq. 5), where `size` is
    `activation_size`, the mean |x| of each input, or without it `sqrt(diag R)`. The module then computes
    `(weight * c) (x / c)`; whoever calls folds `1 / c` into the operation before. Alpha 0 gives `c = 1`, so the result
    is never worse than round to nearest.

    Raises:
        ValueError: shapes that disagree, values that are not finite, or no step.
    """
    check_problem(weight, second_moment)
    spec.groups(weight.shape[-1])
    if steps < 1:
        raise ValueError(f"steps {steps} must be at least 1")
    if activation_size is None:
        activation_size = jnp.sqrt(jnp.diagonal(second_moment, axis1=-2, axis2=-1))
    if np.shape(activation_size) != (*weight.shape[:-2], weight.shape[-1]):
        raise ValueError(f"activation_size has shape {np.shape(activation_size)}, which does not fit {weight.shape}")
    check_finite(activation_size=activation_size)
    return _search(weight, second_moment, activation_size[..., None, :], spec=spec, steps=steps)[..., 0, :]


@functools.partial(jax.jit, static_argnames=("spec", "steps"))
def _search(weight: Any, second_moment: Any, size: Any, *, spec: QuantSpec, steps: int) -> Float[Array, "*L 1 K"]:
    def solve(weight: Array, second_moment: Array, size: Array) -> Array:
        # A dead channel gets the size of the smallest live one, so that it does not set the range of the scales.
        live = size > 0
        smallest = jnp.min(jnp.where(live, size, jnp.inf))
        size = jnp.where(live, size, jnp.where(jnp.isfinite(smallest), smallest, 1.0))

        def scales(alpha: Array) -> Array:
            power = jnp.exp(alpha * jnp.log(size))
            return power / jnp.sqrt(jnp.max(power) * jnp.min(power))

        def loss(alpha: Array) -> Array:
            scaled = weight * scales(alpha)
            error = (scaled - round_to_nearest(scaled, spec).dequantize(jnp.float32)) / scales(alpha)
            return jnp.sum(row_error(error, second_moment))

        alphas = jnp.linspace(0.0, 1.0, steps + 1)
        return scales(alphas[jnp.argmin(jax.lax.map(loss, alphas))])

    with jax.named_scope("search_channel_scales"):
        return over_layers(solve, weight.astype(jnp.float32), second_moment, size)


def scale_channels(
    weight: Float[Array, "*L N K"], second_moment: Float[Array, "*L K K"], channel_scale: Float[Array, "*L K"]
) -> tuple[Float[Array, "*L N K"], Float[Array, "*L K K"]]:
    """Return `weight * c` and the moment of `x / c`: the same module, for any other solver to round.

    Raises:
        ValueError: shapes that disagree, or a channel scale that is not finite and positive.
    """
    check_problem(weight, second_moment)
    channel_scale = jnp.asarray(channel_scale, jnp.float32)
    if channel_scale.shape != (*weight.shape[:-2], weight.shape[-1]):
        raise ValueError(f"channel_scale has shape {channel_scale.shape}, which does not fit weight {weight.shape}")
    if not bool(jnp.all(jnp.isfinite(channel_scale) & (channel_scale > 0))):
        raise ValueError("channel_scale holds values that are not finite and positive")
    outer = channel_scale[..., :, None] * channel_scale[..., None, :]
    return weight * channel_scale[..., None, :], second_moment / outer
