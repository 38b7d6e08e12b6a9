import struct
from pathlib import Path
from typing import Any

import gguf as reference
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from spear_jax.config import RopeScaling
from spear_jax.models import gguf, hf, load
from spear_jax.models.decoder import Decoder
from spear_jax.testing import assert_close

GOLDEN = Path(__file__).parents[1] / "golden"
QUANTIZABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
K_QUANTS = ("Q4_K", "Q5_K", "Q6_K")
KINDS = (*QUANTIZABLE, *K_QUANTS)
# Bytes of a block that hold float16 scales; other bytes may be anything.
K_SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}

VOCAB, WIDTH, HEADS, KV_HEADS, FF, LAYERS = 40, 256, 4, 2, 256, 2
HEAD = WIDTH // HEADS
SHAPES = {
    "token_embd.weight": (VOCAB, WIDTH),
    "output_norm.weight": (WIDTH,),
    **{
        f"blk.{i}.{name}.weight": shape
        for i in range(LAYERS)
        for name, shape in {
            "attn_norm": (WIDTH,),
            "ffn_norm": (WIDTH,),
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (KV_HEADS * HEAD, WIDTH),
            "attn_v": (KV_HEADS * HEAD, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (FF, WIDTH),
            "ffn_up": (FF, WIDTH),
            "ffn_down": (WIDTH, FF),
        }.items()
    },
}


def encode(shape: tuple[int, ...], kind: GGMLQuantizationType, rng: np.random.Generator) -> np.ndarray:
    """Draw a tensor as a file of this type holds it."""
    if kind.name not in K_QUANTS:
        return reference.quants.quantize(rng.standard_normal(shape).astype(np.float32), kind)
    block, size = GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    for at in K_SCALES[kind.name]:
        scales = rng.uniform(0.001, 0.01, raw.shape[:-1]).astype(np.float16)
        raw[..., at : at + 2] = scales[..., None].view(np.uint8)
    return raw.reshape(*shape[:-1], -1)


def write(
    path: Path,
    kind: str = "F32",
    *,
    arch: str = "llama",
    shapes: dict[str, tuple[int, ...]] = SHAPES,
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    biases: bool = False,
) -> Path:
    """Write a small model whose matrices are of type `kind`."""
    rng = np.random.default_rng(0)
    writer = reference.GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(ord("!") + i) for i in range(VOCAB)])
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["! !"])
    writer.add_eos_token_id(2)
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, *value)
    for name, shape in shapes.items():
        stored = GGMLQuantizationType[kind] if len(shape) > 1 else GGMLQuantizationType.F32
        writer.add_tensor(name, encode(shape, stored, rng), raw_dtype=stored)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path: Path, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    file = gguf.GGUFFile.open(path)
    config, family = gguf.read_config(file)
    return gguf.read_weights(file, config, family, dtype=np.dtype(dtype))


def dequantized(path: Path) -> dict[str, np.ndarray]:
    """Read every tensor with the gguf package's own reader."""
    tensors = reference.GGUFReader(path).tensors
    return {t.name: reference.quants.dequantize(np.array(t.data), t.tensor_type) for t in tensors}


def half_split(rows: np.ndarray) -> np.ndarray:
    """Undo llama.cpp's interleaving of q and k, head by head and element by element."""
    result = np.empty_like(rows)
    for head in range(rows.shape[0] // HEAD):
        for i in range(HEAD // 2):
            result[head * HEAD + i] = rows[head * HEAD + 2 * i]
            result[head * HEAD + HEAD // 2 + i] = rows[head * HEAD + 2 * i + 1]
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_each_type_is_dequantized_into_its_place(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "m.gguf", kind)
    expected, weights = dequantized(path), read(path)
    assert np.isfinite(expected["token_embd.weight"]).all()
    np.testing.assert_array_equal(weights["embed.weight"], expected["token_embd.weight"])
    for i in range(LAYERS):
        q, k, v, o, gate, up, down, norm = (
            expected[f"blk.{i}.{name}.weight"]
            for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "ffn_norm")
        )
        np.testing.assert_array_equal(
            weights["layers.qkv.weight"][i], np.concatenate([half_split(q), half_split(k), v])
        )
        np.testing.assert_array_equal(weights["layers.o.weight"][i], o)
        np.testing.assert_array_equal(weights["layers.gate_up.weight"][i], np.concatenate([gate, up]))
        np.testing.assert_array_equal(weights["layers.down.weight"][i], down)
        np.testing.assert_array_equal(weights["layers.mlp_norm.weight"][i], norm)


def test_all_types_of_the_list_are_tested() -> None:
    assert {kind.name for kind in gguf.TENSOR_TYPES} == set(KINDS)


def test_matrices_take_the_dtype_asked_for_and_norms_stay_float32(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "Q8_0")
    weights, exact = read(path, ml_dtypes.bfloat16), read(path)
    np.testing.assert_array_equal(weights["embed.weight"], exact["embed.weight"].astype(ml_dtypes.bfloat16))
    assert weights["final_norm.weight"].dtype == np.float32


def test_a_tensor_longer_than_a_chunk_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.gguf", "Q5_1")
    whole = read(path)
    monkeypatch.setattr(gguf, "_CHUNK", 7 * WIDTH)
    monkeypatch.setattr(gguf, "_GROUP", 3)
    for name, weight in read(path).items():
        np.testing.assert_array_equal(weight, whole[name])


def test_the_same_model_in_both_formats_gives_the_same_logits(tmp_path: Path) -> None:
    """The golden Llama, written as llama.cpp's converter writes it, q and k interleaved."""
    directory = GOLDEN / "llama"
    config, family = hf.read_config(directory)
    weights = hf.read_weights(directory, config, family)
    expected, _ = Decoder.from_weights(config, dict(weights), dtype=jnp.float32)(jnp.arange(9)[None])

    writer = reference.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def add(name: str, weight: np.ndarray) -> None:
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(weight.astype(np.float32)))

    def interleave(rows: np.ndarray) -> np.ndarray:
        return rows.reshape(-1, 2, config.head_dim // 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)

    add("token_embd", weights["embed.weight"])
    add("output_norm", weights["final_norm.weight"])
    for i in range(config.num_layers):
        qkv, gate_up = weights["layers.qkv.weight"][i], weights["layers.gate_up.weight"][i]
        add(f"blk.{i}.attn_q", interleave(qkv[:q]))
        add(f"blk.{i}.attn_k", interleave(qkv[q : q + kv]))
        add(f"blk.{i}.attn_v", qkv[q + kv :])
        add(f"blk.{i}.attn_output", weights["layers.o.weight"][i])
        add(f"blk.{i}.ffn_gate", gate_up[: config.intermediate_size])
        add(f"blk.{i}.ffn_up", gate_up[config.intermediate_size :])
        add(f"blk.{i}.ffn_down", weights["layers.down.weight"][i])
        add(f"blk.{i}.attn_norm", weights["layers.input_norm.weight"][i])
        add(f"blk.{i}.ffn_norm", weights["layers.mlp_norm.weight"][i])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = gguf.GGUFFile.open(tmp_path / "m.gguf")
    read_config, family = gguf.read_config(file)
    model = Decoder.from_weights(
        read_config, gguf.read_weights(file, read_config, family, dtype=np.dtype(np.float32)), dtype=jnp.float32
    )
    actual, _ = model(jnp.arange(9)[None])
    assert_close(actual, expected, relative=1e-6)


def test_qwen_has_biases_no_interleaving_and_may_hold_a_head_of_its_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = {"attn_q": WIDTH, "attn_k": KV_HEADS * HEAD, "attn_v": KV_HEADS * HEAD}
    extra = {
        f"blk.{i}.{name}.bias": rng.standard_normal(size).astype(np.float32)
        for i in range(LAYERS)
        for name, size in rows.items()
    }
    path = write(tmp_path / "tied.gguf", arch="qwen2", extra=extra)
    assert gguf.read_config(gguf.GGUFFile.open(path))[0].tie_embeddings
    extra["output.weight"] = rng.standard_normal((VOCAB, WIDTH)).astype(np.float32)
    path = write(tmp_path / "untied.gguf", arch="qwen2", extra=extra)
    config, _ = gguf.read_config(gguf.GGUFFile.open(path))
    weights, expected = read(path), dequantized(path)
    assert (config.tie_embeddings, config.qkv_bias) == (False, True)
    np.testing.assert_array_equal(weights["head.weight"], extra["output.weight"])
    np.testing.assert_array_equal(weights["layers.qkv.weight"][1, :WIDTH], expected["blk.1.attn_q.weight"])
    np.testing.assert_array_equal(weights["layers.qkv.bias"][1, :WIDTH], extra["blk.1.attn_q.bias"])
    np.testing.assert_array_equal(weights["layers.qkv.bias"][0, -KV_HEADS * HEAD :], extra["blk.0.attn_v.bias"])


def test_rope_factors_and_linear_scaling_are_read(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, HEAD // 2, dtype=np.float32)
    path = write(tmp_path / "factors.gguf", extra={"rope_freqs.weight": factors})
    config, _ = gguf.read_config(gguf.GGUFFile.open(path))
    assert config.rope_scaling == RopeScaling(kind="factors", factors=tuple(map(float, factors)))
    read(path)

    types = reference.GGUFValueType
    linear = {
        "llama.rope.scaling.type": ("linear", types.STRING),
        "llama.rope.scaling.factor": (4.0, types.FLOAT32),
    }
    config, _ = gguf.read_config(gguf.GGUFFile.open(write(tmp_path / "linear.gguf", metadata=linear)))
    assert config.rope_scaling == RopeScaling(kind="linear", factor=4.0)


def test_values_of_every_metadata_type_are_read_as_the_reference_reads_them(tmp_path: Path) -> None:
    types = reference.GGUFValueType
    metadata = {
        "x.uint8": (200, types.UINT8),
        "x.int8": (-100, types.INT8),
        "x.uint16": (60_000, types.UINT16),
        "x.int16": (-30_000, types.INT16),
        "x.int32": (-5, types.INT32),
        "x.uint64": (2**63, types.UINT64),
        "x.int64": (-(2**62), types.INT64),
        "x.float64": (0.1, types.FLOAT64),
        "x.bool": (True, types.BOOL),
        "x.text": ("¿qué?", types.STRING),
        "x.strings": (["a", "", "ü"], types.ARRAY),
        "x.integers": ([1, -2, 3], types.ARRAY),
        "x.floats": ([0.5, -1.5], types.ARRAY),
        "x.flags": ([True, False], types.ARRAY),
    }
    path = write(tmp_path / "m.gguf", metadata=metadata)
    actual = gguf.GGUFFile.open(path).metadata
    for key, field in reference.GGUFReader(path).fields.items():
        if not key.startswith("GGUF."):
            assert actual[key] == field.contents(), key


def test_a_file_cut_anywhere_is_refused_in_one_line(tmp_path: Path) -> None:
    data = write(tmp_path / "m.gguf", "Q4_0").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (*range(0, 400, 13), *range(400, len(data) - 40, 4999), len(data) - 40):
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf: (truncated|not a GGUF file)") as caught:
            load(str(cut))
        assert "\n" not in str(caught.value)


def test_files_that_are_not_gguf_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match="not a GGUF file: it starts with b'PK"):
        gguf.GGUFFile.open(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(100))
    with pytest.raises(ValueError, match="GGUF version 1 is not supported"):
        gguf.GGUFFile.open(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 99))
    with pytest.raises(ValueError, match="damaged header: unknown value type 99"):
        gguf.GGUFFile.open(path)
    with pytest.raises(FileNotFoundError, match=r"none\.gguf: no such file"):
        gguf.GGUFFile.open(tmp_path / "none.gguf")


def test_what_is_not_supported_is_named(tmp_path: Path) -> None:
    types = reference.GGUFValueType

    def refused(message: str, **arguments: Any) -> None:
        with pytest.raises(ValueError, match=message):
            read(write(tmp_path / "m.gguf", **arguments))

    refused("architecture 'falcon' is not supported", arch="falcon")
    refused("rope.scaling.type = 'yarn' is not supported", metadata={"llama.rope.scaling.type": ("yarn", types.STRING)})
    refused("expert_count = 8 is not supported", metadata={"llama.expert_count": (8, types.UINT32)})
    refused("split into 3 files", metadata={"split.count": (3, types.UINT16)})
    refused("tensor rope_freqs.weight has shape", extra={"rope_freqs.weight": np.ones(3, np.float32)})
    refused("unexpected tensors: blk.2.attn_q.weight", extra={"blk.2.attn_q.weight": np.ones((4, 4), np.float32)})
    missing = {name: shape for name, shape in SHAPES.items() if name != "blk.1.ffn_up.weight"}
    refused("missing tensors: blk.1.ffn_up.weight", shapes=missing)
    wrong = SHAPES | {"blk.1.ffn_up.weight": (FF, WIDTH // 2)}
    refused(r"blk\.1\.ffn_up\.weight has shape \[256, 128\], the configuration says \[256, 256\]", shapes=wrong)


def test_an_unsupported_tensor_type_is_named_with_its_tensor(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = reference.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((1, 84), np.uint8), raw_dtype=GGMLQuantizationType.Q2_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"tensor blk\.0\.attn_q\.weight has type Q2_K, which is not supported"):
        gguf.GGUFFile.open(path)
    data = path.read_bytes().replace(
        struct.pack("<I", GGMLQuantizationType.Q2_K) + bytes(8), struct.pack("<IQ", 999, 0)
    )
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"tensor blk\.0\.attn_q\.weight has type 999"):
        gguf.GGUFFile.open(path)
