"""Text comes out piece by piece, never as half a character, and joined it is the whole decoding."""

import functools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from serve.detokenize import REPLACEMENT, Detokenizer, LogprobsHolder, StopMatcher, token_bytes
from serve.request import TokenLogprobs

TEXTS = st.text(
    st.one_of(st.characters(codec="utf-8", exclude_characters=REPLACEMENT), st.sampled_from("你好👩‍👩‍👧é ▁\n"))
)


@functools.cache
def byte_level() -> Tokenizer:
    """Give a tokenizer of single bytes in GPT-2's alphabet: every character of more than a byte is cut."""
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@functools.cache
def byte_fallback() -> Tokenizer:
    """Give a SentencePiece-like tokenizer: a few letters, the rest as <0x..> bytes, and a stripped first space."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for letter in "▁abcdefgh你":
        vocab[letter] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


TOKENIZERS = pytest.mark.parametrize("make", [byte_level, byte_fallback])


def deltas(decode: Callable[[Sequence[int]], str], ids: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(decode, prompt=prompt)
    return [detokenizer.push(token) for token in ids]


@TOKENIZERS
@given(text=TEXTS)
def test_joined_pieces_are_the_whole_decoding(make: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text).ids
    pieces = deltas(tokenizer.decode, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all(REPLACEMENT not in piece for piece in pieces)


@TOKENIZERS
@given(text=TEXTS, keep=st.floats(0, 1))
def test_an_answer_cut_inside_a_character_has_no_broken_end(
    make: Callable[[], Tokenizer], text: str, keep: float
) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text).ids
    shown = "".join(deltas(tokenizer.decode, ids[: int(len(ids) * keep)]))
    assert REPLACEMENT not in shown
    assert tokenizer.decode(ids).startswith(shown)


@given(before=TEXTS, after=TEXTS, cut=st.integers(0, 3))
def test_a_prompt_cut_inside_a_character_is_completed_not_repeated(before: str, after: str, cut: int) -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(before + "👍" + after).ids
    split = len(tokenizer.encode(before).ids) + cut
    assert "".join(deltas(tokenizer.decode, ids[split:], ids[:split])) == "👍" + after


def test_a_special_token_inside_an_answer_does_not_take_the_space_after_it() -> None:
    def decode(ids: Sequence[int]) -> str:
        return " ".join(f"w{i}" for i in ids if i)

    detokenizer = Detokenizer(decode, prompt=(5, 6))
    assert [detokenizer.push(token) for token in (1, 0, 0, 2, 3)] == [" w1", "", "", " w2", " w3"]


def test_the_space_after_a_prompt_is_kept() -> None:
    tokenizer = byte_fallback()
    ids = tokenizer.encode("abc▁de").ids
    assert tokenizer.decode(ids[3:]) == "de"
    assert "".join(deltas(tokenizer.decode, ids[3:], ids[:3])) == " de"


@TOKENIZERS
@given(ids=st.lists(st.integers(0, 255), max_size=80))
def test_bytes_that_are_no_text_pass_without_error(make: Callable[[], Tokenizer], ids: list[int]) -> None:
    "".join(deltas(make().decode, ids)).encode()


def test_endless_garbage_stays_cheap() -> None:
    tokenizer = byte_level()
    broken = tokenizer.encode("👍").ids[1]
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return tokenizer.decode(ids)

    shown = "".join(deltas(decode, [broken] * 500))
    assert longest < 50
    assert len(shown) > 300


@TOKENIZERS
@given(text=TEXTS)
def test_the_bytes_of_tokens_joined_are_the_text(make: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = make()
    told = b"".join(token_bytes(tokenizer, token) for token in tokenizer.encode(text).ids)
    assert told == (text.replace("▁", " ") if make is byte_fallback else text).encode()
    assert token_bytes(tokenizer, 10**6) == b""


@given(pieces=st.lists(st.text("ab", max_size=3), max_size=8), shown=st.lists(st.integers(0, 3), max_size=8))
def test_what_is_known_of_a_token_is_given_with_its_first_character(pieces: list[str], shown: list[int]) -> None:
    holder, text = LogprobsHolder(), "".join(pieces)
    for i in range(len(pieces)):
        holder.push(TokenLogprobs(token=i, logprob=0.0, top=(), offset=len("".join(pieces[:i]))))
    given: list[int] = []
    at = 0
    for length in shown:
        part = text[at : at + length]
        entries = holder.take(part, rest=False)
        assert all(at <= entry.offset < at + len(part) for entry in entries)
        at += len(part)
        given += [entry.token for entry in entries]
    assert given == [i for i in range(len(pieces)) if len("".join(pieces[:i])) < at]
    assert given + [entry.token for entry in holder.take("", rest=True)] == [*range(len(pieces))]


STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@given(pieces=st.lists(st.text("abc", max_size=4)), stops=STOPS)
def test_a_stop_string_ends_the_text_and_never_shows(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown, stopped = "", False
    for piece in pieces:
        text, stopped = matcher.push(piece)
        shown += text
        if stopped:
            break
    text = "".join(pieces)
    ends = [text.find(stop) for stop in stops if stop in text]
    assert stopped == bool(ends)
    if not stopped:
        assert shown + matcher.flush() == text
    else:
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
        assert len(shown) >= min(ends)


@given(pieces=st.lists(st.text("abc", max_size=4)), stops=STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = sent = ""
    for piece in pieces:
        text, stopped = matcher.push(piece)
        shown, sent = shown + text, sent + piece
        if stopped:
            return
        held = sent[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)
