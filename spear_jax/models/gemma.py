"""Gemma-3, text only: four norms a layer, norms of q and k, sliding windows with a rotary base of their own."""

import dataclasses
from typing import Any

from spear_jax.config import ModelConfig
from spear_jax.models import llama
from spear_jax.models.assembly import Family, Name
from spear_jax.models.settings import (
    Settings,
    gguf_fields,
    gguf_rope_scaling,
    hf_fields,
    hf_layer_is_global,
    hf_rope_scaling,
)

_LAYER = "model.layers.*"
NAMES = (
    *(name for name in llama.NAMES if name.key != "layers.mlp_norm.weight"),
    Name(
        key="layers.attn_out_norm.weight",
        hf=f"{_LAYER}.post_attention_layernorm.weight",
        gguf="blk.*.post_attention_norm.weight",
    ),
    Name(key="layers.mlp_norm.weight", hf=f"{_LAYER}.pre_feedforward_layernorm.weight", gguf="blk.*.ffn_norm.weight"),
    Name(
        key="layers.mlp_out_norm.weight",
        hf=f"{_LAYER}.post_feedforward_layernorm.weight",
        gguf="blk.*.post_ffw_norm.weight",
    ),
    Name(key="layers.q_norm.weight", hf=f"{_LAYER}.self_attn.q_norm.weight", gguf="blk.*.attn_q_norm.weight"),
    Name(key="layers.k_norm.weight", hf=f"{_LAYER}.self_attn.k_norm.weight", gguf="blk.*.attn_k_norm.weight"),
)

_OUTER_KEYS = ("bos_token_id", "eos_token_id", "tie_word_embeddings")

GLOBAL_THETA, LOCAL_THETA = 1_000_000.0, 10_000.0
GLOBAL_EVERY = 6
"""Gemma-3 places one layer of full attention after five of sliding windows."""


def gemma3_from_hf(settings: Settings) -> ModelConfig:
    """Read config.json of a Gemma3ForCausalLM, or the text part of a Gemma3ForConditionalGeneration."""
    if (text := settings.get("text_config")) is not None:
        # The outer file names the end tokens and the head that the text part leaves to its defaults.
        shared = {key: settings.get(key) for key in _OUTER_KEYS if settings.has(key)}
        settings = Settings(shared | text, source=settings.source)
    settings.refuse("hidden_activation", "gelu_pytorch_tanh")
    settings.refuse("attention_bias", False)
    settings.refuse("use_bidirectional_attention", False)
    settings.refuse("attn_logit_softcapping")
    settings.refuse("final_logit_softcapping")
    fields = hf_fields(
        settings,
        vocab_size=262_208,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        max_position_embeddings=131_072,
    )
    layers = fields["num_layers"]
    pattern = settings.integer("sliding_window_pattern", GLOBAL_EVERY)
    return ModelConfig(
        **_gemma_fields(fields),
        **_hf_rope(settings),
        sliding_window=settings.integer("sliding_window", 4096),
        layer_is_global=hf_layer_is_global(settings, num_layers=layers) or _every(pattern, layers),
        attention_scale=settings.number("query_pre_attn_scalar", 256) ** -0.5,
        tie_embeddings=settings.flag("tie_word_embeddings", default=True),
    )


def gemma3_from_gguf(settings: Settings) -> ModelConfig:
    """Read the metadata of a GGUF file of architecture `gemma3`.

    The file does not hold the scale of attention. It is 1 / sqrt(head_dim), except for the 27B model, known by its 62
    layers, where it is 1 / sqrt(hidden_size / num_heads) (Gemma 3 technical report, `query_pre_attn_scalar` 168).
    """
    settings.refuse("final_logit_softcapping", 0.0)
    fields = gguf_fields(settings)
    layers = fields["num_layers"]
    width = fields["hidden_size"] / fields["num_heads"] if layers == 62 else fields["head_dim"]
    return ModelConfig(
        **_gemma_fields(fields),
        rope_theta=settings.number("rope.freq_base", GLOBAL_THETA),
        rope_local_theta=settings.number("rope.freq_base_swa", LOCAL_THETA),
        rope_scaling=gguf_rope_scaling(settings),
        sliding_window=settings.integer("attention.sliding_window"),
        layer_is_global=_every(settings.integer("attention.sliding_window_pattern", GLOBAL_EVERY), layers),
        attention_scale=width**-0.5,
    )


def _gemma_fields(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        **fields,
        "family": "gemma3",
        "activation": "gelu_tanh",
        "qk_norm": True,
        "sandwich_norms": True,
        "embed_scale": fields["hidden_size"] ** 0.5,
    }


def _hf_rope(settings: Settings) -> dict[str, Any]:
    """Read bases and scaling: one set of `rope_parameters` for each type of layer, or the older three keys."""
    by_type = settings.get("rope_parameters", {})
    full = (
        {"rope_theta": settings.get("rope_theta")}
        | by_type.get("full_attention", {})
        | settings.get("rope_scaling", {})
    )
    local = {"rope_theta": settings.get("rope_local_base_freq")} | by_type.get("sliding_attention", {})
    if hf_rope_scaling(local, source=settings.source) is not None:
        raise ValueError(f"{settings.source}: rope scaling of sliding_attention layers is not supported: {local}")
    return {
        "rope_theta": Settings(full, source=settings.source).number("rope_theta", GLOBAL_THETA),
        "rope_local_theta": Settings(local, source=settings.source).number("rope_theta", LOCAL_THETA),
        "rope_scaling": hf_rope_scaling(full, source=settings.source),
    }


def _every(count: int, layers: int) -> tuple[bool, ...]:
    return tuple((i + 1) % count == 0 for i in range(layers))


GEMMA3 = Family(
    names=NAMES,
    config_from_hf=gemma3_from_hf,
    config_from_gguf=gemma3_from_gguf,
    hf_norm_offset=1.0,
)
GEMMA3_WITH_VISION = dataclasses.replace(
    GEMMA3,
    hf_prefix="language_model.",
    hf_ignored=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
)
