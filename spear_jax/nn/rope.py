"""Rotary position embeddings in the half-split order: element i is paired with element i + H/2."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spear_jax.config import RopeScaling

type Rope = tuple[Float[Array, "B T H/2"], Float[Array, "B T H/2"]]
"""Cosines and sines of the angles of positions."""


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Give the H/2 angular frequencies in radians a position, float64.

    Sources: Su et al., arXiv 2104.09864; `llama3` as in the Llama 3.1 model card.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "factors":
        if len(scaling.factors) != head_dim // 2:
            raise ValueError(f"rope scaling has {len(scaling.factors)} factors, expected {head_dim // 2}")
        return frequencies / np.asarray(scaling.factors, np.float64)
    wavelengths = 2 * math.pi / frequencies
    periods = scaling.original_max_position / wavelengths
    keep = (periods - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rope_tables(positions: Int[Array, "B T"], frequencies: np.ndarray) -> Rope:
    """Give cosines and sines of `position * frequency`, float32."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Float[Array, "B T N H"], rope: Rope) -> Float[Array, "B T N H"]:
    """Rotate each pair (i, i + H/2) of every head by its position's angle, in float32."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
