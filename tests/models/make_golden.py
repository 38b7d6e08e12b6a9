# pyright: reportMissingImports=false
r"""Make the golden files in `tests/golden` from Hugging Face's PyTorch implementation, independent of this package.

Run by hand, never by the tests, in an environment of its own: torch is no dependency of the package.

    python3.11 -m venv hf && hf/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate gguf==0.19.0 safetensors
    hf/bin/python tests/models/make_golden.py tiny
    hf/bin/python tests/models/make_golden.py real smollm2-135m SmolLM2-135M-Instruct.Q4_1.gguf \
        --text wikitext2_test.txt --windows 6 --length 24 --full
    hf/bin/python tests/models/make_golden.py real gemma-3-270m gemma-3-270m.gguf \
        --text wikitext2_test.txt --windows 6
    hf/bin/python tests/models/make_golden.py real qwen2.5-coder-0.5b qwen2.5-coder-0.5b-instruct.gguf \
        --text wikitext2_test.txt --windows 6

`tests/golden/README.md` explains the files and the keys of each `golden.npz`.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers

log = logging.getLogger("make_golden")

GOLDEN = Path(__file__).parents[1] / "golden"
VERSIONS = {
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "tokenizers": tokenizers.__version__,
    "gguf": importlib.metadata.version("gguf"),
    "numpy": np.__version__,
}


# ---------------------------------------------------------------------------------------------- recording


def record(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """Run `model` on `tokens` [B, T] and return hidden [L+1, B, T, D], final_norm [B, T, D] and logits [B, T, V].

    Hooks are used because `output_hidden_states` never shows the last layer before the final norm. The embedding, at
    index 0, is what enters the first layer, hence after Gemma's scaling.
    """
    hidden: list[torch.Tensor] = []

    def enter_first(_: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])

    def leave(_: torch.nn.Module, __: tuple, output: Any) -> None:
        hidden.append(output[0] if isinstance(output, tuple) else output)

    layers = model.model.layers
    hooks = [layers[0].register_forward_pre_hook(enter_first, with_kwargs=True)]
    hooks += [layer.register_forward_hook(leave) for layer in [*layers, model.model.norm]]
    try:
        with torch.inference_mode():
            logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    *states, final_norm = hidden
    arrays = {"hidden": torch.stack(states), "final_norm": final_norm, "logits": logits}
    for name, array in arrays.items():
        if array.dtype != torch.float32 or not bool(torch.isfinite(array).all()):
            raise AssertionError(f"{name}: {array.dtype}, finite: {bool(torch.isfinite(array).all())}")
    return {name: array.numpy() for name, array in arrays.items()}


def save_npz(folder: Path, arrays: dict[str, np.ndarray], **meta: Any) -> None:
    """Write `golden.npz`, the versions and `meta` as JSON text under the key `meta`."""
    path = folder / "golden.npz"
    contents: dict[str, Any] = {"meta": np.array(json.dumps({"versions": VERSIONS, **meta})), **arrays}
    np.savez_compressed(path, **contents)
    log.info("%s: %d bytes %s", path, path.stat().st_size, {k: (v.shape, str(v.dtype)) for k, v in arrays.items()})


# ---------------------------------------------------------------------------------------------- tiny random models


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny:
    """One tiny random checkpoint: its config, how it is stored, and the same config in the keys of transformers 4."""

    config: transformers.PreTrainedConfig
    dtype: torch.dtype
    legacy: dict[str, Any]
    shards: int = 1


def tiny_models() -> dict[str, Tiny]:
    """Return the tiny checkpoints by name: each family once in its plain form, and once for each odd case."""
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    theta: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0}
    # Wavelengths at head dim 16 and theta 10,000 are 6, 20, 63, 199, ...: each of llama3's three bands is met
    # (shorter than 64 / 4 stays, longer than 64 / 1 is divided by 8, between them it is blended).
    llama3: dict[str, Any] = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    linear: dict[str, Any] = {"rope_type": "linear", "factor": 4.0}
    legacy_theta = {"rope_theta": 10_000.0, "rope_scaling": None}
    return {
        "llama": Tiny(
            config=transformers.LlamaConfig(
                **dict(shape, hidden_size=64),
                rope_parameters=theta,
                rms_norm_eps=1e-5,
                tie_word_embeddings=True,
            ),
            dtype=torch.bfloat16,
            legacy=legacy_theta,
        ),
        "llama3-rope": Tiny(
            config=transformers.LlamaConfig(
                **dict(shape, vocab_size=320),
                head_dim=16,
                rope_parameters={"rope_theta": 10_000.0, **llama3},
                rms_norm_eps=1e-5,
                tie_word_embeddings=False,
            ),
            dtype=torch.bfloat16,
            legacy={"rope_theta": 10_000.0, "rope_scaling": llama3},
            shards=2,
        ),
        "mistral": Tiny(
            config=transformers.MistralConfig(
                **shape,
                head_dim=16,
                rope_parameters=theta,
                rms_norm_eps=1e-5,
                sliding_window=None,
                tie_word_embeddings=False,
            ),
            dtype=torch.float16,
            legacy=legacy_theta,
        ),
        "mistral-window": Tiny(
            config=transformers.MistralConfig(
                **shape,
                rope_parameters=theta | {"rope_theta": 1_000_000.0},
                rms_norm_eps=1e-5,
                sliding_window=8,
                tie_word_embeddings=False,
            ),
            dtype=torch.float16,
            legacy=legacy_theta | {"rope_theta": 1_000_000.0},
        ),
        "qwen2": Tiny(
            config=transformers.Qwen2Config(
                **shape,
                rope_parameters=theta | {"rope_theta": 1_000_000.0},
                rms_norm_eps=1e-6,
                tie_word_embeddings=True,
                use_sliding_window=False,
            ),
            dtype=torch.float32,
            legacy=legacy_theta | {"rope_theta": 1_000_000.0},
        ),
        "qwen3": Tiny(
            config=transformers.Qwen3Config(
                **shape,
                head_dim=16,
                rope_parameters=theta | {"rope_theta": 1_000_000.0},
                rms_norm_eps=1e-6,
                tie_word_embeddings=False,
                attention_bias=False,
                use_sliding_window=False,
            ),
            dtype=torch.bfloat16,
            legacy=legacy_theta | {"rope_theta": 1_000_000.0},
        ),
        "gemma3": Tiny(
            config=transformers.Gemma3TextConfig(
                **dict(shape, bos_token_id=2, eos_token_id=1, num_hidden_layers=5),
                head_dim=16,
                query_pre_attn_scalar=24,
                sliding_window=8,
                layer_types=windows_but_every(3, 5),
                rope_parameters={
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                    "full_attention": {"rope_theta": 1_000_000.0, **linear},
                },
                rms_norm_eps=1e-6,
                tie_word_embeddings=True,
            ),
            dtype=torch.bfloat16,
            legacy={
                "rope_theta": 1_000_000.0,
                "rope_local_base_freq": 10_000.0,
                "rope_scaling": linear,
                "sliding_window_pattern": 3,
            },
        ),
    }


def windows_but_every(period: int, layers: int) -> list[str]:
    """Return Gemma's layer types: each `period`-th layer sees everything, the others a window."""
    return ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(layers)]


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Fill every parameter so that activations are of order one and no norm weight or bias is trivial."""
    centre = 0.0 if "gemma" in model.config.model_type else 1.0  # Gemma multiplies by 1 + weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                value = centre + 0.25 * noise
            elif name.endswith("bias"):
                value = 0.5 * noise
            elif "embed" in name:
                value = 0.3 * noise
            else:
                value = noise / math.sqrt(parameter.shape[1])
            parameter.copy_(value)


def make_tiny(name: str, tiny: Tiny, seed: int) -> None:
    """Write one tiny checkpoint and its goldens, and check that the files, reloaded, give the very same numbers."""
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny.config, dtype=torch.float32)
    randomise(model, generator)
    stored_bytes = sum(p.numel() for p in model.parameters()) * tiny.dtype.itemsize
    model.to(tiny.dtype).save_pretrained(
        folder, max_shard_size="5GB" if tiny.shards == 1 else int(stored_bytes / tiny.shards * 1.15)
    )
    (folder / "generation_config.json").unlink(missing_ok=True)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != tiny.shards:
        raise AssertionError(f"{name}: {len(files)} shards, wanted {tiny.shards}")

    tokens = torch.randint(3, tiny.config.vocab_size, (2, 24), generator=generator)
    arrays = record(load_folder(folder), tokens)
    write_legacy_config(folder, tiny.legacy)
    with_legacy = record(load_folder(folder, config="config_legacy.json"), tokens)
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, with_legacy[key], err_msg=f"{name}: {key} with config_legacy.json")
    log.info("%s: rms by layer %s, logits %.2f", name, rms(arrays["hidden"]).round(2), arrays["logits"].std())
    save_npz(folder, {"tokens": tokens.numpy().astype(np.int32), **arrays}, seed=seed)


def write_legacy_config(folder: Path, legacy: dict[str, Any]) -> None:
    """Write `config_legacy.json`: the same model in the flat rope keys that most published checkpoints carry."""
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "layer_types"):
        config.pop(key, None)
    config["torch_dtype"] = config.pop("dtype")
    config |= legacy | {"transformers_version": "4.57.0"}
    (folder / "config_legacy.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_folder(folder: Path, *, config: str = "config.json") -> torch.nn.Module:
    """Load a checkpoint folder in float32 with eager attention."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        config=transformers.AutoConfig.from_pretrained(folder / config),
        dtype=torch.float32,
        attn_implementation="eager",
    ).eval()


def rms(hidden: np.ndarray) -> np.ndarray:
    """Return the root mean square of each layer's hidden state."""
    return np.sqrt((hidden.astype(np.float64) ** 2).mean(axis=tuple(range(1, hidden.ndim))))


# ---------------------------------------------------------------------------------------------- real models

# Name in GGUF -> name in Hugging Face. Gemma's `ffn_norm` is the norm before the MLP, under another name there.
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
GEMMA_BLOCK = BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class Gguf:
    """A GGUF file: `meta` by key, the architecture's prefix dropped, and its tensors dequantized to float32."""

    def __init__(self, path: Path) -> None:
        """Open `path`."""
        self.reader = gguf.GGUFReader(path)
        self.arch = self.reader.fields["general.architecture"].contents()
        self.meta = {k.removeprefix(f"{self.arch}."): f.contents() for k, f in self.reader.fields.items()}

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each tensor's name and its values, the output axis first."""
        for tensor in self.reader.tensors:
            yield tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)


def rotate_half_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return q or k rows [N*H, D] in the order of rotate-half rope: GGUF pairs neighbours, Hugging Face the halves."""
    rows, *rest = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, *rest)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def hf_config(file: Gguf) -> transformers.PreTrainedConfig:
    """Build the Hugging Face config from GGUF metadata."""
    meta = file.meta
    common: dict[str, Any] = {
        "hidden_size": meta["embedding_length"],
        "intermediate_size": meta["feed_forward_length"],
        "num_hidden_layers": meta["block_count"],
        "num_attention_heads": meta["attention.head_count"],
        "num_key_value_heads": meta["attention.head_count_kv"],
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "max_position_embeddings": meta["context_length"],
        "rms_norm_eps": meta["attention.layer_norm_rms_epsilon"],
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in file.reader.tensors),
    }
    rope = {"rope_type": "default", "rope_theta": meta["rope.freq_base"]}
    match file.arch:
        case "llama":
            return transformers.LlamaConfig(**common, rope_parameters=rope)
        case "qwen2":
            return transformers.Qwen2Config(**common, rope_parameters=rope, use_sliding_window=False)
        case "gemma3":
            # The file says nothing of the local theta, the pattern and the query scale: they are those of the
            # published config of google/gemma-3-270m.
            return transformers.Gemma3TextConfig(
                **common,
                head_dim=meta["attention.key_length"],
                query_pre_attn_scalar=256,
                sliding_window=meta["attention.sliding_window"],
                layer_types=windows_but_every(6, meta["block_count"]),
                rope_parameters={
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                    "full_attention": rope,
                },
            )
    raise ValueError(f"architecture {file.arch!r}: expected llama, qwen2 or gemma3")


def hf_name(name: str, arch: str) -> str:
    """Translate a GGUF tensor name."""
    *head, stem, kind = name.split(".")
    if not head:
        return f"{TOP[stem]}.{kind}"
    names = GEMMA_BLOCK if arch == "gemma3" else BLOCK
    return f"model.layers.{head[1]}.{names[stem]}.{kind}"


def load_gguf(file: Gguf) -> torch.nn.Module:
    """Return the Hugging Face model with the dequantized weights of `file`, float32, eager attention."""
    config = hf_config(file)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    state = model.state_dict()
    missing = set(state) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    with torch.no_grad():
        for name, value in file.tensors():
            stem = name.split(".")[-2]
            if file.arch == "llama" and stem in heads:
                value = rotate_half_order(value, heads[stem])
            if file.arch == "gemma3" and stem.endswith("norm"):
                value = value - 1  # the file holds 1 + weight
            target = hf_name(name, file.arch)
            state[target].copy_(torch.from_numpy(value))
            missing.remove(target)
    if missing:
        raise AssertionError(f"not in the file: {sorted(missing)}")
    return model.eval()


# ---------------------------------------------------------------------------------------------- tokenizers

# GPT-2's pattern with single digits, as published with Qwen2.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_of(meta: dict[str, Any]) -> tokenizers.Tokenizer:
    """Rebuild the tokenizer from GGUF metadata."""
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    vocab = {token: index for index, token in enumerate(tokens)}
    kind, pre = meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"]
    if kind == "gpt2":
        merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
        built = tokenizers.Tokenizer(models.BPE(vocab, merges))
        byte_level = {"add_prefix_space": False, "trim_offsets": False}
        if pre == "smollm":
            steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(**byte_level)]
        elif pre == "qwen2":
            built.normalizer = normalizers.NFC()
            split = pre_tokenizers.Split(tokenizers.Regex(QWEN2_SPLIT), "isolated")
            steps = [split, pre_tokenizers.ByteLevel(**byte_level, use_regex=False)]
        else:
            raise ValueError(f"pre-tokenizer {pre!r}: expected smollm or qwen2")
        built.pre_tokenizer = pre_tokenizers.Sequence(steps)
        built.decoder = decoders.ByteLevel()
    elif kind == "llama":
        merges = merges_of_scores(tokens, meta["tokenizer.ggml.scores"], types)
        built = tokenizers.Tokenizer(
            models.BPE(vocab, merges, unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]], byte_fallback=True)
        )
        built.normalizer = normalizers.Replace(" ", "▁")
        built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        raise ValueError(f"tokenizer {kind!r}: expected gpt2 or llama")
    control = [t for t, k in zip(tokens, types, strict=True) if k == gguf.TokenType.CONTROL]
    user = [t for t, k in zip(tokens, types, strict=True) if k == gguf.TokenType.USER_DEFINED]
    built.add_special_tokens([tokenizers.AddedToken(t, normalized=False, special=True) for t in control])
    built.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in user])
    return built


def merges_of_scores(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Return the merges that a scored vocabulary implies: every split of a piece into two pieces, best score first."""
    ranked = sorted((i for i, k in enumerate(types) if k == gguf.TokenType.NORMAL), key=lambda i: -scores[i])
    known = set(tokens)
    return [
        (piece[:cut], piece[cut:])
        for piece in (tokens[i] for i in ranked)
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


# ---------------------------------------------------------------------------------------------- goldens of real models


def perplexity(model: torch.nn.Module, windows: list[list[int]]) -> tuple[float, int]:
    """Return the perplexity over every token of `windows` but each window's first, and how many tokens those are."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for window in windows:
            tokens = torch.tensor(window)
            states = model.model(input_ids=tokens[None], use_cache=False).last_hidden_state[0, :-1]
            # By blocks: the logits of a whole window are 1 GiB at a vocabulary of 262,144.
            for block, wanted in zip(states.split(256), tokens[1:].split(256), strict=True):
                total += torch.nn.functional.cross_entropy(model.lm_head(block), wanted, reduction="sum").item()
            count += len(window) - 1
    return math.exp(total / count), count


def perplexities(model: torch.nn.Module, ids: list[int], bos: int | None, windows: int) -> dict[str, Any]:
    """Return the perplexity of the first `windows` windows of 1,024 under each convention for BOS."""
    size = 1024
    cuts = {"no_bos": [ids[i * size : (i + 1) * size] for i in range(windows)]}
    if bos is not None:
        short = size - 1
        cuts["bos_then_1023_text"] = [[bos, *ids[i * short : (i + 1) * short]] for i in range(windows)]
        cuts["bos_then_1024_text"] = [[bos, *cut] for cut in cuts["no_bos"]]
        cuts["bos_replaces_first"] = [[bos, *cut[1:]] for cut in cuts["no_bos"]]
    found = {}
    for name, cut in cuts.items():
        value, count = perplexity(model, cut)
        found[name] = {"perplexity": value, "windows": windows, "scored_tokens": count}
        log.info("%s: %s", name, found[name])
    return found


def make_chat(model: torch.nn.Module, file: Gguf, tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Write `chat.json`: a prompt through the chat template and 20 greedy tokens with their margins over the second."""
    meta = file.meta
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=meta["tokenizer.chat_template"]
    )
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = wrapped.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer.encode(text, add_special_tokens=False).ids
    ids, margins = list(prompt), []
    with torch.inference_mode():
        for _ in range(20):
            top = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].topk(2)
            ids.append(int(top.indices[0]))
            margins.append(round(float(top.values[0] - top.values[1]), 4))
    greedy = ids[len(prompt) :]
    chat = {
        "messages": messages,
        "text": text,
        "prompt_ids": prompt,
        "greedy_ids": greedy,
        "greedy_margins": margins,
        "greedy_text": tokenizer.decode(greedy, skip_special_tokens=False),
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "versions": VERSIONS,
    }
    (folder / "chat.json").write_text(json.dumps(chat, indent=1, ensure_ascii=False) + "\n")
    log.info("chat: %r -> %r, smallest margin %.3f", text, chat["greedy_text"], min(margins))


def make_real(name: str, path: Path, text: Path, *, windows: int, full: bool, length: int) -> None:
    """Write the goldens of the model in the GGUF at `path` for the first `length` tokens of `text`."""
    folder = GOLDEN / name
    folder.mkdir(parents=True, exist_ok=True)
    file = Gguf(path)
    tokenizer = tokenizer_of(file.meta)
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    log.info("%s: the text has %d tokens", name, len(ids))
    bos = file.meta["tokenizer.ggml.bos_token_id"] if file.meta["tokenizer.ggml.add_bos_token"] else None
    tokens = (ids if bos is None else [bos, *ids])[:length]

    model = load_gguf(file)
    arrays = record(model, torch.tensor([tokens]))
    hidden, logits = arrays["hidden"][:, 0], arrays["logits"][0, -1]
    last = 2 if full else 1
    best = np.argsort(-logits)[:50]
    golden = {
        "tokens": np.array(tokens, np.int32),
        "hidden_last": hidden[:, -last:],
        "hidden_norm": np.linalg.norm(hidden, axis=-1),
        "final_norm_last": arrays["final_norm"][0, -last:],
        "logits_top_ids": best.astype(np.int32),
        "logits_top": logits[best],
    }
    if full:
        golden["logits_last"] = logits.astype(np.float16)
        make_chat(model, file, tokenizer, folder)
    save_npz(folder, golden, source=path.name, text_tokens=len(ids))
    if windows:
        found = {"versions": VERSIONS, **perplexities(model, ids, bos, windows)}
        (folder / "perplexity.json").write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    """Parse the command line and make the files."""
    parser = argparse.ArgumentParser(description="Make the golden files of the models (see the top of this file).")
    commands = parser.add_subparsers(dest="command", required=True)
    tiny = commands.add_parser("tiny", help="random checkpoints of each family with their goldens")
    tiny.add_argument("names", nargs="*", metavar="NAME", help="only these (default: all)")
    real = commands.add_parser("real", help="goldens of a published model from its GGUF file")
    real.add_argument("name", help="folder under tests/golden")
    real.add_argument("gguf", type=Path, help="the model's file")
    real.add_argument("--text", type=Path, required=True, help="WikiText-2 test split, rows joined by blank lines")
    real.add_argument("--length", type=int, default=16, help="number of tokens in the golden")
    real.add_argument("--full", action="store_true", help="all logits of the last position, two positions, a chat")
    real.add_argument("--windows", type=int, default=0, help="also measure perplexity on so many windows of 1,024")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.logging.set_verbosity_error()
    if args.command == "tiny":
        cases = tiny_models()
        unknown = set(args.names) - set(cases)
        if unknown:
            parser.error(f"unknown {sorted(unknown)}: expected some of {sorted(cases)}")
        for seed, (name, case) in enumerate(cases.items()):
            if not args.names or name in args.names:
                make_tiny(name, case, seed)
        (GOLDEN / "versions.json").write_text(json.dumps(VERSIONS, indent=1) + "\n")
    else:
        make_real(args.name, args.gguf, args.text, windows=args.windows, full=args.full, length=args.length)


if __name__ == "__main__":
    main()
