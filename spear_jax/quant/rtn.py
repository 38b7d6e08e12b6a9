"""Round-to-nearest quantization on min-max scales."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spear_jax.quant.qtensor import QuantSpec, QuantTensor

_TINY = 1e-12
"""Smallest scale: an all-zero row gets this one and codes of zero."""


def round_to_nearest(weight: Float[Array, "*L N K"], spec: QuantSpec) -> QuantTensor:
    """Quantize a weight to int4 by rounding each value to the nearest code on min-max scales.

    Symmetric: scale = max|w| / 7. Asymmetric: scale = (max - min) / 15 with zero inside the range, zero point rounded.
    The codes are chosen against the scale as it is stored, after rounding to its type.

    Raises:
        ValueError: The group size does not divide K.
    """
    spec.groups(weight.shape[-1])
    return _round(weight, spec=spec)


@jax.jit(static_argnames="spec")
def _round(weight: Float[Array, "*L N K"], *, spec: QuantSpec) -> QuantTensor:
    groups = spec.groups(weight.shape[-1])
    w = weight.astype(jnp.float32).reshape(*weight.shape[:-1], groups, -1)
    low, high = jnp.minimum(w.min(-1), 0), jnp.maximum(w.max(-1), 0)
    scale = jnp.maximum(-low, high) / 7 if spec.symmetric else (high - low) / 15
    scale = jnp.maximum(scale, _TINY).astype(spec.scale_dtype)
    steps = w / scale.astype(jnp.float32)[..., None]
    zero = None
    if not spec.symmetric:
        zero = jnp.clip(-8 - jnp.round(low / scale.astype(jnp.float32)), -8, 7)
        steps = steps + zero[..., None]
        zero = zero.astype(jnp.int8)
    codes = jnp.clip(jnp.round(steps), -7 if spec.symmetric else -8, 7).astype(jnp.int8)
    return QuantTensor.from_codes(codes.reshape(weight.shape), scale, zero)
