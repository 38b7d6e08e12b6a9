"""Tokenizers: from a Hugging Face directory, or built from the metadata of a GGUF file."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
)
"""Control tokens that end an answer in the families supported, whichever of them the file names as its only eos."""

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""Values of `tokenizer.ggml.token_type` (llama.cpp, `llama_token_type`)."""

# Regular expressions are those of the tokenizer.json that each name in `tokenizer.ggml.pre` stands for.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ByteLevel:
    """How a byte-level BPE splits text before merging."""

    pattern: str
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


_GPT2_SPLIT = _ByteLevel(pattern=_GPT2)
_LLAMA3_SPLIT = _ByteLevel(pattern=_LLAMA3, ignore_merges=True, adds_bos=True)
_BYTE_LEVEL: dict[str, _ByteLevel] = {
    "default": _GPT2_SPLIT,
    "gpt-2": _GPT2_SPLIT,
    "smollm": _ByteLevel(pattern=_GPT2, single_digits=True),
    "qwen2": _ByteLevel(pattern=_QWEN2, nfc=True),
    "deepseek-r1-qwen": _ByteLevel(pattern=_QWEN2, nfc=True, adds_bos=True),
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "tekken": _ByteLevel(pattern=_TEKKEN, ignore_merges=True, adds_bos=True),
}


def tokenizer_from_directory(directory: Path) -> "PreTrainedTokenizerFast":
    """Load the tokenizer of a Hugging Face directory, with its chat template.

    Raises:
        FileNotFoundError: The directory has no tokenizer files.
        ValueError: They cannot be read.
    """
    config, file = directory / "tokenizer_config.json", directory / "tokenizer.json"
    if not config.exists() and not file.exists():
        raise FileNotFoundError(f"{directory}: no tokenizer.json or tokenizer_config.json")
    _silence_advice()
    try:
        if config.exists():
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_file=str(file))
    except Exception as error:  # The tokenizers library raises plain Exception for a malformed file.
        raise ValueError(f"{directory}: cannot read the tokenizer: {error}") from error


def tokenizer_from_gguf(metadata: Mapping[str, Any], *, source: str) -> "PreTrainedTokenizerFast":
    """Build the tokenizer that GGUF metadata describe, with its special tokens and chat template.

    Raises:
        ValueError: The metadata have no vocabulary, or one of a kind that is not supported.
    """
    read = _Metadata(metadata, source)
    model = read.required("model")
    tokens: list[str] = read.required("tokens")
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(f"{source}: {len(types)} token types for {len(tokens)} tokens")
    match model:
        case "gpt2":
            backend, adds_bos = _byte_level(read, tokens)
        case "llama":
            backend, adds_bos = _sentencepiece(read, tokens, types), True
        case _:
            raise ValueError(f"{source}: tokenizer model {model!r} is not supported (only gpt2 and llama)")

    backend.add_tokens(
        [
            AddedToken(text, normalized=False, special=kind == _CONTROL)
            for text, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )

    def token(name: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is not None and index >= len(tokens):
            raise ValueError(f"{source}: tokenizer.ggml.{name}_token_id is {index}, but there are {len(tokens)} tokens")
        return None if index is None else tokens[index]

    bos, eos = token("bos"), token("eos")
    before = [bos] if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", adds_bos) else []
    after = [eos] if eos is not None and metadata.get("tokenizer.ggml.add_eos_token", False) else []
    if before or after:
        backend.post_processor = processors.Sequence(
            [
                *([backend.post_processor] if backend.post_processor else []),
                processors.TemplateProcessing(
                    single=[*before, "$A", *after],
                    pair=[*before, "$A", *after, *before, "$B", *after],
                    special_tokens=[(t, tokens.index(t)) for t in dict.fromkeys(before + after)],
                ),
            ]
        )
    _silence_advice()
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=_Uncopied(backend),
        bos_token=bos,
        eos_token=eos,
        unk_token=token("unknown"),
        pad_token=token("padding"),
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )


def end_token_ids(tokenizer: "PreTrainedTokenizerFast") -> tuple[int, ...]:
    """Give the ids of the tokenizer's own eos and of the control tokens among `END_TOKENS` that it has."""
    controls = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = [tokenizer.eos_token_id, *(controls.get(name) for name in END_TOKENS)]
    return tuple(dict.fromkeys(index for index in found if isinstance(index, int)))


class _Uncopied:
    """A backend that `copy.deepcopy` gives back itself: the wrapper copies it, seconds for 262,144 tokens."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend

    def __deepcopy__(self, memo: dict[int, Any]) -> tokenizers.Tokenizer:
        return self.backend


class _Metadata:
    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def required(self, name: str) -> Any:
        value = self.values.get(f"tokenizer.ggml.{name}")
        if value is None:
            raise ValueError(f"{self.source}: no tokenizer: tokenizer.ggml.{name} is missing")
        return value


def _byte_level(read: _Metadata, tokens: list[str]) -> tuple[tokenizers.Tokenizer, bool]:
    """Build a byte-level BPE, and say whether it puts bos first where the file does not say."""
    name = read.values.get("tokenizer.ggml.pre", "default")
    if name not in _BYTE_LEVEL:
        raise ValueError(f"{read.source}: pre-tokenizer {name!r} is not supported; supported: {', '.join(_BYTE_LEVEL)}")
    split = _BYTE_LEVEL[name]
    merges = [tuple(merge.split(" ", 1)) for merge in read.required("merges")]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, ignore_merges=split.ignore_merges)
    )
    steps = [
        *([pre_tokenizers.Digits(individual_digits=True)] if split.single_digits else []),
        pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    return backend, split.adds_bos


def _sentencepiece(read: _Metadata, tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    """Build a BPE with byte fallback out of the scores of a sentencepiece model."""
    scores: list[float] = read.required("scores")
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = read.values.get("tokenizer.ggml.unknown_token_id")
    if unknown is None and _UNKNOWN in types:
        unknown = types.index(_UNKNOWN)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(tokens, types, scores, vocab),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if read.values.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([*spaces, decoders.Strip(content=" ", left=1)])
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.decoder = decoders.Sequence(spaces)
    return backend


def _merges(tokens: list[str], types: list[int], scores: list[float], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """List the pairs that make up each token, best first: sentencepiece merges the pair whose union scores best."""
    normal = [i for i, kind in enumerate(types) if kind == 1 and len(tokens[i]) > 1]
    normal.sort(key=lambda i: -scores[i])
    return [
        (token[:cut], token[cut:])
        for token in (tokens[i] for i in normal)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]


def _silence_advice() -> None:
    """Drop the line that transformers prints when it is imported without PyTorch, which this package does not need."""
    logger = logging.getLogger("transformers")
    if _is_not_advice not in logger.filters:
        logger.addFilter(_is_not_advice)


def _is_not_advice(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()
