"""The OpenAI-compatible HTTP surface."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from serve.chat_page import add_chat_page
from serve.errors import error_body as _error_body
from serve.errors import error_response as _error
from serve.gateway import Gateway, Ticket, UnknownModelError
from serve.metrics import CONTENT_TYPE
from serve.request import (
    BadParameterError,
    EngineDeadError,
    Output,
    QueueFullError,
    ShuttingDownError,
    UnattainableError,
    joined,
)
from serve.schema import ChatBody, CommonBody, CompletionBody
from serve.shapes import ChatShape, Shape, TextShape
from serve.texts import add_text_endpoints

_RETRY_SECONDS = 1
_CLIENT_GONE = 499


class EngineError(RuntimeError):
    """An answer ended because of the server, not the client."""

    def __init__(self, output: Output):
        super().__init__(output.error or "the engine failed")
        self.status = 400 if output.client_error else 503 if output.finish_reason == "abort" else 500


def create_app(gateway: Gateway) -> FastAPI:
    """Build the application; it answers from the start and says 503 until `gateway.ready`.

    `middleware.protect` puts it behind limits.
    """
    app = FastAPI(
        title="spear-jax",
        description="OpenAI-compatible server of 4-bit language models.",
        strict_content_type=False,
    )
    _handle_errors(app)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await _answer(gateway, request, body, ChatShape(body, gateway), 1, lambda: gateway.chat_prompt(body))

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        prompts = len(body.prompts())
        shape = TextShape(body, gateway)
        return await _answer(gateway, request, body, shape, prompts, lambda: gateway.completion_prompts(body))

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model_card(gateway, name) for name in gateway.names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        gateway.check_model(name)
        return JSONResponse(_model_card(gateway, name))

    add_text_endpoints(app, gateway)
    add_chat_page(app)

    @app.get("/health")
    @app.get("/ready")
    async def health() -> Response:
        problem = gateway.problem()
        if problem is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": problem}, status_code=503, headers={"retry-after": str(_RETRY_SECONDS)})

    @app.get("/metrics")
    async def metrics() -> Response:
        if gateway.metrics is None:
            raise EngineDeadError("the server cannot answer: starting")
        return Response(gateway.metrics.render(), media_type=CONTENT_TYPE)

    return app


async def _answer(
    gateway: Gateway,
    request: Request,
    body: CommonBody,
    shape: Shape,
    prompts: int,
    tokenize: Callable[[], list[tuple[int, ...]]],
) -> Response:
    """Check, admit, tokenize (off the event loop), and answer as a stream or in one piece."""
    gateway.check_model(body.model)
    body.check()
    ticket = gateway.admit(prompts * body.answers)
    ticket.record["model"] = body.model
    try:
        ids = await asyncio.to_thread(tokenize)
        shape.prompts = ids
        grammar = await gateway.grammar(body)
        ticket.submit(gateway.requests(ticket, body, ids, request.headers, grammar))
        await ticket.taken()
        if body.stream:
            return _EventStream(ticket, _events(ticket, shape, include_usage=body.include_usage))
    except BaseException:
        ticket.close()
        raise
    try:
        return await _unless_disconnected(request, _collect(ticket, shape))
    finally:
        ticket.close()


async def _unless_disconnected(request: Request, answer: Awaitable[Response]) -> Response:
    """Await an answer, but give it up as soon as the client goes away, which nothing else tells a handler."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, watch = asyncio.ensure_future(answer), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else Response(status_code=_CLIENT_GONE)
    finally:
        work.cancel()
        watch.cancel()


async def _collect(ticket: Ticket, shape: Shape) -> Response:
    answers: list[list[Output]] = [[] for _ in ticket.requests]
    async for index, output in ticket.outputs():
        if output.error is not None:
            raise EngineError(output)
        answers[index].append(output)
    whole = [joined(pieces) for pieces in answers]
    tokens, uncompensated = (sum(getattr(answer, name) for answer in whole) for name in ("tokens", "uncompensated"))
    cached = sum(answer.cached for index, answer in enumerate(whole) if ticket.opens_prompt(index))
    choices = [shape.whole(index, answer) for index, answer in enumerate(whole)]
    head = {
        "id": shape.prefix + ticket.id,
        "object": shape.whole_object,
        "created": int(time.time()),
        "model": shape.model,
    }
    return JSONResponse(head | {"choices": choices, "usage": _usage(ticket, tokens, uncompensated, cached)})


async def _events(ticket: Ticket, shape: Shape, *, include_usage: bool) -> AsyncIterator[bytes]:
    """Give the server-sent events of a streamed answer."""
    head = {
        "id": shape.prefix + ticket.id,
        "object": shape.piece_object,
        "created": int(time.time()),
        "model": shape.model,
    }
    tail = {"usage": None} if include_usage else {}
    tokens = uncompensated = cached = 0
    for index in range(len(ticket.requests)):
        if (opening := shape.opening(index)) is not None:
            yield _event(head | {"choices": [opening]} | tail)
    async for index, output in ticket.outputs():
        if output.error is not None:
            kind = "invalid_request_error" if output.client_error else "server_error"
            yield error_event(output.error, code="engine_error", kind=kind)
            return
        tokens += output.tokens
        uncompensated += output.uncompensated
        cached += output.cached if ticket.opens_prompt(index) else 0
        if pieces := shape.pieces(index, output):
            yield b"".join(_event(head | {"choices": [piece]} | tail) for piece in pieces)
    if include_usage:
        yield _event(head | {"choices": [], "usage": _usage(ticket, tokens, uncompensated, cached)})
    yield b"data: [DONE]\n\n"


def error_event(message: str, *, code: str, kind: str = "server_error") -> bytes:
    """Give the event that ends a stream because of the server, or of what was asked."""
    return _event(_error_body(message, kind=kind, code=code))


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _usage(ticket: Ticket, tokens: int, uncompensated: int, cached: int) -> dict[str, Any]:
    details = {"cached_tokens": cached} | ({"uncompensated_tokens": uncompensated} if uncompensated else {})
    return {
        "prompt_tokens": ticket.prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": ticket.prompt_tokens + tokens,
        "prompt_tokens_details": details,
    }


class _EventStream(Response):
    """Sends events, stops as soon as the client goes away, and closes the ticket whatever happens."""

    media_type = "text/event-stream"

    def __init__(self, ticket: Ticket, events: AsyncIterator[bytes]):
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._ticket, self._events = ticket, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def pump() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        tasks = {asyncio.ensure_future(pump()), asyncio.ensure_future(watch())}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._ticket.close()
            for task in tasks:
                task.cancel()


def _model_card(gateway: Gateway, name: str) -> dict[str, Any]:
    assert gateway.model is not None
    return {
        "id": name,
        "object": "model",
        "created": gateway.model.created,
        "owned_by": "spear-jax",
        "max_model_len": gateway.model.context,
        "compares": gateway.compares,
    }


def _handle_errors(app: FastAPI) -> None:
    """Give every error OpenAI's shape and status."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            reason = first.get("ctx", {}).get("error", first["msg"])
            return _error(400, f"the body is not valid JSON: {reason}", code="invalid_json")
        location = [str(part) for part in first["loc"][1:]]
        param = location[0] if location else None
        where = ".".join(location) or "the body"
        code = "missing_required_parameter" if first["type"] == "missing" else "invalid_type"
        return _error(400, f"{where}: {first['msg']}", param=param, code=code)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return _error(404, f"there is no {request.method} {request.url.path} here", code="unknown_url")
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(BadParameterError)
    async def bad_parameter(_: Request, error: BadParameterError) -> Response:
        return _error(400, str(error), param=error.param, code=error.code)

    @app.exception_handler(UnknownModelError)
    async def unknown_model(_: Request, error: UnknownModelError) -> Response:
        return _error(404, str(error), param="model", code="model_not_found")

    @app.exception_handler(QueueFullError)
    async def queue_full(_: Request, error: QueueFullError) -> Response:
        return _error(503, str(error), code="queue_full", retry=_RETRY_SECONDS)

    @app.exception_handler(UnattainableError)
    async def unattainable(_: Request, error: UnattainableError) -> Response:
        return _error(503, str(error), code="slo_unattainable", retry=error.retry_after)

    @app.exception_handler(ShuttingDownError)
    async def shutting_down(_: Request, error: ShuttingDownError) -> Response:
        return _error(503, str(error), code="shutting_down", retry=_RETRY_SECONDS)

    @app.exception_handler(EngineDeadError)
    async def engine_dead(_: Request, error: EngineDeadError) -> Response:
        return _error(503, str(error), code="not_ready", retry=_RETRY_SECONDS)

    @app.exception_handler(EngineError)
    async def engine_error(_: Request, error: EngineError) -> Response:
        return _error(
            error.status, str(error), code="engine_error", retry=_RETRY_SECONDS if error.status == 503 else None
        )

    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> Response:
        return _error(500, f"the server failed: {type(error).__name__}", code="internal_error")
