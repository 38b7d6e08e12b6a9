"""The server's application without a network: `LLM`, three lines of Python."""

import asyncio
import dataclasses
import json
import threading
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Self

from serve.config import ServeConfig

type Prompt = str | Sequence[int]
type Conversation = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """An answer; `finish_reason` is `stop` or `length`, `logprobs` what was asked for, laid out as OpenAI does."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    logprobs: Any = None


class Local:
    """An engine in this process behind the application that the server has, so that answers and errors are the same.

    Raises:
        ValueError, OSError: The model or the settings cannot be used.
    """

    def __init__(self, config: ServeConfig, loop: asyncio.AbstractEventLoop):
        from rich.console import Console

        from serve.cli import use_compilation_cache
        from serve.gateway import Gateway
        from serve.http import create_app
        from serve.request import Admission
        from serve.startup import start_engine

        config.check()
        use_compilation_cache(config.compilation_cache)
        self.config = config
        self.gateway = Gateway(Admission(config.max_slots + config.max_num_queued_reqs))
        self.gateway.attach(loop)
        self._engine = start_engine(config, self.gateway, Console(stderr=True))
        self._app = create_app(self.gateway)

    @property
    def name(self) -> str:
        """The name that bodies give the model."""
        assert self.gateway.model is not None
        return self.gateway.model.names[0]

    async def post(self, path: str, body: bytes) -> tuple[int, Any]:
        """Give the status and the JSON that the server would answer; waits while its queue is full."""
        while True:
            status, answer = await self._post(path, body)
            if status != 503 or answer["error"]["code"] != "queue_full":
                return status, answer
            await asyncio.sleep(0.1)

    async def _post(self, path: str, body: bytes) -> tuple[int, Any]:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        unread = [{"type": "http.request", "body": body, "more_body": False}]
        status, parts = 500, []

        async def receive() -> Any:
            if not unread:
                await asyncio.Event().wait()  # nobody goes away
            return unread.pop()

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            parts.append(message.get("body", b""))

        await self._app(scope, receive, send)
        return status, json.loads(b"".join(parts))

    def close(self) -> None:
        """Stop the engine."""
        self._engine.stop(timeout=60)


class LLM:
    """A model in this process, for scripts:

        from spear_jax import LLM
        llm = LLM("demo")
        print(llm.generate("The sea is", max_tokens=20).text)

    `model` is what the server's `--model` takes, and so are other settings, by the names in `serve.config.ServeConfig`.
    Requests run together, as many as `max_slots`.

    Raises:
        ValueError, OSError: The model or a setting cannot be used.
    """

    def __init__(self, model: str = "demo", **settings: Any):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="LLM", daemon=True)
        self._thread.start()
        try:
            self._local = Local(ServeConfig(model=model, **settings), self._loop)
        except BaseException:
            self._end_loop()
            raise

    def generate(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> Any:
        """Go on from a text, or a list of token ids, or from each of several; `options` as in OpenAI's completions.

        Gives a `Completion`, or a list of them if several were given, in their order.

        Raises:
            ValueError: An option or a prompt cannot be used.
        """
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        listed: Sequence[Any] = [prompts] if one else prompts
        bodies = [{"prompt": prompt if isinstance(prompt, str) else list(prompt)} for prompt in listed]
        answers = self._ask("/v1/completions", bodies, options)
        return answers[0] if one else answers

    def chat(self, messages: Conversation | Sequence[Conversation], **options: Any) -> Any:
        """Answer a conversation, a list of `{"role": ..., "content": ...}`, or each of several; else as `generate`."""
        one = len(messages) > 0 and isinstance(messages[0], Mapping)
        listed: Sequence[Any] = [messages] if one else messages
        answers = self._ask("/v1/chat/completions", [{"messages": list(some)} for some in listed], options)
        return answers[0] if one else answers

    def close(self) -> None:
        """Stop the engine and free what it holds."""
        self._local.close()
        self._end_loop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, path: str, bodies: Sequence[dict[str, Any]], options: dict[str, Any]) -> list[Completion]:
        for name in ("n", "stream"):
            if options.get(name) not in (None, False, 1):
                raise ValueError(f"{name} is not taken here, got {options[name]}; give a prompt several times instead")
        common = {"model": self._local.name} | options
        room = asyncio.Semaphore(2 * self._local.config.max_slots)

        async def one(body: dict[str, Any]) -> Completion:
            async with room:
                status, answer = await self._local.post(path, json.dumps(common | body).encode())
            if status != 200:
                message = answer["error"]["message"]
                raise ValueError(message) if status < 500 else RuntimeError(message)
            (choice,) = answer["choices"]
            return Completion(
                text=choice["text"] if "text" in choice else choice["message"]["content"],
                finish_reason=choice["finish_reason"],
                prompt_tokens=answer["usage"]["prompt_tokens"],
                completion_tokens=answer["usage"]["completion_tokens"],
                logprobs=choice["logprobs"],
            )

        async def every() -> list[Completion]:
            return list(await asyncio.gather(*map(one, bodies)))

        return self._run(every())

    def _run[T](self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
