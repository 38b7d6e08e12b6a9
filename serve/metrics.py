"""Prometheus metrics in vLLM's vocabulary under the prefix `spear:`."""

from collections.abc import Iterator, Mapping
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from serve.request import FinishReason

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
_ITL_BUCKETS = (0.002, 0.005, 0.008, 0.012, 0.016, 0.022, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_REQUEST_BUCKETS = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0)
_TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Metrics:
    """Everything `/metrics` shows, in a registry of its own. Times are seconds."""

    def __init__(self, model_name: str):
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self.running = self._gauge("num_requests_running", "Requests that hold a slot.")
        self.waiting = self._gauge("num_requests_waiting", "Requests waiting for a slot.")
        self.kv_usage = self._gauge("kv_cache_usage_perc", "Share of the KV cache in use; 1 is all of it.")
        self.prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked for in the KV cache.")
        self.prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the KV cache.")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens prefilled.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.rejected = self._counter("request_rejected", "Requests refused because the queue was full.")
        self.unattainable = self._counter("slo_unattainable", "Requests refused because their limits cannot be kept.")
        self.best_effort = self._counter("slo_best_effort", "Requests served without limits that cannot be kept.")
        self.uncompensated = self._counter(
            "prompt_tokens_uncompensated", "Prompt tokens that went without some error compensators to save time."
        )
        self.skipped = self._counter("decode_tokens_deferred", "Times that an answer ahead of its TPOT waited.")
        self.drift = self._gauge("latency_table_drift", "Observed over predicted time of an iteration, averaged.")
        self.drift.set(1)
        self.preemptions = self._counter("num_preemptions", "Times that an answer lost its slot and was begun again.")
        self.faults = self._counter("engine_faults", "Iterations that failed; each costs time, and perhaps an answer.")
        self.retries = self._counter("request_retries", "Answers that were begun again after a fault, where they were.")
        self._reloads = Counter(
            "spear:checkpoint_reloads", "Times that the model was read again, by whether it is the one served since.",
            ["model_name", "taken"], registry=self.registry,
        )  # fmt: skip
        self.host_seconds = self._counter(
            "engine_host_seconds", "Processor time of the engine's thread: what the host does for the device's steps."
        )
        self.step_seconds = self._counter("step_seconds", "Time in which the device had steps to do.")
        self.compilations = self._counter(
            "compilations_after_ready", "Programs compiled after the server said it was ready; more than 0 is a defect."
        )
        self.ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _TTFT_BUCKETS)
        self.itl = self._histogram("inter_token_latency_seconds", "Gap between two tokens of an answer.", _ITL_BUCKETS)
        self.tpot = self._histogram(
            "request_time_per_output_token_seconds", "Mean gap between the tokens of an answer.", _ITL_BUCKETS
        )
        self.e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", _REQUEST_BUCKETS)
        self.queue_time = self._histogram("request_queue_time_seconds", "Arrival to slot.", _REQUEST_BUCKETS)
        self.prefill_time = self._histogram("request_prefill_time_seconds", "Slot to first token.", _REQUEST_BUCKETS)
        self.decode_time = self._histogram("request_decode_time_seconds", "First to last token.", _REQUEST_BUCKETS)
        self.inference_time = self._histogram("request_inference_time_seconds", "Slot to last token.", _REQUEST_BUCKETS)
        self.iteration_tokens = self._histogram(
            "iteration_tokens_total", "Tokens, of prompts and of answers, that an iteration ran.", _TOKEN_BUCKETS
        )
        self.request_n = self._histogram("request_params_n", "Answers asked for at once.", (1, 2, 5, 10, 20))
        self.request_max_tokens = self._histogram("request_params_max_tokens", "max_tokens of answers.", _TOKEN_BUCKETS)
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Prompt length.", _TOKEN_BUCKETS)
        self.request_generation_tokens = self._histogram("request_generation_tokens", "Answer length.", _TOKEN_BUCKETS)
        self._success = Counter(
            "spear:request_success",
            "Requests ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        for reason in get_args(FinishReason):
            self._success.labels(self._model_name, reason)
        self._slo = Counter(
            "spear:request_slo", "Answers that had limits, by whether all were kept.", ["model_name", "met"],
            registry=self.registry,
        )  # fmt: skip
        for met in ("true", "false"):
            self._slo.labels(self._model_name, met)
            self._reloads.labels(self._model_name, met)

    def slo(self, *, met: bool) -> None:
        """Count an answer that had limits on time."""
        self._slo.labels(self._model_name, str(met).lower()).inc()

    def reloaded(self, *, taken: bool) -> None:
        """Count an attempt to go on with another checkpoint."""
        self._reloads.labels(self._model_name, str(taken).lower()).inc()

    def finished(self, reason: FinishReason) -> None:
        """Count the end of a request."""
        self._success.labels(self._model_name, reason).inc()

    def read(self, name: str) -> float:
        """Give what a gauge or a counter stands at."""
        value = self.registry.get_sample_value(f"spear:{name}", {"model_name": self._model_name})
        assert value is not None, name
        return value

    def render(self) -> bytes:
        """Give the text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"spear:{name}", text, ["model_name"], registry=self.registry).labels(self._model_name)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"spear:{name}", text, ["model_name"], registry=self.registry).labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"spear:{name}", text, ["model_name"], registry=self.registry, buckets=buckets).labels(
            self._model_name
        )


def merged(texts: Mapping[str, str]) -> bytes:
    """Join what several replicas show at `/metrics`; each sample gets a label `replica`."""
    families: dict[str, Metric] = {}
    for name, text in texts.items():
        for family in text_string_to_metric_families(text):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                whole.samples.append(sample._replace(labels=sample.labels | {"replica": name}))

    class Families(Collector):
        def collect(self) -> Iterator[Metric]:
            return iter(families.values())

    registry = CollectorRegistry()
    registry.register(Families())
    return generate_latest(registry)
