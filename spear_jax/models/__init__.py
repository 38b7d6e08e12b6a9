"""Models read from Hugging Face directories, the hub, and GGUF files."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from spear_jax.config import ModelConfig
from spear_jax.models import gguf, hf
from spear_jax.models.decoder import Decoder
from spear_jax.models.source import resolve
from spear_jax.tokenizer import end_token_ids, tokenizer_from_directory, tokenizer_from_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["DType", "LoadedModel", "activation_dtype", "load"]

type DType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model on the device, with the tokenizer that belongs to it and the name to serve it under."""

    model: Decoder
    config: ModelConfig
    tokenizer: "PreTrainedTokenizerFast"
    name: str


def load(source: str, *, dtype: DType = "auto") -> LoadedModel:
    """Load `demo`, a Hugging Face directory, a GGUF file, or `org/name` from the hub.

    `auto` is float32 on a CPU and bfloat16 elsewhere. The end tokens of the configuration are those that the model's
    files name and the control tokens of its vocabulary that end an answer.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The files are damaged, or of an architecture or type that is not supported.
    """
    target = activation_dtype(dtype)
    found = resolve(source)
    # The import of transformers and the reading of weights take a second or two each and do not wait for each other.
    with ThreadPoolExecutor(max_workers=1) as pool:
        if found.is_gguf:
            file = gguf.GGUFFile.open(found.path)
            config, family = gguf.read_config(file)
            pending = pool.submit(tokenizer_from_gguf, file.metadata, source=str(found.path))
            weights = gguf.read_weights(file, config, family, dtype=target)
        else:
            config, family = hf.read_config(found.path)
            pending = pool.submit(tokenizer_from_directory, found.path)
            weights = hf.read_weights(found.path, config, family)
        tokenizer = pending.result()
    eos_ids = tuple(dict.fromkeys((*config.eos_ids, *end_token_ids(tokenizer))))
    config = dataclasses.replace(config, eos_ids=eos_ids)
    model = Decoder.from_weights(config, weights, dtype=target)
    return LoadedModel(model=model, config=config, tokenizer=tokenizer, name=found.name)


def activation_dtype(name: DType) -> Any:
    """Give the type that a name stands for: `auto` is float32 on a CPU and bfloat16 elsewhere.

    Raises:
        ValueError: There is no such type of activations.
    """
    if name == "auto":
        return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype {name!r}: expected auto, float32, bfloat16 or float16")
    return jnp.dtype(name)
