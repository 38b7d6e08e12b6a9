"""Several engines behind one endpoint, by Ray Serve: `python -m spear_jax.serve --replicas N`.

Ray Serve starts the replicas, looks after them, replaces those that fail, adds and drains them, and updates them one
after another. This process is the endpoint: it routes each call (`serve.router`) and passes on what a replica answers.
A replica is the server's own application with its engine, past the socket.
"""

import asyncio
import collections
import contextlib
import dataclasses
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NoReturn

import ray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from ray import serve as ray_serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from rich.console import Console
from starlette.types import Message, Receive, Scope, Send

from serve.cli import Server, allow_many_connections, listen, use_compilation_cache
from serve.config import ServeConfig
from serve.errors import error_response
from serve.gateway import Gateway
from serve.http import create_app, error_event
from serve.latency import LatencyTable
from serve.logs import log_to_stderr
from serve.metrics import CONTENT_TYPE, merged
from serve.middleware import protect
from serve.ray_hooks import RouteByCall, ScaleByAttainment
from serve.request import Admission, BadParameterError, QueueFullError
from serve.router import BLOCK_CHARACTERS, CHARACTERS_PER_TOKEN, Arrival, Router, arrival_of
from serve.schema import limits
from serve.startup import default_slo, start_engine

log = logging.getLogger(__name__)

_APP = "spear-jax"
_ATTEMPTS = 3
"""Replicas that a call is given to, one after another, while none has begun to answer."""

_RETRY_SECONDS = 1.0
_PREFIX_TOKENS = 1 << 20
"""Tokens of prompts that the router takes a replica to remember."""

_STATS_SECONDS = 2.0
_METRICS_SECONDS = 10.0
_GIVE_UP_SECONDS = 5.0

type Headers = list[tuple[bytes, bytes]]


class Call:
    """An HTTP call on its way to a replica, which gets no more of it than method, path, headers and body."""

    def __init__(self, method: str, path: str, headers: Headers, body: bytes):
        self.method, self.path, self.headers, self.body = method, path, headers, body
        self.rank: Callable[[Sequence[str]], Sequence[str]] = lambda names: names
        self.sent: Callable[[str], None] = lambda name: None

    def __reduce__(self) -> tuple[Any, ...]:
        return Call, (self.method, self.path, self.headers, self.body)


class Replica:
    """An engine and the server's application over it, in a process of Ray's."""

    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]
        log_to_stderr(config.log_format)
        begin = time.monotonic()
        use_compilation_cache(config.compilation_cache)
        self._gateway = Gateway(
            Admission(config.max_slots + config.max_num_queued_reqs), max_queued_tokens=config.max_num_queued_tokens
        )
        self._gateway.attach(asyncio.get_running_loop())
        self._app = create_app(self._gateway)
        self._counted = collections.Counter[str]()
        await asyncio.to_thread(start_engine, config, self._gateway, Console(stderr=True))
        self.seconds = time.monotonic() - begin

    async def answer(self, call: Call) -> AsyncIterator[Any]:
        """Give (status, headers) first, then the body as it comes; the caller going away ends the answer."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        gone = asyncio.Event()
        unread: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]

        async def receive() -> Message:
            if not unread:
                await gone.wait()
            return unread.pop() if unread else {"type": "http.disconnect"}

        async def run() -> None:
            scope = {
                "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": call.method,
                "scheme": "http", "path": call.path, "raw_path": call.path.encode(), "query_string": b"",
                "root_path": "", "headers": call.headers, "client": None, "server": None,
            }  # fmt: skip
            try:
                await self._app(scope, receive, messages.put)
            finally:
                messages.put_nowait(None)

        task = asyncio.ensure_future(run())
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    yield message["status"], list(message["headers"])
                elif message["type"] == "http.response.body" and message.get("body"):
                    yield message["body"]
            await task
        finally:
            gone.set()
            await asyncio.wait({task}, timeout=_GIVE_UP_SECONDS)
            task.cancel()

    async def metrics(self) -> tuple[str, str]:
        """Give the replica's name and what its server shows at `/metrics`."""
        assert self._gateway.metrics is not None
        return ray_serve.get_replica_context().replica_id.unique_id, self._gateway.metrics.render().decode()

    async def table(self) -> LatencyTable | None:
        """Give the latency table that limits are judged by, if there is one."""
        assert self._gateway.engine is not None
        return self._gateway.engine.table

    async def identity(self) -> tuple[str, int, float]:
        """Give the replica's name, its process, and how long it took to be ready."""
        return ray_serve.get_replica_context().replica_id.unique_id, os.getpid(), self.seconds

    def check_health(self) -> None:
        """Raise where Ray should replace this replica."""
        if (problem := self._gateway.problem()) is not None:
            raise RuntimeError(problem)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Give what the number of replicas is decided by; answers with limits are those since the last call."""
        metrics = self._gateway.metrics
        assert metrics is not None
        samples = {
            (sample.name.removeprefix("spear:"), sample.labels.get("met")): sample.value
            for family in metrics.registry.collect()
            for sample in family.samples
        }
        now = collections.Counter[str](
            kept=int(samples["request_slo_total", "true"]), missed=int(samples["request_slo_total", "false"])
        )
        fresh, self._counted = now - self._counted, now
        return {
            "waiting": samples["num_requests_waiting", None],
            "running": samples["num_requests_running", None],
            "kept": fresh["kept"],
            "missed": fresh["missed"],
        }

    def __del__(self) -> None:
        if getattr(self, "_gateway", None) is not None and self._gateway.engine is not None:
            self._gateway.engine.stop(timeout=_GIVE_UP_SECONDS)


class Front:
    """The endpoint: routes calls to replicas, and passes on what they answer.

    A call whose replica is lost before it began to answer goes to another one, then gets 503 with Retry-After. A
    stream that breaks ends with an error event, an answer in one piece with 503: whoever asked may ask again.
    """

    def __init__(self, config: ServeConfig, gateway: Gateway):
        self._gateway = gateway
        self._slo = default_slo(config.scheduler)
        self._config = config
        self._handle: Any = None
        self._lock = threading.Lock()  # the router is asked in Ray's thread
        self._router = self._make_router(None)
        self.registry = CollectorRegistry()
        self._seconds = Histogram(
            "spear:routing_seconds", "From a call's body to its replica.", registry=self.registry,
            buckets=(0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 1.0),
        )  # fmt: skip
        self._decision = Histogram(
            "spear:routing_decision_seconds", "Of that, choosing the replica.", registry=self.registry,
            buckets=(0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01),
        )  # fmt: skip
        self._retried = Counter("spear:requests_rerouted", "Calls given to another replica.", registry=self.registry)
        self._lost = Counter("spear:requests_lost", "Calls whose replica was lost.", registry=self.registry)
        self._running = Gauge("spear:replicas", "Replicas that answer.", registry=self.registry)

    def _make_router(self, table: LatencyTable | None) -> Router[str]:
        block = BLOCK_CHARACTERS // CHARACTERS_PER_TOKEN
        config = self._config
        return Router(
            config.router, slots=config.max_slots, cache_blocks=_PREFIX_TOKENS // block, block_tokens=block,
            table=table, share=config.scheduler.share,
        )  # fmt: skip

    def ready(self, handle: Any, table: LatencyTable | None) -> None:
        """Begin to pass calls on, or go on with replicas of other settings."""
        with self._lock:
            self._router = self._make_router(table)
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a call; its body must have come in one piece (`serve.middleware`)."""
        if scope["type"] != "http":
            return
        if scope["path"] == "/metrics" and self._handle is not None:
            await self._send(send, 200, [(b"content-type", CONTENT_TYPE.encode())], await self._metrics())
            return
        if (problem := self._refusal()) is not None:
            await error_response(503, problem[0], code=problem[1], retry=_RETRY_SECONDS)(scope, receive, send)
            return
        try:
            self._gateway.admission.reserve()
        except (QueueFullError, BadParameterError) as error:
            await error_response(503, str(error), code="queue_full", retry=_RETRY_SECONDS)(scope, receive, send)
            return
        try:
            body = (await receive()).get("body", b"")
            await self._until_gone(self._pass_on(scope, body, send), receive)
        finally:
            self._gateway.admission.release()

    def _refusal(self) -> tuple[str, str] | None:
        if self._gateway.draining:
            return "the server is shutting down", "shutting_down"
        return None if self._handle is not None else ("the server cannot answer: starting", "not_ready")

    @staticmethod
    async def _until_gone(work: Any, receive: Receive) -> None:
        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        tasks = asyncio.ensure_future(work), asyncio.ensure_future(watch())
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _pass_on(self, scope: Scope, body: bytes, send: Send) -> None:
        arrival = self._arrival(scope["headers"], body)
        for attempt in range(_ATTEMPTS):
            started = None
            call = Call(scope["method"], scope["path"], list(scope["headers"]), body)
            response = self._route(call, arrival)
            try:
                async for piece in response:
                    if started is None:
                        started = piece
                        status, headers = piece
                        await send({"type": "http.response.start", "status": status, "headers": headers})
                    else:
                        with self._lock:
                            self._router.began(call)
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return
            except (RayError, RayServeException) as error:
                if isinstance(error, BackPressureError):
                    await self._fail(send, "all replicas are full", code="queue_full")
                    return
                if isinstance(error, RayTaskError) and not isinstance(error, RayActorError) and started is None:
                    log.error("a replica failed: %s", error)
                    await self._fail(send, "the server failed", code="internal_error", status=500)
                    return
                log.warning("a replica was lost: %s", type(error).__name__)
                self._lost.inc()
                if started is not None:
                    await self._break_off(send, started)
                    return
                if attempt + 1 < _ATTEMPTS:
                    self._retried.inc()
            finally:
                response.cancel()
                with self._lock:
                    self._router.ended(call)
        await self._fail(send, "the replicas that had this request were lost: ask again", code="replica_lost")

    def _route(self, call: Call, arrival: Arrival) -> Any:
        """Hand a call to Ray, which asks for an order of replicas and says who got it."""
        begin = time.monotonic()

        def rank(names: Sequence[str]) -> Sequence[str]:
            asked = time.monotonic()
            with self._lock:
                self._running.set(len(names))
                self._router.update(names)
                ranked = self._router.rank(arrival)
            self._decision.observe(time.monotonic() - asked)
            return ranked

        def sent(name: str) -> None:
            with self._lock:
                self._router.sent(call, arrival, name)
            self._seconds.observe(time.monotonic() - begin)

        call.rank, call.sent = rank, sent
        return self._handle.options(stream=True).answer.remote(call)

    def _arrival(self, headers: Headers, body: bytes) -> Arrival:
        named = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        try:
            slo = limits(named, default=self._slo)
        except BadParameterError:  # the replica says what is wrong with it
            slo = self._slo
        return arrival_of(body, slo)

    async def _fail(self, send: Send, message: str, *, code: str, status: int = 503) -> None:
        response = error_response(status, message, code=code, retry=_RETRY_SECONDS if status == 503 else None)
        await self._send(send, response.status_code, response.raw_headers, bytes(response.body))

    async def _break_off(self, send: Send, started: tuple[int, Headers]) -> None:
        """End an answer that has begun: with an error event where it is a stream."""
        if any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in started[1]):
            message = "the replica that generated this answer was lost: ask again"
            event = error_event(message, code="replica_lost")
            await send({"type": "http.response.body", "body": event, "more_body": False})
            return
        raise ConnectionError("a replica was lost amid an answer in one piece")

    @staticmethod
    async def _send(send: Send, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _metrics(self) -> bytes:
        """Give the metrics of all replicas, each under its name, after those of this endpoint."""
        found = await asyncio.to_thread(self._broadcast, "metrics")
        return generate_latest(self.registry) + merged(dict(found))

    def _broadcast(self, method: str) -> list[Any]:
        return [r for r in self._handle.broadcast(method).results(timeout_s=_METRICS_SECONDS) if r is not None]


def application(config: ServeConfig, *, accelerator: str | None) -> Any:
    """Give what Ray Serve is to run: replicas of an engine, and how to route to, to scale and to drain them."""
    own = dataclasses.replace(config, replicas=0)
    capacity = config.max_slots + config.max_num_queued_reqs
    resources: dict[str, Any] = {"num_cpus": 1}
    if accelerator == "GPU":
        resources["num_gpus"] = config.tensor_parallel
    elif accelerator is not None:
        resources["resources"] = {accelerator: config.tensor_parallel}
    number: dict[str, Any] = {"num_replicas": config.replicas}
    if config.max_replicas is not None:
        scale = f"{ScaleByAttainment.__module__}:{ScaleByAttainment.__name__}"
        bounds = {"least": config.replicas, "most": config.max_replicas, "slots": config.max_slots}
        number["autoscaling_config"] = AutoscalingConfig(
            min_replicas=config.replicas,
            max_replicas=config.max_replicas,
            initial_replicas=config.replicas,
            policy=AutoscalingPolicy(policy_function=scale, policy_kwargs=bounds),
        )
        number["num_replicas"] = "auto"
    deployment = ray_serve.deployment(Replica).options(  # type: ignore[attr-defined]
        name="engine",
        max_ongoing_requests=capacity + 8,
        max_queued_requests=capacity * (config.max_replicas or config.replicas),
        graceful_shutdown_timeout_s=config.drain_seconds,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=_STATS_SECONDS,
        health_check_timeout_s=config.stuck_seconds,
        request_router_config=RequestRouterConfig(request_router_class=RouteByCall),  # type: ignore[arg-type]
        ray_actor_options=resources,
        **number,
    )
    return deployment.bind(own)


class Cluster:
    """Ray as this process uses it: started here, or joined."""

    def __init__(self, address: str | None):
        # Ray's workers are nice (15) to whatever else runs: engines are what a machine is there for.
        os.environ.setdefault("RAY_worker_niceness", "0")
        environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
        quiet = {"logging_level": logging.WARNING, "log_to_driver": False}
        if address is None:
            ray.init(include_dashboard=False, runtime_env=environment, **quiet)
        else:
            ray.init(address, runtime_env=environment, **quiet)
        ray_serve.start(proxy_location="Disabled")
        kinds = ray.cluster_resources()
        self.accelerator = next((kind for kind in ("GPU", "TPU") if kinds.get(kind)), None)

    def deploy(self, config: ServeConfig) -> tuple[Any, LatencyTable | None]:
        """Start replicas, or update those that run one after another; give the handle to them and their table."""
        handle = ray_serve.run(application(config, accelerator=self.accelerator), name=_APP, route_prefix=None)
        tables = handle.broadcast("table").results()
        return handle, next(iter(tables), None)

    def close(self) -> None:
        """End the replicas, which drain; a cluster that was started here ends with them."""
        with contextlib.suppress(RayServeException, RayError):
            ray_serve.delete(_APP)
        ray.shutdown()


def serve_replicas(config: ServeConfig, reread: Callable[[], ServeConfig]) -> NoReturn:
    """Serve until a signal, then end the process; SIGHUP reads settings again and updates replicas one after another.

    Raises:
        ValueError, OSError: The port is taken, or the model or the settings cannot be used.
    """
    log_to_stderr(config.log_format)
    listener = listen(config.host, config.port)
    allow_many_connections()
    capacity = (config.max_slots + config.max_num_queued_reqs) * (config.max_replicas or config.replicas)
    gateway = Gateway(Admission(capacity))
    front = Front(config, gateway)
    app = protect(front, config)
    address = f"http://{config.host}:{listener.getsockname()[1]}"
    log.info("not ready yet, listening: %s", address)
    server = Server(app, gateway, config)
    failure: list[BaseException] = []
    clusters: list[Cluster] = []
    updates = threading.Semaphore(0)

    def deploy(settings: ServeConfig) -> None:
        begin = time.monotonic()
        front.ready(*clusters[0].deploy(settings))
        log.info("ready: %s, %d replicas in %.1f s", address, settings.replicas, time.monotonic() - begin)

    def start() -> None:
        try:
            clusters.append(Cluster(config.ray_address))
            deploy(config)
        except BaseException as error:
            failure.append(error)
            server.should_exit = True
            return
        while updates.acquire():
            try:
                deploy(reread())
            except Exception as error:
                log.error("not updated: %s", error)

    signal.signal(signal.SIGHUP, lambda *_: updates.release())
    with listener:
        server.run_with(listener, threading.Thread(target=start, name="startup", daemon=True))
    for cluster in clusters:
        cluster.close()
    if failure:
        raise failure[0]
    log.info("stopped")
    # Threads of Ray outlive its shutdown: ordinary exit aborts when they find the interpreter gone.
    logging.shutdown()
    os._exit(0)
