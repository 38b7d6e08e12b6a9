"""A model divided among devices by heads and by the MLP's features; each device holds a smaller model of its own."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from pallas_kernels.int4_matmul import Compensator, compensator_coordinates, gated_coordinates, int4_matmul
from spear_jax.config import ModelConfig
from spear_jax.models.decoder import MODULES, Decoder, Layer, unstack
from spear_jax.nn.linear import Linear
from spear_jax.quant import CompensatorBank, QuantTensor

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


def part(model: Decoder, index: int, *, parts: int) -> Decoder:
    """Take one device's part of an int4 model of stacked layers: of heads, of the MLP's features, of the head's rows.

    Raises:
        ValueError: The model cannot be divided so.
    """
    config, h = model.config, model.config.head_dim
    own = model.replace()
    assert isinstance(own.layers, Layer)
    own.config = own.layers.config = part_of(config, parts)
    outputs = {
        "qkv": [config.num_heads * h, config.num_kv_heads * h, config.num_kv_heads * h],
        "gate_up": [config.intermediate_size] * 2,
    }

    def share(array: Array, axis: int) -> Array:
        if array.shape[axis] % parts:
            raise ValueError(f"tp {parts} does not divide {array.shape[axis]} of {list(array.shape)}")
        return jnp.split(array, parts, axis=axis)[index]

    def rows(array: Array, sizes: list[int], axis: int) -> Array:
        pieces = jnp.split(array, np.cumsum(sizes)[:-1], axis=axis)
        return jnp.concatenate([share(piece, axis) for piece in pieces], axis=axis)

    for name in MODULES:
        linear = getattr(model.layers, name)
        weight, bias = linear.weight, None if linear.bias is None else linear.bias[...]
        if not isinstance(weight, QuantTensor):
            raise ValueError(f"only int4 models are divided: {name} is {weight.dtype}")
        if name in outputs:
            weight, bias = jax.tree.map(lambda array, sizes=outputs[name]: rows(array, sizes, 1), (weight, bias))
        else:  # codes, and what there is for each group of them, go by inputs
            weight = jax.tree.map(lambda array: share(array, 2) if array.shape[2] > 1 else array, weight)
        setattr(own.layers, name, Linear(weight, bias))
    banks = {}
    for name, bank in model.compensators.items():
        plain = jax.tree.map(lambda v: v[...], bank, is_leaf=lambda v: isinstance(v, nnx.Variable))
        if name in outputs:
            plain.bt = rows(plain.bt, outputs[name], 1)
        else:
            plain.a = share(plain.a, 1)
        factors = {field: getattr(plain, field) for field in ("a", "bt", "a_scale", "bt_scale", "gate")}
        banks[name] = CompensatorBank(bank.ranks, **factors, bits=bank.bits)
    head = None if model.head is None else jax.tree.map(lambda array: share(array, 0), model.head)
    return own.replace(compensators=nnx.Dict(banks), head=head)


def divide(model: Decoder, devices: Sequence[Any], lay_out: Callable[[Decoder], Decoder]) -> Decoder:
    """Divide an int4 model of stacked layers among devices; arrays get a leading axis, which lies on them.

    Raises:
        ValueError: The model cannot be divided so.
    """
    count, shards = len(devices), []
    for index, device in enumerate(devices):
        laid_out = lay_out(part(model, index, parts=count))
        separate = laid_out if isinstance(laid_out.layers, nnx.List) else unstack(laid_out)
        shards.append(jax.device_put(jax.tree.map(lambda leaf: leaf[None], divide_rows(separate, parts=count)), device))
    place = _along(devices)

    def together(*leaves: Array) -> Array:
        shape = (count, *leaves[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, place, list(leaves))

    return jax.tree.map(together, *shards)


def on_all(make: Callable[[], Any], devices: Sequence[Any]) -> Any:
    """Make the same arrays on each device, along a leading axis."""
    return jax.jit(
        lambda: jax.tree.map(lambda leaf: jnp.stack([leaf] * len(devices)), make()), out_shardings=_along(devices)
    )()


def _along(devices: Sequence[Any]) -> NamedSharding:
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))


def on_each(step: Callable[..., Any], devices: Sequence[Any]) -> Callable[..., Any]:
    """Run `step(leaves, state, ...)` on each device with its own leaves and state, which lie along a leading axis.

    All get the same further arguments and compute the same first result.
    """
    own, same = PartitionSpec(AXIS), PartitionSpec()

    def one(leaves: Any, state: Any, *rest: Any) -> Any:
        leaves, state = jax.tree.map(lambda leaf: leaf[0], (leaves, state))
        first, state = step(leaves, state, *rest)
        return first, jax.tree.map(lambda leaf: leaf[None], state)

    def run(leaves: Any, state: Any, *rest: Any) -> Any:
        specs = {"in_specs": (own, own, *(same for _ in rest)), "out_specs": (same, own)}
        mesh = Mesh(np.array(devices), (AXIS,))
        return jax.shard_map(one, mesh=mesh, check_vma=False, **specs)(leaves, state, *rest)

    return run


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
