"""Bodies of the OpenAI-compatible endpoints, and what they mean to the engine."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
)

from serve.grammar import lark_grammar, regex_grammar, schema_grammar
from serve.request import MAX_LOGPROBS, UNBOUNDED, BadParameterError, SamplingParams, Slo, check_range
from serve.tools import Tool, ToolFormat

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens` in text completions; chat answers run to the end of the context."""

TTFT_KEY, TPOT_KEY = "x-slo-ttft-ms", "x-slo-tpot-ms"
"""Limits of a request, in milliseconds, as header or body key: names of the Gateway API Inference Extension."""

_SLO_HEADERS = {
    TTFT_KEY: (TTFT_KEY, "x-llm-d-slo-ttft-ms"),
    TPOT_KEY: (TPOT_KEY, "x-llm-d-slo-tpot-ms"),
}

_MAX_COMPLETION_LOGPROBS = 5
_MAX_STOPS = 16
_MAX_N = 16
_MAX_KEYS = 1024
_MAX_TOOLS = 128


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None
    return text


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > _MAX_KEYS:
        raise ValueError(f"holds {len(value)} keys, at most {_MAX_KEYS} are taken")
    return value


T = TypeVar("T")
Listed = Annotated[list[T], Field(max_length=2**18, fail_fast=True)]
"""A list that is given up at its first mistake: a description of each of a million takes a gigabyte and seconds."""

Text = Annotated[str, AfterValidator(_encodable)]
StopString = Annotated[str, StringConstraints(max_length=1024), AfterValidator(_encodable)]
FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
TokenId = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "best_of": (None, 1),
    "echo": (None, False),  # of chats: a text completion has it
    "suffix": (None, ""),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "prompt_logprobs": (None,),
    "use_beam_search": (None, False),
    "min_tokens": (None, 0),
}
"""Fields that would change the answer and that this server does not have, with the values that ask for nothing."""


class JsonSchema(BaseModel):
    """What `response_format` says of a schema; JSON that fits it is the only answer there is, `strict` or not."""

    name: str | None = None
    definition: Annotated[dict[str, Any] | bool | None, Field(alias="schema")] = None


class ResponseFormat(BaseModel):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> str | None:
        """Give the grammar that it asks for.

        Raises:
            BadParameterError: There is no schema.
        """
        if self.type == "text":
            return None
        if self.type == "json_object":
            return schema_grammar({"type": "object"})
        if self.json_schema is None or self.json_schema.definition is None:
            raise BadParameterError(
                "response_format of type json_schema needs json_schema.schema", param="response_format"
            )
        return schema_grammar(self.json_schema.definition)


class StructuredOutputs(BaseModel):
    """vLLM's `structured_outputs`: one of a JSON schema, a regular expression, a list of texts, or a Lark grammar."""

    json_schema: Annotated[dict[str, Any] | bool | None, Field(alias="json")] = None
    regex: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1)] | None = None
    grammar: Text | None = None

    def compiled(self) -> str:
        """Give the grammar that it asks for.

        Raises:
            BadParameterError: It asks for none, or for more than one.
        """
        given = (self.json_schema, self.regex, self.choice, self.grammar)
        if sum(value is not None for value in given) != 1:
            raise BadParameterError(
                "structured_outputs takes one of json, regex, choice and grammar", param="structured_outputs"
            )
        if self.regex is not None:
            return regex_grammar(self.regex)
        if self.grammar is not None:
            return lark_grammar(self.grammar)
        if self.choice is not None:
            return lark_grammar("start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in self.choice))
        assert self.json_schema is not None
        return schema_grammar(self.json_schema)


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool = False


class CommonBody(BaseModel):
    """What chat and text completions share; unknown fields are ignored, as clients send new ones all the time."""

    model_config = ConfigDict(extra="allow")

    model: str
    max_tokens: Annotated[int, Field(strict=True)] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Annotated[int, Field(strict=True)] | None = None
    min_p: Number | None = None
    seed: Annotated[int, Field(strict=True)] | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: Annotated[dict[str, Number] | None, BeforeValidator(_few)] = None
    n: Annotated[int, Field(strict=True)] | None = None
    stop: StopString | Listed[StopString] | None = None
    stop_token_ids: Listed[TokenId] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    slo_ttft_ms: Annotated[Number | None, Field(validation_alias=AliasChoices(TTFT_KEY, "slo_ttft_ms"))] = None
    slo_tpot_ms: Annotated[Number | None, Field(validation_alias=AliasChoices(TPOT_KEY, "slo_tpot_ms"))] = None
    priority: Annotated[int, Field(strict=True, ge=-(2**31), lt=2**31)] = 0
    allow_uncompensated: Annotated[bool, Field(strict=True)] = True
    compensators: Annotated[bool, Field(strict=True)] = True

    def check(self) -> None:
        """Refuse what this server cannot do rather than answer something else than was asked.

        Raises:
            BadParameterError: Names the field.
        """
        for name, harmless in UNSUPPORTED.items():
            value = (self.model_extra or {}).get(name)
            if not any(
                value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in harmless
            ):
                raise BadParameterError(
                    f"{name} is not supported by this server", param=name, code="unsupported_parameter"
                )
        check_range("n", self.answers, low=1, high=_MAX_N)
        if len(self.stops) > _MAX_STOPS:
            raise BadParameterError(
                f"stop holds {len(self.stops)} strings, at most {_MAX_STOPS} are taken", param="stop"
            )
        if self.stream_options is not None and not self.stream:
            raise BadParameterError("stream_options is only allowed when stream is true", param="stream_options")

    @property
    def answers(self) -> int:
        """How many answers each prompt gets."""
        return 1 if self.n is None else self.n

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a streamed answer ends with a chunk that holds the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def requested_tokens(self) -> int | None:
        """Give the limit on generated tokens that the client set, or None."""
        return self.max_tokens

    def requested_logprobs(self) -> int | None:
        """Give how many likeliest tokens are to be told in the place of each, or None if not even its own probability.

        Raises:
            BadParameterError: It is out of range.
        """
        raise NotImplementedError

    @property
    def echoes(self) -> bool:
        """Whether the answer begins with the prompt, which is then judged as well where the answer is."""
        return False

    def grammar(self, form: ToolFormat) -> tuple[str, str] | None:
        """Give the field that holds answers to a grammar, and the grammar; None if they are free.

        Raises:
            BadParameterError: What is asked for makes no sense, alone or together.
        """
        del form
        asked = None if self.response_format is None else self.response_format.grammar()
        if self.structured_outputs is None:
            return None if asked is None else ("response_format", asked)
        if asked is not None:
            raise BadParameterError("give response_format or structured_outputs, not both", param="structured_outputs")
        return "structured_outputs", self.structured_outputs.compiled()

    def limits(self, headers: Mapping[str, str], *, default: Slo) -> Slo:
        """Give the limits on time that the body or else the headers ask for, and where they do not, the server's own.

        Raises:
            BadParameterError: A limit is no number above 0.
        """
        return limits(headers, default=default, ttft_ms=self.slo_ttft_ms, tpot_ms=self.slo_tpot_ms)

    def biases(self, *, vocab_size: int) -> tuple[tuple[int, float], ...]:
        """Give what is to be added to the logits of tokens.

        Raises:
            BadParameterError: A key is no token of the vocabulary.
        """
        found = []
        for text, bias in (self.logit_bias or {}).items():
            token = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
            if not 0 <= token < vocab_size:
                raise BadParameterError(
                    f"logit_bias has the key {text!r}; the vocabulary has tokens 0 to {vocab_size - 1}",
                    param="logit_bias",
                )
            found.append((token, bias))
        return tuple(found)

    def sampling(self, *, room: int, eos_ids: tuple[int, ...], fallback_seed: int, vocab_size: int) -> SamplingParams:
        """Give the engine's parameters for an answer that may have `room` tokens at most.

        Raises:
            BadParameterError: A value is out of range.
        """
        limit = self.requested_tokens()
        if limit is not None:
            check_range("max_tokens", limit, low=0 if self.echoes else 1, high=2**31 - 1)
        top_k = 0 if self.top_k in (None, -1) else self.top_k
        return SamplingParams(
            max_tokens=room if limit is None else min(limit, room),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=0.0 if self.min_p is None else self.min_p,
            seed=fallback_seed if self.seed is None else self.seed,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=self.biases(vocab_size=vocab_size),
            logprobs=self.requested_logprobs(),
            prompt_logprobs=self.requested_logprobs() if self.echoes else None,
            stop=self.stops,
            stop_token_ids=frozenset(() if self.ignore_eos else eos_ids) | frozenset(self.stop_token_ids or ()),
        )


def limits(headers: Mapping[str, str], *, default: Slo, ttft_ms: Any = None, tpot_ms: Any = None) -> Slo:
    """Give the limits on time that a body's values or else the headers ask for, and where they do not, the default.

    Raises:
        BadParameterError: A limit is no number above 0.
    """
    ttft = _seconds(TTFT_KEY, ttft_ms, headers)
    tpot = _seconds(TPOT_KEY, tpot_ms, headers)
    return Slo(
        ttft=default.ttft if ttft is None else ttft,
        itl=default.itl if tpot is None else UNBOUNDED,
        tpot=default.tpot if tpot is None else tpot,
    )


def _seconds(key: str, value: float | None, headers: Mapping[str, str]) -> float | None:
    """Read a limit in milliseconds."""
    text = next((headers[name] for name in _SLO_HEADERS[key] if name in headers), None)
    if value is None and text is not None:
        try:
            value = float(text)
        except ValueError:
            raise BadParameterError(f"{key} must be a number of milliseconds, got {text!r}", param=key) from None
    if value is None:
        return None
    check_range(key, value, low=0.0, high=1e3 * UNBOUNDED, open_low=True)
    return value / 1e3


class CompletionBody(CommonBody):
    """Body of `POST /v1/completions`: one prompt or several, as text or token ids."""

    prompt: Text | Listed[Text] | Listed[TokenId] | Listed[Listed[TokenId]]
    logprobs: Annotated[int, Field(strict=True)] | None = None
    echo: Annotated[bool, Field(strict=True)] | None = None

    @property
    def echoes(self) -> bool:
        """Whether the answer begins with the prompt."""
        return bool(self.echo)

    def prompts(self) -> list[str | list[int]]:
        """Give the prompts one by one.

        Raises:
            BadParameterError: There is none.
        """
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise BadParameterError("prompt must not be an empty list", param="prompt")
        if isinstance(prompt[0], int):
            return [[token for token in prompt if isinstance(token, int)]]
        return [item for item in prompt if not isinstance(item, int)]

    def requested_tokens(self) -> int:
        """Give the limit on generated tokens: OpenAI's default of 16 unless set."""
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def requested_logprobs(self) -> int | None:
        """Give how many likeliest tokens are to be told; raises as `CommonBody` says."""
        check_range("logprobs", self.logprobs or 0, low=0, high=_MAX_COMPLETION_LOGPROBS)
        return self.logprobs


class TextPart(BaseModel):
    """A part of a chat message; only text can be served."""

    type: Literal["text"]
    text: Text


class CalledFunction(BaseModel):
    """The function of a call that was made; `arguments` is JSON as text."""

    name: Text
    arguments: Text = "{}"


class PastCall(BaseModel):
    """A call in a message of the assistant."""

    id: Text | None = None
    function: CalledFunction


class Message(BaseModel):
    """A chat message; `content` parts are joined."""

    model_config = ConfigDict(extra="ignore")

    role: Annotated[str, StringConstraints(max_length=64), AfterValidator(_encodable)]
    content: Text | Listed[TextPart] | None = None
    name: Text | None = None
    tool_calls: list[PastCall] | None = None
    tool_call_id: Text | None = None

    def plain(self) -> dict[str, Any]:
        """Give the message as chat templates take it: calls with their arguments as objects.

        Raises:
            BadParameterError: Arguments of a call are no JSON.
        """
        content = self.content or ""
        joined = content if isinstance(content, str) else "".join(part.text for part in content)
        plain: dict[str, Any] = {"role": self.role, "content": joined}
        if self.name is not None:
            plain["name"] = self.name
        if self.tool_call_id is not None:
            plain["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            plain["tool_calls"] = [self._plain_call(call) for call in self.tool_calls]
        return plain

    @staticmethod
    def _plain_call(call: PastCall) -> dict[str, Any]:
        try:
            arguments = json.loads(call.function.arguments)
        except (ValueError, RecursionError):
            raise BadParameterError(
                f"messages: the arguments of a call of {call.function.name} are no JSON", param="messages"
            ) from None
        return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


class Function(BaseModel):
    """A function that may be called."""

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None


class FunctionTool(BaseModel):
    """An entry of `tools`."""

    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    """The name in a `tool_choice`."""

    name: FunctionName


class NamedChoice(BaseModel):
    """A `tool_choice` that says which function to call."""

    type: Literal["function"]
    function: NamedFunction


class TokenizeBody(BaseModel):
    """Body of `POST /tokenize`: a text, or a conversation to be laid out by the chat template."""

    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeBody(BaseModel):
    """Body of `POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId]


class ChatBody(CommonBody):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[Listed[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(strict=True)] | None = None
    logprobs: Annotated[bool, Field(strict=True)] | None = None
    top_logprobs: Annotated[int, Field(strict=True)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=_MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None

    @property
    def shown_tools(self) -> list[Tool]:
        """The tools that the model is told of."""
        if self.tool_choice == "none":
            return []
        told = [tool.function for tool in self.tools or ()]
        return [Tool(name=f.name, description=f.description, parameters=f.parameters or {}) for f in told]

    @property
    def names_the_call(self) -> bool:
        """Whether `tool_choice` says which function is to be called."""
        return isinstance(self.tool_choice, NamedChoice)

    def grammar(self, form: ToolFormat) -> tuple[str, str] | None:
        """Give the grammar of the calls that are demanded, or else what `CommonBody` says."""
        tools, choice, asked = self.shown_tools, self.tool_choice, super().grammar(form)
        names = [tool.name for tool in tools]
        if len(set(names)) < len(names):
            raise BadParameterError("tools holds two functions of the same name", param="tools")
        if tools and asked is not None:
            raise BadParameterError(f"{asked[0]} does not go with tools; set tool_choice to none", param=asked[0])
        if isinstance(choice, NamedChoice):
            tools = [tool for tool in tools if tool.name == choice.function.name]
        if choice in (None, "none", "auto"):
            return asked
        if not tools:
            raise BadParameterError("tool_choice asks for a function that is not among tools", param="tool_choice")
        several = choice == "required" and self.parallel_tool_calls is not False
        return "tools", form.grammar(tools, several=several)

    def requested_tokens(self) -> int | None:
        """Give the limit on generated tokens that the client set, or None for the rest of the context."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def requested_logprobs(self) -> int | None:
        """Give how many likeliest tokens are to be told; raises as `CommonBody` says, or if told only of those."""
        count = self.top_logprobs or 0
        check_range("top_logprobs", count, low=0, high=MAX_LOGPROBS)
        if count and not self.logprobs:
            raise BadParameterError("top_logprobs is only allowed when logprobs is true", param="top_logprobs")
        return count if self.logprobs else None
