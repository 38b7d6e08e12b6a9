"""The architectures that can be read, by the name that each format gives them."""

from spear_jax.models.assembly import Family
from spear_jax.models.gemma import GEMMA3, GEMMA3_WITH_VISION
from spear_jax.models.llama import LLAMA, MISTRAL
from spear_jax.models.qwen import QWEN2, QWEN3

HF_FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": GEMMA3_WITH_VISION,
}

HF_MODEL_TYPES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma3_text": GEMMA3,
    "gemma3": GEMMA3_WITH_VISION,
}

GGUF_FAMILIES: dict[str, Family] = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3, "gemma3": GEMMA3}
