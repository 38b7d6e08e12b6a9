"""A model divided among devices by heads, features and vocabulary; each device runs a smaller model of its own.

The parts of all devices are one tree whose arrays have a leading axis of devices. What runs on them runs under
`jax.shard_map`, where each device sees its part: kernels that one device runs know nothing of it. Column-parallel
linears (qkv, gate and up) need no sum, row-parallel ones (o, down) one each, of y and of the compensator's z.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.peer_reduce import Reduction
from spear_jax.config import ModelConfig
from spear_jax.models.decoder import Decoder, unstack
from spear_jax.nn.row_parallel import AXIS, RowCompensator, RowParallel
from spear_jax.quant import DividedRows, Int8Rows, QuantTensor

OWN, SAME = PartitionSpec(AXIS), PartitionSpec()
"""What each device has of its own, stacked along the first axis, and what all have alike."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """The mesh axis that each logical axis of a model's arrays is divided over; None for none."""

    heads: str | None = AXIS
    """Query heads, and keys' and values' with them: rows of qkv, columns of o."""
    mlp: str | None = AXIS
    """Features of the MLP: rows of gate and of up, columns of down."""
    vocab: str | None = AXIS
    """Rows of the embedding and of the head."""
    model: str | None = None
    rank: str | None = None
    layers: str | None = None

    def __post_init__(self) -> None:
        whole = [name for name in ("model", "rank", "layers") if getattr(self, name) is not None]
        if whole:
            raise ValueError(f"no array is divided over {', '.join(whole)}: expected None")
        for name in ("heads", "mlp", "vocab"):
            if getattr(self, name) not in (None, AXIS):
                raise ValueError(f"{name} is divided over {AXIS!r} or None, got {getattr(self, name)!r}")

    def placement(self, mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
        """Say where `load_checkpoint` puts arrays so that no device holds all: spread evenly where they can be."""

        def of(name: str, shape: tuple[int, ...]) -> NamedSharding:
            spread = []
            for size, logical in zip(shape, logical_axes(name), strict=False):
                axis = getattr(self, logical)
                spread.append(None if axis is None or size % mesh.shape[axis] else axis)
            return NamedSharding(mesh, PartitionSpec(*spread))

        return of


_INSIDE = {"qkv": "heads", "o": "heads", "gate_up": "mlp", "down": "mlp"}
_ROW_PARALLEL = ("o", "down")


def logical_axes(name: str) -> tuple[str, ...]:
    """Give the logical axes of an array by its name in a checkpoint; nothing for what all devices have whole."""
    match name.split("."):
        case ["embed" | "head"] | ["embed" | "head", "codes"]:
            return ("vocab", "model")
        case ["embed" | "head", "scale"]:
            return ("vocab",)
        case ["layers", module, "weight", *_] if module in _INSIDE:
            out = "model" if module in _ROW_PARALLEL else _INSIDE[module]
            return ("layers", out, _INSIDE[module] if module in _ROW_PARALLEL else "model")
        case ["layers", module, "bias"] if module not in _ROW_PARALLEL:
            return ("layers", _INSIDE[module])
        case ["compensators", module, "a"] if module in _ROW_PARALLEL:
            return ("rank", _INSIDE[module])
        case ["compensators", module, "bt"] if module not in _ROW_PARALLEL:
            return ("rank", _INSIDE[module])
    return ()


def make_mesh(parts: int) -> Mesh:
    """Give the first devices as a mesh.

    Raises:
        ValueError: There are not so many.
    """
    if not 1 <= parts <= len(jax.devices()):
        raise ValueError(f"tensor_parallel must be from 1 to the {len(jax.devices())} devices there are, got {parts}")
    return jax.make_mesh((parts,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def part_of(config: ModelConfig, parts: int, rules: ShardingRules | None = None) -> ModelConfig:
    """Give the architecture of one device's part.

    Heads of keys and values that are fewer than devices are each on several of them.

    Raises:
        ValueError: Heads, features or the vocabulary cannot be divided so.
    """
    rules = rules or ShardingRules()
    divided = {"num_heads": rules.heads, "intermediate_size": rules.mlp, "vocab_size": rules.vocab}
    for name, axis in divided.items():
        if axis is not None and getattr(config, name) % parts:
            raise ValueError(f"tp {parts} does not divide {name} {getattr(config, name)}")
    changes = {}
    if rules.heads is not None:
        kv = config.num_kv_heads
        if kv % parts and parts % kv:
            raise ValueError(f"tp {parts} does not divide num_kv_heads {kv}, nor the other way round")
        changes |= {"num_heads": config.num_heads // parts, "num_kv_heads": max(1, kv // parts)}
    if rules.mlp is not None:
        changes["intermediate_size"] = config.intermediate_size // parts
    return dataclasses.replace(config, **changes)


def part(model: Decoder, index: int, parts: int, rules: ShardingRules | None = None) -> Decoder:
    """Give the arrays of one device of `parts`, of a model of stacked layers as it is stored.

    Raises:
        ValueError: Something cannot be divided so; says what and its size.
    """
    rules = rules or ShardingRules()
    config = model.config
    for name, linear in ((name, getattr(model.layers, name)) for name in _ROW_PARALLEL):
        if linear.bias is not None:
            raise ValueError(f"{name} has a bias: only linears without one are divided by their inputs")
    for name, bank in model.compensators.items():
        gate = bank.gate
        if name in _ROW_PARALLEL and gate is not None and (gate.probe is not None or gate.w_rms is not None):
            raise ValueError(f"{name}: gates that see more of x than z are not divided among devices")
    units = {"heads": [config.num_heads], "mlp": [config.intermediate_size], "vocab": [config.vocab_size]}
    fused = {"qkv": [config.num_heads, config.num_kv_heads, config.num_kv_heads], "gate_up": units["mlp"] * 2}

    def cut(path: Any, leaf: Array) -> Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        for axis, logical in enumerate(logical_axes(name)):
            if getattr(rules, logical) is None or leaf.shape[axis] == 1:  # one scale for all columns
                continue
            module = name.split(".")[1] if "." in name else name
            leaf = _share(leaf, axis, fused.get(module, units[logical]), index, parts, name=name)
        return leaf

    smaller = part_of(config, parts, rules)
    divided = jax.tree_util.tree_map_with_path(cut, model)
    divided.config = divided.layers.config = smaller
    if rules.vocab is not None:
        for name in ("embed", "head"):
            if (table := getattr(divided, name)) is not None:
                rows = table if isinstance(table, Int8Rows) else table[...]
                setattr(divided, name, DividedRows(rows=rows, axis=AXIS))
    return divided


def _share(array: Array, axis: int, units: Sequence[int], index: int, parts: int, *, name: str) -> Array:
    """Give a device's share of each of several pieces of so many units, which lie one after another along an axis."""
    size, start, shares = array.shape[axis], 0, []
    for count in units:
        length = size * count // sum(units)
        share = length // count if count < parts else length // parts
        if share * min(count, parts) != length:
            raise ValueError(f"{name}: {length} of {list(array.shape)} cannot be divided over {parts} devices")
        first = start + share * (index * min(count, parts) // parts)
        shares.append(jax.lax.slice_in_dim(array, first, first + share, axis=axis))
        start += length
    return shares[0] if len(shares) == 1 else jnp.concatenate(shares, axis=axis)


def sum_rows(
    model: Decoder, *, parts: int, reduction: Reduction = "psum", rules: ShardingRules | None = None
) -> Decoder:
    """Give one device's part, laid out, with sums over devices after `o` and `down`.

    With "dual-write" sums go through inboxes where `_suits_inboxes` says so, else by psum.
    """
    rules = rules or ShardingRules()
    divided = model.replace()
    layers = divided.layers if isinstance(divided.layers, nnx.List) else [divided.layers]
    for name in _ROW_PARALLEL:
        if getattr(rules, _INSIDE[name]) is None:
            continue
        chosen: Reduction = "dual-write" if reduction == "dual-write" and _suits_inboxes(divided, name) else "psum"
        bank = divided.compensators.get(name)
        if chosen == "dual-write" and bank is not None and dispatch.is_hopper():
            try:
                bank.layers = nnx.List([RowCompensator.of(compensator) for compensator in bank.layers])
            except NotImplementedError:
                chosen = "psum"
        for layer in layers:
            setattr(layer, name, RowParallel(getattr(layer, name), parts=parts, reduction=chosen))
    return divided


def _suits_inboxes(model: Decoder, name: str) -> bool:
    """Say whether sums after a linear can go through inboxes: of int4 in separate layers, with no norm before the sum.

    On a GPU or a TPU codes must be in the kernel's order and activations bfloat16. On a CPU it is the same as psum, for
    tests.
    """
    if not isinstance(model.layers, nnx.List) or model.config.sandwich_norms:
        return False
    weight = getattr(model.layers[0], name).weight
    if not isinstance(weight, QuantTensor):
        return False
    if dispatch.is_hopper():
        return weight.layout == "fragments" and model.dtype == jnp.bfloat16
    if dispatch.platform() == "tpu":
        return weight.layout == "columns" and model.dtype == jnp.bfloat16
    return dispatch.platform() == "cpu"


def sums_by_inbox(model: Decoder) -> bool:
    """Say whether a part needs an inbox."""
    if not isinstance(model.layers, nnx.List):
        return False
    linears = (getattr(model.layers[0], name) for name in _ROW_PARALLEL)
    return any(isinstance(linear, RowParallel) and linear.reduction == "dual-write" for linear in linears)


def divide(
    model: Decoder,
    mesh: Mesh,
    *,
    lay_out: Callable[[Decoder], Decoder] = unstack,
    reduction: Reduction = "psum",
    rules: ShardingRules | None = None,
) -> Decoder:
    """Give the parts of all devices of a mesh side by side, each laid out on its device.

    Raises:
        ValueError: Something cannot be divided so; says what and its size.
    """
    count = mesh.size
    spread = any(not leaf.is_fully_addressable for leaf in jax.tree.leaves(model))
    cut = _cut_by_all(model, mesh, rules) if spread else lambda index, device: part(model, index, count, rules)
    parts = []
    for index, device in enumerate(mesh.devices.flat):
        if device.process_index != jax.process_index():
            continue
        own = jax.device_put(cut(index, device), device)
        with jax.default_device(device):
            parts.append(sum_rows(lay_out(own), parts=count, reduction=reduction, rules=rules))
    return side_by_side(parts, mesh)


def _cut_by_all(model: Decoder, mesh: Mesh, rules: ShardingRules | None) -> Callable[[int, Any], Decoder]:
    """Cut a model that lies on several hosts, all together; give what has the part of a device of this one."""

    def stacked(model: Decoder) -> Decoder:
        parts = [part(model, index, mesh.size, rules) for index in range(mesh.size)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

    cut = jax.jit(stacked, out_shardings=NamedSharding(mesh, OWN))(model)

    def of(index: int, device: Any) -> Decoder:
        del index
        return jax.tree.map(lambda leaf: _shard_on(leaf, device)[0], cut)

    return of


def _shard_on(array: Array, device: Any) -> Array:
    return next(shard.data for shard in array.addressable_shards if shard.device == device)


def same_everywhere(array: Any, mesh: Mesh) -> Array:
    """Put an array that every process has alike on all devices; unlike `device_put`, none asks the others for it."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, SAME), lambda index: array[index])


def side_by_side[T](parts: Sequence[T], mesh: Mesh) -> T:
    """Give trees, each on its device of this process, as one tree with a leading axis of devices."""
    sharding = NamedSharding(mesh, OWN)
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]

    def join(*leaves: Array) -> Array:
        own = [jax.device_put(leaf[None], device) for leaf, device in zip(leaves, devices, strict=True)]
        return jax.make_array_from_single_device_arrays((mesh.size, *leaves[0].shape), sharding, own)

    return jax.tree.map(join, *parts)


def of_parts(function: Callable[..., Any], mesh: Mesh, *, own: int = 1, gives: Any = SAME) -> Callable[..., Any]:
    """Give a function of parts side by side that runs `function` on each device; the first `own` arguments are such.

    `gives` says of each result whether it is each device's own or the same on all.
    """

    def one(*arguments: Any) -> Any:
        mine = jax.tree.map(lambda leaf: leaf[0], arguments[:own])
        results = function(*mine, *arguments[own:])
        if not isinstance(gives, tuple):
            return _stacked(results, gives)
        return tuple(_stacked(result, spec) for result, spec in zip(results, gives, strict=True))

    def run(*arguments: Any) -> Any:
        specs = (OWN,) * own + (SAME,) * (len(arguments) - own)
        return jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=gives, check_vma=False)(*arguments)

    return functools.wraps(function)(run)


def _stacked(tree: Any, spec: PartitionSpec) -> Any:
    return tree if spec == SAME else jax.tree.map(lambda leaf: leaf[None], tree)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DividedModel:
    """A divided model that is called as a whole one is: tokens in, hidden states and logits out, without a cache."""

    parts: Decoder
    mesh: Mesh = dataclasses.field(metadata={"static": True})

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], None]:
        """Compute hidden states after the final norm."""

        def hidden(part: Decoder, *where: Array) -> Array:
            return part(*where)[0]

        arguments = (tokens,) if positions is None else (tokens, positions)
        return of_parts(hidden, self.mesh)(self.parts, *arguments), None

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Compute next-token logits in float32."""
        return of_parts(Decoder.logits, self.mesh)(self.parts, hidden)
