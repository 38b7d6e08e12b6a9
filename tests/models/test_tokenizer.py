import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from spear_jax.models.gguf import GGUFFile
from spear_jax.models.source import resolve
from spear_jax.testing import shared_data
from spear_jax.tokenizer import end_token_ids, tokenizer_from_directory, tokenizer_from_gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
MANY_SCRIPTS = (
    "naïve café — “quotes” … 𝔘𝔫𝔦 你好，世界 こんにちは 안녕 مرحبا שלום हिन्दी ไทย "
    "👩\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 e\u0301 \u200b\u00a0 ½² \t\ttabs  two   three"
    "    \n\n\n  lines\r\n 1234567 don't WON'T x=1;//{}\x00\x7f"
)
# SmolLM2's 304,978 is what its own pre-tokenizer gives, which cuts off digits before the GPT-2 pattern runs; with that
# pattern alone it is 304,986: the 8 places where a run of line breaks comes before a digit are cut one break earlier.
REAL = {
    "gemma-3-270m.gguf": (292_282, [2]),
    "qwen2.5-coder-0.5b-instruct.gguf": (299_078, []),
    "qwen2.5-coder-1.5b-instruct.gguf": (299_078, []),
}


def gguf_tokenizer(path: Path) -> Any:
    return tokenizer_from_gguf(GGUFFile.open(path).metadata, source=str(path))


@pytest.fixture(scope="module")
def demo() -> Any:
    return gguf_tokenizer(resolve("demo").path)


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    """Describe a byte-level BPE: the 256 bytes, a few merges, two control tokens, one user-defined."""
    letters = sorted(ByteLevel.alphabet())
    merged = ["ab", "abc", "12", "123", "Ġa", "ĊĊ"]
    special = ["<|end|>", "<|im_end|>", "<tool>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": letters + merged + special,
        "tokenizer.ggml.token_type": [NORMAL] * 262 + [CONTROL, CONTROL, USER_DEFINED],
        "tokenizer.ggml.merges": ["a b", "ab c", "1 2", "12 3", "Ġ a", "Ċ Ċ"],
        "tokenizer.ggml.bos_token_id": 262,
        "tokenizer.ggml.eos_token_id": 263,
    } | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """Describe a sentencepiece BPE with byte fallback over a few letters."""
    pieces = ["▁", "a", "b", "c", "ab", "▁a", "▁ab", "bc"]
    scores = [-1.0, -2.0, -3.0, -4.0, -0.5, -0.7, -0.9, -0.1]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces],
        "tokenizer.ggml.scores": [0.0] * 259 + scores,
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


def test_the_demo_tokenizer_cuts_wikitext_as_its_authors_do(demo: Any) -> None:
    text = shared_data("text/wikitext2_test.txt").read_text()
    ids = demo.encode(text, add_special_tokens=False)
    assert len(ids) == 304_978
    assert demo.decode(ids) == text


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_cut_wikitext_into_the_known_number_of_tokens(name: str) -> None:
    folder = os.environ.get("SPEAR_JAX_TEST_MODELS")
    if folder is None or not (Path(folder) / name).exists():
        pytest.skip(f"needs {name} in the folder that SPEAR_JAX_TEST_MODELS names")
    count, before = REAL[name]
    tokenizer = gguf_tokenizer(Path(folder) / name)
    text = shared_data("text/wikitext2_test.txt").read_text()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == count
    assert tokenizer.decode(ids) == text
    assert tokenizer("x")["input_ids"][:-1] == before
    composed = MANY_SCRIPTS.replace("e\u0301", "é")
    assert tokenizer.decode(tokenizer.encode(composed, add_special_tokens=False)) == composed


def test_text_of_many_scripts_comes_back(demo: Any) -> None:
    assert demo.decode(demo.encode(MANY_SCRIPTS, add_special_tokens=False)) == MANY_SCRIPTS


def test_the_demo_tokenizer_knows_its_special_tokens(demo: Any) -> None:
    assert (demo.bos_token, demo.eos_token, demo.unk_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert demo("Hi")["input_ids"] == demo.encode("Hi", add_special_tokens=False)
    assert demo.encode("a<|im_end|>b")[1] == demo.eos_token_id
    assert demo.decode(demo.encode("a<|im_end|>b"), skip_special_tokens=True) == "ab"
    assert set(end_token_ids(demo)) == {0, 2}


def test_merges_and_special_tokens_of_a_byte_level_bpe() -> None:
    tokenizer = tokenizer_from_gguf(byte_level_metadata(), source="m.gguf")
    assert tokenizer.tokenize("abc ab 1234<tool><|end|>") == ["abc", "Ġ", "ab", "Ġ", "123", "4", "<tool>", "<|end|>"]
    assert end_token_ids(tokenizer) == (263, 262)
    decoded = tokenizer.decode(tokenizer.encode("abc<tool><|end|>"), skip_special_tokens=True)
    assert decoded == "abc<tool>"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["a", "123", "4", "Ġ", "Ġa", "Ċ", "Ċ", "1"]),
        ("smollm", ["a", "1", "2", "3", "4", "Ġ", "Ġa", "ĊĊ", "1"]),
        ("qwen2", ["a", "1", "2", "3", "4", "Ġ", "Ġa", "ĊĊ", "1"]),
        ("llama-bpe", ["a", "123", "4", "Ġ", "Ġa", "ĊĊ", "1"]),
        ("tekken", ["a", "1", "2", "3", "4", "Ġ", "Ġa", "ĊĊ", "1"]),
    ],
)
def test_each_pre_tokenizer_splits_as_its_name_says(pre: str, pieces: list[str]) -> None:
    tokenizer = tokenizer_from_gguf(byte_level_metadata(pre=pre), source="m.gguf")
    assert tokenizer.tokenize("a1234  a\n\n1") == pieces


def test_bos_is_added_where_the_file_or_the_kind_says_so() -> None:
    def ids(**changes: Any) -> list[int]:
        return tokenizer_from_gguf(byte_level_metadata(**changes), source="m.gguf")("abc")["input_ids"]

    assert ids() == [257]
    assert ids(pre="llama-bpe") == [262, 257]
    assert ids(pre="llama-bpe", add_bos_token=False) == [257]
    assert ids(add_bos_token=True, add_eos_token=True) == [262, 257, 263]


def test_scores_of_a_sentencepiece_model_become_merges() -> None:
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata(), source="m.gguf")
    assert tokenizer.tokenize("ab c") == ["▁ab", "▁", "c"]
    assert tokenizer.tokenize("abc") == ["▁a", "bc"]
    assert tokenizer.tokenize("bé") == ["▁", "b", "<0xC3>", "<0xA9>"]
    assert tokenizer("a")["input_ids"][0] == 1
    for text in ("ab c", "  bé 你好 👩‍👩‍👧", "a</s>"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    bare = tokenizer_from_gguf(sentencepiece_metadata(add_space_prefix=False, add_bos_token=False), source="m.gguf")
    assert bare.tokenize("abc") == ["a", "bc"]
    assert bare("a")["input_ids"] == [260]


def test_a_chat_template_is_rendered_and_its_absence_reported() -> None:
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    metadata = byte_level_metadata() | {"tokenizer.chat_template": template}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tokenizer = tokenizer_from_gguf(metadata, source="m.gguf")
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "[user]a<|im_end|>[assistant]b<|im_end|>"
    with pytest.raises(ValueError, match="chat_template"):
        tokenizer_from_gguf(byte_level_metadata(), source="m.gguf").apply_chat_template(messages, tokenize=False)


def test_a_tokenizer_saved_to_a_directory_is_read_back(tmp_path: Path, demo: Any) -> None:
    demo.save_pretrained(tmp_path)
    again = tokenizer_from_directory(tmp_path)
    assert again.encode(MANY_SCRIPTS) == demo.encode(MANY_SCRIPTS)
    messages = [{"role": "user", "content": "Hi"}]
    assert again.apply_chat_template(messages, tokenize=False) == demo.apply_chat_template(messages, tokenize=False)
    assert end_token_ids(again) == end_token_ids(demo)

    for path in tmp_path.iterdir():
        if path.name != "tokenizer.json":
            path.unlink()
    assert tokenizer_from_directory(tmp_path).encode(MANY_SCRIPTS) == demo.encode(MANY_SCRIPTS)


def test_what_is_missing_or_not_supported_is_named(tmp_path: Path) -> None:
    def refused(message: str, metadata: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=message):
            tokenizer_from_gguf(metadata, source="m.gguf")

    refused(r"m\.gguf: no tokenizer: tokenizer\.ggml\.model is missing", {})
    refused("tokenizer model 'bert' is not supported", byte_level_metadata(model="bert"))
    refused("pre-tokenizer 'viking' is not supported", byte_level_metadata(pre="viking"))
    refused("3 token types for 265 tokens", byte_level_metadata(token_type=[1, 1, 1]))
    refused("eos_token_id is 999, but there are 265 tokens", byte_level_metadata(eos_token_id=999))
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        tokenizer_from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot read the tokenizer"):
        tokenizer_from_directory(tmp_path)
