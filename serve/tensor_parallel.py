"""A model divided among devices by heads and by the MLP's features; each device holds a smaller model of its own."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.int4_matmul import Compensator, compensator_coordinates, gated_coordinates, int4_matmul
from spear_jax.config import ModelConfig
from spear_jax.models.decoder import Decoder
from spear_jax.nn.linear import Linear
from spear_jax.quant import QuantTensor

AXIS = "tp"
"""Name of the axis of devices that a model is divided over."""


def part_of(config: ModelConfig, parts: int) -> ModelConfig:
    """Give the architecture of one device's part.

    Raises:
        ValueError: Heads or features cannot be divided so.
    """
    counts = ("num_heads", "num_kv_heads", "intermediate_size")
    for name in counts:
        if getattr(config, name) % parts:
            raise ValueError(f"tp {parts} does not divide {name} {getattr(config, name)}")
    return dataclasses.replace(config, **{name: getattr(config, name) // parts for name in counts})


class RowParallel(nnx.Module):
    """A linear whose inputs are divided over `AXIS`: partial sums of the product and of `z = A x` are added up.

    The gate is not linear in z, so it is applied to the sum; each device then adds its share of `B z`.
    """

    def __init__(self, linear: Linear, *, parts: int) -> None:
        self.linear = linear
        self.parts = parts

    activation = None  # as `Linear` has it: nothing is applied to a part of a sum

    def __call__(
        self,
        x: Float[Array, "*B K"],
        *,
        compensator: Compensator | None = None,
        z: Float[Array, "*B R"] | None = None,
    ) -> Float[Array, "*B N"]:
        """Apply the layer to this device's inputs; all devices get the whole result.

        Coordinates of this device's inputs alone, gated as they are, would be no part of the whole's: `z` is not taken.
        """
        del z
        weight = self.linear.weight
        if not isinstance(weight, QuantTensor) or self.linear.bias is not None:
            raise NotImplementedError("only int4 linears without a bias are divided by their inputs")
        total = None
        if compensator is not None:
            gate = compensator.gate
            if gate is not None and not gate.published:
                raise NotImplementedError("gates that see more of x than z are not divided")
            partial = compensator_coordinates(x, dataclasses.replace(compensator, gate=None))
            total = jax.lax.psum(partial, AXIS)
            total = (total if gate is None else gated_coordinates(x, total, None, gate)) / self.parts
        y = int4_matmul(
            x, weight.packed, weight.scale, zero=weight.zero, compensator=compensator, z=total,
            out_dtype=jnp.float32, layout=weight.layout,
        )  # fmt: skip
        return jax.lax.psum(y, AXIS).astype(x.dtype)


def divide_rows(model: Decoder, *, parts: int) -> Decoder:
    """Give one device's part, of separate layers, with sums over devices after `o` and `down`."""
    divided = jax.tree.map(lambda leaf: leaf, model)
    assert isinstance(divided.layers, nnx.List)
    for layer in divided.layers:
        layer.o, layer.down = RowParallel(layer.o, parts=parts), RowParallel(layer.down, parts=parts)
    return divided


def gathered_logits(model: Decoder, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Compute logits of this device's part of the vocabulary, and gather those of all."""
    return jax.lax.all_gather(model.logits(hidden), AXIS, axis=hidden.ndim - 1, tiled=True)
