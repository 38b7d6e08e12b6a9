"""What operators see: keys, limits, logs, spans, drains and a stuck device, with a server whose device is Python."""

import concurrent.futures
import http.client
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from serve.cli import Server, listen, parse
from serve.config import ServeConfig
from serve.engine import Engine
from serve.gateway import Gateway, ModelInfo
from serve.http import create_app
from serve.logs import JsonFormatter
from serve.metrics import Metrics
from serve.middleware import protect
from serve.request import Admission, SamplingParams, Slo
from serve.slots import SlotScheduler
from serve.tracing import Tracing, trace_to

SLOTS, CONTEXT = 2, 200


class WordRunner:
    """A device whose slot answers word i with words i+1, i+2, ...; `gate` closed, a step takes until it is opened."""

    slots = SLOTS

    def __init__(self) -> None:
        self.last = np.zeros(SLOTS, np.int64)
        self.step_seconds = 0.0
        self.gate = threading.Event()
        self.gate.set()

    def prefill(
        self, tokens: Sequence[int], *, slot: int, start: int, bucket: int, last: bool, params: SamplingParams,
        level: int, first: bool, answered: int,
    ) -> np.ndarray:  # fmt: skip
        self.last[slot] = (tokens[-1] + 1) % CONTEXT
        return self.last[slot].copy()

    def decode(self, active: np.ndarray) -> np.ndarray:
        time.sleep(self.step_seconds)
        assert self.gate.wait(30)
        self.last[active] = (self.last[active] + 1) % CONTEXT
        return self.last.copy()

    def logprobs(self, wanted: np.ndarray) -> Any:
        raise NotImplementedError

    def use_table(self, table: np.ndarray) -> None:
        raise NotImplementedError

    def recover(self, error: Exception) -> None:
        raise error


def words() -> PreTrainedTokenizerFast:
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(CONTEXT)} | {"<unk>": CONTEXT}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


class Served:
    """A server on a port of its own, in threads of this process."""

    def __init__(self, *, tracing: Tracing | None = None, ready: bool = True, **settings: Any):
        self.config = ServeConfig(**({"max_slots": SLOTS, "port": 0, "stuck_seconds": 20.0} | settings))
        self.config.check()
        self.runner, self.metrics = WordRunner(), Metrics("words")
        self.gateway = Gateway(
            Admission(SLOTS + self.config.max_num_queued_reqs), max_queued_tokens=self.config.max_num_queued_tokens
        )
        tokenizer = words()
        self.engine = Engine(
            self.runner,
            SlotScheduler(num_slots=SLOTS, buckets=(16, 64), stall_tokens=64),
            decode=lambda ids: tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=True),
            deliver=self.gateway.deliver,
            metrics=self.metrics,
            context=CONTEXT,
        )
        self.info = ModelInfo(
            names=("words",), tokenizer=tokenizer, context=CONTEXT, vocab_size=CONTEXT, bos_id=None, eos_ids=()
        )
        self.listener = listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.server = Server(protect(create_app(self.gateway), self.config, tracing=tracing), self.gateway, self.config)
        starter = threading.Thread(target=self.begin if ready else lambda: None)
        self._thread = threading.Thread(target=self.server.run_with, args=(self.listener, starter), daemon=True)
        self._thread.start()
        while starter.ident is None:
            time.sleep(0.01)
        starter.join()

    def begin(self) -> None:
        self.engine.start()
        self.gateway.ready(self.engine, self.info, self.metrics, stuck_seconds=self.config.stuck_seconds, slo=Slo())

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, data, {k.replace("_", "-"): v for k, v in headers.items()})
            response = connection.getresponse()
            return response.status, response.read(), response.headers
        finally:
            connection.close()

    def complete(self, prompt: str = "w1", **options: Any) -> tuple[int, bytes, Any]:
        body = {"model": "words", "prompt": prompt, "max_tokens": 3}
        return self.ask("POST", "/v1/completions", body | options)

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def close(self) -> None:
        self.runner.gate.set()
        self.server.should_exit = True
        self._thread.join(20)
        if self.engine.alive:
            assert self.engine.stop(timeout=20)
        self.listener.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def start(**settings: Any) -> Served:
        started.append(Served(**settings))
        return started[-1]

    yield start
    for one in started:
        one.close()


def test_a_server_is_ready_after_it_has_started_and_not_before(serve: Callable[..., Served]) -> None:
    server = serve(ready=False)
    for path in ("/health", "/ready"):
        status, body, headers = server.ask("GET", path)
        assert (status, json.loads(body), headers["retry-after"]) == (503, {"status": "starting"}, "1")
    server.begin()
    assert server.ask("GET", "/ready")[:2] == (200, b'{"status":"ok"}')
    server.gateway.draining = True
    assert server.ask("GET", "/ready")[:2] == (503, b'{"status":"draining"}')


def test_keys_are_asked_for_where_there_are_some(serve: Callable[..., Served]) -> None:
    server = serve(api_key=("first", "sécond"))
    for value in (None, "first", "Bearer", "Bearer firs", "Bearer first x", "Basic first", "Bearer "):
        headers = {} if value is None else {"authorization": value}
        status, body, answered = server.ask("GET", "/v1/models", **headers)
        assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key"), value
        assert answered["www-authenticate"] == "Bearer"
    for value in ("Bearer first", "bearer  first ", "Bearer sécond".encode().decode("latin-1")):
        assert server.ask("GET", "/v1/models", authorization=value)[0] == 200
    assert [server.ask("GET", path)[0] for path in ("/health", "/ready", "/metrics")] == [200] * 3
    assert server.ask("GET", "/openapi.json")[0] == 401


def test_keys_come_from_flags_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEAR_JAX_API_KEY", "c,d")
    assert parse(["--api-key", "a", "b"]).api_key == ("a", "b", "c", "d")
    monkeypatch.setenv("SPEAR_JAX_API_KEY", "c,")
    with pytest.raises(ValueError, match="empty key"):
        parse([])


def test_other_pages_may_ask_only_where_they_are_named(serve: Callable[..., Served]) -> None:
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    closed = serve()
    assert closed.ask("OPTIONS", "/v1/completions", **asked)[0] == 405
    assert "access-control-allow-origin" not in closed.ask("GET", "/v1/models", origin="https://a.example")[2]
    server = serve(cors_origins=("https://a.example",), api_key=("k",))
    status, _, headers = server.ask("OPTIONS", "/v1/completions", **asked)
    assert (status, headers["access-control-allow-origin"]) == (200, "https://a.example")
    assert server.ask("GET", "/v1/models", origin="https://a.example")[2]["access-control-allow-origin"]
    assert "access-control-allow-origin" not in server.ask("GET", "/v1/models", origin="https://b.example")[2]


def test_a_request_has_one_id_everywhere(serve: Callable[..., Served], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="serve")
    server = serve(log_requests=True)
    body = {"model": "words", "prompt": "w1 w2", "max_tokens": 3}
    _, answer, headers = server.ask("POST", "/v1/completions", body, x_request_id="mine-1")
    assert (headers["x-request-id"], json.loads(answer)["id"]) == ("mine-1", "cmpl-mine-1")
    _, answer, headers = server.ask("POST", "/v1/completions", body, x_request_id="a b\tc")
    assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])
    assert json.loads(answer)["id"] == "cmpl-" + headers["x-request-id"]
    assert server.ask("GET", "/no%0Aline?x=1")[0] == 404
    server.ask("GET", "/health")
    server.wait(lambda: len(caplog.records) >= 3)
    first, _, third = caplog.records
    line = json.loads(JsonFormatter().format(first))
    assert line.pop("seconds") >= line.pop("ttft") >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line.pop("message").startswith("POST /v1/completions 200 0.0")
    assert line == {
        "level": "info",
        "logger": "serve.middleware",
        "request_id": "mine-1",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "model": "words",
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "finish_reasons": ["length"],
    }
    assert third.getMessage().startswith("GET /no%0Aline 404 ")


def test_a_defect_is_one_json_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("serve.x", logging.ERROR, __file__, 1, "failed: %s", ("é\n",), info)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "failed: é\n"
    assert "ValueError: two\nlines" in json.loads(line)["exception"]


def test_a_span_has_what_is_known_of_its_request(serve: Callable[..., Served]) -> None:
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    server = serve(tracing=Tracing(exporter, wait=True))
    parent = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
    body = {"model": "words", "prompt": "w1 w2", "max_tokens": 3, "stream": True}
    assert server.ask("POST", "/v1/completions", body, traceparent=parent, x_request_id="r")[0] == 200
    server.ask("GET", "/metrics")
    server.engine.stop(timeout=20)
    assert server.complete()[0] == 503
    server.wait(lambda: len(exporter.get_finished_spans()) == 2)
    first, second = exporter.get_finished_spans()
    assert format(first.context.trace_id, "032x") == "ab" * 16
    assert first.name == "POST /v1/completions"
    attributes = dict(first.attributes)
    assert attributes.pop("gen_ai.latency.time_to_first_token") >= 0
    assert attributes == {
        "http.request.method": "POST",
        "url.path": "/v1/completions",
        "http.response.status_code": 200,
        "gen_ai.request.id": "r",
        "gen_ai.request.model": "words",
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ("length",),
    }
    assert (first.status.is_ok, second.status.is_ok) == (True, False)


def test_spans_need_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ValueError, match="--extra otel"):
        trace_to("http://localhost:4318")


def test_waiting_prompts_are_limited_by_their_tokens(serve: Callable[..., Served]) -> None:
    server = serve(max_num_queued_tokens=10)
    server.runner.step_seconds = 0.02
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(server.complete, "w1", max_tokens=100) for _ in range(SLOTS)]
        server.wait(lambda: server.metrics.running._value.get() == SLOTS and not server.gateway._waiting)
        long = pool.submit(server.complete, "w1 " * 20)
        server.wait(lambda: server.gateway.admission.held == SLOTS + 1)
        server.wait(lambda: sum(server.gateway._waiting.values()) >= 20)
        status, body, headers = server.complete("w1")
        assert (status, json.loads(body)["error"]["code"]) == (503, "queue_full")
        assert int(headers["retry-after"]) >= 1
        assert [done.result()[0] for done in (*running, long)] == [200] * 3
    assert server.complete("w1 " * 20)[0] == 200
    assert not server.gateway._waiting


def test_a_client_that_is_slow_to_send_is_cut_off(serve: Callable[..., Served]) -> None:
    server = serve(client_seconds=0.4)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n"
    for sent, answer in ((b"", b""), (b"POST", b""), (head, b""), (head + b"\r\n{", b"HTTP/1.1 408 ")):
        begin = time.monotonic()
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
            client.sendall(sent)
            received = b""
            while data := client.recv(4096):
                received += data
        assert received[: len(answer)] == answer, sent
        assert answer or not received
        assert 0.3 < time.monotonic() - begin < 5
    # Bytes that keep coming do not help, and a client that keeps its connection for the next request is not cut off.
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.05) as client:
        for _ in range(100):
            try:
                client.sendall(b"x")
                assert client.recv(10) == b""
                break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("a head that never ends was waited for")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    for _ in range(2):
        connection.request("GET", "/health")
        assert connection.getresponse().read()
        time.sleep(0.6)
    connection.close()


def test_a_client_that_does_not_read_gives_its_place_back(serve: Callable[..., Served]) -> None:
    server = serve(client_seconds=0.5)
    body = json.dumps({"model": "words", "prompt": ["w1"] * 16, "max_tokens": 190, "stream": True}).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", server.port))
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        server.wait(lambda: server.gateway.admission.held == 16)
        for connection in server.server.server_state.connections:
            connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
            connection.transport.set_write_buffer_limits(4096)
        server.wait(lambda: server.gateway.admission.held == 0)
    assert server.complete()[0] == 200


def test_all_bodies_together_take_bounded_memory(serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.middleware._BODIES_AT_ONCE", 2)
    server = serve(max_body_mib=0.25, client_seconds=5)
    part = b"x" * (200 * 1024)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (len(part) + 1)
    clients = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(4)]
    for client in clients:
        client.sendall(head + part)
    time.sleep(0.3)
    statuses = []
    for client in clients:
        client.sendall(b"x")
        statuses.append(client.recv(4096).split()[1])
        client.close()
    assert sorted(set(statuses)) == [b"400", b"503"]
    assert server.complete()[0] == 200


def test_a_stuck_device_ends_requests_with_an_error_until_it_answers_again(serve: Callable[..., Served]) -> None:
    server = serve(stuck_seconds=1.5)
    assert server.complete()[0] == 200
    server.runner.gate.clear()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(server.complete, stream=stream) for stream in (False, True, False)]
        answers = [done.result(timeout=20) for done in asked]
    assert [status for status, _, _ in answers] == [500, 200, 500]
    assert all(b"engine has not answered for" in body for _, body, _ in answers)
    assert b"[DONE]" not in answers[1][1]
    assert server.ask("GET", "/health")[0] == 503
    status, body, _ = server.complete()
    assert (status, json.loads(body)["error"]["code"]) == (503, "not_ready")
    server.runner.gate.set()
    server.wait(lambda: server.ask("GET", "/health")[0] == 200)
    assert json.loads(server.complete("w7")[1])["choices"][0]["text"].split() == ["w8", "w9", "w10"]
    assert server.gateway.admission.held == 0


def test_an_engine_whose_thread_is_gone_is_not_healthy(serve: Callable[..., Served]) -> None:
    server = serve()
    server.engine.stop(timeout=20)
    assert server.ask("GET", "/health")[:2] == (503, b'{"status":"engine ended"}')
    assert server.complete()[0] == 503


def exported() -> set[str]:
    text = Metrics("m").render().decode()
    return {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")} | set(
        re.findall(r"# TYPE (\S+)", text)
    )


def test_metrics_have_the_words_that_scrapers_look_for() -> None:
    names = """num_requests_running num_requests_waiting kv_cache_usage_perc prompt_tokens_total generation_tokens_total
    num_preemptions_total request_success_total iteration_tokens_total_count request_params_n_count
    request_params_max_tokens_count request_prompt_tokens_count request_generation_tokens_count
    time_to_first_token_seconds_bucket inter_token_latency_seconds_bucket request_queue_time_seconds_bucket
    request_time_per_output_token_seconds_bucket e2e_request_latency_seconds_bucket
    request_prefill_time_seconds_bucket request_decode_time_seconds_bucket request_inference_time_seconds_bucket"""
    assert {f"spear:{name}" for name in names.split()} - exported() == set()


def test_every_metric_of_the_dashboard_is_exported() -> None:
    dashboard = json.loads((Path(__file__).parents[2] / "configs" / "grafana" / "spear-jax.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"spear:\w+", query)}
    assert len(panels) >= 12
    assert len(asked) >= 15
    assert asked - exported() == set()
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


@pytest.mark.parametrize(
    ("path", "field", "item"),
    [
        ("/v1/completions", "prompt", "null,"),
        ("/v1/completions", "prompt", "[],"),
        ("/v1/completions", "prompt", "1,"),
        ("/v1/completions", "stop", "0,"),
        ("/v1/completions", "stop_token_ids", '"",'),
        ("/v1/chat/completions", "messages", "{},"),
    ],
)
def test_a_million_mistakes_are_not_listed(serve: Callable[..., Served], path: str, field: str, item: str) -> None:
    server = serve()
    count = 3 * 2**20 // len(item)
    body = f'{{"model": "words", "{field}": [{item * count}{item[:-1]}]}}'.encode()
    begin = time.monotonic()
    status, answer, _ = server.ask("POST", path, body)
    # A list of them all took seven seconds, in which no stream went on, and a gigabyte.
    assert time.monotonic() - begin < 3
    assert status == 400
    assert len(answer) < 1000
