"""Int4 checkpoints of other tools as the base: their grid, and the original moved to their channel scales."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from calibrate.capture import Moments
from calibrate.config import CalibrateConfig
from calibrate.quantizers import float_weight
from spear_jax import models
from spear_jax.models.decoder import MODULES, Decoder
from spear_jax.models.hf import read_int4_format
from spear_jax.nn.linear import Linear, RMSNorm
from spear_jax.quant import QuantSpec, QuantTensor

_MOST_ERROR = 0.6
"""Relative error of a weight above which it is no rounding of the reference's: of int4 it is 0.05 to 0.3, of weights
that have nothing to do with each other 1.4."""

_SPREAD = 0.05
"""Standard deviation of the logarithm of fitted row scales below which they are noise of rounding: AWQ's is 0.2 or
more."""


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
    weights = {name: float_weight(getattr(exact.layers, name)).astype(jnp.float32) for name in MODULES}
    stored: dict[str, Array] = {name: getattr(base.layers, name).weight.dequantize() for name in MODULES}
    channels: dict[str, Array] = {}
    for norm_name, name in (("input_norm", "qkv"), ("mlp_norm", "gate_up")):
        norm: RMSNorm = getattr(base.layers, norm_name)
        ratio = getattr(exact.layers, norm_name).weight[...] / norm.weight[...]
        channels[name] = jnp.where(jnp.isfinite(ratio) & (ratio > 0), ratio, 1.0)
        gain = getattr(exact.layers, norm_name).weight[...] / channels[name]
        setattr(layers, norm_name, RMSNorm(gain, eps=norm.eps))
        weights[name] = weights[name] * channels[name][:, None, :]

    values = config.num_kv_heads * config.head_dim
    value_scale = _row_scales(stored["qkv"][:, -values:], weights["qkv"][:, -values:])
    up_scale = _row_scales(
        stored["gate_up"][:, -config.intermediate_size :], weights["gate_up"][:, -config.intermediate_size :]
    )
    rows = {"qkv": _after_ones(value_scale, weights["qkv"]), "gate_up": _after_ones(up_scale, weights["gate_up"])}
    for name, scale in rows.items():
        weights[name] = weights[name] * scale[..., None]
    heads = value_scale.reshape(config.num_layers, config.num_kv_heads, config.head_dim)
    heads = jnp.repeat(heads, config.num_heads // config.num_kv_heads, axis=1)
    channels |= {"o": 1 / heads.reshape(config.num_layers, -1), "down": 1 / up_scale}
    for name in ("o", "down"):
        weights[name] = weights[name] * channels[name][:, None, :]

    for name, weight in weights.items():
        error = jnp.linalg.norm(weight - stored[name], axis=(1, 2)) / jnp.linalg.norm(weight, axis=(1, 2))
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


def _row_scales(stored: Float[Array, "L N K"], weight: Float[Array, "L N K"]) -> Float[Array, "L N"]:
    """Fit what each row was multiplied by; one in layers where no row stands out."""
    scale = jnp.sum(stored * weight, axis=-1) / jnp.sum(jnp.square(weight), axis=-1)
    scale = jnp.where(jnp.isfinite(scale) & (scale > 0), scale, 1.0)
    return jnp.where(jnp.std(jnp.log(scale), axis=-1, keepdims=True) < _SPREAD, 1.0, scale)


def _after_ones(scale: Float[Array, "L N"], weight: Float[Array, "L M K"]) -> Float[Array, "L M"]:
    """Give scales of all rows: those of the last ones, and one for the rows before."""
    return jnp.pad(scale, ((0, 0), (weight.shape[1] - scale.shape[1], 0)), constant_values=1.0)
