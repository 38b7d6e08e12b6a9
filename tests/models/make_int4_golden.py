# pyright: reportMissingImports=false
r"""Make the int4 checkpoints in `tests/golden/int4` with the packing code of the tools that define their formats.

Run by hand, never by the tests, in an environment of its own: torch is no dependency of the package. AutoAWQ and
AutoGPTQ do not import under current versions of what they need, so their unpacked packages are named by folder and the
one file of each that packs a linear is taken.

    python3.11 -m venv hf && hf/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate compressed-tensors==0.20.0
    hf/bin/pip download --no-deps autoawq==0.2.9 auto-gptq==0.7.1   # then unpack both
    hf/bin/python tests/models/make_int4_golden.py --autoawq autoawq-0.2.9 --autogptq auto_gptq-0.7.1

Each folder is a checkpoint of a tiny random model as such a tool writes it, and `golden.npz`: `tokens` int32 [1, 12];
`logits` float32 [1, 12, V] of Transformers with the weights as that tool dequantizes them in float32; `meta`, JSON text
with versions and the SHA-256 of each of these weights (little-endian float32, [N, K]).
"""

import argparse
import hashlib
import importlib
import importlib.util
import json
import math
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compressed_tensors
import numpy as np
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parents[1] / "golden" / "int4"
VERSIONS = {
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "compressed_tensors": compressed_tensors.__version__,
    "autoawq": "0.2.9",
    "auto_gptq": "0.7.1",
}
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
GROUP = 32

Weights = dict[str, torch.Tensor]
"""Dequantized weights by the name of their module."""


def llama() -> transformers.PreTrainedConfig:
    """Return grouped heads and a tied head."""
    return transformers.LlamaConfig(**SHAPE)


def qwen2() -> transformers.PreTrainedConfig:
    """Return biases on q, k, v and a head of its own."""
    own = {"num_key_value_heads": 4, "tie_word_embeddings": False}
    return transformers.Qwen2Config(**{key: value for key, value in (SHAPE | own).items() if key != "head_dim"})


def gemma3() -> transformers.PreTrainedConfig:
    """Return norms that are stored less one."""
    return transformers.Gemma3TextConfig(
        **SHAPE, query_pre_attn_scalar=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    )


def random_model(config: transformers.PreTrainedConfig, seed: int) -> torch.nn.Module:
    """Return a model whose activations are of order one, with groups of weights off centre."""
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    centre = 0.0 if "gemma" in config.model_type else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                value = centre + 0.25 * noise
            elif name.endswith("bias") or "embed" in name:
                value = 0.3 * noise
            else:
                value = (noise + 0.5 * torch.randn(len(noise), 1, generator=generator)) / math.sqrt(noise.shape[1])
            parameter.copy_(value.half())
    return model


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Return the linears of the layers by name."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    found.pop("lm_head", None)
    return found


def grid(weight: torch.Tensor, *, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float16 scales and zero points in 0..15, [N, G], of min-max ranges."""
    groups = weight.reshape(len(weight), -1, GROUP)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        scale = torch.maximum(-low, high).mul(2 / 15).half()
        return scale, torch.full_like(scale, 8)
    scale = ((high - low) / 15).half()
    return scale, torch.round(-low / scale.float()).clamp(1, 15).half()


def make_awq(model: torch.nn.Module, folder: Path, package: Path) -> Weights:
    """Write a checkpoint of AutoAWQ's GEMM layout."""
    gemm = import_awq(package)
    tensors = dense_tensors(model)
    weights: Weights = {}
    for name, linear in linears(model).items():
        scales, zeros = grid(linear.weight, symmetric=False)
        packed = gemm.WQLinear_GEMM.from_linear(
            linear.half(), 4, GROUP, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
        )
        tensors |= {f"{name}.{key}": value for key, value in packed.state_dict().items()}
        scale = packed.scales.float()
        weights[name] = gemm.dequantize_gemm(packed.qweight, packed.qzeros, scale, 4, GROUP).T.contiguous()
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    write(folder, model, tensors, settings | {"modules_to_not_convert": None})
    return weights


def make_gptq(model: torch.nn.Module, folder: Path, package: Path, *, symmetric: bool) -> Weights:
    """Write a checkpoint of AutoGPTQ."""
    qlinear = import_file(package / "auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py")
    tensors = dense_tensors(model)
    weights: Weights = {}
    for name, linear in linears(model).items():
        scales, zeros = grid(linear.weight, symmetric=symmetric)
        n, k = linear.weight.shape
        packed = qlinear.QuantLinear(4, GROUP, k, n, linear.bias is not None)
        packed.pack(linear.half(), scales, zeros, None)
        tensors |= {f"{name}.{key}": value.clone() for key, value in packed.state_dict().items()}
        packed.scales = packed.scales.float()
        packed.bias = None
        weights[name] = packed(torch.eye(k)).T.contiguous()
    settings = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": symmetric}
    extra = {"damp_percent": 0.01, "static_groups": False, "true_sequential": True, "is_marlin_format": False}
    write(folder, model, tensors, settings | extra | {"model_name_or_path": None, "model_file_base_name": None})
    return weights


def make_compressed(model: torch.nn.Module, folder: Path, *, strategy: str, symmetric: bool, dtype: Any) -> Weights:
    """Write a checkpoint with the compressed-tensors library itself."""
    model.to(dtype)
    scheme: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": strategy}
    if strategy == "group":
        scheme["group_size"] = GROUP
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme}}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    weights: Weights = {}
    for name, linear in linears(model).items():
        size = GROUP if strategy == "group" else linear.weight.shape[1]
        parts = linear.weight.reshape(len(linear.weight), -1, size)
        scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), linear.quantization_scheme.weights)
        linear.weight_scale.data.copy_(scale)
        if not symmetric:
            linear.weight_zero_point.data.copy_(zero)
        state = PackedQuantizationCompressor.compress(dict(linear.state_dict()), linear.quantization_scheme)
        state["weight_scale"] = state["weight_scale"].float()
        weights[name] = PackedQuantizationCompressor.decompress(state, linear.quantization_scheme)["weight"]
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return weights


def dense_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return what stays float16: embedding, head, norms."""
    names = set(linears(model))
    state = {name: tensor.half() for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in names}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def write(folder: Path, model: torch.nn.Module, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    """Write config.json and model.safetensors."""
    folder.mkdir(parents=True)
    model.config.dtype = "float16"
    model.config.architectures = [type(model).__name__]
    values = model.config.to_dict() | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True, default=str) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def import_awq(package: Path) -> types.ModuleType:
    """Import AutoAWQ's file with the GEMM layout, without the package's own imports."""
    for name in ("awq", "awq.modules", "awq.modules.linear"):
        stub = types.ModuleType(name)
        stub.__path__ = [str(package / name.replace(".", "/"))]
        sys.modules[name] = stub
    return importlib.import_module("awq.modules.linear.gemm")


def import_file(path: Path) -> types.ModuleType:
    """Import one file by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(name: str, config: transformers.PreTrainedConfig, seed: int, packer: Callable[..., Weights]) -> None:
    """Write one checkpoint and what Transformers computes with its weights."""
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    with torch.no_grad():
        weights = packer(random_model(config, seed), folder)
    config.dtype = "float32"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    stored = {key: tensor.float() for key, tensor in load_file(folder / "model.safetensors").items()}
    state = {key: stored[key] for key in model.state_dict() if key in stored}
    state |= {f"{key}.weight": weight for key, weight in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    tokens = torch.randint(3, config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        logits = model(input_ids=tokens, use_cache=False).logits.numpy()
    digests = {
        key: hashlib.sha256(weight.numpy().astype("<f4").tobytes()).hexdigest() for key, weight in weights.items()
    }
    meta = json.dumps({"versions": VERSIONS, "seed": seed, "weights": digests})
    arrays: dict[str, Any] = {"tokens": tokens.numpy().astype(np.int32), "logits": logits, "meta": np.array(meta)}
    np.savez_compressed(folder / "golden.npz", **arrays)
    print(name, sum(file.stat().st_size for file in folder.iterdir()), "bytes, logits", logits.std().round(2))


def main() -> None:
    """Make all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoawq", type=Path, required=True)
    parser.add_argument("--autogptq", type=Path, required=True)
    options = parser.parse_args()
    make("awq", qwen2(), 0, lambda model, folder: make_awq(model, folder, options.autoawq))
    for name, symmetric in (("gptq", True), ("gptq-asymmetric", False)):
        make(name, llama(), 1, lambda m, f, s=symmetric: make_gptq(m, f, options.autogptq, symmetric=s))
    for name, config, strategy, symmetric, dtype in (
        ("compressed-channel", gemma3(), "channel", True, torch.bfloat16),
        ("compressed-asymmetric", llama(), "group", False, torch.float16),
    ):
        make(
            name,
            config,
            2,
            lambda m, f, g=strategy, s=symmetric, d=dtype: make_compressed(m, f, strategy=g, symmetric=s, dtype=d),
        )


if __name__ == "__main__":
    main()
