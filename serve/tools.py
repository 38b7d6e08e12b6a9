"""Calls of tools: how a family of models writes them, read out of its answers, and as a grammar for answers.

The chat template shows the family: Hermes's tags (Qwen and most others), Llama 3's bare JSON, or Mistral's list. A
model whose template knows no tools is told of them in a system message, in Hermes's way.
"""

import dataclasses
import json
import secrets
import string
from collections.abc import Sequence
from typing import Any, Literal

from serve.detokenize import overlap
from serve.grammar import lark_grammar, schema_text

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PROMPT = """You may call functions to answer. These are the functions, as JSON within <tools></tools>:
<tools>
{tools}
</tools>
To call one, answer with a JSON object with its name and arguments within <tool_call></tool_call>:
<tool_call>
{{"name": "NAME", "arguments": {{}}}}
</tool_call>"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str | None
    parameters: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Give it as chat templates take it."""
        return {"type": "function", "function": dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call that the model asks for; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str

    def as_json(self) -> dict[str, Any]:
        """Give it as OpenAI's answers have it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """How a family of models writes calls; `native` says whether its chat template shows tools by itself."""

    style: Literal["hermes", "llama", "mistral"]
    native: bool

    @classmethod
    def of_template(cls, template: str) -> "ToolFormat":
        """Tell the format by the words of a chat template."""
        native = "tools" in template
        if native and "[TOOL_CALLS]" in template:
            return cls(style="mistral", native=True)
        if native and _OPEN not in template and '"parameters"' in template and "ipython" in template:
            return cls(style="llama", native=True)
        return cls(style="hermes", native=native)

    @property
    def arguments_key(self) -> str:
        """The key under which a call has its arguments."""
        return "parameters" if self.style == "llama" else "arguments"

    def grammar(self, tools: Sequence[Tool], *, several: bool) -> str:
        """Give the grammar of a call of one of the tools, or with `several` of one call or more."""
        begin, between, end = {
            "hermes": (f"{_OPEN}\n", "\n", f"\n{_CLOSE}"),
            "llama": ("", "; ", ""),
            "mistral": ("", ", ", ""),
        }[self.style]
        calls = f"call ({json.dumps(between)} call)*" if several else "call"
        lines = [f'start: "[" {calls} "]"' if self.style == "mistral" else f"start: {calls}"]
        lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
        for i, tool in enumerate(tools):
            head = f'{begin}{{"name": {json.dumps(tool.name)}, "{self.arguments_key}": '
            lines.append(f"call_{i}: {json.dumps(head)} arguments_{i} {json.dumps('}' + end)}")
            lines.append(f"arguments_{i}: %json {schema_text({'type': 'object'} | tool.parameters)}")
        return lark_grammar("\n".join(lines))

    def lay_out(self, messages: Sequence[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
        """Give the messages as the chat template takes them: tools and calls as text where it knows none."""
        if self.native:
            return list(messages)
        laid_out = []
        for message in messages:
            content = message["content"]
            if calls := message.get("tool_calls"):
                told = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
                content = "\n".join([*([content] if content else []), *(f"{_OPEN}\n{t}\n{_CLOSE}" for t in told)])
            if message["role"] == "tool":
                laid_out.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
            else:
                laid_out.append({"role": message["role"], "content": content})
        if tools:
            shown = "\n".join(json.dumps(tool.as_json(), ensure_ascii=False) for tool in tools)
            system = _PROMPT.format(tools=shown)
            if laid_out[0]["role"] == "system":
                system = f"{laid_out.pop(0)['content']}\n\n{system}"
            laid_out.insert(0, {"role": "system", "content": system})
        return laid_out

    def parser(self, names: Sequence[str]) -> "CallParser":
        """Give a reader of an answer in which these functions may be called."""
        return CallParser(self, names)


class CallParser:
    """Tells calls from text as an answer comes; what names no known function, or is no call, is text.

    A call is told when it is complete. Of an answer of bare JSON that is known only at its end.
    """

    def __init__(self, form: ToolFormat, names: Sequence[str]):
        self._form, self._names = form, frozenset(names)
        self._held = ""
        self._inside = False  # what is held begins with a call, perhaps
        self._begun = self._called = False

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Add text; give what is text for certain, and the calls that have become complete."""
        self._held += text
        if self._form.style != "hermes":
            return self._push_bare(), []
        shown, calls = "", []
        while True:
            if self._called:  # blanks between calls are no text
                self._held = self._held.lstrip()
                self._called = not self._held
            if not self._inside:
                before, tag, rest = self._held.partition(_OPEN)
                keep = 0 if tag else overlap(before, _OPEN)
                shown += before[: len(before) - keep]
                self._held = rest if tag else before[len(before) - keep :]
                self._inside = bool(tag)
                if not tag:
                    return shown, calls
            inner, tag, rest = self._held.partition(_CLOSE)
            if not tag:
                return shown, calls
            found = self._read(inner)
            calls += found
            shown += "" if found else f"{_OPEN}{inner}{_CLOSE}"
            self._held, self._inside, self._called = rest, False, bool(found)

    def flush(self) -> tuple[str, list[ToolCall]]:
        """Give what is left at the end of the answer."""
        held, self._held = self._held, ""
        if not self._inside:
            return held, []
        if found := self._read(held):
            return "", found
        return (_OPEN if self._form.style == "hermes" else "") + held, []

    def _push_bare(self) -> str:
        if not self._begun and (start := self._held.lstrip()):
            self._begun = True
            self._inside = start[0] == ("[" if self._form.style == "mistral" else "{")
        if self._inside or not self._begun:
            return ""
        held, self._held = self._held, ""
        return held

    def _read(self, text: str) -> list[ToolCall]:
        """Give the calls that a text consists of, or none if it is anything else."""
        decoder, values, place = json.JSONDecoder(), [], 0
        text = text.strip()
        try:
            while place < len(text):
                value, place = decoder.raw_decode(text, place)
                values += value if isinstance(value, list) else [value]
                while place < len(text) and text[place] in "; \n\t\r":
                    place += 1
        except (ValueError, RecursionError):
            return []
        calls = []
        for value in values:
            arguments = value.get(self._form.arguments_key) if isinstance(value, dict) else None
            if not isinstance(arguments, dict) or value.get("name") not in self._names:
                return []
            told = json.dumps(arguments, ensure_ascii=False)
            calls.append(ToolCall(id=self._new_id(), name=value["name"], arguments=told))
        return calls

    def _new_id(self) -> str:
        letters = string.ascii_letters + string.digits
        if self._form.style == "mistral":  # its template takes no other length
            return "".join(secrets.choice(letters) for _ in range(9))
        return "call_" + "".join(secrets.choice(letters) for _ in range(24))
