"""OpenTelemetry spans of requests, where the extra `otel` is installed and an address is given."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_ATTRIBUTES = {
    "method": "http.request.method",
    "path": "url.path",
    "status": "http.response.status_code",
    "request_id": "gen_ai.request.id",
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "finish_reasons": "gen_ai.response.finish_reasons",
    "ttft": "gen_ai.latency.time_to_first_token",
}
"""What of a request's record goes into its span, by OpenTelemetry's names, or vLLM's where it has none."""


class Tracing:
    """Makes a span for each request, a child of the caller's if it sent a `traceparent`, and sends them in batches."""

    def __init__(self, exporter: "SpanExporter", *, wait: bool = False):
        from opentelemetry.propagate import extract
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
        from opentelemetry.trace import SpanKind, Status, StatusCode

        self._extract, self._kind = extract, SpanKind.SERVER
        self._failed = Status(StatusCode.ERROR)
        self._provider = TracerProvider(resource=Resource.create({"service.name": "spear-jax"}))
        self._provider.add_span_processor((SimpleSpanProcessor if wait else BatchSpanProcessor)(exporter))
        self._tracer = self._provider.get_tracer("serve")

    @contextlib.contextmanager
    def span(self, record: Mapping[str, Any], headers: Mapping[str, str]) -> Iterator[None]:
        """Time what is done inside; attributes are what `record` holds at its end."""
        name = f"{record['method']} {record['path']}"
        with self._tracer.start_as_current_span(name, context=self._extract(headers), kind=self._kind) as span:
            try:
                yield
            finally:
                span.set_attributes({_ATTRIBUTES[key]: value for key, value in record.items() if key in _ATTRIBUTES})
                if record.get("status", 500) >= 500:
                    span.set_status(self._failed)

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()


def trace_to(endpoint: str) -> Tracing:
    """Send spans to an OTLP collector over HTTP, such as http://localhost:4318/v1/traces.

    Raises:
        ValueError: The extra `otel` is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ValueError("otlp_endpoint needs the extra: uv run --extra otel ...") from None
    return Tracing(OTLPSpanExporter(endpoint=endpoint))
