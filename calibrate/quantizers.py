"""Whole models put on an int4 grid by each of the solvers."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from calibrate.capture import Moments
from calibrate.solvers import (
    Rounded,
    gptq,
    gptq_search,
    learn_clip,
    min_max_grid,
    refine,
    round_to_grid,
    scale_channels,
    search_channel_scales,
    search_scales,
)
from calibrate.weights import float_weights, with_weights
from spear_jax.models.decoder import MODULES, Decoder
from spear_jax.models.quantize import quantize_model
from spear_jax.nn.linear import RMSNorm
from spear_jax.quant import QuantSpec, QuantTensor

type Quantizer = Literal["rtn", "awq", "clip", "learned-clip", "gptq", "gptq-clip", "refined"]
"""Ways to round: to nearest on min-max scales; that behind AWQ's channel scales; to nearest on searched, or on learned
scales; GPTQ on min-max, or on searched scales; and "refined": scales searched under GPTQ, then coordinate descent."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """A quantized model, with the float model of the same function as the reference that it was rounded from.

    `exact` and `moments` are the reference's own, save where AWQ moved scales between its weights.
    """

    model: Decoder
    exact: Decoder
    moments: Moments


def round_weight(weight: Array, moment: Array, *, quantizer: Quantizer, spec: QuantSpec) -> QuantTensor:
    """Quantize one module, of one layer or of a stack of them, given the second moment of its input; all float32."""
    match quantizer:
        case "rtn" | "awq" | "gptq":
            grid = min_max_grid(weight, spec)
        case "learned-clip":
            grid = learn_clip(weight, moment, spec)
        case _:
            grid = search_scales(weight, moment, spec)
    match quantizer:
        case "gptq" | "gptq-clip":
            return gptq(weight, moment, grid).to_tensor()
        case "refined":
            return refine(weight, moment, gptq_search(weight, moment, grid)).to_tensor()
        case _:
            return Rounded(codes=round_to_grid(weight, grid), grid=grid).to_tensor()


def quantize_base(
    model: Decoder,
    *,
    quantizer: Quantizer,
    spec: QuantSpec,
    moments: Moments,
    progress: Callable[[int, int], None] | None = None,
) -> Base:
    """Quantize the four linears of all layers, every one against the reference's own activations.

    Raises:
        ValueError: The group size does not divide a module's input size, or a weight is not finite.
    """
    if quantizer == "rtn":
        return Base(model=quantize_model(model, spec), exact=model, moments=moments)
    if quantizer == "awq":
        model, moments = move_channel_scales(model, moments, spec)
    tensors = {}
    for done, (name, weight) in enumerate(float_weights(model).items(), start=1):
        spec.groups(weight.shape[-1], name=name)
        tensors[name] = round_weight(weight, moments[name], quantizer=quantizer, spec=spec)
        if progress:
            progress(done, len(MODULES))
    return Base(model=model.replace(layers=with_weights(model.layers, tensors)), exact=model, moments=moments)


def move_channel_scales(model: Decoder, moments: Moments, spec: QuantSpec) -> tuple[Decoder, Moments]:
    """Give a model of the same function whose weights round better: AWQ's channel scales (arXiv 2306.00978).

    Each module's input channels are multiplied, and what feeds them divided: the norm before `qkv` and `gate_up`, the
    rows of `up` before `down`. The input of `o` is left alone, as heads that share values cannot be scaled apart.
    """
    weights, moments = float_weights(model), dict(moments)

    def scale(name: str) -> Float[Array, "L K"]:
        channels = search_channel_scales(weights[name], moments[name], spec)
        weights[name], moments[name] = scale_channels(weights[name], moments[name], channels)
        return channels

    down = scale("down")
    gate, up = jnp.split(weights["gate_up"], 2, axis=-2)
    weights["gate_up"] = jnp.concatenate([gate, up / down[..., None]], axis=-2)
    norms = {}
    for norm_name, name in (("input_norm", "qkv"), ("mlp_norm", "gate_up")):
        norm: RMSNorm = getattr(model.layers, norm_name)
        gain = norm.weight[...].astype(jnp.float32) / scale(name)
        norms[norm_name] = RMSNorm(gain.astype(norm.weight.dtype), eps=norm.eps)
    layers = with_weights(model.layers, {name: weight.astype(model.dtype) for name, weight in weights.items()})
    for norm_name, norm in norms.items():
        setattr(layers, norm_name, norm)
    return model.replace(layers=layers), moments
