"""Attack a server, or load it for long, and say what it took: `python tests/serve/hostile.py [soak] [--minutes N]`.

Starts `python -m spear_jax.serve` with the demo model, or with a tiny one of random weights (`--tiny`), and writes one
JSON object to `--out`, by default under `serve/results/`. Without `soak`, hostile clients of every kind come while
ordinary streams go on, which must say the same as before; with it, a mixed load with cancels goes on for so many
minutes. The exit status is 1 if the server answered with 5xx where it should not, lost or changed an answer, kept
memory, or is not healthy in the end.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import datetime
import http.client
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from spear_jax.versions import package_versions

ROOT = Path(__file__).parents[2]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
CONTEXT = 384
CLIENT_SECONDS = 4.0


class Target:
    """A server process, and what clients of it saw."""

    def __init__(self, *flags: str):
        command = [sys.executable, "-m", "spear_jax.serve", "--port", "0", "--max-context", str(CONTEXT)]
        command += ["--prefill-buckets", "16", "64", "--client-seconds", str(CLIENT_SECONDS), "--max-body-mib", "2"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True, env=environment)
        self.log: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        self.port = int(self._wait_for("listening: ").rsplit(":", 1)[1])
        self._wait_for("ready: ")
        self.watched = psutil.Process(self.process.pid)
        self.peak = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)

    def _watch(self) -> None:
        while self.process.poll() is None:
            try:
                self.peak = max(self.peak, self.memory())
            except psutil.Error:
                return
            time.sleep(0.1)

    def _wait_for(self, word: str) -> str:
        while True:
            for line in list(self.log):
                if word in line:
                    return line
            if self.process.poll() is not None:
                raise RuntimeError("".join(self.log))
            time.sleep(0.1)

    def memory(self) -> float:
        """Give what the process holds, in MiB."""
        return self.watched.memory_info().rss / 2**20

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def raw(self, data: bytes) -> int:
        """Send bytes as they are; gives the status, or 0 where the connection was closed without one."""
        with self.connect() as client:
            try:
                client.sendall(data)
                head = client.recv(4096)
            except OSError:
                return 0
            return int(head.split()[1]) if head.startswith(b"HTTP/") else 0

    def post(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=900)
        try:
            connection.request("POST", path, body, {"content-type": "application/json"} | (headers or {}))
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def gauge(self, name: str) -> float:
        text = self.get("/metrics")[1].decode()
        return sum(float(x.rsplit(" ", 1)[1]) for x in text.splitlines() if x.startswith(f"spear:{name}{{"))

    def settle(self) -> float:
        """Wait until nothing runs; gives the memory then."""
        deadline = time.monotonic() + 120
        while self.gauge("num_requests_running") or self.gauge("num_requests_waiting"):
            if time.monotonic() > deadline:
                raise RuntimeError("requests are left in the server although all clients are gone")
            time.sleep(0.2)
        time.sleep(1)
        return self.memory()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def write_tiny(folder: Path) -> Path:
    """Write a checkpoint of random weights whose words are w2, w3, ..., for machines that are slow."""
    import jax.numpy as jnp
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    from spear_jax.checkpoint import save_checkpoint
    from spear_jax.models.decoder import Decoder
    from spear_jax.models.quantize import quantize_model
    from spear_jax.quant import QuantSpec
    from spear_jax.testing import random_weights, tiny_config

    config = tiny_config(tie_embeddings=False, max_position=512)
    vocab = {"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, config.vocab_size)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    model = quantize_model(Decoder.from_weights(config, random_weights(config), dtype=jnp.float32), QuantSpec())
    save_checkpoint(folder / "checkpoint", model, tokenizer, name="tiny")
    return folder / "checkpoint"


class Bystanders:
    """Ordinary streams that go on meanwhile; each must say what it said when it was alone."""

    def __init__(self, target: Target, count: int = 2):
        self._target = target
        self.expected = [self._ask(i) for i in range(count)]
        self.answers = self.wrong = 0
        self.worst = 0.0
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._go_on, args=(i,)) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def _ask(self, index: int) -> str:
        body = {"model": "demo", "prompt": f"w{index + 2} and w{index + 7} are", "max_tokens": 24, "temperature": 0}
        status, data = self._target.post(TEXT, json.dumps(body | {"stream": True}).encode())
        events = [json.loads(line[6:]) for line in data.splitlines() if line.startswith(b"data: {")]
        return f"{status} " + "".join(event["choices"][0]["text"] for event in events if event.get("choices"))

    def _go_on(self, index: int) -> None:
        while not self._end.is_set():
            begin = time.monotonic()
            try:
                said = self._ask(index)
            except (OSError, http.client.HTTPException) as error:
                said = repr(error)
            self.answers += 1
            if said != self.expected[index]:
                self.wrong += 1
                print(f"a bystander was told {said!r}", file=sys.stderr)
            self.worst = max(self.worst, time.monotonic() - begin)

    def stop(self) -> dict[str, Any]:
        self._end.set()
        for thread in self._threads:
            thread.join()
        return {"answers": self.answers, "wrong": self.wrong, "slowest_s": round(self.worst, 2)}


def fuzzed_json(target: Target) -> list[int]:
    """Bodies that were whole once."""
    rng = random.Random(0)
    texts = [json.dumps(HELLO).encode(), json.dumps({"model": "demo", "prompt": ["a", "b"], "max_tokens": 1}).encode()]
    junk = [None, True, -1, 2**70, 1e308, float("nan"), float("inf"), "", "\ud800", [], {}, [[]], [None] * 9, {"": {}}]
    fields = [*HELLO, "prompt", "stop", "temperature", "top_p", "top_k", "min_p", "seed", "n", "logit_bias", "logprobs",
              "stream", "stream_options", "priority", "max_completion_tokens", "presence_penalty", "stop_token_ids",
              "top_logprobs", "x-slo-ttft-ms", "echo", "tools", "tool_choice", "response_format", "user"]  # fmt: skip
    statuses = []
    for i in range(200):
        text = bytearray(texts[i % 2])
        if i % 3:
            body = dict(HELLO) if i % 2 else {"model": "demo", "prompt": "a", "max_tokens": 1}
            body[rng.choice(fields)] = rng.choice(junk)
            body.setdefault("max_tokens", 1)
            if body["max_tokens"] is None:
                body["max_tokens"] = 1
            text = bytearray(json.dumps(body).encode())
        else:
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(text))
                text[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        statuses.append(target.post(CHAT if i % 2 else TEXT, bytes(text))[0])
    return statuses


def huge_bodies(target: Target) -> list[int]:
    """Bodies over the limit, and at it: one word, many errors, many small things, deep nesting."""
    size = 2 * 2**20 - 300

    def many(value: bytes, count: int) -> bytes:
        return b",".join(b'"%d":%s' % (i, value) for i in range(count))

    bodies = [
        json.dumps({"model": "demo", "prompt": "x" * 2**21}).encode(),
        json.dumps({"model": "demo", "prompt": "word " * (size // 5)}).encode(),
        b'{"model": "demo", "prompt": "' + b"a" * (size - 40) + b'"}',
        b'{"model": "demo", "prompt": [' + b"null," * (size // 5 - 10) + b"null]}",
        b'{"model": "demo", "prompt": [' + b"[]," * (size // 3 - 20) + b"[]]}",
        b'{"model": "demo", "prompt": [' + b"1," * (size // 2 - 20) + b"1]}",
        b'{"model": "demo", "messages": [' + b"{}," * (size // 3 - 20) + b"{}]}",
        b'{"model": "demo", "messages": [{"role": "user", "content": [' + b"{}," * (size // 3 - 40) + b"{}]}]}",
        b'{"model": "demo", "prompt": "a", "stop": [' + b"0," * (size // 2 - 40) + b"0]}",
        b'{"model": "demo", "prompt": "a", "stop_token_ids": [' + b'"",' * (size // 3 - 40) + b"0]}",
        b'{"model": "demo", "prompt": "a", "logit_bias": {' + many(b"{}", size // 14) + b"}}",
        b'{"model": "demo", "prompt": "a", ' + many(b"0", size // 12) + b"}",
        b"[" * size,
        b'{"a":' * (size // 5),
        b'{"model": "demo", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b"9" * size,
        b'{"model": "demo", "prompt": "a", "seed": ' + b"9" * (size - 60) + b"}",
        b'"\\ud800' * (size // 7),
    ]  # fmt: skip
    return [target.post(CHAT if b"messages" in body[:40] else TEXT, body)[0] for body in bodies for _ in range(2)]


def invalid_text(target: Target) -> list[int]:
    """Bytes that are no UTF-8, halves of surrogate pairs, controls."""
    parts = [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x00", b"\\ud800", b"\\udc00\\ud800"]
    return [
        target.post(path, b'{"model": "demo", "%s": "a%sb", "max_tokens": 1}' % (field, part))[0]
        for part in parts
        for path, field in ((TEXT, b"prompt"), (TEXT, b"user"), (TEXT, b"stop"), (CHAT, b"messages"))
        if part != b"\\ud800" or field != b"user"
    ]


def limits(target: Target) -> list[int]:
    """Prompts of exactly the context, one under and one over, and numbers that are none."""
    statuses = [
        target.post(TEXT, json.dumps({"model": "demo", "prompt": [9] * n, "max_tokens": 5}).encode())[0]
        for n in (CONTEXT - 1, CONTEXT, CONTEXT + 1)
    ]
    assert statuses == [200, 400, 400], statuses
    for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
        for value in (float("nan"), float("inf"), float("-inf"), -3, 1e400, 10**400):
            statuses.append(target.post(CHAT, json.dumps(HELLO | {name: value}).encode())[0])
    for name in ("max_tokens", "n", "seed", "top_k", "priority"):
        for value in (-1, 0, 2**31, 2**63, -(2**63) - 1, 10**400, float("nan"), 1.5):
            body = HELLO | {name: value}
            statuses.append(
                target.post(
                    CHAT,
                    json.dumps(
                        body | {"max_tokens": min(body["max_tokens"], 2)} if name != "max_tokens" else body
                    ).encode(),
                )[0]
            )
    return statuses


def bad_http(target: Target) -> list[int]:
    """Heads that try to smuggle lines, paths that try to climb, methods and lengths that are wrong."""
    body = json.dumps(HELLO).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    paths = [b"/../../etc/passwd", b"/v1/models/..%2f..%2fetc%2fpasswd", b"/v1/models/%00", b"/%0d%0aset-cookie:%20a=b",
             b"//v1/models", b"/v1/models/" + b"a" * 30_000, b"/v1/\xff", b"http://other/v1/models", b"*",
             b"/v1/models/%ff%fe", b"/v1/models/%E2%80%AE"]  # fmt: skip
    raws = [
        *(b"GET %s HTTP/1.1\r\nhost: x\r\n\r\n" % path for path in paths),
        head + b"x-request-id: a\rb\r\ncontent-length: 0\r\n\r\n",
        head + b"x-request-id: a\r\n set-cookie: b\r\ncontent-length: 2\r\n\r\n{}",
        head + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        head + b"content-length: -5\r\n\r\n",
        head + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        head + b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        head + b"transfer-encoding: chunked\r\n\r\nzz\r\n\r\n",
        head + b"content-encoding: gzip\r\ncontent-length: 3\r\n\r\n\x1f\x8b\x08",
        head + b"x: " + b"a" * 100_000 + b"\r\n\r\n",
        head + b"".join(b"x%d: a\r\n" % i for i in range(9000)) + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"FOO /health HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    ]
    statuses = [target.raw(raw) for raw in raws]
    for value in ("nan", "-1", "1e999", "\u0661", "0x10", "1_0"):
        statuses.append(target.post(CHAT, body, {"x-slo-ttft-ms": value.encode().decode("latin-1")})[0])
    return statuses


def disconnects(target: Target) -> list[int]:
    """Clients that go away at every stage: in the head, in the body, before the answer, in it, and with a reset."""
    rng = random.Random(1)
    body = json.dumps(HELLO | {"max_tokens": 200, "stream": True, "ignore_eos": True}).encode()
    plain = json.dumps(HELLO | {"max_tokens": 200, "ignore_eos": True}).encode()
    for i in range(120):
        data = body if i % 2 else plain
        sent = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(data)) + data
        with target.connect() as client:
            client.sendall(sent[: rng.randrange(1, len(sent))] if i % 3 == 0 else sent)
            if i % 3 == 2:
                client.settimeout(3)
                for _ in range(rng.randint(0, 5)):
                    try:
                        client.recv(rng.choice((1, 100, 4096)))
                    except TimeoutError:
                        break
            if i % 4 == 0:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    target.settle()
    return []


def slow_clients(target: Target) -> list[int]:
    """Clients that send a byte a second, of the head or of the body."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\n"
    clients = [target.connect() for _ in range(300)]
    begin, statuses = time.monotonic(), []
    for i, client in enumerate(clients):
        client.sendall(head if i % 2 else head[:20])
        client.setblocking(False)
    opened = set(clients)
    while opened and time.monotonic() - begin < 5 * CLIENT_SECONDS:
        time.sleep(0.5)
        for client in list(opened):
            try:
                client.send(b"x")
                data = client.recv(4096)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            statuses.append(int(data.split()[1]) if data else 0)
            opened.discard(client)
            client.close()
    assert not opened, f"{len(opened)} slow clients were never cut off"
    return statuses


def many_connections(target: Target) -> list[int]:
    """Thousands of connections that say nothing, while the server answers others; then all ask at once."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    clients = [target.connect() for _ in range(3000)]
    statuses = [target.get("/health")[0], target.post(CHAT, json.dumps(HELLO).encode())[0]]
    for client in clients:
        client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    answered = 0
    for client in clients:
        with contextlib.suppress(OSError):
            answered += client.recv(4096).startswith(b"HTTP/1.1 200")
        client.close()
    statuses.append(200 if answered else 0)
    print(f"{answered} of {len(clients)} silent connections were answered in the end", file=sys.stderr)
    return statuses


def full_queue(target: Target) -> list[int]:
    """More requests at once than the server holds: 503 with Retry-After is right here."""
    body = json.dumps(HELLO | {"n": 16, "max_tokens": 4, "temperature": 1}).encode()
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        statuses = [status for status, _ in pool.map(lambda _: target.post(CHAT, body), range(60))]
    assert set(statuses) <= {200, 503}, statuses
    return [200 if status == 503 else status for status in statuses]


ATTACKS: list[Callable[[Target], list[int]]] = [
    fuzzed_json, huge_bodies, invalid_text, limits, bad_http, disconnects, slow_clients, many_connections, full_queue
]  # fmt: skip


def attack(target: Target, only: set[str]) -> dict[str, Any]:
    """Run every attack, twice each for memory: the second time shows what is kept."""
    bystanders = Bystanders(target)
    report: dict[str, Any] = {}
    before = target.memory()
    for one in ATTACKS:
        if only and one.__name__ not in only:
            continue
        row: dict[str, Any] = {}
        for turn in ("first", "second"):
            begin, target.peak = time.monotonic(), 0.0
            statuses = collections.Counter(one(target))
            row[turn] = {"seconds": round(time.monotonic() - begin, 1), "peak_mib": round(target.peak)}
            row["statuses"] = {str(status): count for status, count in sorted(statuses.items())}
            row[turn]["memory_after_mib"] = round(target.memory())
        row["ok"] = not any(int(status) >= 500 for status in row["statuses"])
        report[one.__name__] = row
        print(one.__name__, json.dumps(row), file=sys.stderr)
    report["bystanders"] = bystanders.stop()
    report["memory_mib"] = {"before": round(before), "after": round(target.settle())}
    kept = max(
        (r["second"]["memory_after_mib"] - r["first"]["memory_after_mib"] for r in report.values() if "second" in r),
        default=0,
    )
    report["most_kept_by_a_second_turn_mib"] = kept
    fine = all(row.get("ok", True) for row in report.values() if isinstance(row, dict))
    report["ok"] = fine and not report["bystanders"]["wrong"] and kept < 100 and target.get("/health")[0] == 200
    return report


def soak(target: Target, minutes: float) -> dict[str, Any]:
    """Offer a mixed load: chats and completions, streamed or not, n, penalties, seeds, and a quarter of cancels."""
    end = time.monotonic() + 60 * minutes
    counts: collections.Counter[str] = collections.Counter()
    samples: list[tuple[float, float]] = []
    begin = time.monotonic()

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < end:
            text = " ".join(rng.choices(["w7", "sea", "w23", "é", "日本"], k=rng.randint(1, 120)))
            body = HELLO | {
                "messages": [{"role": "user", "content": text}],
                "max_tokens": rng.randint(1, 60),
                "temperature": rng.choice([0, 1]),
                "stream": rng.random() < 0.5,
                "n": rng.choice([1, 1, 1, 2]),
                "presence_penalty": rng.choice([0, 0, 1]),
                "ignore_eos": rng.random() < 0.5,
            }
            if rng.random() < 0.2:
                body |= {"logprobs": True, "top_logprobs": 3}
            data = json.dumps(body).encode()
            counts["sent"] += 1
            try:
                if rng.random() < 0.25:
                    with target.connect() as connection:
                        connection.sendall(
                            b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(data))
                            + data
                        )
                        connection.settimeout(rng.uniform(0.01, 2))
                        with contextlib.suppress(TimeoutError):
                            connection.recv(rng.choice((1, 4096)))
                    counts["cancelled"] += 1
                    continue
                status, answer = target.post(CHAT, data)
            except (OSError, http.client.HTTPException) as error:
                counts[f"lost: {type(error).__name__}"] += 1
                continue
            whole = status == 200 and (answer.endswith(b"data: [DONE]\n\n") if body["stream"] else b"usage" in answer)
            counts["answered" if whole else f"failed: {status}"] += 1

    def watch() -> None:
        while time.monotonic() < end:
            time.sleep(5)
            samples.append((round(time.monotonic() - begin), round(target.memory(), 1)))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(12)] + [threading.Thread(target=watch)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = target.settle()
    late = [memory for seconds, memory in samples if seconds > 60 * minutes / 3]
    half = len(late) // 2
    growth = sum(late[half:]) / max(len(late[half:]), 1) - sum(late[:half]) / max(half, 1)
    lost = counts["sent"] - counts["answered"] - counts["cancelled"]
    return {
        "minutes": minutes,
        "counts": dict(counts),
        "lost": lost,
        "tokens": target.gauge("generation_tokens_total"),
        "engine_faults": target.gauge("engine_faults_total"),
        "compilations_after_ready": target.gauge("compilations_after_ready_total"),
        "memory_mib": {"first": samples[0][1], "after": round(after, 1), "growth_late": round(growth, 1)},
        "samples": samples[:: max(len(samples) // 60, 1)],
        "ok": lost == 0 and growth < 20 and target.gauge("compilations_after_ready_total") == 0,
    }


def main() -> int:
    """Run one of the two, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["attack", "soak"], default="attack")
    parser.add_argument("--minutes", type=float, default=30.0, help="how long to soak")
    parser.add_argument("--only", nargs="*", default=[], help=f"attacks: {', '.join(one.__name__ for one in ATTACKS)}")
    parser.add_argument("--tiny", action="store_true", help="serve a tiny model of random weights, not the demo")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    args = parser.parse_args()
    load = os.getloadavg()
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        model = ("--model", str(write_tiny(Path(folder))), "--served-model-name", "demo") if args.tiny else ()
        target = Target(*model)
    try:
        report = soak(target, args.minutes) if args.what == "soak" else attack(target, set(args.only))
        report["log"] = [line for line in target.log if "Traceback" in line or "Error" in line][-20:]
        report["exit_status"] = target.stop()
    finally:
        if target.process.poll() is None:
            target.process.kill()
    report["model"] = "tiny" if args.tiny else "demo"
    report["date"] = datetime.date.today().isoformat()
    report["command"] = " ".join(["python", "tests/serve/hostile.py", *sys.argv[1:]])
    report["versions"] = package_versions("jax", "fastapi", "uvicorn", "pydantic")
    report["load_of_machine"] = {"cores": os.cpu_count(), "before": load, "after": os.getloadavg()}
    out = args.out or ROOT / "serve" / "results" / ("soak.json" if args.what == "soak" else "hostile.json")
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(out)
    return int(not report["ok"] or report["exit_status"] != 0)


if __name__ == "__main__":
    sys.exit(main())
