"""Foreign tensors put into the stacked weights of `Decoder`: what a family calls them, and where each one goes."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from spear_jax.config import ModelConfig
from spear_jax.models.decoder import weight_shapes
from spear_jax.models.settings import Settings

type Rows = Literal["q", "k", "v", "gate", "up"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Name:
    """One row of a family's table: a weight of `Decoder` and what Hugging Face and GGUF call it.

    `*` stands for the number of the layer. `rows` says which block of a fused projection the foreign tensor is.
    """

    key: str
    hf: str
    gguf: str
    rows: Rows | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What a family of models needs to be read from either format.

    `hf_norm_offset` is what Hugging Face adds to a norm weight when it applies it. `gguf_interleaved` lists the rows
    that llama.cpp stores with the two halves of each head interleaved. Tensors whose Hugging Face name starts with one
    of `hf_ignored` belong to parts that are not the decoder; `hf_prefix` is dropped from the other names.
    """

    names: tuple[Name, ...]
    config_from_hf: Callable[[Settings], ModelConfig]
    config_from_gguf: Callable[[Settings], ModelConfig]
    hf_norm_offset: float = 0.0
    hf_prefix: str = ""
    hf_ignored: tuple[str, ...] = ()
    gguf_interleaved: frozenset[Rows] = frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """Where one foreign tensor goes: a weight of shape `stack`, the layer in it, and the rows in the layer."""

    key: str
    stack: tuple[int, ...]
    shape: tuple[int, ...]
    layer: int | None
    start: int | None
    rows: Rows | None

    @property
    def is_norm(self) -> bool:
        """Say whether this is the multiplier of an RMS norm."""
        return self.key.endswith("norm.weight")


def slots(config: ModelConfig, names: tuple[Name, ...], *, source: Literal["hf", "gguf"]) -> dict[str, Slot]:
    """Give for each foreign name that a checkpoint of this configuration must have the place of its tensor."""
    found = {}
    for key, shape in weight_shapes(config).items():
        for name in (name for name in names if name.key == key):
            start, count = _block(config, name.rows)
            stacked = key.startswith("layers.")
            for layer in range(config.num_layers) if stacked else (None,):
                body = shape[1:] if stacked else shape
                foreign = getattr(name, source).replace("*", str(layer))
                found[foreign] = Slot(
                    key=key,
                    stack=shape,
                    shape=body if count is None else (count, *body[1:]),
                    layer=layer,
                    start=start,
                    rows=name.rows,
                )
    return found


class Assembly:
    """The weights of a `Decoder` while the tensors of a checkpoint are written into them, one after the other.

    Matrices are kept in `dtypes[key]`; norms and biases in float32, because Gemma's `1 + w` does not fit bfloat16.
    """

    def __init__(self, expected: Mapping[str, Slot], *, dtypes: Mapping[str, np.dtype]) -> None:
        self._dtypes = dtypes
        self._missing = dict(expected)
        self._weights: dict[str, np.ndarray] = {}

    def place(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Give the view that the tensor `name` must be written to.

        Raises:
            ValueError: The shape of the tensor is not that of its place.
        """
        slot = self._missing.pop(name)
        if shape != slot.shape:
            raise ValueError(f"tensor {name} has shape {list(shape)}, the configuration says {list(slot.shape)}")
        if slot.key not in self._weights:
            dtype = np.dtype(np.float32) if len(slot.shape) == 1 else self._dtypes[slot.key]
            self._weights[slot.key] = _empty(slot.stack, dtype)
        view = self._weights[slot.key]
        if slot.layer is not None:
            view = view[slot.layer]
        return view if slot.start is None else view[slot.start : slot.start + slot.shape[0]]

    def finish(self) -> dict[str, np.ndarray]:
        """Give the complete weights.

        Raises:
            ValueError: Tensors are missing; names them.
        """
        if self._missing:
            raise ValueError(f"missing tensors: {listed(self._missing)}")
        return self._weights


def listed(names: Mapping[str, object] | list[str], *, limit: int = 5) -> str:
    """Write names as a list that stays on one line."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate at a multiple of 64 bytes, where JAX on a CPU takes an array over without a copy.

    No page is touched, so that memory grows as tensors arrive.
    """
    size, alignment = math.prod(shape) * dtype.itemsize, 64
    buffer = np.empty(size + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    return buffer[start : start + size].view(dtype).reshape(shape)


def _block(config: ModelConfig, rows: Rows | None) -> tuple[int | None, int | None]:
    """Give first row and count of rows of a block of a fused projection."""
    q, kv, ff = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.intermediate_size
    match rows:
        case "q":
            return 0, q
        case "k":
            return q, kv
        case "v":
            return q + kv, kv
        case "gate":
            return 0, ff
        case "up":
            return ff, ff
        case None:
            return None, None
