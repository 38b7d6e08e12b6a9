import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from flax import nnx
from safetensors.numpy import load_file

from pallas_kernels.int4_matmul import Compensator, Gate, int4_matmul
from spear_jax import export
from spear_jax.config import ModelConfig, RopeScaling
from spear_jax.export import COMPENSATORS, export_huggingface, huggingface_config
from spear_jax.models import load
from spear_jax.models.decoder import Decoder
from spear_jax.models.quantize import quantize_model
from spear_jax.nn.rope import rope_frequencies
from spear_jax.quant import CompensatorBank, QuantSpec
from spear_jax.testing import assert_close, random_weights, tiny_config

GEMMA = {
    "family": "gemma3", "qk_norm": True, "sandwich_norms": True, "activation": "gelu_tanh", "embed_scale": 8.0,
    "rope_theta": 1e6, "rope_local_theta": 1e4, "sliding_window": 4, "layer_is_global": (False, True, False),
    "attention_scale": 0.125, "norm_eps": 1e-6,
}  # fmt: skip
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_max_position=8192)
FAMILIES = {
    "llama": {"rope_scaling": LLAMA3, "tie_embeddings": False, "rope_theta": 5e5, "bos_id": 2, "eos_ids": (1, 3)},
    "linear": {"rope_scaling": RopeScaling(kind="linear", factor=4.0)},
    "mistral": {"sliding_window": 4},
    "qwen2": {"family": "qwen2", "qkv_bias": True},
    "qwen2-window": {"family": "qwen2", "qkv_bias": True, "sliding_window": 4, "layer_is_global": (True, False, False)},
    "qwen3": {"family": "qwen3", "qk_norm": True, "head_dim": 32},
    "gemma3": GEMMA,
}


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    # Byte-level BPE: for some architectures transformers builds its own class from the vocabulary, which must be one.
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<|endoftext|>", *alphabet])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")


def make_model(*, ranks: tuple[int, ...] = (1, 0, 2), gated: bool = False, **changes) -> Decoder:
    config = tiny_config(**changes)
    model = quantize_model(Decoder.from_weights(config, random_weights(config), dtype=jnp.float32), QuantSpec())
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) * 0.3, jnp.float32)

    total, banks = sum(ranks), {}
    for name, (n, k) in config.module_shapes().items():
        gate = Gate(w_in=draw(total, 4), b_in=draw(3, 4), w_out=draw(total, 4), b_out=draw(total)) if gated else None
        banks[name] = CompensatorBank(ranks, draw(total, k), draw(total, n), gate=gate).to_int8()
    model.compensators = nnx.Dict(banks)
    return model


def logits(model: Decoder) -> np.ndarray:
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    return np.asarray(jax.jit(lambda m, t: m.logits(m(t)[0]))(model, tokens))


@pytest.mark.parametrize("name", FAMILIES)
def test_our_loader_reads_the_export_and_answers_the_same(tmp_path, name):
    model = make_model(**FAMILIES[name])
    export_huggingface(tmp_path / "out", model, make_tokenizer(), dtype="float32")
    loaded = load(str(tmp_path / "out"), dtype="float32")
    same = {
        field: getattr(loaded.config, field) for field in ("windows", "rope_scaling", "rope_theta", "family", "bos_id")
    }
    assert same == {field: getattr(model.config, field) for field in same}
    assert set(model.config.eos_ids) <= set(loaded.config.eos_ids)
    assert loaded.config.scale == pytest.approx(model.config.scale)
    # Folding adds the low-rank term in another order of sums than the served product.
    assert_close(logits(loaded.model), logits(model), relative=2e-4)
    expected = make_tokenizer()("plain text", add_special_tokens=False)["input_ids"]
    assert loaded.tokenizer("plain text", add_special_tokens=False)["input_ids"] == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_the_config(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(huggingface_config(tiny_config(**FAMILIES[name]))))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    expected = tiny_config(**FAMILIES[name])
    assert config.num_key_value_heads == expected.num_kv_heads
    assert config.head_dim == expected.head_dim
    if name == "gemma3":
        assert config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
        assert config.rope_parameters["full_attention"]["rope_theta"] == 1e6
        assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    else:
        assert config.rope_parameters["rope_theta"] == expected.rope_theta
    if name == "llama":
        assert config.rope_parameters["rope_type"] == "llama3"


def test_gated_compensators_go_to_a_file_of_their_own(tmp_path):
    model = make_model(gated=True)
    with pytest.raises(ValueError, match="cannot be folded"):
        export_huggingface(tmp_path / "out", model, make_tokenizer(), compensators="fold")
    export_huggingface(tmp_path / "out", model, make_tokenizer(), dtype="float32")
    tensors = load_file(tmp_path / "out" / COMPENSATORS)
    assert {name for name in tensors if name.startswith("layers.2.down.")} == {
        f"layers.2.down.{part}" for part in ("a", "b", "gate.w_in", "gate.b_in", "gate.w_out", "gate.b_out")
    }
    assert not any(name.startswith("layers.1.") for name in tensors)

    x = jnp.asarray(np.random.default_rng(2).standard_normal((5, 128)), jnp.float32)
    weight = load_file(tmp_path / "out" / "model.safetensors")["model.layers.2.mlp.down_proj.weight"]
    t = {name.removeprefix("layers.2.down."): value for name, value in tensors.items()}
    z = x @ t["a"].T
    gate = 1 + jnp.tanh(jax.nn.silu(z @ t["gate.w_in"] + t["gate.b_in"]) @ t["gate.w_out"].T + t["gate.b_out"])
    quantized = model.layer(2).down.weight
    compensator = model.compensators["down"].at(2)
    assert isinstance(compensator, Compensator)
    expected = int4_matmul(x, quantized.packed, quantized.scale, compensator=compensator)
    assert_close(x @ weight.T + (gate * z) @ t["b"].T, expected, relative=1e-5)


def test_static_compensators_may_be_kept_apart(tmp_path):
    model = make_model()
    export_huggingface(tmp_path / "out", model, make_tokenizer(), dtype="float32", compensators="separate")
    bare = model.replace(compensators=nnx.Dict())
    assert_close(logits(load(str(tmp_path / "out"), dtype="float32").model), logits(bare), relative=1e-5)
    assert (tmp_path / "out" / COMPENSATORS).exists()


def test_large_models_are_split_into_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", 50_000)
    model = make_model()
    export_huggingface(tmp_path / "out", model, make_tokenizer())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {Path(name).name for name in index["weight_map"].values()}
    assert len(files) > 2
    assert files == {p.name for p in (tmp_path / "out").glob("model-*.safetensors")}
    assert_close(logits(load(str(tmp_path / "out"), dtype="float32").model), logits(model), relative=0.02)


def test_gguf_rope_factors_become_the_llama3_rule():
    plain, scaled = (rope_frequencies(16, 5e5, s) for s in (None, LLAMA3))
    factors = RopeScaling(kind="factors", factors=tuple((plain / scaled).tolist()))
    values = huggingface_config(tiny_config(rope_theta=5e5, rope_scaling=factors))
    assert values["rope_scaling"]["rope_type"] == "llama3"
    assert values["rope_scaling"]["factor"] == 8.0
    odd = RopeScaling(kind="factors", factors=(1.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"no Llama 3\.1 rule"):
        huggingface_config(tiny_config(rope_theta=5e5, rope_scaling=odd))


def test_what_config_json_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="llama model cannot hold qk_norm = True"):
        huggingface_config(tiny_config(qk_norm=True))
    config: ModelConfig = tiny_config(family="qwen3", qk_norm=True, attention_scale=0.5)
    with pytest.raises(ValueError, match=r"cannot hold scale = 0\.5"):
        huggingface_config(config)
