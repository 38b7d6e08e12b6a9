"""Calls of tools: formats told by chat templates, calls told from text however it is cut, and grammars for them."""

import asyncio
import json
import threading
import time
from typing import Any

import numpy as np
import pytest
import tokenizers

from serve.grammar import Grammar, GrammarError, Grammars, regex_grammar, schema_grammar
from serve.request import BadParameterError, QueueFullError
from serve.tools import Tool, ToolFormat

HERMES = ToolFormat(style="hermes", native=True)
LLAMA = ToolFormat(style="llama", native=True)
MISTRAL = ToolFormat(style="mistral", native=True)
TOOL = Tool(name="add", description="Add.", parameters={"type": "object", "properties": {"a": {"type": "integer"}}})


@pytest.mark.parametrize(
    ("template", "style", "native"),
    [
        ("{% if tools %}<tool_call>{% endif %}", "hermes", True),
        ('{{ tools }} {"name": x, "parameters": y} ipython', "llama", True),
        ("{{ tools }}[TOOL_CALLS]", "mistral", True),
        ("{{ messages }}", "hermes", False),
        ("", "hermes", False),
    ],
)
def test_the_chat_template_tells_the_format(template: str, style: str, native: bool) -> None:
    assert ToolFormat.of_template(template) == ToolFormat(style=style, native=native)  # type: ignore[arg-type]


CALL = '{"name": "add", "arguments": {"a": 1}}'
LLAMA_CALL = CALL.replace("arguments", "parameters")


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("form", "answer", "text", "calls"),
    [
        (HERMES, f"Let me see. <tool_call>\n{CALL}\n</tool_call>", "Let me see. ", 1),
        (HERMES, f"<tool_call>{CALL}</tool_call>\n<tool_call>\n{CALL}\n</tool_call>", "", 2),
        (HERMES, f"<tool_call>\n{CALL}", "", 1),
        (HERMES, "a < b, <tool>, <tool_cal", "a < b, <tool>, <tool_cal", 0),
        (HERMES, "<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", 0),
        (HERMES, f"<tool_call>{CALL.replace('add', 'sub')}</tool_call>", None, 0),
        (HERMES, "<tool_call>" + "[" * 100_000, None, 0),
        (LLAMA, LLAMA_CALL, "", 1),
        (LLAMA, f"{LLAMA_CALL}; {LLAMA_CALL}", "", 2),
        (LLAMA, '{"name": "add"}', '{"name": "add"}', 0),
        (LLAMA, "The sum is {1}.", "The sum is {1}.", 0),
        (MISTRAL, f" [{CALL}, {CALL}]", "", 2),
        (MISTRAL, "[1] is a source", "[1] is a source", 0),
        (MISTRAL, "", "", 0),
    ],
)
def test_calls_are_told_from_text(form: ToolFormat, answer: str, text: str | None, calls: int, size: int) -> None:
    parser, shown, found = form.parser(["add"]), "", []
    size = size if len(answer) < 1000 else 1000
    for start in range(0, len(answer), size):
        more, made = parser.push(answer[start : start + size])
        shown, found = shown + more, found + made
    more, made = parser.flush()
    assert shown + more == (answer if text is None else text)
    found += made
    assert [(call.name, json.loads(call.arguments)) for call in found] == [("add", {"a": 1})] * calls
    assert len({call.id for call in found}) == calls
    assert all(len(call.id) == (9 if form is MISTRAL else 29) for call in found)


def test_a_template_without_tools_is_told_of_them_in_words() -> None:
    form = ToolFormat(style="hermes", native=False)
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    system, assistant, answer = form.lay_out(messages, [TOOL])
    assert system["content"].startswith("Be brief.\n")
    assert json.dumps(TOOL.as_json()) in system["content"]
    assert form.parser(["add"]).push(assistant["content"])[1][0].name == "add"
    assert answer == {"role": "user", "content": "<tool_response>\n2\n</tool_response>"}
    assert form.lay_out(messages[:1], []) == messages[:1]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    """Grammars over bytes: token i is byte i, 256 ends."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate([*alphabet, "<end>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    made = Grammars(tokenizer, vocab_size=300, eos_ids=(256,))
    made.encode = lambda text: tokenizer.encode(text).ids  # type: ignore[attr-defined]
    return made


def accepts(grammars: Any, grammar: Grammar, text: str) -> bool:
    """Whether a grammar allows each token of a text, by its masks, and then an end."""
    mask, tokens, seen = np.zeros(10, np.uint32), grammars.encode(text), []
    for token in [*tokens, 256]:
        grammar.fill(mask)
        assert not np.unpackbits(mask.view(np.uint8), bitorder="little")[257:].any()
        if not mask[token // 32] >> (token % 32) & 1:
            return False
        done = grammar.push(token)
        seen.append(token)
        if done:
            return seen[: len(tokens)] == tokens
    return True


@pytest.mark.parametrize("form", [HERMES, LLAMA, MISTRAL])
def test_grammars_allow_calls_and_nothing_else(grammars: Grammars, form: ToolFormat) -> None:
    other = Tool(name="noop", description=None, parameters={})
    several = asyncio.run(grammars.compile(form.grammar([TOOL, other], several=True), param="tools"))
    one = asyncio.run(grammars.compile(form.grammar([TOOL], several=False), param="tools"))
    call = (LLAMA_CALL if form is LLAMA else CALL).replace('"a": 1', '"a":1')
    texts = {
        "hermes": (tagged := f"<tool_call>\n{call}\n</tool_call>", f"{tagged}\n{tagged}"),
        "llama": (call, f"{call}; {call}"),
        "mistral": (f"[{call}]", f"[{call}, {call}]"),
    }[form.style]  # fmt: skip
    assert [accepts(grammars, several.copy(), text) for text in texts] == [True, True]
    assert accepts(grammars, one.copy(), texts[0])
    assert form.parser(["add"]).push(texts[1])[1] or form.style != "hermes"
    for bad in (texts[0].replace(":1", ':"x"'), texts[0].replace("add", "sub"), "Hello", texts[0][:-1]):
        assert not accepts(grammars, one.copy(), bad)


def test_a_mask_has_what_may_come_next_and_an_end_is_told(grammars: Grammars) -> None:
    grammar = asyncio.run(grammars.compile(regex_grammar("ab|ac"), param="x"))
    other, mask = grammar.copy(), np.zeros(10, np.uint32)
    (a,), (b,), (c,) = (grammars.encode(letter) for letter in "abc")  # type: ignore[attr-defined]

    def allowed() -> list[int]:
        grammar.fill(mask)
        return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()

    assert allowed() == [a]
    assert not grammar.push(a)
    assert allowed() == [b, c]
    assert grammar.push(c)
    with pytest.raises(GrammarError):
        other.push(b)


@pytest.mark.parametrize(
    "grammar",
    [
        "{",
        regex_grammar("("),
        regex_grammar("(" * 30_000),
        schema_grammar({"type": "widget"}),
        schema_grammar({"$ref": "http://localhost/x"}),
        schema_grammar({"enum": ["x" * 70_000]}),
        schema_grammar({"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(6)]} for i in range(12)]}),
    ],
    ids=range(7),
)
def test_what_is_no_grammar_or_too_much_of_one_is_refused(grammars: Grammars, grammar: str) -> None:
    with pytest.raises(BadParameterError, match="x: ") as error:
        asyncio.run(grammars.compile(grammar, param="x"))
    assert error.value.param == "x"


def test_a_grammar_that_is_slow_is_refused(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.grammar._MAX_MASK_SECONDS", 0.0)
    with pytest.raises(BadParameterError, match="too complex"):
        asyncio.run(grammars.compile(regex_grammar("a"), param="x"))
    monkeypatch.setattr(Grammars, "_compile", lambda *_: time.sleep(0.3))
    monkeypatch.setattr("serve.grammar._MAX_SECONDS", 0.05)
    with pytest.raises(BadParameterError, match="too complex"):
        asyncio.run(grammars.compile(regex_grammar("a"), param="x"))


def test_a_grammar_that_does_not_get_its_turn_is_not_called_bad(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.grammar._MAX_SECONDS", 0.05)
    busy = threading.Event()
    for _ in range(2):
        grammars._pool.submit(busy.wait, 20)
    try:
        with pytest.raises(QueueFullError):
            asyncio.run(grammars.compile(regex_grammar("a"), param="x"))
    finally:
        busy.set()
