"""Token ids into text, piece by piece: whole characters only, and nothing of a stop string."""

import collections
import re
from collections.abc import Callable, Sequence
from typing import Any

from serve.request import TokenLogprobs

REPLACEMENT = "\ufffd"
"""What a decoder puts in place of bytes that are not (yet) a character."""

_BYTE = re.compile("<0x([0-9A-F]{2})>")
_VISIBLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTE_OF = {chr(byte): byte for byte in _VISIBLE} | {
    chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*_VISIBLE}))
}
"""GPT-2's alphabet, in which the vocabularies of byte-level tokenizers are written: other bytes from U+0100 on."""

_CONTEXT_TOKENS = 6
_MAX_UNSETTLED = 32
"""Ids kept in the hope of a whole character; an answer of invalid bytes is let go after as many."""


class Detokenizer:
    """Turns a growing list of token ids into text that only ever grows.

    The pieces joined are the decoding of all ids after the prompt, except that the bytes of an unfinished character are
    held back until it is complete and dropped if it never is. A window of the last few ids is decoded each time,
    never the whole answer, so a token costs the same at the end as at the start. `decode` maps ids to text and must
    skip special tokens; `prompt` gives the decoder the context that decides, for instance, about a leading space.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], *, prompt: Sequence[int] = ()):
        self._decode = decode
        self._window: list[int] = []
        self._settled = 0  # ids of the window whose text is out for good
        self._sent = ""  # the part of the window's text that is out
        self._restart(self._context(prompt))

    def push(self, token: int) -> str:
        """Add one id and give the text that became certain."""
        self._window.append(token)
        text = self._decode(self._window)
        waited = len(self._window) - self._settled
        certain = text.rstrip(REPLACEMENT) if waited <= _MAX_UNSETTLED else text
        delta = ""
        # A decoder of byte tokens replaces a whole run of them while its last character is unfinished, so that even
        # text that is out looks broken for a while.
        if certain.startswith(self._sent):
            delta, self._sent = certain[len(self._sent) :], certain
        if waited > _MAX_UNSETTLED:
            self._restart(self._window[-_CONTEXT_TOKENS:])
        elif delta and self._sent == text:
            # An id without text, a special token, gives the next one no context to tell a leading space from.
            self._restart(self._window[self._settled :])
        return delta

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """Give the last ids of a prompt, from the beginning of a character if one is near."""
        ends = [list(prompt[-count:]) for count in range(_CONTEXT_TOKENS, _CONTEXT_TOKENS + 4)] if prompt else [[]]
        return next((end for end in ends if not self._decode(end).startswith(REPLACEMENT)), ends[0])

    def _restart(self, window: list[int]) -> None:
        """Decode from these ids on, whose whole characters are out; the window never begins inside one."""
        text = self._decode(window) if window else ""
        self._window, self._sent = window, text.rstrip(REPLACEMENT)
        self._settled = len(window) if self._sent == text else 0


class StopMatcher:
    """Passes text on until a stop string appears, holding back what may be the start of one."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; give what can be shown and whether a stop string was met (it and what follows are swallowed)."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [index for index in (text.find(stop) for stop in self._stops) if index >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max(overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """Give what was held back, at the end of an answer that met no stop string."""
        held, self._held = self._held, ""
        return held


class LogprobsHolder:
    """Keeps what is known of tokens until the first character of each is shown; what never is, is dropped."""

    def __init__(self) -> None:
        self._held: collections.deque[TokenLogprobs] = collections.deque()
        self._shown = 0

    def push(self, entry: TokenLogprobs) -> None:
        """Add the next token."""
        self._held.append(entry)

    def take(self, text: str, *, rest: bool) -> tuple[TokenLogprobs, ...]:
        """Say what text is shown next; give the tokens that begin in it, and with `rest` all others as well."""
        self._shown += len(text)
        taken = []
        while self._held and (rest or self._held[0].offset < self._shown):
            taken.append(self._held.popleft())
        return tuple(taken)


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Give the bytes that a token stands for, a part of a character if so; special tokens by their names.

    `tokenizer` is one of the `tokenizers` package. Ids it does not know, which pad some vocabularies, give none.
    """
    piece = tokenizer.id_to_token(token)
    if piece is None:
        return b""
    if byte := _BYTE.fullmatch(piece):
        return bytes([int(byte[1], 16)])
    text = tokenizer.decode([token], skip_special_tokens=False)
    if REPLACEMENT in text and all(character in _BYTE_OF for character in piece):
        return bytes(_BYTE_OF[character] for character in piece)
    # A decoder takes the space of what stands first.
    return (" " + text if piece.startswith("\u2581") and not text.startswith(" ") else text).encode()


def overlap(text: str, stop: str) -> int:
    """Give the length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
