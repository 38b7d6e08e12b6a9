"""How the endpoints of completions lay out their answers."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from serve.gateway import Gateway
from serve.request import Output, TokenLogprobs
from serve.schema import ChatBody, CommonBody, CompletionBody
from serve.tools import CallParser, ToolCall

type Logprobs = Sequence[TokenLogprobs]


class Shape:
    """How one endpoint lays out its answers; log-probabilities are None in what was not asked for them."""

    prefix: str
    whole_object: str
    piece_object: str

    def __init__(self, body: CommonBody, gateway: Gateway):
        self.model = body.model
        self.prompts: list[tuple[int, ...]] = []  # known once they are tokenized
        self._asked = body.requested_logprobs() is not None
        self._token_bytes = gateway.token_bytes

    def _name(self, token: int) -> str:
        """Give the text of a token; a part of a character is told by its bytes, as OpenAI does."""
        data = self._token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def whole(self, index: int, answer: Output) -> dict[str, Any]:
        """Give the choice of an answer in one piece."""
        raise NotImplementedError

    def opening(self, index: int) -> dict[str, Any] | None:
        """Give the choice that opens a stream, if there is one."""
        raise NotImplementedError

    def pieces(self, index: int, output: Output) -> Sequence[dict[str, Any]]:
        """Give the choices that carry new text and the end of an answer."""
        raise NotImplementedError


class ChatShape(Shape):
    """Answers of `POST /v1/chat/completions`."""

    prefix, whole_object, piece_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, body: ChatBody, gateway: Gateway):
        super().__init__(body, gateway)
        self._ends_in_calls = "stop" if body.names_the_call else "tool_calls"
        self._names = [tool.name for tool in body.shown_tools]
        self._form = gateway.tool_format
        self._readers: dict[int, tuple[CallParser, list[ToolCall]]] = {}  # by index, and the calls so far

    def whole(self, index: int, answer: Output) -> dict[str, Any]:
        """Give the choice of an answer in one piece."""
        text, calls = self._read(index, answer)
        message: dict[str, Any] = {"role": "assistant", "content": None if calls and not text else text}
        message |= {"refusal": None} | ({"tool_calls": [call.as_json() for call in calls]} if calls else {})
        told, reason = self._told(answer.logprobs), self._reason(index, answer)
        return {"index": index, "message": message, "logprobs": told, "finish_reason": reason}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Give the choice that opens a stream."""
        return _delta(index, {"role": "assistant", "content": ""}, None)

    def pieces(self, index: int, output: Output) -> Sequence[dict[str, Any]]:
        """Give the choices that carry new text, calls that are complete, and the end of an answer."""
        known = len(self._readers[index][1]) if index in self._readers else 0
        text, calls = self._read(index, output)
        told, reason = self._told(output.logprobs), self._reason(index, output)
        pieces = []
        if text or output.logprobs:
            pieces.append(_delta(index, {"content": text}, None) | {"logprobs": told})
        for place, call in enumerate(calls, known):
            pieces.append(_delta(index, {"tool_calls": [{"index": place} | call.as_json()]}, None))
        return pieces if reason is None else [*pieces, _delta(index, {}, reason)]

    def _read(self, index: int, output: Output) -> tuple[str, list[ToolCall]]:
        """Tell text from calls, where there are tools."""
        if not self._names:
            return output.text, []
        parser, made = self._readers.setdefault(index, (self._form.parser(self._names), []))
        text, calls = parser.push(output.text)
        if output.finish_reason is not None:
            rest, last = parser.flush()
            text, calls = text + rest, calls + last
        made.extend(calls)
        return text, calls

    def _reason(self, index: int, output: Output) -> str | None:
        called = index in self._readers and self._readers[index][1]
        return self._ends_in_calls if called and output.finish_reason == "stop" else output.finish_reason

    def _told(self, logprobs: Logprobs) -> dict[str, Any] | None:
        def told(token: int, logprob: float) -> dict[str, Any]:
            return {"token": self._name(token), "logprob": logprob, "bytes": [*self._token_bytes(token)]}

        if not self._asked:
            return None
        content = [told(e.token, e.logprob) | {"top_logprobs": [told(*pair) for pair in e.top]} for e in logprobs]
        return {"content": content, "refusal": None}


def _delta(index: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


class TextShape(Shape):
    """Answers of `POST /v1/completions`; with `echo` the first piece of each begins with its prompt."""

    prefix, whole_object, piece_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, body: CompletionBody, gateway: Gateway):
        super().__init__(body, gateway)
        self._echoes = body.echoes
        self._given, self._answers = body.prompts(), body.answers
        self._echoed: dict[int, int] = {}  # characters of the prompt, by index of the choice

    def whole(self, index: int, answer: Output) -> dict[str, Any]:
        """Give the choice of an answer in one piece, or of a part of one."""
        text, told = answer.text, self._told(answer.logprobs, offset=self._echoed.get(index, 0))
        if self._echoes and index not in self._echoed:
            prompt, before = self._echo(index, answer.prompt_logprobs)
            self._echoed[index] = len(prompt)
            text, told = prompt + text, self._told(answer.logprobs, offset=len(prompt))
            if told is not None and before is not None:
                told = {name: before[name] + values for name, values in told.items()}
        return {"index": index, "text": text, "logprobs": told, "finish_reason": answer.finish_reason}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Give nothing: a stream begins with its first text."""
        return None

    def pieces(self, index: int, output: Output) -> Sequence[dict[str, Any]]:
        """Give the choices that carry new text and the end of an answer."""
        unsaid = self._echoes and index not in self._echoed
        new = output.text or output.finish_reason or output.logprobs or unsaid
        return [self.whole(index, output)] if new else []

    def _echo(self, index: int, logprobs: Logprobs) -> tuple[str, dict[str, list[Any]] | None]:
        """Give the prompt of a choice as text, as it came if it was text, and what is told of its tokens."""
        given, ids = self._given[index // self._answers], self.prompts[index // self._answers]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = [decoder.decode(self._token_bytes(token)) for token in ids]
        pieces[-1] += decoder.decode(b"", final=True)
        text = given if isinstance(given, str) else "".join(pieces)
        told = self._told(logprobs, offset=0)
        if told is None:
            return text, None
        # What a tokenizer adds at the beginning, BOS or a space, has no place in the text.
        place, offsets = len(text) - sum(map(len, pieces)), []
        for piece in pieces:
            offsets.append(max(place, 0))
            place += len(piece)
        first: dict[str, list[Any]] = {"tokens": [self._name(ids[0])], "token_logprobs": [None], "top_logprobs": [None]}
        return text, {name: values + told[name] for name, values in first.items()} | {"text_offset": offsets}

    def _told(self, logprobs: Logprobs, *, offset: int) -> dict[str, Any] | None:
        """Lay them out side by side; the token itself is among the likeliest, whether it is one or not."""
        if not self._asked:
            return None
        return {
            "tokens": [self._name(e.token) for e in logprobs],
            "token_logprobs": [e.logprob for e in logprobs],
            "top_logprobs": [self._by_name((*e.top, (e.token, e.logprob))) for e in logprobs],
            "text_offset": [offset + e.offset for e in logprobs],
        }

    def _by_name(self, pairs: Iterable[tuple[int, float]]) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, logprob in pairs:
            found.setdefault(self._name(token), logprob)
        return found
