"""`python -m spear_jax.serve batch`: answer a file of requests in OpenAI's batch format."""

import asyncio
import dataclasses
import json
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from serve.config import ServeConfig
from serve.load import console
from serve.offline import Local

log = logging.getLogger(__name__)

URLS = ("/v1/chat/completions", "/v1/completions")

DESCRIPTION = """Answer a file of requests in OpenAI's batch format, without a server.

Usage: python -m spear_jax.serve batch IN.jsonl OUT.jsonl [SETTINGS.yaml] [--flags]; settings are the server's. Each
line of IN is {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions" or "/v1/completions", "body": {...}};
each line of OUT, in the order in which answers end, has its custom_id and a response, or an error for lines that are no
requests. What OUT already has is not asked again, so a batch that was stopped, or killed, goes on where it was. The
exit status is 1 if a line has no answer of status 200."""


class BadLineError(ValueError):
    """A line that is no request; `custom_id` is its id, if it has one."""

    def __init__(self, code: str, message: str, custom_id: str | None = None):
        super().__init__(message)
        self.code, self.custom_id = code, custom_id


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """A request of a batch."""

    custom_id: str
    url: str
    body: bytes


def parse_line(line: bytes) -> Item:
    """Read a line of a batch.

    Raises:
        BadLineError: It is no request.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadLineError("invalid_json", f"the line is not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise BadLineError("invalid_request", f"the line is not an object but a {type(record).__name__}")
    name = record.get("custom_id")
    if not isinstance(name, str) or not name:
        raise BadLineError("missing_required_parameter", f"custom_id must be a string, got {name!r}")
    if record.get("method") != "POST":
        raise BadLineError("invalid_method", f"method must be POST, got {record.get('method')!r}", name)
    if record.get("url") not in URLS:
        raise BadLineError("invalid_url", f"url must be one of {', '.join(URLS)}, got {record.get('url')!r}", name)
    body = record.get("body")
    if not isinstance(body, dict):
        raise BadLineError("invalid_request", "body must be an object", name)
    if body.get("stream"):
        raise BadLineError("invalid_request", "answers of a batch are not streamed: stream must be false", name)
    return Item(custom_id=name, url=record["url"], body=json.dumps(body).encode())


class Results:
    """The file of answers: whole lines only, and what it already holds.

    Raises:
        ValueError: The file has a line that is no answer: it is something else.
    """

    def __init__(self, path: Path):
        self.answered: set[str] = set()
        self.bad_lines: set[int] = set()
        self.failed = 0
        self._file: BinaryIO = open(path, "a+b", buffering=0)  # noqa: SIM115
        self._file.seek(0)
        kept = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break  # the writer was killed inside it
            try:
                self._note(json.loads(line))
            except (ValueError, KeyError, TypeError):
                self._file.close()
                raise ValueError(f"{path}: line at byte {kept} is no answer of a batch; choose another file") from None
            kept += len(line)
        os.ftruncate(self._file.fileno(), kept)

    def _note(self, record: dict[str, Any]) -> None:
        error, response = record["error"], record["response"]
        if error is not None:
            self.bad_lines.add(error["line"])
        else:
            self.answered.add(record["custom_id"])
        self.failed += error is not None or response["status_code"] != 200

    def write(self, custom_id: str | None, *, response: Any = None, error: Any = None) -> None:
        """Add an answer."""
        record = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}
        data = memoryview(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        while data:
            data = data[self._file.write(data) :]
        self._note(record)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


async def answer_all(local: Local, requests: Path, results: Results, progress: Progress) -> None:
    """Answer what has no answer yet, a few more at a time than there are slots.

    Raises:
        RuntimeError: The engine failed; what is written stays.
    """
    task = progress.add_task("answers", total=sum(1 for _ in _lines(requests)))
    room = asyncio.Semaphore(2 * local.config.max_slots)

    async def answer(item: Item) -> None:
        try:
            status, body = await local.post(item.url, item.body)
            if status >= 500 and (problem := local.gateway.problem()) is not None:
                raise RuntimeError(f"{problem}: run the same command again to go on")
            response = {"status_code": status, "request_id": body.get("id"), "body": body}
            results.write(item.custom_id, response=response)
            progress.advance(task)
        finally:
            room.release()

    seen: set[str] = set()
    async with asyncio.TaskGroup() as group:
        for number, line in _lines(requests):
            try:
                item = parse_line(line)
                if item.custom_id in seen:
                    raise BadLineError("duplicate_custom_id", "an earlier line has this custom_id", item.custom_id)
            except BadLineError as error:
                if number not in results.bad_lines:
                    told = {"code": error.code, "message": str(error), "line": number}
                    results.write(error.custom_id, error=told)
                progress.advance(task)
                continue
            seen.add(item.custom_id)
            if item.custom_id in results.answered:
                progress.advance(task)
                continue
            await room.acquire()
            group.create_task(answer(item))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Give the lines that are not empty, with their numbers from 1 on."""
    with open(path, "rb") as file:
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def run_batch(requests: Path, output: Path, config: ServeConfig) -> int:
    """Answer a file of requests; gives the exit status.

    Raises:
        ValueError, OSError: A file, the model or a setting cannot be used.
    """
    next(_lines(requests), None)  # a file that cannot be read is found before the model is loaded
    results = Results(output)

    async def work() -> None:
        local = await asyncio.to_thread(Local, config, asyncio.get_running_loop())
        try:
            with progress:
                await answer_all(local, requests, results, progress)
        finally:
            local.close()

    screen = console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, TimeRemainingColumn(), console=screen, disable=not screen.is_terminal)
    try:
        asyncio.run(work())
    except* RuntimeError as failures:
        raise failures.exceptions[0] from None
    finally:
        results.close()
    log.info(
        "%d answers, %d of them errors: %s", len(results.answered) + len(results.bad_lines), results.failed, output
    )
    return int(results.failed > 0)
