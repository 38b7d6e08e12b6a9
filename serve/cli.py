"""`python -m spear_jax.serve`: settings, logs, the socket, signals, and the way down."""

import asyncio
import dataclasses
import gc
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from rich.console import Console

from serve.config import ServeConfig
from serve.connection import patient_for
from serve.gateway import Gateway
from serve.http import create_app
from serve.logs import log_to_stderr
from serve.middleware import protect
from serve.reload import Reloader
from serve.request import Admission
from serve.tracing import trace_to
from spear_jax.cli import cache_dir, parse_flags, run_main
from spear_jax.config import load_yaml

if TYPE_CHECKING:
    from serve.hosts import Group

log = logging.getLogger(__name__)

_CLOSE_SECONDS = 5
"""How long the last responses may take to leave after draining."""

_DESCRIPTION = """OpenAI-compatible server of 4-bit language models.

Usage: python -m spear_jax.serve [SETTINGS.yaml] [--flags]; flags win over the file. Without any, it serves a small demo
model on http://127.0.0.1:8000. Logs and progress go to stderr. SIGTERM or Ctrl-C drains: running answers finish, new
requests get 503; a second one ends them at once. With --reload-checkpoint SIGHUP reads the model again and goes on with
it. The exit status is 2 for a mistake in the settings or the model.

Other commands, each with a --help: `python -m spear_jax.serve batch IN.jsonl OUT.jsonl` answers a file of requests in
OpenAI's batch format; `python -m spear_jax.serve profile` measures the step times by which limits on
time are kept; `python -m spear_jax.serve bench` offers a load, to a server or an engine of its own, and measures."""

_PROFILE_DESCRIPTION = """Measure how long the server's iterations take, and write the latency table by which it keeps
limits on time: beside the checkpoint, or to the file that --scheduler.latency-table names. Takes the server's settings;
a server with others refuses the table."""


def main() -> None:
    """Run the server until it is told to stop, or another command that is named first."""
    match sys.argv[1:]:
        case ["profile", *rest]:
            run_main(lambda: measure(parse(rest, description=_PROFILE_DESCRIPTION)))
        case ["bench", *rest]:
            from serve.bench import main as bench

            log_to_stderr()
            bench(rest)
        case ["batch", *rest]:
            run_main(lambda: batch(rest))
        case rest:
            run_main(lambda: serve_as(parse(rest), lambda: parse(rest)))


def serve_as(config: ServeConfig, reread: Callable[[], ServeConfig]) -> int:
    """Serve with the engine of this process, or with replicas, whose settings `reread` gives again for an update.

    Raises:
        ValueError, OSError: See `serve`; or Ray is not installed.
    """
    if not config.replicas:
        return serve(config)
    try:
        from serve.replicas import serve_replicas
    except ImportError as error:
        raise ValueError(f"--replicas needs Ray: install spear-jax[ray] ({error})") from None
    return serve_replicas(config, reread)


def measure(config: ServeConfig) -> int:
    """Measure and write the latency table of a model.

    Raises:
        ValueError, OSError: The model or the settings cannot be used.
    """
    log_to_stderr()
    use_compilation_cache(config.compilation_cache)
    from serve.profile import profile

    return profile(config)


def batch(arguments: Sequence[str]) -> int:
    """Answer a file of requests.

    Raises:
        ValueError, OSError: The files, the model or the settings cannot be used.
    """
    from serve.batch import DESCRIPTION, run_batch

    files = [argument for argument in arguments[:2] if not argument.startswith("-")]
    config = parse(arguments[len(files) :], description=DESCRIPTION)
    if len(files) < 2:
        raise ValueError("batch needs a file of requests and a file for answers: batch IN.jsonl OUT.jsonl")
    log_to_stderr(config.log_format)
    return run_batch(Path(files[0]), Path(files[1]), config)


def parse(arguments: Sequence[str], *, description: str = _DESCRIPTION) -> ServeConfig:
    """Read settings from an optional YAML file and flags.

    Raises:
        ValueError, OSError: The file cannot be read or a value makes no sense.
    """
    arguments = list(arguments)
    defaults = ServeConfig()
    if arguments and not arguments[0].startswith("-"):
        defaults = load_yaml(ServeConfig, arguments.pop(0))
    config = parse_flags(
        ServeConfig, args=arguments, default=defaults, prog="python -m spear_jax.serve", description=description
    )
    if keys := os.environ.get("SPEAR_JAX_API_KEY"):
        config = dataclasses.replace(config, api_key=(*config.api_key, *keys.split(",")))
    config.check()
    return config


def serve(config: ServeConfig) -> int:
    """Serve until a signal; gives the exit status.

    Raises:
        ValueError, OSError: The port is taken, or the model or the settings cannot be used.
    """
    console = Console(stderr=True)
    log_to_stderr(config.log_format)
    tracing = None if config.otlp_endpoint is None else trace_to(config.otlp_endpoint)
    use_compilation_cache(config.compilation_cache)
    group = meet(config)
    if group is not None and not group.leads:
        return follow_process_0(config, group, console)
    listener = listen(config.host, config.port)
    allow_many_connections()
    gateway = Gateway(
        Admission(config.max_slots + config.max_num_queued_reqs), max_queued_tokens=config.max_num_queued_tokens
    )
    app = protect(create_app(gateway), config, tracing=tracing)
    address = f"http://{config.host}:{listener.getsockname()[1]}"
    log.info("not ready yet, listening: %s", address)
    server = Server(app, gateway, config)
    failure: list[BaseException] = []

    def start() -> None:
        # Imports and tracing make objects by the hundred thousand that stay: looking for garbage there only takes time.
        gc.disable()
        try:
            from serve.startup import start_engine

            start_engine(config, gateway, console, group)
            gc.freeze()
            gc.enable()
            log.info("ready: %s", address)
        except BaseException as error:
            failure.append(error)
            server.should_exit = True

    starter = threading.Thread(target=start, name="startup", daemon=True)
    with listener:
        server.run_with(listener, starter)
    if tracing is not None:
        tracing.close()
    if failure:
        raise failure[0]
    stopped = gateway.engine.stop(timeout=_CLOSE_SECONDS) if gateway.engine is not None else not starter.is_alive()
    failed = gateway.engine is not None and gateway.engine.failure is not None
    if group is not None:
        group.end()
    log.info("stopped")
    if not stopped:
        # A thread is inside a compilation or a step; ordinary exit would tear XLA down under it.
        logging.shutdown()
        os._exit(int(failed))
    return int(failed)


def meet(config: ServeConfig) -> "Group | None":
    """Meet the other processes that the model is divided over; None if there are none.

    Raises:
        ValueError: They cannot be reached, or were started with other settings.
    """
    if config.coordinator is None:
        return None
    import jax

    from serve.hosts import check_same, connect
    from spear_jax.hosts import join

    if not join(config.coordinator, num_processes=config.num_processes, process_id=config.process_id):
        return None
    if config.tensor_parallel != jax.device_count():
        raise ValueError(
            f"tensor_parallel must be the {jax.device_count()} devices of {jax.process_count()} processes, "
            f"got {config.tensor_parallel}"
        )
    check_same(config)
    return connect()


def follow_process_0(config: ServeConfig, group: "Group", console: Console) -> int:
    """Do what process 0 tells until it ends; gives the exit status."""
    from serve.hosts import follow
    from serve.startup import start_runner

    # A signal to all processes of a group is process 0's to act on: it drains, and needs the others for it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    runner, _, _ = start_runner(config, console)
    log.info("ready to follow process 0")
    follow(runner, group)
    log.info("stopped")
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Open the listening socket, before any slow work.

    Raises:
        OSError: The port is taken, or the address is not one of this machine.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
    return listener


def allow_many_connections() -> None:
    """Raise the limit on open files, of which each connection is one, to what this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def use_compilation_cache(folder: str) -> None:
    """Keep compiled programs in a folder for the next start; `auto` is this project's own, `none` keeps none."""
    import jax

    if folder == "none":
        return
    path = cache_dir() / "xla" if folder == "auto" else Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Server(uvicorn.Server):
    """A uvicorn server that drains on the first signal and leaves with the status its caller chooses."""

    def __init__(self, app: object, gateway: Gateway, config: ServeConfig):
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                log_level="warning",
                access_log=False,
                server_header=False,
                http=patient_for(config.client_seconds),
                ws="none",
                lifespan="off",
                timeout_graceful_shutdown=_CLOSE_SECONDS,
            )
        )
        self._gateway = gateway
        self._config = config
        self._deadline: float | None = None

    def run_with(self, listener: socket.socket, starter: threading.Thread) -> None:
        """Serve on an open socket, and start a thread once the event loop runs."""
        self._starter = starter
        self.run(sockets=[listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to answer, then start the engine."""
        await super().startup(sockets=sockets)
        loop = asyncio.get_running_loop()
        self._gateway.attach(loop)
        if self._config.reload_checkpoint:
            loop.add_signal_handler(signal.SIGHUP, Reloader(self._config, self._gateway))
        self._starter.start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or at a second signal stop. The signal is not raised again after: this exit is orderly."""
        del frame
        if self._deadline is not None:
            self.should_exit = True
            return
        log.info("%s: draining %d requests", signal.Signals(sig).name, self._gateway.admission.held)
        self._gateway.draining = True
        self._deadline = time.monotonic() + self._config.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """Look ten times a second whether the engine answers and whether draining is over."""
        self._gateway.watch()
        if self._deadline is not None:
            held = self._gateway.admission.held
            if held and time.monotonic() > self._deadline:
                log.warning("drain deadline: %d requests end with an error", held)
                self.should_exit = True
            elif not held:
                self.should_exit = True
        if self.should_exit and self._gateway.engine is not None and self._gateway.admission.held:
            self._gateway.engine.abort_all()
        return await super().on_tick(counter)
