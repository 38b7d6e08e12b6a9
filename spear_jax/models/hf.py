"""Models saved by Hugging Face Transformers: config.json and safetensors, read tensor by tensor."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from spear_jax.config import ModelConfig
from spear_jax.models.assembly import Assembly, Family, Slot, listed, slots
from spear_jax.models.families import HF_FAMILIES, HF_MODEL_TYPES
from spear_jax.models.settings import Settings

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_config(directory: Path) -> tuple[ModelConfig, Family]:
    """Read the architecture from `config.json`, and the end tokens that `generation_config.json` adds.

    Raises:
        FileNotFoundError: There is no config.json.
        ValueError: The architecture, or a setting of it, is not supported.
    """
    path = directory / "config.json"
    values = _read_json(path)
    if (quantization := values.get("quantization_config")) is not None:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise ValueError(f"{path}: checkpoints quantized with {method} are not supported; give the unquantized model")
    family = _family(values, path)
    config = family.config_from_hf(Settings(values, source=str(path)))
    generation = directory / "generation_config.json"
    if generation.exists():
        eos = _read_json(generation).get("eos_token_id") or ()
        ids = (*config.eos_ids, *((eos,) if isinstance(eos, int) else eos))
        config = dataclasses.replace(config, eos_ids=tuple(dict.fromkeys(ids)))
    return config, family


def read_weights(directory: Path, config: ModelConfig, family: Family) -> dict[str, np.ndarray]:
    """Read the safetensors of `directory` into stacked weights of the stored dtype (norms and biases: float32).

    The peak of host memory is the weights and the largest tensor: files are read with pread, because pages of a
    mapped file count as memory of the process.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A tensor is missing, unexpected, or of another shape or dtype than expected.
    """
    expected = slots(config, family.names, source="hf")
    files = [_File(path) for path in _weight_files(directory)]
    found: dict[str, np.dtype] = {}
    for file in files:
        unexpected = [name for name in file.names if not _ignored(name, config, family)]
        unexpected = [name for name in unexpected if name.replace(family.hf_prefix, "", 1) not in expected]
        if unexpected:
            raise ValueError(f"{file.path}: unexpected tensors: {listed(unexpected)}")
        found |= {name: file.dtype(name) for name in file.names if not _ignored(name, config, family)}

    assembly = Assembly(config, expected, dtypes=_stack_dtypes(found, expected, family))
    for file in files:
        with file.open() as tensors:
            for name in file.names:
                if not _ignored(name, config, family):
                    target = name.replace(family.hf_prefix, "", 1)
                    try:
                        place = assembly.place(target, file.shape(name))
                    except (KeyError, ValueError) as error:
                        reason = f"tensor {name} comes twice" if isinstance(error, KeyError) else error
                        raise ValueError(f"{file.path}: {reason}") from None
                    place[...] = tensors.get_tensor(name)
                    if expected[target].is_norm:
                        place += family.hf_norm_offset
    try:
        return assembly.finish()
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


class _File:
    """A safetensors file: names, shapes and dtypes, in the order of the data."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with self.open() as tensors:
                self.names: list[str] = list(tensors.offset_keys())
                headers = {name: tensors.get_slice(name) for name in self.names}
                self._shapes = {name: tuple(header.get_shape()) for name, header in headers.items()}
                self._dtypes = {name: header.get_dtype() for name, header in headers.items()}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a complete safetensors file: {error}") from None

    def open(self) -> Any:
        return safe_open(self.path, framework="numpy", backend="pread")

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype:
        if self._dtypes[name] not in _DTYPES:
            supported = ", ".join(_DTYPES)
            raise ValueError(f"{self.path}: tensor {name} has dtype {self._dtypes[name]}, expected one of {supported}")
        return _DTYPES[self._dtypes[name]]


def _stack_dtypes(found: dict[str, np.dtype], expected: dict[str, Slot], family: Family) -> dict[str, np.dtype]:
    """Give each weight the dtype of its tensors, or float32 where they differ."""
    stacks: dict[str, np.dtype] = {}
    for name, dtype in found.items():
        key = expected[name.replace(family.hf_prefix, "", 1)].key
        stacks[key] = dtype if stacks.get(key, dtype) == dtype else np.dtype(np.float32)
    return stacks


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
