"""Int4 linears as AutoAWQ, GPTQ and compressed-tensors store them, brought to `QuantTensor` without rounding again.

Codes and zero points are four-bit numbers in 0..15, eight to an int32; w = (q - z) * s. Here both are kept less eight.
For a linear of N outputs and K inputs in G groups, low nibbles first unless said otherwise:

- awq (AutoAWQ's GEMM layout): qweight [K, N/8] and qzeros [G, N/8], nibble i of a word being output 0 2 4 6 1 3 5 7 of
  its eight; scales [G, N].
- gptq (AutoGPTQ, GPTQModel): qweight [K/8, N], packed along K; qzeros [G, N/8], each less one in the format "gptq" and
  as it is in "gptq_v2"; scales [G, N]; g_idx [K], the group of each input.
- compressed-tensors ("pack-quantized"): weight_packed [N, K/8]; weight_zero_point [N/8, G], packed along N;
  weight_scale [N, G]; weight_shape.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, Int8, Shaped, UInt8

from spear_jax.models.assembly import Slot, listed
from spear_jax.models.settings import Settings
from spear_jax.quant import QuantTensor

type Method = Literal["awq", "gptq", "compressed-tensors"]
type Part = Literal["packed", "scale", "zero", "shape", "group_index"]

_PARTS: dict[Method, dict[str, Part]] = {
    "awq": {"qweight": "packed", "scales": "scale", "qzeros": "zero"},
    "gptq": {"qweight": "packed", "scales": "scale", "qzeros": "zero", "g_idx": "group_index"},
    "compressed-tensors": {
        "weight_packed": "packed",
        "weight_scale": "scale",
        "weight_zero_point": "zero",
        "weight_shape": "shape",
        "weight_g_idx": "group_index",
    },
}
_AWQ_PLACES = np.asarray([0, 4, 1, 5, 2, 6, 3, 7], np.intp)
"""Nibble of a word of AutoAWQ that holds each of its eight outputs."""

_LEAST_GROUP = 32
"""Columns that products with int4 weights take at a time share a scale (`serve/cpu.py`, kernels)."""

_FLIP = np.uint8(0x88)
"""Turns both nibbles of a byte from 0..15 to two's complement of what they are less eight."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4Format:
    """What `quantization_config` in config.json says of the linears of all layers.

    `group_size` -1 is one scale per output channel. `zero_shift` is added to zero points as stored.
    """

    method: Method
    group_size: int
    symmetric: bool
    zero_shift: int = 0

    def part(self, name: str) -> tuple[str, Part] | None:
        """Split a tensor's name into the weight that it is a part of and which part; None for other tensors."""
        module, _, suffix = name.rpartition(".")
        part = _PARTS[self.method].get(suffix)
        return None if part is None else (f"{module}.weight", part)

    def slots(self, linears: Mapping[str, Slot]) -> dict[str, Slot]:
        """Give the places of the tensors that these weights are stored in.

        Raises:
            ValueError: The group size does not divide a weight's inputs, or they are odd.
        """
        found = {}
        for name, slot in linears.items():
            module = name.removesuffix(".weight")
            for suffix, part in _PARTS[self.method].items():
                if part in ("shape", "group_index"):
                    continue
                if part == "zero" and self.method == "compressed-tensors" and self.symmetric:
                    continue
                k = slot.shape[-1]
                size = k // 2 if part == "packed" else self.groups(k, name=name)
                found[f"{module}.{suffix}"] = dataclasses.replace(
                    slot, key=f"{slot.key}.{part}", shape=(slot.shape[0], size), stack=(*slot.stack[:-1], size)
                )
        return found

    def groups(self, k: int, *, name: str) -> int:
        """Give how many groups K inputs fall into.

        Raises:
            ValueError: The group size does not divide them, or they are odd.
        """
        size = k if self.group_size == -1 else self.group_size
        if k % 2 or k % size:
            raise ValueError(f"{name} has {k} inputs: expected an even number that groups of {size} divide")
        return k // size

    def convert(
        self, name: str, tensor: Shaped[np.ndarray, "..."], part: Part, shape: tuple[int, ...]
    ) -> Shaped[np.ndarray, "N _"] | None:
        """Give codes packed as in `QuantTensor`, scales or zero points of a weight of `shape`; None for what only says
        how they are stored.

        Raises:
            ValueError: The tensor has another shape than the format says, or says something that is not supported.
        """
        n, k = shape
        groups = self.groups(k, name=name)
        match part:
            case "packed":
                return self._codes(name, tensor, n, k)
            case "scale":
                outputs_last = self.method != "compressed-tensors"
                _check_shape(name, tensor, (groups, n) if outputs_last else (n, groups))
                return tensor.T if outputs_last else tensor
            case "zero":
                return self._zeros(name, tensor, n, groups)
            case "shape":
                if tuple(tensor.tolist()) != shape:
                    raise ValueError(f"{name} says {tensor.tolist()}, the configuration says {list(shape)}")
            case "group_index":
                _check_shape(name, tensor, (k,))
                if not (tensor == np.arange(k) // (k // groups)).all() and not (tensor == -1).all():
                    raise ValueError(
                        f"{name}: columns of a group are not neighbours (desc_act, act-order), which is not supported: "
                        "quantize with desc_act false, or with static groups"
                    )
        return None

    def _codes(self, name: str, words: Int[np.ndarray, "A B"], n: int, k: int) -> Int8[np.ndarray, "N K/2"]:
        match self.method:
            case "awq":
                _check_shape(name, words, (k, math.ceil(n / 8)))
                codes = _awq_nibbles(words)[:, :n].T
                octets = codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)
            case "gptq":
                _check_shape(name, words, (math.ceil(k / 8), n))
                octets = _octets(words.T)
            case "compressed-tensors":
                _check_shape(name, words, (n, math.ceil(k / 8)))
                octets = _octets(words)
        return (octets[:, : k // 2] ^ _FLIP).view(np.int8)

    def _zeros(self, name: str, words: Int[np.ndarray, "A B"], n: int, groups: int) -> Int8[np.ndarray, "N G"]:
        packed_first = self.method == "compressed-tensors"
        _check_shape(name, words, (math.ceil(n / 8), groups) if packed_first else (groups, math.ceil(n / 8)))
        stored = _awq_nibbles(words) if self.method == "awq" else _nibbles(words.T if packed_first else words)
        stored = stored[:, :n]
        if self.zero_shift and (stored == 15).any():
            raise ValueError(
                f"{name}: a zero point is stored as 15 in checkpoint_format gptq, which tools read as 0 or as 16: "
                "write the model in checkpoint_format gptq_v2"
            )
        return stored.T.astype(np.int8) + np.int8(self.zero_shift - 8)


def read_format(settings: Settings) -> Int4Format | None:
    """Read `quantization_config` of a config.json; None where there is none.

    Raises:
        ValueError: It describes something other than int4 linears in one of the three formats.
    """
    values = settings.get("quantization_config")
    if values is None:
        return None
    own = Settings(values if isinstance(values, dict) else {}, source=f"{settings.source}: quantization_config")
    match own.get("quant_method"):
        case "awq":
            found = _awq(own)
        case "gptq":
            found = _gptq(own)
        case "compressed-tensors":
            found = _compressed_tensors(own)
        case other:
            raise ValueError(f"{own.source}: quant_method = {other!r} is not supported (only {', '.join(_PARTS)})")
    if found.group_size != -1 and (found.group_size < _LEAST_GROUP or found.group_size % _LEAST_GROUP):
        raise ValueError(f"{own.source}: group_size must be -1 or a multiple of {_LEAST_GROUP}, got {found.group_size}")
    return found


def assemble_int4(weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """Put the parts of weights together; zero points that are all eight, the middle, are left out."""
    keys = [name.removesuffix(".packed") for name in weights if name.endswith(".packed")]
    zeros = {key: weights.pop(f"{key}.zero", None) for key in keys}
    symmetric = not any(zero is not None and zero.any() for zero in zeros.values())
    whole: dict[str, Any] = dict(weights)
    for key in keys:
        packed, scale = whole.pop(f"{key}.packed"), whole.pop(f"{key}.scale")
        whole[key] = QuantTensor(packed=packed, scale=scale, zero=None if symmetric else zeros[key])
    return whole


def _awq(own: Settings) -> Int4Format:
    for key in ("bits", "w_bit"):
        own.refuse(key, 4)
    for key in ("version", "format", "checkpoint_format"):
        own.refuse(key, "gemm", "GEMM")
    return Int4Format(
        method="awq",
        group_size=own.integer("group_size", own.get("q_group_size")),
        symmetric=not own.flag("zero_point", default=True),
    )


def _gptq(own: Settings) -> Int4Format:
    _require(own, "bits", 4)
    for key in ("checkpoint_format", "format"):
        own.refuse(key, "gptq", "gptq_v2")
    own.refuse("is_marlin_format", False)
    stored = own.get("checkpoint_format", own.get("format", "gptq"))
    return Int4Format(
        method="gptq",
        group_size=own.integer("group_size"),
        symmetric=own.flag("sym", default=True),
        zero_shift=1 if stored == "gptq" else 0,
    )


def _compressed_tensors(own: Settings) -> Int4Format:
    groups = own.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError(f"{own.source}: config_groups is missing or empty")
    own.refuse("kv_cache_scheme")
    own.refuse("transform_config", {})
    found = {_compressed_group(own, name, group) for name, group in groups.items()}
    if len(found) > 1:
        raise ValueError(f"{own.source}: config_groups {listed(groups)} differ: all linears must be stored alike")
    return found.pop()


def _compressed_group(own: Settings, name: str, values: dict[str, Any]) -> Int4Format:
    group = Settings(values, source=f"{own.source}: {name}")
    for key in ("input_activations", "output_activations"):
        group.refuse(key)
    whole = Settings({"format": group.get("format", own.get("format"))}, source=group.source)
    _require(whole, "format", "pack-quantized")
    weights = Settings(group.get("weights", {}), source=f"{group.source}.weights")
    _require(weights, "num_bits", 4)
    weights.refuse("type", "int")
    _require(weights, "strategy", "group", "channel")
    per_channel = weights.get("strategy") == "channel"
    return Int4Format(
        method="compressed-tensors",
        group_size=-1 if per_channel else weights.integer("group_size"),
        symmetric=weights.flag("symmetric", default=True),
    )


def _require(settings: Settings, key: str, *allowed: Any) -> None:
    """Refuse a setting that is absent or not one of `allowed`."""
    settings.refuse(key, *allowed)
    if settings.get(key) is None:
        raise ValueError(f"{settings.source}: {key} is missing, expected {' or '.join(map(repr, allowed))}")


def _check_shape(name: str, tensor: Shaped[np.ndarray, "..."], shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"tensor {name} has shape {list(tensor.shape)}, expected {list(shape)} for 4 bits")


def _octets(words: Int[np.ndarray, "R W"]) -> UInt8[np.ndarray, "R 4*W"]:
    """Give the bytes of little-endian words, low ones first."""
    return np.ascontiguousarray(words, "<i4").view(np.uint8)


def _nibbles(words: Int[np.ndarray, "R W"]) -> UInt8[np.ndarray, "R 8*W"]:
    """Give the eight four-bit numbers of each word, low ones first."""
    octets = _octets(words)
    return np.stack([octets & np.uint8(15), octets >> np.uint8(4)], axis=-1).reshape(len(words), -1)


def _awq_nibbles(words: Int[np.ndarray, "R W"]) -> UInt8[np.ndarray, "R 8*W"]:
    return _nibbles(words).reshape(len(words), -1, 8)[..., _AWQ_PLACES].reshape(len(words), -1)
