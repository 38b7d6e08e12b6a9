"""A real server in a process of its own, shared by the tests of the session."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

START_SECONDS = 540
FLAGS = (
    "--max-context",
    "384",
    "--prefill-buckets",
    "16",
    "64",
    "--max-num-queued-reqs",
    "4",
    "--max-body-mib",
    "0.25",
)


@dataclasses.dataclass
class ServerProcess:
    """A running `python -m spear_jax.serve`; `log` grows with what it writes to stderr."""

    process: subprocess.Popen[str]
    log: list[str]
    reader: threading.Thread | None = None
    url: str = ""

    def wait_for_log(self, word: str, *, seconds: float) -> str:
        """Wait for a line that holds `word`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for line in list(self.log):
                if word in line:
                    return line
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"no {word!r} in the server's log:\n{''.join(self.log)}")

    def metric(self, name: str) -> float:
        """Read the sum of a metric's samples without buckets."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"spear:{name}{{")]
        assert values, f"no metric spear:{name}"
        return sum(values)

    def wait_for_metric(self, name: str, condition: Callable[[float], bool], *, seconds: float = 30) -> None:
        """Wait until a metric's value meets a condition."""
        deadline = time.monotonic() + seconds
        while not condition(value := self.metric(name)):
            assert time.monotonic() < deadline, f"spear:{name} is still {value}"
            time.sleep(0.05)

    def status(self, path: str) -> int:
        """Give the status that a GET has."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code


def launch(*flags: str) -> ServerProcess:
    """Start a server on a free port, from any folder, and wait until it says that it is ready."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "spear_jax.serve", "--port", "0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    server = ServerProcess(process, [])

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            server.log.append(line)

    server.reader = threading.Thread(target=read, daemon=True)
    server.reader.start()
    try:
        server.url = server.wait_for_log("listening", seconds=120).split()[-1]
    except BaseException:
        end(server)
        raise
    return server


def end(server: ServerProcess) -> None:
    """Stop a server, the hard way if it does not listen."""
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
        try:
            server.process.wait(60)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()
    if server.reader is not None:
        server.reader.join(30)
    for pipe in (server.process.stdout, server.process.stderr):
        assert pipe is not None
        pipe.close()


@pytest.fixture
def launch_server() -> Iterator[Callable[..., ServerProcess]]:
    """Give a function that starts a server of the test's own, which ends with the test."""
    servers: list[ServerProcess] = []

    def start(*flags: str) -> ServerProcess:
        servers.append(launch(*flags))
        return servers[-1]

    yield start
    for server in servers:
        end(server)


@pytest.fixture(scope="session")
def starting_server() -> Iterator[ServerProcess]:
    """The demo server, perhaps not ready yet."""
    pytest.importorskip("openai")
    server = launch(*FLAGS)
    yield server
    end(server)


@pytest.fixture(scope="session")
def server(starting_server: ServerProcess) -> ServerProcess:
    """The demo server, ready."""
    starting_server.wait_for_log("ready: ", seconds=START_SECONDS)
    return starting_server
