"""Models saved by Hugging Face Transformers: config.json and safetensors, dense or int4, read tensor by tensor."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from spear_jax.config import ModelConfig
from spear_jax.models.assembly import Assembly, Family, Slot, listed, slots
from spear_jax.models.decoder import MODULES
from spear_jax.models.families import HF_FAMILIES, HF_MODEL_TYPES
from spear_jax.models.int4_formats import Int4Format, assemble_int4, read_format
from spear_jax.models.settings import Settings

_FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_INTEGERS = {"I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_config(directory: Path) -> tuple[ModelConfig, Family]:
    """Read the architecture from `config.json`, and the end tokens that `generation_config.json` adds.

    Raises:
        FileNotFoundError: There is no config.json.
        ValueError: The architecture, or a setting of it, is not supported.
    """
    path = directory / "config.json"
    values = _read_json(path)
    family = _family(values, path)
    config = family.config_from_hf(Settings(values, source=str(path)))
    generation = directory / "generation_config.json"
    if generation.exists():
        eos = _read_json(generation).get("eos_token_id") or ()
        ids = (*config.eos_ids, *((eos,) if isinstance(eos, int) else eos))
        config = dataclasses.replace(config, eos_ids=tuple(dict.fromkeys(ids)))
    return config, family


def read_int4_format(directory: Path) -> Int4Format | None:
    """Read how the linears of a quantized model are stored; None for one that is not quantized.

    Raises:
        FileNotFoundError: There is no config.json.
        ValueError: They are stored in a way that is not supported.
    """
    path = directory / "config.json"
    return read_format(Settings(_read_json(path), source=str(path)))


def read_weights(directory: Path, config: ModelConfig, family: Family) -> dict[str, Any]:
    """Read the safetensors of `directory` into stacked weights of the stored dtype (norms and biases: float32).

    Linears of a quantized model become `QuantTensor` with the codes, scales and zero points of the file. The peak of
    host memory is the weights and the largest tensor: files are read with pread, because pages of a mapped file count
    as memory of the process.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A tensor is missing, unexpected, or of another shape or dtype than expected.
    """
    plan = _Plan(directory, config, family)
    files = [_File(path) for path in _weight_files(directory)]
    kept: dict[str, list[str]] = {}
    dtypes: dict[str, np.dtype] = {}
    for file in files:
        kept[file.path.name] = plan.select(file)
        for name in kept[file.path.name]:
            if (slot := plan.slot(name)) is not None:
                dtype = plan.dtype(file, name)
                dtypes[slot.key] = dtype if dtypes.get(slot.key, dtype) == dtype else np.dtype(np.float32)

    assembly = Assembly(plan.expected, dtypes=dtypes)
    for file in files:
        with file.open() as tensors:
            for name in kept[file.path.name]:
                target = plan.target(name)
                try:
                    tensor = plan.convert(name, tensors.get_tensor(name))
                    if tensor is None:
                        continue
                    place = assembly.place(target, tensor.shape)
                except (KeyError, ValueError) as error:
                    reason = f"tensor {name} comes twice" if isinstance(error, KeyError) else error
                    raise ValueError(f"{file.path}: {reason}") from None
                place[...] = tensor
                if plan.expected[target].is_norm:
                    place += family.hf_norm_offset
    try:
        return assemble_int4(assembly.finish())
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


class _Plan:
    """What the tensors of a directory are: where each goes, and how those of int4 linears are unpacked."""

    def __init__(self, directory: Path, config: ModelConfig, family: Family) -> None:
        self.config, self.family = config, family
        self.expected = slots(config, family.names, source="hf")
        self.format = read_int4_format(directory)
        self.linears: dict[str, Slot] = {}
        if self.format is not None:
            keys = {f"layers.{module}.weight" for module in MODULES}
            self.linears = {name: slot for name, slot in self.expected.items() if slot.key in keys}
            dense = {name: slot for name, slot in self.expected.items() if slot.key not in keys}
            try:
                self.expected = dense | self.format.slots(self.linears)
            except ValueError as error:
                raise ValueError(f"{directory}: {error}") from None

    def target(self, name: str) -> str:
        """Give the name that a tensor has in the family's table."""
        return name.replace(self.family.hf_prefix, "", 1)

    def slot(self, name: str) -> Slot | None:
        """Give the place of a tensor; None for one that only says how another is stored."""
        return self.expected.get(self.target(name))

    def dtype(self, file: "_File", name: str) -> np.dtype:
        """Give the dtype to keep a tensor in."""
        part = self._part(name)
        packed = part is not None and part[1] != "scale"
        found = file.dtype(name, _INTEGERS if packed else _FLOATS)
        return np.dtype(np.int8) if packed else found

    def select(self, file: "_File") -> list[str]:
        """Give the names of the tensors to read, in the order of the data.

        Raises:
            ValueError: There is a tensor that the configuration does not name.
        """
        names = [name for name in file.names if not _ignored(name, self.config, self.family)]
        if dense := [name for name in names if self.target(name) in self.linears]:
            raise ValueError(
                f"{file.path}: {listed(dense)} are not int4: models with some linears of their layers left unquantized "
                "are not supported"
            )
        unexpected = [name for name in names if self.slot(name) is None and self._part(name) is None]
        empty = self._zero_biases(file, unexpected)
        if unexpected := [name for name in unexpected if name not in empty]:
            raise ValueError(f"{file.path}: unexpected tensors: {listed(unexpected)}")
        return [name for name in names if name not in empty]

    def convert(self, name: str, tensor: np.ndarray) -> np.ndarray | None:
        """Give a tensor as it is kept; None for one that is checked and not kept.

        Raises:
            ValueError: It does not fit the format of the int4 linears.
        """
        part = self._part(name)
        if part is None or self.format is None:
            return tensor
        return self.format.convert(name, tensor, part[1], self.linears[part[0]].shape)

    def _part(self, name: str) -> Any:
        part = None if self.format is None else self.format.part(self.target(name))
        return part if part is not None and part[0] in self.linears else None

    def _zero_biases(self, file: "_File", names: list[str]) -> set[str]:
        """Find the biases of zero that GPTQ tools write for linears that have none."""
        biases = [name for name in names if name.removesuffix(".bias") + ".weight" in self.linears]
        if not biases:
            return set()
        with file.open() as tensors:
            return {name for name in biases if not tensors.get_tensor(name).any()}


class _File:
    """A safetensors file: names and dtypes, in the order of the data."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with self.open() as tensors:
                self.names: list[str] = list(tensors.offset_keys())
                self._dtypes = {name: tensors.get_slice(name).get_dtype() for name in self.names}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a complete safetensors file: {error}") from None

    def open(self) -> Any:
        return safe_open(self.path, framework="numpy", backend="pread")

    def dtype(self, name: str, allowed: dict[str, np.dtype]) -> np.dtype:
        if self._dtypes[name] not in allowed:
            supported = ", ".join(allowed)
            raise ValueError(f"{self.path}: tensor {name} has dtype {self._dtypes[name]}, expected one of {supported}")
        return allowed[self._dtypes[name]]


def _ignored(name: str, config: ModelConfig, family: Family) -> bool:
    """Say whether a tensor is no weight of the decoder: other parts, old rotary buffers, the copy of a tied head."""
    return (
        name.startswith(family.hf_ignored)
        or name.endswith("rotary_emb.inv_freq")
        or (config.tie_embeddings and name.endswith("lm_head.weight"))
    )


def _weight_files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index}: no weight_map")
        paths = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        paths = [directory / _SINGLE]
    for path in paths:
        if not path.exists():
            other = sorted(p.name for p in directory.glob("*.bin"))
            hint = f" ({listed(other)} is not read: convert it to safetensors)" if other else ""
            raise FileNotFoundError(f"{path}: no such file{hint}")
    return paths


def _family(values: dict[str, Any], path: Path) -> Family:
    architectures = values.get("architectures") or []
    for name in architectures:
        if name in HF_FAMILIES:
            return HF_FAMILIES[name]
    if not architectures and values.get("model_type") in HF_MODEL_TYPES:
        return HF_MODEL_TYPES[values["model_type"]]
    named = ", ".join(architectures) or values.get("model_type") or "none named"
    raise ValueError(f"{path}: architecture {named} is not supported; supported: {', '.join(HF_FAMILIES)}")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values
