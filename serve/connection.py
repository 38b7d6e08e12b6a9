"""Connections that do not wait for ever: neither for the head of a request nor for a client that does not read."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def patient_for(seconds: float) -> type[H11Protocol]:
    """Give uvicorn's protocol with a limit on how long a client may take to send a head, and to make room for output.

    A connection that is over the limit is cut. The body of a request is waited for by `BodyLimit`, which can answer;
    between requests uvicorn's own limit on idle connections holds.
    """

    class Connection(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _reader: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head, self._reader = _cancelled(self._head), _cancelled(self._reader)
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._reader = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._reader = _cancelled(self._reader)
            super().resume_writing()

        def _watch_head(self) -> None:
            """Let the clock run from the first byte on, and stop it with the last one of a head."""
            if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
                self._head = _cancelled(self._head)
            elif self._head is None:
                self._head = self.loop.call_later(seconds, self.transport.abort)

    return Connection


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
