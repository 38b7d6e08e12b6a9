"""What every HTTP request passes before the application: an id and a log line, API keys, and limits on its body."""

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.config import ServeConfig
from serve.errors import error_response
from serve.logs import begin_record
from serve.tracing import Tracing

log = logging.getLogger(__name__)

_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_OPEN = frozenset({"/", "/health", "/ready", "/metrics"})
_NOT_LOGGED = frozenset({"/health", "/ready", "/metrics"})
_DISCARDED_BYTES = 64 * 2**20
"""How much of a body that is too large is read before the connection is closed."""

_BODIES_AT_ONCE = 64
"""How many of the largest bodies may be in memory at the same time, unfinished ones included."""


def protect(app: ASGIApp, config: ServeConfig, *, tracing: Tracing | None = None) -> ASGIApp:
    """Put an application behind the limits, the keys and the log that the settings ask for."""
    app = BodyLimit(app, max_bytes=int(config.max_body_mib * 2**20), seconds=config.client_seconds)
    if config.api_key:
        app = ApiKeys(app, config.api_key)
    if config.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return RequestLog(app, lines=config.log_requests, tracing=tracing)


class RequestLog:
    """Gives each request an id, its client's own `x-request-id` if that is one, and with `lines` a line in the log.

    The id is in the answer's headers, in its `id`, and in every line of the log that is about it.
    """

    def __init__(self, app: ASGIApp, *, lines: bool, tracing: Tracing | None = None):
        self._app = app
        self._lines = lines
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, and say how it went."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        record = begin_record(
            request_id=given if _ID.fullmatch(given) else uuid.uuid4().hex,
            method=scope["method"],
            path=scope["raw_path"].decode("ascii", "backslashreplace"),
        )
        begin = time.monotonic()

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = record["request_id"]
                record["status"] = message["status"]
            await send(message)

        watched = scope["path"] not in _NOT_LOGGED
        try:
            if self._tracing is not None and watched:
                with self._tracing.span(record, headers):
                    await self._app(scope, receive, tell)
            else:
                await self._app(scope, receive, tell)
        finally:
            if self._lines and watched:
                record["seconds"] = round(time.monotonic() - begin, 4)
                line = "%(method)s %(path)s %(status)s %(seconds).3f s, %(request_id)s"
                log.info(line, {"status": None} | record, extra=record)


class ApiKeys:
    """Answers 401 to whoever does not present one of the keys as a bearer token; checks and metrics are open to all."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Compare in a time that does not depend on the keys."""
        if scope["type"] != "http" or scope["path"] in _OPEN:
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        digest = _digest(key.strip())
        known = [hmac.compare_digest(digest, other) for other in self._digests]
        if kind.lower() != b"bearer" or not any(known):
            answer = error_response(401, "this server needs a valid API key", code="invalid_api_key")
            answer.headers["www-authenticate"] = "Bearer"
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _last(answer: Response) -> Response:
    """Make an answer the last one of its connection, on which there may be more of a body."""
    answer.headers["connection"] = "close"
    return answer


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class BodyLimit:
    """Reads bodies: 413 if one is larger than `max_bytes`, declared or not, 408 if it takes longer than `seconds`.

    The rest of a body that is too large is read and thrown away, up to a bound: a connection closed while the client
    still sends reaches it as a broken pipe instead of an answer. All bodies that are being read or served take bounded
    memory together; past that the answer is 503.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, seconds: float):
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._held = 0  # bytes of bodies being read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, then let the application read it again."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self._seconds):
                size = await self._read(receive, parts)
        except TimeoutError:
            message = f"the body did not come within {self._seconds:g} s"
            await _last(error_response(408, message, code="request_timeout"))(scope, receive, send)
            return
        finally:
            self._held -= sum(map(len, parts))
        if size is None:
            return
        if size > self._max_bytes:
            message = f"the body is larger than the {self._max_bytes} bytes this server takes"
            await _last(error_response(413, message, code="body_too_large"))(scope, receive, send)
            return
        if sum(map(len, parts)) < size:
            message = "other requests' bodies fill the memory set aside for them"
            await error_response(503, message, code="bodies_full", retry=1)(scope, receive, send)
            return
        body: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]
        del parts

        async def replay() -> Message:
            return body.pop() if body else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive, parts: list[bytes]) -> int | None:
        """Give the size of a body, of which `parts` hold what there was room for; None if the client went away."""
        size, more = 0, True
        while more and size <= self._max_bytes + _DISCARDED_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            more = message.get("more_body", False)
            if size <= self._max_bytes and self._held + len(part) <= _BODIES_AT_ONCE * self._max_bytes:
                parts.append(part)
                self._held += len(part)
        return size
