"""`POST /tokenize` and `POST /detokenize`, as vLLM has them."""

import asyncio

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from serve.gateway import Gateway
from serve.request import BadParameterError
from serve.schema import DetokenizeBody, TokenizeBody


def add_text_endpoints(app: FastAPI, gateway: Gateway) -> None:
    """Add both endpoints; they work as soon as there is a model, without the engine."""

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        gateway.check_model(gateway.names[0] if body.model is None else body.model)
        return JSONResponse(await asyncio.to_thread(_tokenized, gateway, body))

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Response:
        gateway.check_model(gateway.names[0] if body.model is None else body.model)
        return JSONResponse({"prompt": await asyncio.to_thread(gateway.text_of, body.tokens)})


def _tokenized(gateway: Gateway, body: TokenizeBody) -> dict[str, object]:
    if (body.prompt is None) == (body.messages is None):
        raise BadParameterError("give either prompt or messages", param="prompt")
    if body.prompt is not None:
        ids = gateway.tokens_of(body.prompt, add_special_tokens=body.add_special_tokens)
    else:
        ids = gateway.chat_tokens(body.messages or [], add_generation_prompt=body.add_generation_prompt)
    names = None
    if body.return_token_strs:
        names = [gateway.token_bytes(token).decode(errors="replace") for token in ids]
    return {"count": len(ids), "max_model_len": gateway.context, "tokens": ids, "token_strs": names}
