"""Two real replicas of a tiny model under Ray: one is killed amid many streams, all are updated, and metrics add up."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from serve.metrics import merged

ROOT = Path(__file__).parents[2]
STREAMS = 200
RETRYABLE = {"replica_lost", "engine_error", "queue_full"}


def test_metrics_of_replicas_are_joined_under_their_names() -> None:
    text = (
        "# HELP spear:a_total A.\n# TYPE spear:a_total counter\nspear:a_total{{model_name=\"m\"}} {}\n"
        "# HELP spear:b B.\n# TYPE spear:b histogram\nspear:b_bucket{{le=\"+Inf\"}} 2.0\nspear:b_count 2.0\n"
        "spear:b_sum 1.5\n"
    )  # fmt: skip
    joined = merged({"x": text.format(1.0), "y": text.format(2.0)}).decode()
    assert joined.count("# TYPE spear:a_total counter") == 1
    assert 'spear:a_total{model_name="m",replica="x"} 1.0' in joined
    assert 'spear:a_total{model_name="m",replica="y"} 2.0' in joined
    assert 'spear:b_bucket{le="+Inf",replica="y"} 2.0' in joined


class Endpoint:
    """`python -m spear_jax.serve SETTINGS` with replicas."""

    def __init__(self, settings: Path):
        self.settings = settings
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "spear_jax.serve", str(settings), "--port", "0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.log: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        self.url = self.wait_for("ready: ")[0].split()[2].rstrip(",")

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr:
            self.log += iter(self.process.stderr.readline, "")

    def wait_for(self, word: str, *, count: int = 1) -> list[str]:
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline:
            if len(lines := [line for line in list(self.log) if word in line and "not ready" not in line]) >= count:
                return lines
            assert self.process.poll() is None, "".join(self.log)
            time.sleep(0.1)
        raise AssertionError("".join(self.log))

    def replicas(self) -> list[int]:
        """Give the processes of the replicas, which are descendants of the endpoint's."""
        parents, names = {}, {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                stat, name = (folder / "stat").read_text(), (folder / "cmdline").read_bytes()
            except OSError:
                continue
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
            names[int(folder.name)] = name

        def descends(process: int) -> bool:
            return process == self.process.pid or (process > 1 and descends(parents.get(process, 0)))

        return [p for p, name in names.items() if name.startswith(b"ray::ServeReplica:") and descends(p)]

    def metrics(self, name: str) -> dict[str, float]:
        """Give a metric by replica."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        found = re.findall(rf'^spear:{name}{{.*replica="(\w+)".*}} (\S+)$', text, re.MULTILINE)
        return {replica: float(value) for replica, value in found}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("replicas")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    script = Path(__file__).with_name("tiny_checkpoint.py")
    subprocess.run([sys.executable, script, folder / "tiny"], env=environment, check=True, capture_output=True)
    settings = folder / "settings.yaml"
    settings.write_text(
        f"model: {folder / 'tiny'}\nserved_model_name: tiny\nreplicas: 2\nmax_slots: 4\nmax_context: 120\n"
        "prefill_buckets: [16]\n"
    )
    started = Endpoint(settings)
    yield started
    started.process.terminate()
    try:
        assert started.process.wait(90) == 0, "".join(started.log)
    finally:
        started.process.kill()


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=300, limits=httpx.Limits(max_connections=STREAMS)) as client:
        yield client


def stream(client: httpx.Client, url: str, prompt: list[int], tokens: int = 30) -> str:
    """Give how a stream ended: `done`, or the code of the error in it or instead of it."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        text = response.read().decode()
    if response.status_code != 200:
        assert response.headers["retry-after"]
        return response.json()["error"]["code"]
    if text.endswith("data: [DONE]\n\n"):
        return "done"
    last = text.strip().rpartition("data: ")[2]
    assert '"error"' in last, text
    return re.findall(r'"code":"(\w+)"', last)[0]


@pytest.mark.slow
def test_replicas_answer_fail_and_are_updated_behind_one_endpoint(endpoint: Endpoint, client: httpx.Client) -> None:
    """Kill one of two amid 200 streams, then update both while requests come: each ends whole or may be asked again."""
    url = endpoint.url
    assert client.get(f"{url}/v1/models").json()["data"][0]["id"] == "tiny"
    assert client.post(f"{url}/v1/completions", json={"model": "no", "prompt": "w1"}).status_code == 404
    victims = endpoint.replicas()
    assert len(victims) == 2

    with ThreadPoolExecutor(STREAMS) as pool:
        running = [pool.submit(stream, client, url, [i % 90, i % 7, 3]) for i in range(STREAMS)]
        while sum(stream.done() for stream in running) < STREAMS // 10:
            time.sleep(0.02)
        os.kill(victims[0], 9)
        ends = [each.result() for each in running]
    assert set(ends) <= {"done"} | RETRYABLE, set(ends)
    assert ends.count("done") > STREAMS // 4
    assert ends.count("done") < STREAMS, "none was running where the replica was killed"
    assert [stream(client, url, [i]) for i in range(10)] == ["done"] * 10

    deadline = time.monotonic() + 200
    while len(served := endpoint.metrics("generation_tokens_total")) < 2:
        assert time.monotonic() < deadline, "the killed replica was not replaced"
        time.sleep(0.5)
    before = set(served)

    endpoint.settings.write_text(endpoint.settings.read_text().replace("max_context: 120", "max_context: 100"))
    os.kill(endpoint.process.pid, 1)
    ends, updated = [], threading.Event()

    def ask(seed: int) -> None:
        while not updated.is_set():
            ends.append(stream(client, url, [seed, len(ends) % 90], 20))

    askers = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for asker in askers:
        asker.start()
    try:
        endpoint.wait_for("ready: ", count=2)
    finally:
        updated.set()
    for asker in askers:
        asker.join()
    assert ends
    assert set(ends) == {"done"}
    assert not before & set(endpoint.metrics("generation_tokens_total"))
    assert client.get(f"{url}/v1/models/tiny").json()["max_model_len"] == 100
