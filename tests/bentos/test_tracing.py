"""Traces as a collector gets them: a real exporter, and an OTLP/HTTP receiver that decodes what comes."""

from __future__ import annotations

import asyncio
import gzip
import logging
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from starlette.responses import PlainTextResponse

from bentos import tracing
from bentos.access import ApiKeys
from bentos.encoder import Encoder
from bentos.errors import SettingsError
from bentos.http import Frontend
from bentos.lunchbox import open_lunchbox
from bentos.metrics import ServeMetrics
from bentos.settings import ServeSettings
from bentos.tracing import Tracing, check_tracing, open_tracing
from tests.bentos.shelves import make_shelf

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ON = ServeSettings(tracing="otlp")


class Collector:
    """Takes spans at http://127.0.0.1:PORT/v1/traces."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def spans(self) -> list[Any]:
        return [s for r in self.requests for rs in r.resource_spans for ss in rs.scope_spans for s in ss.spans]

    @property
    def resource(self) -> dict[str, str]:
        (resource,) = {rs.resource.SerializeToString() for r in self.requests for rs in r.resource_spans}
        parsed = type(self.requests[0].resource_spans[0].resource).FromString(resource)
        return {a.key: a.value.string_value for a in parsed.attributes}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    collector = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


def opened(version: str = "ekiben:3-0123abcd") -> Tracing:
    found = open_tracing(ON, version)
    assert found is not None
    return found


def record(tracing: Tracing, **changes: Any) -> float:
    """Record a request of 0.3 s that ends now; return when it began, in seconds since 1970."""
    ended = time.monotonic()
    request: dict[str, Any] = {
        "method": "POST",
        "route": "/encode",
        "code": 200,
        "began": ended - 0.3,
        "ended": ended,
        "stages": {"tokenize": (ended - 0.3, ended - 0.2), "infer": (ended - 0.2, ended)},
        "request_id": "id-7",
        "texts": 2,
        "tokens": 9,
    }
    tracing.record_request(**request | changes)
    return time.time() - 0.3


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: a.value.string_value or a.value.int_value for a in span.attributes}


def test_it_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    assert open_tracing(ServeSettings()) is None


def test_a_request_is_a_span_with_its_stages_below(collector: Collector) -> None:
    tracing = opened()
    began = record(tracing)
    tracing.close()
    (request,) = [span for span in collector.spans if span.name == "POST /encode"]
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/encode",
        "http.response.status_code": 200,
        "ekiben.request_id": "id-7",
        "ekiben.texts": 2,
        "ekiben.tokens": 9,
    }
    assert request.kind == 2  # server
    assert not request.parent_span_id
    assert request.status.code == 0
    assert abs(request.start_time_unix_nano / 1e9 - began) < 1
    assert (request.end_time_unix_nano - request.start_time_unix_nano) / 1e9 == pytest.approx(0.3)
    stages = {span.name: span for span in collector.spans if span is not request and span.parent_span_id}
    assert set(stages) == {"tokenize", "infer"}
    for stage in stages.values():
        assert (stage.trace_id, stage.parent_span_id) == (request.trace_id, request.span_id)
    tokenize = stages["tokenize"]
    assert (tokenize.end_time_unix_nano - tokenize.start_time_unix_nano) / 1e9 == pytest.approx(0.1)
    assert {"service.name": "ekiben", "service.version": "ekiben:3-0123abcd"}.items() <= collector.resource.items()


def test_a_request_through_the_server_is_read_embedded_and_responded(
    collector: Collector, tiny_lunchbox_path: Path
) -> None:
    tracing, metrics = opened(), ServeMetrics({"/encode"})

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("")(scope, receive, send)

    async def main() -> None:
        encoder = Encoder(open_lunchbox(tiny_lunchbox_path), ON, metrics)
        await encoder.start()
        shelf = make_shelf(encoder)
        app = Frontend(
            inner,
            known_paths={"/encode", "/livez"},
            get_shelf=lambda: shelf,
            settings=ON,
            keys=ApiKeys(ON),
            metrics=metrics,
            tracing=tracing,
        )
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            for texts in (["bread", "milk"], [""]):
                await client.post("/encode", json={"texts": texts})
            await client.get("/livez")
        await encoder.stop()

    asyncio.run(main())
    tracing.close()
    requests = {
        (s.name, attributes(s)["http.response.status_code"]): s for s in collector.spans if not s.parent_span_id
    }
    assert set(requests) == {("POST /encode", 200), ("POST /encode", 422), ("GET /livez", 200)}
    answered = requests["POST /encode", 200]
    assert (attributes(answered)["ekiben.texts"], attributes(answered)["ekiben.tokens"]) == (2, 6)
    stages = [span for span in collector.spans if span.parent_span_id]
    assert [span.name for span in stages] == ["read", "embed", "respond"]
    assert {span.parent_span_id for span in stages} == {answered.span_id}, "what was refused has none"
    times = [moment for span in stages for moment in (span.start_time_unix_nano, span.end_time_unix_nano)]
    assert times == sorted(times)


def test_it_goes_on_where_the_caller_left_off(collector: Collector) -> None:
    tracing = opened()
    record(tracing, traceparent=f"00-{TRACE_ID}-{PARENT_ID}-01".encode(), tracestate=b"shop=1", stages=None)
    tracing.close()
    (span,) = collector.spans
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
    assert span.trace_state == "shop=1"


def test_a_caller_that_is_not_sampled_is_not_sent(collector: Collector) -> None:
    tracing = opened()
    record(tracing, traceparent=f"00-{TRACE_ID}-{PARENT_ID}-00".encode())
    record(tracing, route="/rank")
    tracing.close()
    assert {span.name for span in collector.spans} == {"POST /rank", "tokenize", "infer"}


@pytest.mark.parametrize(
    "traceparent", [b"", b"junk", b"\xff\xfe", b"00-0-0-01", b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01"]
)
def test_a_malformed_traceparent_begins_a_new_trace(collector: Collector, traceparent: bytes) -> None:
    tracing = opened()
    record(tracing, traceparent=traceparent, stages=None)
    tracing.close()
    (span,) = collector.spans
    assert not span.parent_span_id


def test_an_error_of_the_server_is_one_in_the_trace(collector: Collector) -> None:
    tracing = opened()
    for code in (404, 503):
        record(tracing, code=code, stages=None)
    tracing.close()
    found = {attributes(span)["http.response.status_code"]: span for span in collector.spans}
    assert (found[404].status.code, found[503].status.code) == (0, 2)
    assert attributes(found[503])["error.type"] == "503"


def test_opentelemetrys_own_variables_are_followed(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "embeddings-eu")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    tracing = opened()
    record(tracing)
    record(tracing, traceparent=f"00-{TRACE_ID}-{PARENT_ID}-01".encode(), stages=None)
    tracing.close()
    (span,) = collector.spans
    assert span.trace_id.hex() == TRACE_ID
    assert collector.resource["service.name"] == "embeddings-eu"


def test_a_collector_that_is_away_stops_neither_requests_nor_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "opentelemetry")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(tracing, "CLOSE_TIMEOUT_S", 0.5)
    away = opened()
    for _ in range(100):
        record(away)
    closing = threading.Thread(target=away.close)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()


def test_a_missing_exporter_is_refused_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    for work in (open_tracing, check_tracing):
        with pytest.raises(SettingsError, match="pip install opentelemetry-exporter-otlp-proto-http"):
            work(ON)
        work(ServeSettings())
