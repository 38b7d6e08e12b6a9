import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spear_jax.models import hf
from spear_jax.models.assembly import slots
from spear_jax.models.decoder import MODULES, Decoder
from spear_jax.models.families import HF_FAMILIES
from spear_jax.models.int4_formats import read_format
from spear_jax.models.quantize import quantize_model
from spear_jax.models.settings import Settings
from spear_jax.quant import QuantSpec, QuantTensor
from spear_jax.testing import assert_close

GOLDEN = Path(__file__).parents[1] / "golden" / "int4"
SOURCE = Path(__file__).parents[1] / "golden" / "llama"
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}},
    "ignore": ["lm_head"],
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 256, (2, 16)), jnp.int32)


def load(directory: Path) -> Decoder:
    config, family = hf.read_config(directory)
    return Decoder.from_weights(config, hf.read_weights(directory, config, family), dtype=jnp.float32)


def weight_of(model: Decoder, name: str) -> QuantTensor:
    weight = getattr(model.layers, name).weight
    assert isinstance(weight, QuantTensor)
    return weight


@pytest.mark.parametrize("name", ["awq", "gptq", "gptq-asymmetric", "compressed-channel", "compressed-asymmetric"])
def test_what_the_tools_write_is_read_to_the_last_bit(name: str) -> None:
    """Codes, scales and zero points as the tools themselves dequantize them; logits of Transformers."""
    golden = np.load(GOLDEN / name / "golden.npz")
    digests = json.loads(str(golden["meta"]))["weights"]
    model = load(GOLDEN / name)
    found = {}
    for foreign, slot in slots(model.config, HF_FAMILIES["LlamaForCausalLM"].names, source="hf").items():
        if (module := foreign.removesuffix(".weight")) in digests:
            whole = np.asarray(weight_of(model, slot.key.split(".")[1]).dequantize())[slot.layer]
            part = whole if slot.start is None else whole[slot.start : slot.start + slot.shape[0]]
            found[module] = hashlib.sha256(np.ascontiguousarray(part, "<f4").tobytes()).hexdigest()
    assert found == digests
    for module in MODULES:
        assert (weight_of(model, module).zero is None) == (name in ("gptq", "compressed-channel"))
        assert weight_of(model, module).scale.dtype == ("bfloat16" if name == "compressed-channel" else "float16")
    hidden, _ = model(jnp.asarray(golden["tokens"]))
    assert_close(model.logits(hidden), golden["logits"], relative=1e-5)


# ------------------------------------------------------------------------- a writer, from the formats' descriptions


def pack(values: np.ndarray, axis: int, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """Pack numbers in 0..15, eight to an int32 along an axis, nibble i being number order[i]."""
    values = np.moveaxis(values.astype(np.uint32), axis, 0)
    words = np.zeros((len(values) // 8, *values.shape[1:]), np.uint32)
    for word in range(len(words)):
        for i, number in enumerate(order):
            words[word] |= values[8 * word + number] << np.uint32(4 * i)
    return np.ascontiguousarray(np.moveaxis(words, 0, axis)).view(np.int32)


def parts_of(tensor: QuantTensor, settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """Give the tensors that a format keeps a weight [N, K] in."""
    codes = np.asarray(tensor.codes()) + 8
    scale = np.asarray(tensor.scale)
    zero = np.full(scale.shape, 8) if tensor.zero is None else np.asarray(tensor.zero) + 8
    k, groups = codes.shape[1], scale.shape[1]
    match settings["quant_method"]:
        case "awq":
            order = (0, 2, 4, 6, 1, 3, 5, 7)
            return {"qweight": pack(codes.T, 1, order), "qzeros": pack(zero.T, 1, order), "scales": scale.T}
        case "gptq":
            shift = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
            index = (np.arange(k) // (k // groups)).astype(np.int32)
            return {
                "qweight": pack(codes.T, 0), "qzeros": pack(zero.T - shift, 1), "scales": scale.T, "g_idx": index
            }  # fmt: skip
        case _:
            found = {"weight_packed": pack(codes, 1), "weight_scale": scale, "weight_shape": np.asarray(codes.shape)}
            return found if tensor.zero is None else found | {"weight_zero_point": pack(zero, 0)}


def write(directory: Path, model: Decoder, settings: dict[str, Any], *, source: Path = SOURCE) -> Path:
    """Write the int4 linears of a model in a format, everything else as it is in `source`."""
    directory.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    tensors = load_file(source / "model.safetensors")
    for name, slot in slots(model.config, HF_FAMILIES["LlamaForCausalLM"].names, source="hf").items():
        module = slot.key.split(".")[1]
        if module in MODULES:
            del tensors[name]
            rows = slice(slot.start, None if slot.start is None else slot.start + slot.shape[0])
            layer = jax.tree.map(lambda leaf, i=slot.layer, r=rows: leaf[i][r], weight_of(model, module))
            for suffix, tensor in parts_of(layer, settings).items():
                tensors[f"{name.removesuffix('.weight')}.{suffix}"] = np.ascontiguousarray(tensor)
    save_file(tensors, directory / "model.safetensors")
    return directory


def rounded(*, group_size: int = 32, symmetric: bool = True, dtype: Any = np.float16) -> Decoder:
    """Round the tiny Llama to nearest, with scales of a type that the tools write."""
    model = quantize_model(load_dense(), QuantSpec(group_size=group_size, symmetric=symmetric))
    for name in MODULES:
        linear = getattr(model.layers, name)
        weight = linear.weight
        zero = None if weight.zero is None else jnp.maximum(weight.zero, -7)
        linear.weight = QuantTensor(packed=weight.packed, scale=weight.scale.astype(dtype), zero=zero)
    return model


def load_dense() -> Decoder:
    config, family = hf.read_config(SOURCE)
    return Decoder.from_weights(config, hf.read_weights(SOURCE, config, family), dtype=jnp.float32)


def compressed(**weights: Any) -> dict[str, Any]:
    return COMPRESSED | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS | weights}}}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "awq": (AWQ, {"symmetric": False}),
    "awq symmetric per channel": (AWQ | {"group_size": -1}, {"group_size": -1}),
    "gptq": (GPTQ, {}),
    "gptq per channel": (GPTQ | {"group_size": -1}, {"group_size": -1}),
    "gptq asymmetric": (GPTQ | {"sym": False}, {"symmetric": False}),
    "gptq v2 asymmetric": (GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}, {"symmetric": False}),
    "compressed": (compressed(), {"dtype": ml_dtypes.bfloat16}),
    "compressed asymmetric": (compressed(symmetric=False), {"symmetric": False, "dtype": np.float32}),
    "compressed per channel": (compressed(strategy="channel", group_size=None), {"group_size": -1}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_written_in_a_format_comes_back_as_it_was(case: str, tmp_path: Path) -> None:
    settings, how = CASES[case]
    model = rounded(**how)
    again = load(write(tmp_path / "model", model, settings))
    for name in MODULES:
        expected, found = weight_of(model, name), weight_of(again, name)
        np.testing.assert_array_equal(found.packed, expected.packed)
        np.testing.assert_array_equal(found.scale, expected.scale)
        assert found.scale.dtype == expected.scale.dtype
        assert (found.zero is None) == (expected.zero is None)
        if expected.zero is not None:
            np.testing.assert_array_equal(found.zero, expected.zero)
    states = [jax.jit(lambda m: m(TOKENS)[0])(m) for m in (model, again)]
    np.testing.assert_array_equal(*states)


def test_parts_may_lie_in_different_files_and_types(tmp_path: Path) -> None:
    model = rounded()
    directory = write(tmp_path / "model", model, GPTQ)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.scales"] = tensors["model.layers.1.mlp.up_proj.scales"].astype(np.float32)
    tensors["model.layers.1.mlp.up_proj.bias"] = np.zeros(96, np.float16)  # Written by AutoGPTQ where there is none.
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    for number in range(2):
        save_file({name: tensors[name] for name in names[number::2]}, directory / f"{number}.safetensors")
    weight_map = {name: f"{i % 2}.safetensors" for i, name in enumerate(names)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    again = load(directory)
    for name in MODULES:
        np.testing.assert_array_equal(weight_of(again, name).dequantize(), weight_of(model, name).dequantize())
    # The scales of gate and up differ in type: the stack has the one that holds both.
    assert weight_of(again, "gate_up").scale.dtype == np.float32
    assert weight_of(again, "down").scale.dtype == np.float16


def test_a_quantized_model_is_not_rounded_again() -> None:
    with pytest.raises(ValueError, match="qkv is int4 already"):
        quantize_model(load(GOLDEN / "awq"), QuantSpec())


DOWN = "model.layers.1.mlp.down_proj"


def no_quantized_down(tensors: dict[str, np.ndarray]) -> None:
    for suffix in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{DOWN}.{suffix}"]
    tensors[f"{DOWN}.weight"] = np.ones((64, 96), np.float16)


def act_order(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{DOWN}.g_idx"] = tensors[f"{DOWN}.g_idx"][::-1].copy()


def eight_bits(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{DOWN}.qweight"] = np.zeros((24, 64), np.int32)


def wrapped_zero(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{DOWN}.qzeros"][0, 0] = -1


def no_scales(tensors: dict[str, np.ndarray]) -> None:
    del tensors[f"{DOWN}.scales"]


def coarse_scales(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{DOWN}.scales"] = tensors[f"{DOWN}.scales"][:1].copy()


def float_codes(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{DOWN}.qweight"] = tensors[f"{DOWN}.qweight"].astype(np.float32)


def a_bias(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{DOWN}.bias"] = np.ones(64, np.float16)


def a_quantized_head(tensors: dict[str, np.ndarray]) -> None:
    tensors["lm_head.qweight"] = np.zeros((8, 256), np.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_quantized_down, r"down_proj\.weight are not int4: models with some linears .* unquantized"),
        (act_order, r"down_proj\.g_idx: columns of a group are not neighbours \(desc_act"),
        (eight_bits, r"down_proj\.qweight has shape \[24, 64\], expected \[12, 64\]"),
        (wrapped_zero, r"down_proj\.qzeros: a zero point is stored as 15"),
        (no_scales, r"missing tensors: model\.layers\.1\.mlp\.down_proj\.scales"),
        (coarse_scales, r"down_proj\.scales has shape \[1, 64\], expected \[3, 64\]"),
        (float_codes, r"down_proj\.qweight has dtype F32, expected one of I32, I64"),
        (a_bias, r"unexpected tensors: model\.layers\.1\.mlp\.down_proj\.bias"),
        (a_quantized_head, r"unexpected tensors: lm_head\.qweight"),
    ],
)
def test_tensors_that_cannot_be_read_as_they_are_meant_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    directory = write(tmp_path / "model", rounded(), GPTQ)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        load(directory)
    assert str(directory) in str(caught.value)


def test_a_shape_that_contradicts_the_configuration_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "model", rounded(), COMPRESSED)
    tensors = load_file(directory / "model.safetensors")
    tensors[f"{DOWN}.weight_shape"] = np.asarray([64, 128])
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"down_proj\.weight_shape says \[64, 128\], the configuration says \[64, 96\]"
    ):
        load(directory)


@pytest.mark.parametrize(
    ("index", "refused"), [(np.arange(96) // 32, False), (np.full(96, -1), False), (np.arange(96) % 3, True)]
)
def test_an_index_of_groups_may_say_that_there_is_no_order(tmp_path: Path, index: np.ndarray, refused: bool) -> None:
    model = rounded()
    directory = write(tmp_path / "model", model, COMPRESSED)
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {f"{DOWN}.weight_g_idx": index.astype(np.int32)}, directory / "model.safetensors")
    if refused:
        with pytest.raises(ValueError, match=r"weight_g_idx: columns of a group are not neighbours"):
            load(directory)
    else:
        np.testing.assert_array_equal(weight_of(load(directory), "down").packed, weight_of(model, "down").packed)


def test_groups_that_do_not_divide_the_inputs_are_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "model", rounded(), GPTQ)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["group_size"] = 128
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"q_proj\.weight has 64 inputs: expected .* groups of 128 divide"):
        load(directory)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes"}, r"quant_method = 'bitsandbytes' is not supported \(only awq, gptq"),
        ("int4", "quant_method = None is not supported"),
        (AWQ | {"bits": 8}, "bits = 8 is not supported"),
        (AWQ | {"version": "gemv"}, "version = 'gemv' is not supported"),
        (AWQ | {"group_size": 16}, "group_size must be -1 or a multiple of 32, got 16"),
        (GPTQ | {"bits": 3}, "bits = 3 is not supported"),
        (GPTQ | {"bits": None}, "bits is missing"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin' is not supported"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format = True is not supported"),
        (COMPRESSED | {"format": "marlin-24"}, "format = 'marlin-24' is not supported"),
        (COMPRESSED | {"format": "int-quantized"}, "format = 'int-quantized' is not supported"),
        (COMPRESSED | {"config_groups": {}}, "config_groups is missing or empty"),
        (COMPRESSED | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (compressed(num_bits=8), "num_bits = 8 is not supported"),
        (compressed(type="float"), "type = 'float' is not supported"),
        (compressed(strategy="tensor"), "strategy = 'tensor' is not supported"),
        (
            COMPRESSED | {"config_groups": {"g": {"weights": WEIGHTS, "input_activations": {"num_bits": 8}}}},
            "input_activations",
        ),
        (
            COMPRESSED | {"config_groups": {"a": {"weights": WEIGHTS}, "b": {"weights": WEIGHTS | {"group_size": 64}}}},
            "config_groups a, b differ",
        ),
    ],
)
def test_other_formats_are_refused_by_name(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_format(Settings({"quantization_config": settings}, source="model/config.json"))
    assert str(caught.value).startswith("model/config.json: quantization_config")


def test_a_model_without_quantization_has_no_format() -> None:
    assert hf.read_int4_format(SOURCE) is None
