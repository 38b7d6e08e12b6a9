"""A model over several processes, each with a device of its own, as if they were hosts: gloo between them."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from serve.config import ServeConfig
from serve.hosts import LOST_SECONDS, Group, follow, led

ROOT = Path(__file__).parents[2]
PROMPTS = [[(7 * i + j * j) % 96 for j in range(5 + 9 * i)] for i in range(3)]


class Recorder:
    slots = 3

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def decode(self, active: Any, *, deep: int = 0) -> str:
        self.seen.append((list(active), deep))
        return "token"


def test_calls_are_told_to_the_others_in_order_and_made_here() -> None:
    """And who follows makes them, until the end is told."""
    from multiprocessing.connection import Pipe

    here, there = Pipe()
    lost: list[str] = []
    lead, other = Group({1: here}, leave=lost.append), Group({0: there}, leave=lost.append)
    runner, follower = Recorder(), Recorder()
    ran = led(runner, lead)
    assert ran.slots == 3
    assert [ran.decode([True]), ran.decode([False], deep=2)] == ["token", "token"]
    lead.end()
    follow(follower, other)
    assert follower.seen == runner.seen == [([True], 0), ([False], 2)]
    assert not lost


def test_who_is_gone_is_named() -> None:
    from multiprocessing.connection import Pipe

    here, there = Pipe()
    lost, noticed = [], threading.Event()

    def leave(message: str) -> None:
        lost.append(message)
        noticed.set()

    Group({1: here}, leave=leave)
    there.close()
    assert noticed.wait(LOST_SECONDS)
    assert "process 1" in lost[0]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"num_processes": 2}, "need a coordinator"),
        ({"coordinator": "h:1", "num_processes": 2}, "process_id must be"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "process_id must be"),
        ({"coordinator": "auto", "process_id": 0}, "need a coordinator"),
        ({"coordinator": "auto", "steps_per_call": 8}, "steps_per_call must be 1"),
        ({"coordinator": "auto", "reload_checkpoint": True}, "reload_checkpoint is for a model on one host"),
        ({"coordinator": "auto", "replicas": 2}, "replicas of a model over several hosts"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ServeConfig(**settings).check()


class Process:
    """A server's process; `url` is where it says that it listens."""

    def __init__(self, checkpoint: Path, *flags: str):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "spear_jax.serve", "--model", str(checkpoint), "--port", "0"]
        command += ["--max-slots", "2", "--max-context", "120", "--prefill-buckets", "16", *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr:
            self.log += iter(self.process.stderr.readline, "")

    def wait_for(self, word: str) -> str:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            if (line := next((line for line in list(self.log) if word in line), None)) is not None:
                return line
            assert self.process.poll() is None, "".join(self.log)
            time.sleep(0.05)
        raise AssertionError("".join(self.log))

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Give the exit status and all that was said."""
        self.process.send_signal(number)
        return self.ended(60)

    def ended(self, seconds: float) -> tuple[int, str]:
        status = self.process.wait(seconds)
        self._reader.join(10)
        return status, "".join(self.log)


def answers(server: Process) -> list[str]:
    """Ask for three greedy answers at once, of a server with two slots."""
    url = server.wait_for("ready: ").split()[2].rstrip(",")

    def ask(prompt: list[int]) -> str:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0, "logprobs": 0}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return " ".join(json.load(response)["choices"][0]["logprobs"]["tokens"])

    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(ask, PROMPTS))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hosts") / "tiny"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    script = Path(__file__).with_name("tiny_checkpoint.py")
    subprocess.run([sys.executable, script, path], env=environment, check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> list[str]:
    """What one process answers."""
    server = Process(checkpoint)
    try:
        told = answers(server)
    finally:
        server.end()
    assert len({word for text in told for word in text.split()}) > 8
    return told


@pytest.fixture
def start_group(checkpoint: Path) -> Iterator[Callable[[int], list[Process]]]:
    started: list[Process] = []

    def start(count: int) -> list[Process]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            meeting = f"127.0.0.1:{probe.getsockname()[1]}"
        flags = ("--tensor-parallel", str(count), "--coordinator", meeting, "--num-processes", str(count))
        group = [Process(checkpoint, *flags, "--process-id", str(i)) for i in range(count)]
        started.extend(group)
        return group

    yield start
    for process in started:
        process.process.kill()
        process.ended(30)


@pytest.mark.slow
def test_a_lost_process_ends_the_group_and_a_restart_serves(
    start_group: Callable[[int], list[Process]], whole: list[str]
) -> None:
    lead, other = start_group(2)
    assert answers(lead) == whole
    other.process.kill()
    status, said = lead.ended(LOST_SECONDS + 10)
    assert status == 3
    assert "process 1 of 2 was lost" in said
    lead, other = start_group(2)
    assert answers(lead) == whole


@pytest.mark.slow
def test_four_processes_answer_as_one_and_end_together(
    start_group: Callable[[int], list[Process]], whole: list[str]
) -> None:
    group = start_group(4)
    assert answers(group[0]) == whole
    assert group[0].end()[0] == 0
    assert [process.ended(30)[0] for process in group[1:]] == [0, 0, 0]
