import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spear_jax.config import ModelConfig, RopeScaling
from spear_jax.models import hf, load
from spear_jax.models.families import HF_FAMILIES

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config_of(**changes: Any) -> ModelConfig:
    values = LLAMA | changes
    family = HF_FAMILIES[values["architectures"][0]]
    return family.config_from_hf(hf.Settings(values, source="config.json"))


def tensors(*, dtype: Any = np.float32, layers: int = 2, tied: bool = False) -> dict[str, np.ndarray]:
    """Give the tensors of the configuration above, each filled with values that tell where it went."""
    shapes = {"model.embed_tokens.weight": (48, 32), "model.norm.weight": (32,)}
    if not tied:
        shapes["lm_head.weight"] = (48, 32)
    for i in range(layers):
        prefix = f"model.layers.{i}."
        shapes |= {
            prefix + "input_layernorm.weight": (32,),
            prefix + "post_attention_layernorm.weight": (32,),
            prefix + "self_attn.q_proj.weight": (32, 32),
            prefix + "self_attn.k_proj.weight": (16, 32),
            prefix + "self_attn.v_proj.weight": (16, 32),
            prefix + "self_attn.o_proj.weight": (32, 32),
            prefix + "mlp.gate_proj.weight": (64, 32),
            prefix + "mlp.up_proj.weight": (64, 32),
            prefix + "mlp.down_proj.weight": (32, 64),
        }
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def save(directory: Path, weights: dict[str, np.ndarray], **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(LLAMA | changes))
    save_file(weights, directory / "model.safetensors")
    return directory


def read(directory: Path) -> dict[str, np.ndarray]:
    config, family = hf.read_config(directory)
    return hf.read_weights(directory, config, family)


def shard(directory: Path, weights: dict[str, np.ndarray]) -> None:
    """Split the checkpoint in two files with an index, tensors of one stack in both."""
    (directory / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_land_in_their_place_in_the_stored_dtype(tmp_path: Path, dtype: Any, sharded: bool) -> None:
    source = tensors(dtype=dtype)
    directory = save(tmp_path / "model", source)
    if sharded:
        shard(directory, source)
    weights = read(directory)
    assert weights["layers.qkv.weight"].dtype == dtype
    for i in range(2):
        layer = f"model.layers.{i}."
        parts = [source[f"{layer}self_attn.{x}_proj.weight"] for x in "qkv"]
        np.testing.assert_array_equal(weights["layers.qkv.weight"][i], np.concatenate(parts))
        parts = [source[f"{layer}mlp.{x}_proj.weight"] for x in ("gate", "up")]
        np.testing.assert_array_equal(weights["layers.gate_up.weight"][i], np.concatenate(parts))
        np.testing.assert_array_equal(weights["layers.down.weight"][i], source[f"{layer}mlp.down_proj.weight"])
        norm = source[f"{layer}post_attention_layernorm.weight"]
        np.testing.assert_array_equal(weights["layers.mlp_norm.weight"][i], norm.astype(np.float32))
    np.testing.assert_array_equal(weights["embed.weight"], source["model.embed_tokens.weight"])
    np.testing.assert_array_equal(weights["head.weight"], source["lm_head.weight"])


def test_a_stack_of_two_dtypes_becomes_float32(tmp_path: Path) -> None:
    source = tensors(dtype=np.float16)
    name = "model.layers.1.self_attn.v_proj.weight"
    source[name] = source[name].astype(ml_dtypes.bfloat16)
    weights = read(save(tmp_path / "model", source))
    assert weights["layers.qkv.weight"].dtype == np.float32
    np.testing.assert_array_equal(weights["layers.qkv.weight"][1, 48:], source[name].astype(np.float32))


def test_rotary_buffers_and_the_copy_of_a_tied_head_are_passed_over(tmp_path: Path) -> None:
    source = tensors()
    source["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    weights = read(save(tmp_path / "model", source, tie_word_embeddings=True))
    assert "head.weight" not in weights


def test_the_text_part_of_a_vision_model_is_read_under_both_of_its_names(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden" / "gemma3"
    config = json.loads((golden / "config.json").read_text())
    plain = load_file(golden / "model.safetensors")
    expected = read(golden)
    for prefix in ("language_model.model.", "model.language_model."):
        directory = tmp_path / prefix
        directory.mkdir()
        source = {name.replace("model.", prefix, 1): tensor for name, tensor in plain.items()}
        source["vision_tower.embeddings.weight"] = np.ones((2, 2), np.float32)
        save_file(source, directory / "model.safetensors")
        outer = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": config, "eos_token_id": [1, 106]}
        (directory / "config.json").write_text(json.dumps(outer))
        weights = read(directory)
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            np.testing.assert_array_equal(weight, expected[name])


def test_gemma_norms_are_whole_multipliers_not_rounded_to_the_stored_dtype() -> None:
    golden = Path(__file__).parents[1] / "golden" / "gemma3"
    stored = load_file(golden / "model.safetensors")["model.norm.weight"]
    assert stored.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read(golden)["final_norm.weight"], 1 + stored.astype(np.float32))


def test_generation_config_adds_end_tokens(tmp_path: Path) -> None:
    directory = save(tmp_path / "model", tensors())
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    config, _ = hf.read_config(directory)
    assert config.eos_ids == (2, 7)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("settings", "theta", "scaling"),
    [
        ({}, 10_000.0, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 10_000.0, RopeScaling(kind="linear", factor=2.0)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, RopeScaling(kind="llama3", factor=32.0)),
        ({"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}, 5e5, RopeScaling(kind="llama3", factor=32.0)),
    ],
)
def test_rope_is_read_in_its_old_and_its_new_form(settings: Any, theta: float, scaling: RopeScaling | None) -> None:
    config = config_of(**settings)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


def test_windows_are_those_that_transformers_would_use() -> None:
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert config_of(**mistral).sliding_window == 4096
    assert config_of(**mistral, sliding_window=None).sliding_window is None
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "max_window_layers": 1}
    assert config_of(**qwen, use_sliding_window=False).sliding_window is None
    windowed = config_of(**qwen, use_sliding_window=True)
    assert (windowed.sliding_window, windowed.layer_is_global) == (8, (True, False))
    gemma = config_of(
        architectures=["Gemma3ForCausalLM"], num_hidden_layers=7, sliding_window=16, tie_word_embeddings=None
    )
    assert gemma.layer_is_global == (False,) * 5 + (True, False)
    assert (gemma.rope_theta, gemma.rope_local_theta, gemma.tie_embeddings) == (1e6, 1e4, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "architecture MixtralForCausalLM is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers must be an integer, got 'two'"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
    ],
)
def test_a_configuration_that_is_not_supported_is_refused_by_name(tmp_path: Path, changes: Any, message: str) -> None:
    directory = save(tmp_path / "model", tensors(), **changes)
    with pytest.raises(ValueError, match=message) as caught:
        hf.read_config(directory)
    assert "\n" not in str(caught.value)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    source = tensors()
    removed = {n: t for n, t in source.items() if n != "model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(ValueError, match=r"missing tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        read(save(tmp_path / "missing", removed))
    with pytest.raises(ValueError, match=r"unexpected tensors: model\.layers\.2\.input_layernorm"):
        read(save(tmp_path / "more", tensors(layers=3)))
    wrong = source | {"model.layers.0.self_attn.k_proj.weight": np.ones((8, 32), np.float32)}
    with pytest.raises(ValueError, match=r"k_proj\.weight has shape \[8, 32\], the configuration says \[16, 32\]"):
        read(save(tmp_path / "shape", wrong))
    integers = source | {"lm_head.weight": np.ones((48, 32), np.int8)}
    with pytest.raises(ValueError, match=r"lm_head\.weight has dtype I8"):
        read(save(tmp_path / "dtype", integers))


def test_files_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    directory = save(tmp_path / "model", tensors())
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a complete safetensors file"):
        read(directory)
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file \(pytorch_model\.bin is not read"):
        read(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        read(directory)
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        load(str(directory))


# VmHWM rather than ru_maxrss: that one starts a child at the peak of its parent.
MEASURE = """
    import sys
    from pathlib import Path
    from spear_jax.models import hf
    from spear_jax.models.decoder import Decoder

    def peak():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    def build(directory):
        config, family = hf.read_config(directory)
        weights = hf.read_weights(directory, config, family)
        held = sum(w.nbytes for w in weights.values())
        return Decoder.from_weights(config, weights, dtype="bfloat16"), held

    large, small = map(Path, sys.argv[1:])
    build(small)
    before = peak()
    model, held = build(large)
    print(peak() - before, held)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_peak_memory_is_the_model_and_its_largest_tensor(tmp_path: Path) -> None:
    wide = {"vocab_size": 40_000, "hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 12}
    shapes = {name: tensor.shape for name, tensor in tensors(layers=12).items()}
    scale = {48: 40_000, 32: 512, 64: 4096, 16: 256}
    source = {n: np.ones([scale[x] for x in shape], ml_dtypes.bfloat16) for n, shape in shapes.items()}
    directory = save(tmp_path / "large", source, **wide)
    shard(directory, source)
    small = save(tmp_path / "small", tensors())
    total, largest = sum(t.nbytes for t in source.values()), max(t.nbytes for t in source.values())
    del source
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(directory), str(small)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, held = map(int, result.stdout.split())
    slack = 12 * 2**20
    assert held == pytest.approx(total, rel=0.01)
    assert total > 200e6
    assert peak <= total + largest + slack, f"peak {peak / 1e6:.0f} MB for {total / 1e6:.0f} + {largest / 1e6:.0f} MB"
