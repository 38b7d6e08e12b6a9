"""The shape of every error, which is OpenAI's."""

import math
from typing import Any

from fastapi.responses import JSONResponse


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Give the JSON that tells an error; `kind` is what OpenAI calls its type."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int, message: str, *, param: str | None = None, code: str | None = None, retry: float | None = None
) -> JSONResponse:
    """Give the answer that tells an error; `retry` is in seconds."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = None if retry is None else {"retry-after": str(math.ceil(retry))}
    return JSONResponse(error_body(message, kind=kind, param=param, code=code), status_code=status, headers=headers)
