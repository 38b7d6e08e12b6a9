"""Llama 2 and 3.x, SmolLM2, Mistral: what their checkpoints call things."""

from spear_jax.config import ModelConfig
from spear_jax.models.assembly import Family, Name
from spear_jax.models.settings import Settings, gguf_fields, gguf_rope_scaling, hf_fields, hf_rope

_LAYER = "model.layers.*"
NAMES = (
    Name(key="embed.weight", hf="model.embed_tokens.weight", gguf="token_embd.weight"),
    Name(key="final_norm.weight", hf="model.norm.weight", gguf="output_norm.weight"),
    Name(key="head.weight", hf="lm_head.weight", gguf="output.weight"),
    Name(key="layers.input_norm.weight", hf=f"{_LAYER}.input_layernorm.weight", gguf="blk.*.attn_norm.weight"),
    Name(key="layers.qkv.weight", rows="q", hf=f"{_LAYER}.self_attn.q_proj.weight", gguf="blk.*.attn_q.weight"),
    Name(key="layers.qkv.weight", rows="k", hf=f"{_LAYER}.self_attn.k_proj.weight", gguf="blk.*.attn_k.weight"),
    Name(key="layers.qkv.weight", rows="v", hf=f"{_LAYER}.self_attn.v_proj.weight", gguf="blk.*.attn_v.weight"),
    Name(key="layers.o.weight", hf=f"{_LAYER}.self_attn.o_proj.weight", gguf="blk.*.attn_output.weight"),
    Name(key="layers.mlp_norm.weight", hf=f"{_LAYER}.post_attention_layernorm.weight", gguf="blk.*.ffn_norm.weight"),
    Name(key="layers.gate_up.weight", rows="gate", hf=f"{_LAYER}.mlp.gate_proj.weight", gguf="blk.*.ffn_gate.weight"),
    Name(key="layers.gate_up.weight", rows="up", hf=f"{_LAYER}.mlp.up_proj.weight", gguf="blk.*.ffn_up.weight"),
    Name(key="layers.down.weight", hf=f"{_LAYER}.mlp.down_proj.weight", gguf="blk.*.ffn_down.weight"),
)


def llama_from_hf(settings: Settings) -> ModelConfig:
    """Read config.json of a LlamaForCausalLM."""
    settings.refuse("hidden_act", "silu")
    settings.refuse("attention_bias", False)
    settings.refuse("mlp_bias", False)
    settings.refuse("partial_rotary_factor", 1.0)
    return ModelConfig(
        family="llama",
        **hf_fields(settings, max_position_embeddings=2048),
        **hf_rope(settings),
        tie_embeddings=settings.flag("tie_word_embeddings"),
    )


def mistral_from_hf(settings: Settings) -> ModelConfig:
    """Read config.json of a MistralForCausalLM; its window is 4,096 where not named, and none where null."""
    settings.refuse("hidden_act", "silu")
    return ModelConfig(
        family="llama",
        **hf_fields(settings, num_key_value_heads=8, max_position_embeddings=131_072),
        **hf_rope(settings),
        sliding_window=settings.get("sliding_window") if settings.has("sliding_window") else 4096,
        tie_embeddings=settings.flag("tie_word_embeddings"),
    )


def llama_from_gguf(settings: Settings) -> ModelConfig:
    """Read the metadata of a GGUF file of architecture `llama`."""
    return ModelConfig(
        family="llama",
        **gguf_fields(settings),
        rope_theta=settings.number("rope.freq_base", 10_000.0),
        rope_scaling=gguf_rope_scaling(settings),
        sliding_window=settings.get("attention.sliding_window"),
    )


LLAMA = Family(
    names=NAMES,
    config_from_hf=llama_from_hf,
    config_from_gguf=llama_from_gguf,
    gguf_interleaved=frozenset({"q", "k"}),
)
MISTRAL = Family(
    names=NAMES,
    config_from_hf=mistral_from_hf,
    config_from_gguf=llama_from_gguf,
    gguf_interleaved=frozenset({"q", "k"}),
)
