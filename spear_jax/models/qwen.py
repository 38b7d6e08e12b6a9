"""Qwen2, Qwen2.5 and Qwen3: Llama's tensors with q, k, v biases (2) or norms of q and k (3)."""

from typing import Any

from spear_jax.config import ModelConfig
from spear_jax.models import llama
from spear_jax.models.assembly import Family, Name
from spear_jax.models.settings import Settings, gguf_fields, gguf_rope_scaling, hf_fields, hf_layer_is_global, hf_rope

_LAYER = "model.layers.*"
NAMES = (
    *llama.NAMES,
    Name(key="layers.qkv.bias", rows="q", hf=f"{_LAYER}.self_attn.q_proj.bias", gguf="blk.*.attn_q.bias"),
    Name(key="layers.qkv.bias", rows="k", hf=f"{_LAYER}.self_attn.k_proj.bias", gguf="blk.*.attn_k.bias"),
    Name(key="layers.qkv.bias", rows="v", hf=f"{_LAYER}.self_attn.v_proj.bias", gguf="blk.*.attn_v.bias"),
    Name(key="layers.q_norm.weight", hf=f"{_LAYER}.self_attn.q_norm.weight", gguf="blk.*.attn_q_norm.weight"),
    Name(key="layers.k_norm.weight", hf=f"{_LAYER}.self_attn.k_norm.weight", gguf="blk.*.attn_k_norm.weight"),
)


def qwen2_from_hf(settings: Settings) -> ModelConfig:
    """Read config.json of a Qwen2ForCausalLM."""
    return ModelConfig(family="qwen2", qkv_bias=True, **_hf_fields(settings))


def qwen3_from_hf(settings: Settings) -> ModelConfig:
    """Read config.json of a Qwen3ForCausalLM."""
    settings.refuse("attention_bias", False)
    return ModelConfig(family="qwen3", qk_norm=True, **_hf_fields(settings, head_dim=128))


def qwen2_from_gguf(settings: Settings) -> ModelConfig:
    """Read the metadata of a GGUF file of architecture `qwen2`."""
    return ModelConfig(family="qwen2", qkv_bias=True, **_gguf_fields(settings))


def qwen3_from_gguf(settings: Settings) -> ModelConfig:
    """Read the metadata of a GGUF file of architecture `qwen3`."""
    return ModelConfig(family="qwen3", qk_norm=True, **_gguf_fields(settings))


def _hf_fields(settings: Settings, **defaults: int) -> dict[str, Any]:
    settings.refuse("hidden_act", "silu")
    fields = hf_fields(settings, num_key_value_heads=32, max_position_embeddings=32_768, **defaults)
    layers = fields["num_layers"]
    window = settings.integer("sliding_window", 4096) if settings.flag("use_sliding_window") else None
    first_windowed = settings.integer("max_window_layers", 28)
    is_global = hf_layer_is_global(settings, num_layers=layers) or tuple(i < first_windowed for i in range(layers))
    return {
        **fields,
        **hf_rope(settings),
        "sliding_window": window,
        "layer_is_global": None if window is None else is_global,
        "tie_embeddings": settings.flag("tie_word_embeddings"),
    }


def _gguf_fields(settings: Settings) -> dict[str, Any]:
    return {
        **gguf_fields(settings),
        "rope_theta": settings.number("rope.freq_base", 10_000.0),
        "rope_scaling": gguf_rope_scaling(settings),
    }


QWEN2 = Family(names=NAMES, config_from_hf=qwen2_from_hf, config_from_gguf=qwen2_from_gguf)
QWEN3 = Family(names=NAMES, config_from_hf=qwen3_from_hf, config_from_gguf=qwen3_from_gguf)
