"""Between HTTP and the engine: admission, tokenizing, and outputs carried to the asyncio tasks that wait for them."""

import asyncio
import collections
import dataclasses
import functools
import itertools
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from serve.compare import ComparedEngines
from serve.detokenize import token_bytes
from serve.engine import Engine
from serve.grammar import Grammars
from serve.logs import current_record
from serve.metrics import Metrics
from serve.request import (
    Admission,
    BadParameterError,
    EngineDeadError,
    Grammar,
    Output,
    QueueFullError,
    Request,
    ShuttingDownError,
    Slo,
    UnattainableError,
)
from serve.schema import ChatBody, CommonBody, CompletionBody, Message
from serve.tools import Tool, ToolFormat

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What the HTTP side knows of the model. `context` counts tokens, prompt and answer together."""

    names: tuple[str, ...]
    tokenizer: Any
    context: int
    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))


class ContextLengthError(BadParameterError):
    """A prompt leaves no room for an answer."""

    def __init__(self, tokens: int, context: int, param: str):
        super().__init__(
            f"the prompt has {tokens} tokens, but this server's context is {context} tokens, answer included",
            param=param,
            code="context_length_exceeded",
        )


class UnknownModelError(Exception):
    """A request names a model that is not served here."""


class Ticket:
    """The answers to one HTTP request: a place in the server, the engine's requests, and the outputs as they come.

    Whoever holds it must `close` it, however things end: that aborts what still runs and gives the place back.
    """

    def __init__(self, gateway: "Gateway", places: int):
        self.record = current_record()
        self.id: str = self.record.get("request_id") or uuid.uuid4().hex
        self.requests: list[Request] = []
        self.prompt_tokens = 0
        self._gateway = gateway
        self._places = places
        self._queue: asyncio.Queue[tuple[Request, Output]] = asyncio.Queue()
        self._early: collections.deque[tuple[Request, Output]] = collections.deque()
        self._open: dict[Request, int] = {}

    def submit(self, requests: Sequence[Request]) -> None:
        """Hand the requests to the engine; their index here is the `index` of the choice."""
        self._gateway.queue_tokens(requests)
        self.requests = list(requests)
        self._open = {request: index for index, request in enumerate(requests)}
        self.record |= {"prompt_tokens": self.prompt_tokens, "completion_tokens": 0, "finish_reasons": []}
        self._gateway.register(self.requests, self._queue)

    async def taken(self) -> None:
        """Wait until the engine has said that it takes the requests, where it may refuse them.

        Raises:
            UnattainableError: It refuses one: its limits cannot be kept now.
        """
        pending = {request for request in self.requests if self._gateway.may_refuse(request)}
        while pending:
            request, output = await self._queue.get()
            if output.retry_after is not None:
                raise UnattainableError(output.error or "refused", retry_after=output.retry_after)
            if request in pending and output.finish_reason is None:
                pending.remove(request)
                continue
            pending.discard(request)
            self._early.append((request, output))

    def opens_prompt(self, index: int) -> bool:
        """Say whether an answer is the first to its prompt: a prompt is counted once, however many answers it has."""
        return index == 0 or self.requests[index].prompt is not self.requests[index - 1].prompt

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """Give (index of the choice, output) until every answer has ended."""
        while self._open:
            request, output = self._early.popleft() if self._early else await self._queue.get()
            index = self._open[request]
            if output.finish_reason is not None:
                del self._open[request]
            self._note(request, output)
            yield index, output

    def _note(self, request: Request, output: Output) -> None:
        record = self.record
        if output.tokens and "ttft" not in record:
            record["ttft"] = round(time.monotonic() - request.arrival, 4)
        record["completion_tokens"] += output.tokens
        if output.finish_reason is not None:
            record["finish_reasons"].append(output.finish_reason)

    def close(self) -> None:
        """Abort what has not ended and give the place back; a second call does nothing."""
        if self._places:
            self._gateway.forget(self.requests, unfinished=list(self._open))
            self._gateway.admission.release(self._places)
            self._places = 0


class Gateway:
    """Admits requests, turns bodies into engine requests, and delivers outputs; lives in the event loop's thread."""

    def __init__(self, admission: Admission, *, max_queued_tokens: int | None = None):
        self.admission = admission
        self._max_queued_tokens = max_queued_tokens
        self._waiting: dict[Request, int] = {}  # tokens of prompts whose first output has not come
        self.draining = False
        self.model: ModelInfo | None = None
        self.token_bytes = functools.cache(self._token_bytes)
        self.engine: Engine | ComparedEngines | None = None
        self.metrics: Metrics | None = None
        self._queues: dict[Request, asyncio.Queue[tuple[Request, Output]]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stuck_seconds = 0.0
        self._slo = Slo()
        self._grammars: Grammars | None = None
        self.tool_format = ToolFormat.of_template("")

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Say which event loop outputs go to."""
        self._loop = loop

    def ready(
        self,
        engine: Engine | ComparedEngines,
        model: ModelInfo,
        metrics: Metrics,
        *,
        stuck_seconds: float,
        slo: Slo,
    ) -> None:
        """Begin to serve with a started engine; `slo` is for requests that ask for none.

        Called from the thread that started it.
        """
        self._stuck_seconds = stuck_seconds
        self._slo = slo
        self.metrics = metrics
        self.model = model
        self._grammars = Grammars(model.tokenizer.backend_tokenizer, vocab_size=model.vocab_size, eos_ids=model.eos_ids)
        self.tool_format = ToolFormat.of_template(str(getattr(model.tokenizer, "chat_template", None) or ""))
        self.engine = engine

    @property
    def compares(self) -> bool:
        """Whether the model can be asked without its compensators."""
        return isinstance(self.engine, ComparedEngines)

    def problem(self) -> str | None:
        """Say why requests cannot be served now, or None."""
        return "draining" if self.draining else self._engine_problem()

    def _engine_problem(self) -> str | None:
        if self.engine is None:
            return "starting"
        if self.engine.failure is not None:
            return "engine failed"
        if not self.engine.alive:
            return "engine ended"
        if self.engine.seconds_since_beat > self._stuck_seconds:
            return f"engine has not answered for {self.engine.seconds_since_beat:.0f} s"
        return None

    def watch(self) -> None:
        """End what an engine that does not answer, or is no more, holds with an error; to be called now and then.

        An engine that answers again forgets these requests and serves new ones.
        """
        if self.engine is None or not self._queues or (problem := self._engine_problem()) is None:
            return
        log.error("%s: %d requests end with an error", problem, len(self._queues))
        for request in list(self._queues):
            self.engine.abort(request)
        failed = Output(finish_reason="error", error=problem)
        self._dispatch([(request, failed) for request in self._queues])
        self._queues.clear()

    def deliver(self, outputs: list[tuple[Request, Output]]) -> None:
        """Carry outputs from the engine's thread to the tasks that wait for them, with one wake-up of the loop."""
        assert self._loop is not None, "deliver before attach"
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, outputs)

    def _dispatch(self, outputs: list[tuple[Request, Output]]) -> None:
        for request, output in outputs:
            if output.tokens or output.finish_reason is not None:
                self._waiting.pop(request, None)
            if (waiting := self._queues.get(request)) is not None:
                waiting.put_nowait((request, output))

    def queue_tokens(self, requests: Sequence[Request]) -> None:
        """Count the prompts of requests as waiting.

        Raises:
            QueueFullError: With these, more tokens would wait than may.
        """
        new = {request: len(request.prompt) for request in requests}
        held, limit = sum(self._waiting.values()), self._max_queued_tokens
        if limit is not None and held and held + sum(new.values()) > limit:
            self._count_rejected()
            raise QueueFullError(f"{held} prompt tokens already wait, and {limit} may")
        self._waiting |= new

    def _count_rejected(self) -> None:
        if self.metrics is not None:
            self.metrics.rejected.inc()

    def register(self, requests: Sequence[Request], outputs: asyncio.Queue[tuple[Request, Output]]) -> None:
        """Send the requests' outputs to a queue and the requests to the engine."""
        assert self.engine is not None
        for request in requests:
            self._queues[request] = outputs
            self.engine.submit(request)

    def may_refuse(self, request: Request) -> bool:
        """Say whether the engine answers a request with whether it takes it."""
        return self.engine is not None and self.engine.refuses and request.slo.declared

    def forget(self, requests: Sequence[Request], *, unfinished: Sequence[Request]) -> None:
        """Stop delivering, and abort those that have not ended."""
        for request in requests:
            self._queues.pop(request, None)
            self._waiting.pop(request, None)
        for request in unfinished:
            if self.engine is not None:
                self.engine.abort(request)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the model.

        Raises:
            EngineDeadError: There is none yet.
        """
        if self.model is None:
            raise EngineDeadError("the server cannot answer: starting")
        return self.model.names

    def check_model(self, name: str) -> None:
        """Refuse a name that is not the model's.

        Raises:
            UnknownModelError: It is another.
            EngineDeadError: There is no model yet.
        """
        if name not in self.names:
            raise UnknownModelError(f"the model {name!r} does not exist here; this server has {', '.join(self.names)}")

    def admit(self, answers: int) -> Ticket:
        """Reserve places for a call before any work is done for it.

        Raises:
            QueueFullError, ShuttingDownError, EngineDeadError: It cannot be taken now.
            BadParameterError: It could never be taken.
        """
        if self.draining:
            raise ShuttingDownError("the server is shutting down")
        if (problem := self.problem()) is not None:
            raise EngineDeadError(f"the server cannot answer: {problem}")
        try:
            self.admission.reserve(answers)
        except QueueFullError:
            self._count_rejected()
            raise
        return Ticket(self, answers)

    def chat_prompt(self, body: ChatBody) -> list[tuple[int, ...]]:
        """Lay out a conversation by the model's chat template, as token ids.

        Raises:
            BadParameterError: The model has no template, or the template refuses the conversation.
        """
        return [self._fits(tuple(self.chat_tokens(body.messages, tools=body.shown_tools)), "messages")]

    def chat_tokens(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), add_generation_prompt: bool = True
    ) -> list[int]:
        """Lay out messages as `chat_prompt` does, however long they are."""
        tokenizer = self._model.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise BadParameterError("this model has no chat template; use /v1/completions", param="messages")
        laid_out = self.tool_format.lay_out([message.plain() for message in messages], tools)
        try:
            text = tokenizer.apply_chat_template(
                laid_out,
                tools=[tool.as_json() for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:
            reason = " ".join(str(error).split())
            raise BadParameterError(f"the chat template refuses these messages: {reason}", param="messages") from None
        return tokenizer.encode(text, add_special_tokens=False)

    def tokens_of(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Give the token ids of a text."""
        return self._model.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def text_of(self, tokens: Sequence[int]) -> str:
        """Give the text of token ids, special tokens by their names.

        Raises:
            BadParameterError: An id lies outside the vocabulary.
        """
        self._check_ids(tokens, "tokens")
        return self._model.tokenizer.backend_tokenizer.decode(list(tokens), skip_special_tokens=False)

    @property
    def context(self) -> int:
        """The tokens that prompt and answer may have together."""
        return self._model.context

    def completion_prompts(self, body: CompletionBody) -> list[tuple[int, ...]]:
        """Turn the prompts of a text completion into token ids.

        Raises:
            BadParameterError: A prompt is empty, too long, or holds an id outside the vocabulary.
        """
        return [self._fits(self._prompt_ids(prompt), "prompt") for prompt in body.prompts()]

    def _prompt_ids(self, prompt: str | list[int]) -> tuple[int, ...]:
        model = self._model
        ids = tuple(model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        if not ids and model.bos_id is not None:
            ids = (model.bos_id,)
        self._check_ids(ids, "prompt")
        return ids

    def _check_ids(self, ids: Sequence[int], param: str) -> None:
        size = self._model.vocab_size
        outside = next((token for token in ids if token >= size), None)
        if outside is not None:
            raise BadParameterError(f"{param} holds token id {outside}; the vocabulary has {size} entries", param=param)

    def _fits(self, ids: tuple[int, ...], param: str) -> tuple[int, ...]:
        if not ids:
            raise BadParameterError(f"{param} holds no tokens", param=param)
        if len(ids) >= self._model.context:
            raise ContextLengthError(len(ids), self._model.context, param)
        return ids

    def _token_bytes(self, token: int) -> bytes:
        return token_bytes(self._model.tokenizer.backend_tokenizer, token)

    async def grammar(self, body: CommonBody) -> Grammar | None:
        """Compile the grammar that a body's answers are held to, if there is one.

        Raises:
            BadParameterError: It is none that can be used.
            QueueFullError: Too many are being compiled.
        """
        asked = await asyncio.to_thread(body.grammar, self.tool_format)
        if asked is None:
            return None
        assert self._grammars is not None, "a request was admitted before the model was ready"
        return await self._grammars.compile(asked[1], param=asked[0])

    def requests(
        self,
        ticket: Ticket,
        body: CommonBody,
        prompts: Sequence[tuple[int, ...]],
        headers: Mapping[str, str],
        grammar: Grammar | None = None,
    ) -> list[Request]:
        """Make the engine's requests: `n` for each prompt, in the order of the choices.

        Raises:
            BadParameterError: A sampling parameter or a limit is out of range.
        """
        model, slo = self._model, body.limits(headers, default=self._slo)
        if self.metrics is not None:
            self.metrics.request_n.observe(body.answers)
        if not body.compensators and not self.compares:
            raise BadParameterError("compensators: this server was not started with --compare", param="compensators")
        ticket.prompt_tokens = sum(map(len, prompts))
        made = []
        for prompt, answer in itertools.product(prompts, range(body.answers)):
            params = body.sampling(
                room=model.context - len(prompt),
                eos_ids=model.eos_ids,
                fallback_seed=secrets.randbits(63),
                vocab_size=model.vocab_size,
            )
            params = dataclasses.replace(params, constrained=grammar is not None)
            if answer:
                params = dataclasses.replace(params, seed=(params.seed + answer + 2**63) % 2**64 - 2**63)
            made.append(
                Request(
                    id=f"{ticket.id}-{len(made)}",
                    prompt=prompt,
                    params=params,
                    slo=slo,
                    priority=body.priority,
                    droppable=body.allow_uncompensated and params.prompt_logprobs is None,
                    grammar=grammar,
                    bare=not body.compensators,
                )
            )
        return made

    @property
    def _model(self) -> ModelInfo:
        assert self.model is not None, "a request was admitted before the model was ready"
        return self.model
