"""Int4 checkpoints of other tools as the base: their grid, and the original moved to their channel scales."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from calibrate.capture import Moments
from calibrate.config import CalibrateConfig
from calibrate.weights import float_weights, int4_weight
from spear_jax import models
from spear_jax.models.decoder import MODULES, Decoder
from spear_jax.models.hf import read_int4_format
from spear_jax.nn.linear import Linear, RMSNorm
from spear_jax.quant import QuantSpec, QuantTensor

_MOST_ERROR = 0.6
"""Relative error of a weight above which it is no rounding of the reference's: of int4 it is 0.05 to 0.3, of weights
that have nothing to do with each other 1.4."""

_LEAST_GAIN = 0.1
"""Share of the squared errors of two weights that fitted scales between them must take off to be kept: below it they
are noise of rounding."""


def with_imported_grid(config: CalibrateConfig, path: Path) -> CalibrateConfig:
    """Give the settings with the grid of the int4 checkpoint at `path`; as they are where it is none.

    Raises:
        ValueError: An int4 checkpoint has no reference, another model has one, or another grid is asked for.
    """
    found = None if path.is_file() else read_int4_format(path)
    if found is None:
        if config.reference is not None:
            raise ValueError(f"--reference {config.reference}: {config.model} is not int4 and is its own reference")
        return config
    if config.reference is None:
        raise ValueError(
            f"{config.model} is an int4 checkpoint ({found.method}): name the model it was made from by --reference; "
            "compensators are trained towards it"
        )
    spec = QuantSpec(group_size=found.group_size, symmetric=found.symmetric)
    asked = config.symmetric or config.asymmetric
    if config.group_size not in (-1, spec.group_size) or (asked and config.spec.symmetric != spec.symmetric):
        raise ValueError(f"{config.model} has {spec}: leave out --group-size, --symmetric and --asymmetric")
    return dataclasses.replace(config, group_size=spec.group_size, symmetric=False, asymmetric=not spec.symmetric)


def load_reference(source: str, base: Decoder) -> Decoder:
    """Load the float32 model that an int4 base was made from.

    Raises:
        ValueError: It is int4 itself, or of other shapes than the base.
    """
    model = models.load(source, dtype="float32").model
    if isinstance(model.layers.qkv.weight, QuantTensor):  # type: ignore[union-attr]
        raise ValueError(f"--reference {source} is int4 itself: name the model before it was quantized")
    for name in ("num_layers", "vocab_size", "hidden_size", "num_heads", "num_kv_heads", "intermediate_size"):
        expected, found = getattr(base.config, name), getattr(model.config, name)
        if expected != found:
            raise ValueError(f"--reference {source}: {name} is {found}, of the int4 checkpoint {expected}")
    return model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aligned:
    """A model of the reference's function whose weights are those that a base was rounded from.

    `channels` [L, K] of each module is what its weights' columns were multiplied by, and its inputs divided.
    """

    model: Decoder
    channels: dict[str, Float[Array, "L K"]]

    def moments(self, moments: Moments) -> Moments:
        """Give the second moments of the inputs, from those of the reference's."""
        return {n: moments[n] / (c[..., :, None] * c[..., None, :]) for n, c in self.channels.items()}


def align(exact: Decoder, base: Decoder, *, source: str) -> Aligned:
    """Find the channel scales that a tool like AWQ moved between weights before it rounded them.

    Norm gains tell those of `qkv` and `gate_up`. Those between values and `o`, and between `up` and `down`, are fitted
    by least squares row by row: any positive ones give a model of the same function.

    Raises:
        ValueError: A weight of the base is no rounding of the reference's.
    """
    config, layers = exact.config, jax.tree.map(lambda leaf: leaf, exact.layers)
    weights = float_weights(exact)
    stored: dict[str, Array] = {name: int4_weight(base, name).dequantize() for name in MODULES}
    channels: dict[str, Array] = {}
    for norm_name, name in (("input_norm", "qkv"), ("mlp_norm", "gate_up")):
        norm: RMSNorm = getattr(base.layers, norm_name)
        ratio = getattr(exact.layers, norm_name).weight[...] / norm.weight[...]
        channels[name] = jnp.where(jnp.isfinite(ratio) & (ratio > 0), ratio, 1.0)
        gain = getattr(exact.layers, norm_name).weight[...] / channels[name]
        setattr(layers, norm_name, RMSNorm(gain, eps=norm.eps))
        weights[name] = weights[name] * channels[name][:, None, :]

    def shared(scale: Float[Array, "L V"]) -> Float[Array, "L O"]:
        """Repeat the scales of values for each query head that reads them."""
        heads = scale.reshape(config.num_layers, config.num_kv_heads, config.head_dim)
        repeated = jnp.repeat(heads, config.num_heads // config.num_kv_heads, axis=1)
        return repeated.reshape(config.num_layers, -1)

    rows: dict[str, Array] = {}
    values, ups = config.num_kv_heads * config.head_dim, config.intermediate_size
    for first, second, count, spread in (("qkv", "o", values, shared), ("gate_up", "down", ups, lambda scale: scale)):
        block = weights[first][:, -count:], stored[first][:, -count:]
        scale = _scales_between(block, (weights[second], stored[second]), spread)
        channels[second] = 1 / spread(scale)
        rows[first] = jnp.pad(scale, ((0, 0), (weights[first].shape[1] - count, 0)), constant_values=1.0)
        weights[first] = weights[first] * rows[first][..., None]
        weights[second] = weights[second] * channels[second][:, None, :]

    for name, weight in weights.items():
        error = _relative_error(weight, stored[name])
        if not float(error.max()) < _MOST_ERROR:
            raise ValueError(
                f"--reference {source} is not what the int4 checkpoint was made from: {name} of layer "
                f"{int(error.argmax())} differs by {float(error.max()):.0%} of its size"
            )
        bias = getattr(exact.layers, name).bias
        if bias is not None:
            bias = bias[...] * rows[name] if name in rows else bias[...]
        setattr(layers, name, Linear(weight, bias))
    return Aligned(model=exact.replace(layers=layers), channels=channels)


def _scales_between(
    rows: tuple[Float[Array, "L M K"], Float[Array, "L M K"]],
    columns: tuple[Float[Array, "L N O"], Float[Array, "L N O"]],
    spread: Callable[[Float[Array, "L M"]], Float[Array, "L O"]],
) -> Float[Array, "L M"]:
    """Fit what each row of a weight was multiplied by, where the columns of the next were divided by the same.

    Both are given as in the reference and as stored. `spread` gives the scale of each column from those of the rows.
    Layers where a fit explains little get ones.
    """
    (exact, stored), (exact_after, stored_after) = rows, columns
    scale = jnp.sum(stored * exact, axis=-1) / jnp.sum(jnp.square(exact), axis=-1)
    scale = jnp.where(jnp.isfinite(scale) & (scale > 0), scale, 1.0)

    def error(scale: Float[Array, "L M"]) -> Float[Array, "L 1"]:
        here = _relative_error(exact * scale[..., None], stored)
        after = _relative_error(exact_after / spread(scale)[:, None, :], stored_after)
        return (jnp.square(here) + jnp.square(after))[:, None]

    return jnp.where(error(scale) < (1 - _LEAST_GAIN) * error(jnp.ones_like(scale)), scale, 1.0)


def _relative_error(weight: Float[Array, "L N K"], stored: Float[Array, "L N K"]) -> Float[Array, " L"]:
    return jnp.linalg.norm(weight - stored, axis=(1, 2)) / jnp.linalg.norm(stored, axis=(1, 2))
