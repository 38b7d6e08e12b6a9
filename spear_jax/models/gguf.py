"""GGUF files of llama.cpp: metadata, and tensors dequantized into place.

The header is parsed here: `gguf.GGUFReader` makes an array object for each string of the vocabulary, which took 6 s for
49,152 tokens and 19 s for 262,144, against 0.1 and 0.3 s. Types and dequantization are those of the `gguf` package.
"""

import dataclasses
import math
import mmap
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from spear_jax.config import ModelConfig, RopeScaling
from spear_jax.models.assembly import Assembly, Family, listed, slots
from spear_jax.models.families import GGUF_FAMILIES
from spear_jax.models.settings import Settings

TENSOR_TYPES = tuple(
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
)

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_VERSIONS = (2, 3)
_CHUNK = 2**21
"""Elements dequantized at a time: small enough for temporaries to be a few tens of MB whatever the tensor."""
_GROUP = 256
"""Blocks handed to `dequantize` as one row: it loops over 16 rows in Python, 2.6 times faster than on rows of 18."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """Where a tensor lies: `shape` is row-major, rows first; `offset` counts bytes from the start of the file."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size

    @property
    def rows(self) -> int:
        """Number of rows."""
        return math.prod(self.shape[:-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """The header of a GGUF file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    @classmethod
    def open(cls, path: Path) -> "GGUFFile":
        """Read the header of a file and check that its tensors are inside it.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not GGUF, of a version not read here, truncated, or holds tensors of an unsupported type.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        size = path.stat().st_size
        if size < 24:
            raise ValueError(f"{path}: not a GGUF file: {size} bytes")
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != b"GGUF":
                raise ValueError(f"{path}: not a GGUF file: it starts with {data[:4]!r}")
            try:
                return cls._parse(path, _Header(data))
            except _Truncated:
                raise ValueError(f"{path}: truncated: the file ends inside its header, after {size} bytes") from None
            except (UnicodeDecodeError, _Corrupt) as error:
                raise ValueError(f"{path}: damaged header: {error}") from None

    @classmethod
    def _parse(cls, path: Path, header: "_Header") -> "GGUFFile":
        version = header.scalar("I")
        if version not in _VERSIONS:
            raise ValueError(f"{path}: GGUF version {version} is not supported (only {_listed(_VERSIONS)})")
        tensor_count, value_count = header.scalar("Q"), header.scalar("Q")
        metadata = {}
        for _ in range(value_count):
            key = header.string()
            metadata[key] = header.value(header.value_type())
        if (parts := metadata.get("split.count", 0)) > 1:
            raise ValueError(f"{path}: split into {parts} files: merge them first (llama-gguf-split --merge)")

        entries = []
        for _ in range(tensor_count):
            name = header.string()
            shape = tuple(header.scalar("Q") for _ in range(header.scalar("I")))[::-1]
            entries.append((name, shape, header.scalar("I"), header.scalar("Q")))
        alignment = metadata.get("general.alignment", 32)
        start = -(-header.position // alignment) * alignment
        tensors = {}
        for name, shape, number, offset in entries:
            kind = _tensor_type(number, name=name, path=path)
            if not shape or shape[-1] % GGML_QUANT_SIZES[kind][0]:
                raise ValueError(f"{path}: tensor {name} of shape {list(shape)} does not fit the blocks of {kind.name}")
            tensors[name] = tensor = GGUFTensor(name=name, kind=kind, shape=shape, offset=start + offset)
            end = tensor.offset + tensor.rows * tensor.row_bytes
            if end > len(header.data):
                raise ValueError(f"{path}: truncated: tensor {name} ends at byte {end} of {len(header.data)}")
        return cls(path=path, metadata=metadata, tensors=tensors)

    def read_rows(self, tensor: GGUFTensor) -> Iterator[tuple[slice, np.ndarray]]:
        """Read a tensor in runs of rows: yields which rows, and their values in float32 or the 16-bit float stored."""
        step = max(1, _CHUNK // tensor.shape[-1] // _GROUP * _GROUP)
        with self.path.open("rb") as stream:
            stream.seek(tensor.offset)
            for first in range(0, tensor.rows, step):
                rows = slice(first, min(first + step, tensor.rows))
                count = rows.stop - rows.start
                raw = np.fromfile(stream, np.uint8, count * tensor.row_bytes).reshape(count, tensor.row_bytes)
                yield rows, _decode(raw, tensor.kind)


def read_config(file: GGUFFile) -> tuple[ModelConfig, Family]:
    """Read the architecture from the metadata.

    Raises:
        ValueError: The architecture, or a setting of it, is not supported.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in GGUF_FAMILIES:
        raise ValueError(f"{file.path}: architecture {architecture!r} is not supported (only {_listed(GGUF_FAMILIES)})")
    family = GGUF_FAMILIES[architecture]
    config = family.config_from_gguf(Settings(file.metadata, source=str(file.path), prefix=f"{architecture}."))
    config = dataclasses.replace(config, tie_embeddings="output.weight" not in file.tensors)
    if (factors := file.tensors.get("rope_freqs.weight")) is not None:
        if factors.shape != (config.head_dim // 2,):
            expected = [config.head_dim // 2]
            raise ValueError(f"{file.path}: tensor {factors.name} has shape {list(factors.shape)}, expected {expected}")
        values = tuple(float(x) for _, rows in file.read_rows(factors) for x in rows.reshape(-1))
        config = dataclasses.replace(config, rope_scaling=RopeScaling(kind="factors", factors=values))
    return config, family


def read_weights(file: GGUFFile, config: ModelConfig, family: Family, *, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Dequantize the tensors into stacked weights of `dtype` (norms and biases: float32).

    Raises:
        ValueError: A tensor is missing, unexpected, or of another shape than expected.
    """
    expected = slots(config, family.names, source="gguf")
    unexpected = [name for name in file.tensors if name not in expected and name != "rope_freqs.weight"]
    if unexpected:
        raise ValueError(f"{file.path}: unexpected tensors: {listed(unexpected)}")
    dtypes = dict.fromkeys((slot.key for slot in expected.values()), np.dtype(dtype))
    assembly = Assembly(expected, dtypes=dtypes)
    try:
        for tensor in sorted((file.tensors[name] for name in expected if name in file.tensors), key=lambda t: t.offset):
            place = assembly.place(tensor.name, tensor.shape).reshape(-1, tensor.shape[-1])
            if expected[tensor.name].rows in family.gguf_interleaved:
                order = _half_split_order(tensor.rows, config.head_dim)
                for rows, values in file.read_rows(tensor):
                    place[order[rows]] = values
            else:
                for rows, values in file.read_rows(tensor):
                    place[rows] = values
        return assembly.finish()
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None


def _half_split_order(rows: int, head_dim: int) -> np.ndarray:
    """Give for each row of q or k in llama.cpp's order its place in half-split order.

    llama.cpp stores element i of the first half of a head beside element i of the second.
    """
    return np.arange(rows).reshape(-1, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def _decode(raw: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    match kind:
        case GGMLQuantizationType.F32:
            return raw.view(np.float32)
        case GGMLQuantizationType.F16:
            return raw.view(np.float16)
        case GGMLQuantizationType.BF16:
            return raw.view(ml_dtypes.bfloat16)
        case _:
            size = GGML_QUANT_SIZES[kind][1]
            groups = raw.reshape(-1, math.gcd(raw.size // size, _GROUP) * size)
            return dequantize(groups, kind).reshape(raw.shape[0], -1)


def _tensor_type(number: int, *, name: str, path: Path) -> GGMLQuantizationType:
    if number in TENSOR_TYPES:
        return GGMLQuantizationType(number)
    known = number in GGMLQuantizationType.__members__.values()
    kind = GGMLQuantizationType(number).name if known else number
    supported = _listed(kind.name for kind in TENSOR_TYPES)
    raise ValueError(f"{path}: tensor {name} has type {kind}, which is not supported (only {supported})")


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


class _Truncated(Exception):
    pass


class _Corrupt(Exception):
    pass


class _Header:
    """A cursor over the header; every read checks that the bytes are there."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 4

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self._take(self.scalar("Q")).decode("utf-8")

    def value_type(self) -> GGUFValueType:
        number = self.scalar("I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise _Corrupt(f"unknown value type {number} at byte {self.position - 4}") from None

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.scalar(_SCALARS[kind])
        item, count = self.value_type(), self.scalar("Q")
        if item == GGUFValueType.STRING:
            return self._strings(count)
        if item == GGUFValueType.ARRAY:
            return [self.value(item) for _ in range(count)]
        dtype = np.dtype("<" + _SCALARS[item])
        return np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()

    def _strings(self, count: int) -> list[str]:
        """Read strings in one loop of its own: a vocabulary has hundreds of thousands."""
        data, position, end = self.data, self.position, len(self.data)
        unpack, strings = struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            if position + 8 > end:
                raise _Truncated
            start = position + 8
            position = start + unpack(data, position)[0]
            if position > end:
                raise _Truncated
            strings.append(data[start:position].decode("utf-8"))
        self.position = position
        return strings

    def _take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise _Truncated
        return self.data[start : self.position]
