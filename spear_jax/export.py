"""Quantized models written back as Hugging Face directories, for tools that know nothing of int4 or compensators."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from spear_jax.atomic import writing_directory
from spear_jax.config import ModelConfig, RopeScaling
from spear_jax.models.assembly import Family, Slot, slots
from spear_jax.models.decoder import Decoder, weight_shapes
from spear_jax.models.families import HF_FAMILIES
from spear_jax.nn.rope import rope_frequencies
from spear_jax.quant import CompensatorBank, Int8Rows, QuantTensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COMPENSATORS = "compensators.safetensors"
MAX_SHARD_BYTES = 4 << 30

_MODEL_TYPES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "mistral": ("MistralForCausalLM", "mistral"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
_FORMULA = (
    "y = W x + B f(z), z = A x, h = w_out silu(w_in^T z + w_probe^T (probe x) + w_rms log(rms(x)) + b_in) + b_out; "
    "f(z) = z without a gate, z (1 + tanh h) for form tanh, z (1 + h) for linear, z + h for shift"
)


def export_huggingface(
    path: str | Path,
    model: Decoder,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    compensators: Literal["fold", "separate"] | None = None,
    overwrite: bool = False,
) -> None:
    """Write config.json, dequantized safetensors and the tokenizer to the directory `path`, whole or not at all.

    `fold` adds static compensators to the weights, W + B A. `separate` writes them to `compensators.safetensors`:
    float32 tensors `layers.{i}.{module}.a` [R, K] and `.b` [N, R], and of a gate `.gate.w_in` [R, H], `.gate.b_in` [H],
    `.gate.w_out` [R, H], `.gate.b_out` [R] and, if it has them, `.gate.probe` [P, K], `.gate.w_probe` [P, H] and
    `.gate.w_rms` [H]; module is qkv (rows q, k, v), o, gate_up (gate, up) or down. The file's metadata hold the
    `formula` and each module's `form.{module}`. Without a choice, static ones are folded and gated ones separate: a
    gate depends on the token.

    Raises:
        ValueError: Gated compensators cannot be folded, or the architecture cannot be said in config.json.
        FileExistsError: Something is at `path` that `overwrite` does not allow to replace.
        OSError: The disk is full or cannot be written.
    """
    from safetensors.numpy import save_file

    gated = any(bank.gate is not None for bank in model.compensators.values())
    if compensators == "fold" and gated:
        raise ValueError("compensators with a gate depend on the token and cannot be folded: export them as separate")
    fold = compensators != "separate" and not gated
    config = huggingface_config(model.config) | {"dtype": dtype, "torch_dtype": dtype}
    family = HF_FAMILIES[config["architectures"][0]]
    extra = {} if fold else _separate_tensors(model)
    forms = {f"form.{module}": bank.gate.form for module, bank in model.compensators.items() if bank.gate is not None}
    elements = sum(int(np.prod(shape)) for shape in weight_shapes(model.config).values())
    size = elements * jnp.dtype(dtype).itemsize + sum(tensor.nbytes for tensor in extra.values()) + (64 << 20)
    with writing_directory(path, size=size, overwrite=overwrite) as partial:
        partial.mkdir()
        tokenizer.save_pretrained(partial)
        _write_json(partial / "config.json", config)
        ends = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
        _write_json(
            partial / "generation_config.json", {key: value for key, value in ends.items() if value is not None}
        )
        _write_shards(partial, _foreign_tensors(model, family, fold=fold, dtype=jnp.dtype(dtype)))
        if extra:
            save_file(extra, partial / COMPENSATORS, metadata={"format": "spear_jax 1", "formula": _FORMULA} | forms)


def huggingface_config(config: ModelConfig) -> dict[str, Any]:
    """Give config.json of a model, in keys that both transformers 4 and 5 read.

    Raises:
        ValueError: A setting has no place in the family's config.json.
    """
    windowed = config.sliding_window is not None
    architecture, model_type = _MODEL_TYPES["mistral" if config.family == "llama" and windowed else config.family]
    _check_plain(config, model_type)
    values: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling(config),
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids) or None,
        "attention_bias": config.qkv_bias,
        "use_cache": True,
    }
    layer_types = ["full_attention" if is_global else "sliding_attention" for is_global in config.layer_is_global or ()]
    if model_type == "gemma3_text":
        values |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": _query_scalar(config),
            "rope_local_base_freq": config.rope_local_theta,
            "sliding_window": config.sliding_window,
            "layer_types": layer_types,
        }
    else:
        values |= {"hidden_act": "silu"}
    if model_type == "llama":
        values |= {"mlp_bias": False}
    if model_type == "mistral":
        values |= {"sliding_window": config.sliding_window}
    if model_type in ("qwen2", "qwen3"):
        values |= {"use_sliding_window": windowed, "sliding_window": config.sliding_window}
        if windowed:
            values |= {"layer_types": layer_types or ["sliding_attention"] * config.num_layers}
            values |= {"max_window_layers": 0}
    return values


def _check_plain(config: ModelConfig, model_type: str) -> None:
    """Refuse settings that the family's config.json cannot hold, rather than drop them."""
    gemma = model_type == "gemma3_text"
    expected: dict[str, Any] = {
        "activation": "gelu_tanh" if gemma else "silu",
        "sandwich_norms": gemma,
        "qk_norm": gemma or model_type == "qwen3",
        "qkv_bias": model_type == "qwen2",
        "embed_scale": config.hidden_size**0.5 if gemma else 1.0,
    }
    if not gemma:
        expected |= {"scale": config.head_dim**-0.5, "rope_local_theta": None}
    if model_type in ("llama", "mistral"):
        expected |= {"layer_is_global": None}
    for name, value in expected.items():
        found = getattr(config, name)
        same = np.isclose(found, value) if isinstance(value, float) else found == value
        if not same:
            raise ValueError(f"config.json of a {model_type} model cannot hold {name} = {found!r} (only {value!r})")


def _query_scalar(config: ModelConfig) -> int:
    """Give the whole number whose inverse square root is the scale of Gemma's attention."""
    scalar = round(config.scale**-2)
    if not np.isclose(scalar**-0.5, config.scale):
        raise ValueError(f"config.json of a gemma3_text model cannot hold the attention scale {config.scale!r}")
    return scalar


def _rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "factors":
        scaling = _llama3_of_factors(config, scaling)
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }


def _llama3_of_factors(config: ModelConfig, scaling: RopeScaling) -> RopeScaling:
    """Find the Llama 3.1 rule that gives the factors a GGUF file lists."""
    rule = RopeScaling(kind="llama3", factor=round(max(scaling.factors), 3))
    found, wanted = (rope_frequencies(config.head_dim, config.rope_theta, s) for s in (rule, scaling))
    if not np.allclose(found, wanted, rtol=1e-3):
        raise ValueError("rope factors that follow no Llama 3.1 rule cannot be written to config.json")
    return rule


def _foreign_tensors(
    model: Decoder, family: Family, *, fold: bool, dtype: jnp.dtype
) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
    """Give the tensors one after the other, so that the host holds one layer of one module at a time."""
    by_place: dict[tuple[str, int | None], list[tuple[str, Slot]]] = {}
    for name, slot in slots(model.config, family.names, source="hf").items():
        by_place.setdefault((slot.key, slot.layer), []).append((family.hf_prefix + name, slot))
    for (key, layer), named in by_place.items():
        whole = np.asarray(_weight(model, key, layer, fold=fold), np.float32)
        for name, slot in named:
            tensor = whole if slot.start is None else whole[slot.start : slot.start + slot.shape[0]]
            offset = family.hf_norm_offset if slot.is_norm else 0.0
            yield name, np.ascontiguousarray((tensor - offset).astype(dtype))


def _weight(model: Decoder, key: str, layer: int | None, *, fold: bool) -> Array:
    *owners, attribute = key.split(".")
    if key in ("embed.weight", "head.weight"):
        table = getattr(model, key.removesuffix(".weight"))
        return table.dequantize(model.dtype) if isinstance(table, Int8Rows) else table[...]
    owner: Any = model
    for name in owners:
        owner = getattr(owner, name)
    value = getattr(owner, attribute)
    if layer is None:
        return value[...]
    if not isinstance(value, QuantTensor):
        return value[...][layer]
    weight = jax.tree.map(lambda leaf: leaf[layer], value).dequantize(jnp.float32)
    bank = model.compensators.get(owners[-1]) if fold else None
    factors = None if bank is None else _factors(bank, layer)
    return weight if factors is None else weight + factors["b"] @ factors["a"]


def _factors(bank: CompensatorBank, layer: int) -> dict[str, Array] | None:
    """Give A [R, K], B [N, R] and the gate's arrays of one layer in float32; None for rank 0."""
    compensator = bank.at(layer)
    if compensator is None:
        return None

    def rows(factor: Array, scale: Array | None) -> Array:
        factor = factor.astype(jnp.float32)
        return factor if scale is None else factor * scale.astype(jnp.float32)[:, None]

    arrays = {"a": rows(compensator.a, compensator.a_scale), "b": rows(compensator.bt, compensator.bt_scale).T}
    if compensator.gate is not None:
        gate = compensator.gate
        for name in ("w_in", "b_in", "w_out", "b_out", "w_probe", "w_rms"):
            if (value := getattr(gate, name)) is not None:
                arrays[f"gate.{name}"] = value.astype(jnp.float32)
        if gate.probe is not None:
            arrays["gate.probe"] = rows(gate.probe, gate.probe_scale)
    return arrays


def _separate_tensors(model: Decoder) -> dict[str, np.ndarray]:
    tensors = {}
    for module, bank in model.compensators.items():
        for layer in range(model.config.num_layers):
            for name, array in (_factors(bank, layer) or {}).items():
                tensors[f"layers.{layer}.{module}.{name}"] = np.ascontiguousarray(array)
    return tensors


def _write_shards(directory: Path, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    """Write model.safetensors, or numbered files and their index where one would be larger than a shard may be."""
    from safetensors.numpy import save_file

    written: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        save_file(shard, directory / f"shard-{len(written)}", metadata={"format": "pt"})
        written.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(other.nbytes for other in shard.values()) + tensor.nbytes > MAX_SHARD_BYTES:
            flush()
        shard[name] = tensor
        total += tensor.nbytes
    flush()
    if len(written) == 1:
        (directory / "shard-0").rename(directory / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(written):
        file = f"model-{i + 1:05}-of-{len(written):05}.safetensors"
        (directory / f"shard-{i}").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
