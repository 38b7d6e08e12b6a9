"""Log lines for people or for machines, and what is known of the HTTP request that a line is about."""

import contextvars
import json
import logging
import sys
import time
from typing import Any, Literal

LogFormat = Literal["text", "json"]

_RECORD: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("request", default=None)

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def begin_record(**facts: Any) -> dict[str, Any]:
    """Begin to note facts about the request that this task serves: they go into its log line and its span."""
    record = dict(facts)
    _RECORD.set(record)
    return record


def current_record() -> dict[str, Any]:
    """Give the facts noted about the request being served; outside of one, a dictionary that nobody reads."""
    record = _RECORD.get()
    return {} if record is None else record


class JsonFormatter(logging.Formatter):
    """A line is a JSON object: time (UTC), level, logger, message, the id of the request, and what `extra` holds."""

    def format(self, record: logging.LogRecord) -> str:
        """Give the line."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request_id := current_record().get("request_id")) is not None:
            line["request_id"] = request_id
        line |= {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_to_stderr(form: LogFormat = "text") -> None:
    """Write what `serve` has to say, and warnings of everything else, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter() if form == "json" else logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S")
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("serve").setLevel(logging.INFO)
