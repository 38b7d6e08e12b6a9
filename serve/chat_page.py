"""`GET /`: a page to chat with the model, one file that asks for nothing from elsewhere."""

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def add_chat_page(app: FastAPI) -> None:
    """Add the page; it works as soon as the server answers, and waits for the model."""
    page = Path(__file__).with_name("chat_page.html").read_bytes()

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return HTMLResponse(page, headers={"content-security-policy": _POLICY, "cache-control": "no-cache"})
