"""Optional OpenTelemetry traces: one span a request, one below it for each stage, sent over OTLP/HTTP.

Off unless EKIBEN_TRACING asks for it: an OTEL_* variable that a platform sets for all its programs must not make every
request here dearer. Everything else is as OpenTelemetry names it: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER,
OTEL_SERVICE_NAME and so on are read by its own packages. Spans are made after the answer, from times that were taken
anyway; a thread sends them in batches, and drops them when the collector does not take them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from bentos.errors import SettingsError
from bentos.settings import ServeSettings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

PACKAGE = "opentelemetry-exporter-otlp-proto-http"
CLOSE_TIMEOUT_S = 5.0  # for what has not been sent when the server ends


class Tracing:
    """Makes spans and has them sent. Methods may be called from any thread."""

    def __init__(self, provider: TracerProvider, exporter: SpanExporter) -> None:
        """Send the spans of `provider` through `exporter`; `open_tracing` makes both."""
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._exporter = exporter
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = provider.get_tracer("bentos")
        self._propagator = TraceContextTextMapPropagator()

    def record_request(
        self,
        *,
        method: str,
        route: str,
        code: int,
        began: float,
        ended: float,
        stages: Mapping[str, tuple[float, float]] | None = None,
        traceparent: bytes | None = None,
        tracestate: bytes | None = None,
        request_id: str | None = None,
        texts: int = 0,
        tokens: int = 0,
    ) -> None:
        """Make the spans of a request that was answered.

        Args:
            method: of the request.
            route: path of a known route, or `/unknown`.
            code: status of the answer.
            began: end of the headers, as `time.monotonic()`.
            ended: end of the answer, likewise.
            stages: name -> beginning and end, likewise.
            traceparent: header of the request; the span becomes a child of the caller's.
            tracestate: header of the request.
            request_id: as in the logs.
            texts: texts of the request.
            tokens: their tokens.
        """
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        headers = {"traceparent": traceparent, "tracestate": tracestate}
        carrier = {name: value.decode("latin-1") for name, value in headers.items() if value is not None}
        offset_ns = time.time_ns() - time.monotonic_ns()
        span = self._tracer.start_span(
            f"{method} {route}",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=offset_ns + int(began * 1e9),
            attributes={
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": code,
                "ekiben.request_id": request_id or "",
                "ekiben.texts": texts,
                "ekiben.tokens": tokens,
            },
        )
        if span.is_recording():
            context = set_span_in_context(span)
            for name, (stage_began, stage_ended) in (stages or {}).items():
                stage = self._tracer.start_span(name, context=context, start_time=offset_ns + int(stage_began * 1e9))
                stage.end(offset_ns + int(stage_ended * 1e9))
            if code >= 500:
                span.set_attribute("error.type", str(code))
                span.set_status(StatusCode.ERROR)
        span.end(offset_ns + int(ended * 1e9))

    def close(self) -> None:
        """Send what is left, for some seconds at most; it blocks for as long."""
        sending = threading.Thread(target=self._provider.shutdown, name="ekiben-tracing", daemon=True)
        sending.start()
        sending.join(CLOSE_TIMEOUT_S)
        if sending.is_alive():
            self._exporter.shutdown()


def check_tracing(settings: ServeSettings) -> None:
    """Make sure that the settings can be met, without starting anything.

    Raises:
        SettingsError: when the exporter's package is missing.
    """
    if settings.tracing != "off":
        _import_exporter()


def open_tracing(settings: ServeSettings, version: str = "") -> Tracing | None:
    """Start to trace when the settings ask for it; None when they do not.

    Args:
        settings: of the server.
        version: of what is served, for the collector.

    Raises:
        SettingsError: when the exporter's package is missing.
    """
    if settings.tracing == "off":
        return None
    make_exporter = _import_exporter()
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider

    resource = Resource.create({"service.name": "ekiben", "service.version": version})
    provider = TracerProvider(resource=resource.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    return Tracing(provider, make_exporter())


def _import_exporter() -> Callable[[], SpanExporter]:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise SettingsError(
            f"EKIBEN_TRACING is 'otlp', but its exporter is not installed: run `pip install {PACKAGE}` where the "
            "server runs, or set EKIBEN_TRACING=off"
        ) from None
    return OTLPSpanExporter
