"""One request as the server tells of it: in the metrics, in the access log, as spans."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from starlette.types import Scope

from bentos.adapter import Adapter
from bentos.doors import DOORS_BY_PATH, Door
from bentos.encoder import Encoder
from bentos.logs import choose_request_id, log_request
from bentos.metrics import ServeMetrics
from bentos.receiving import Headers
from bentos.schemas import DoorRequest
from bentos.tracing import Tracing

UNAVAILABLE = "unavailable"  # in the place of model and space while no version is live


class Call:
    """What is asked, by whom, and what becomes of it. Times are those of `time.monotonic()`."""

    __slots__ = (
        "adapter",
        "answered",
        "client",
        "computed",
        "door",
        "encoder",
        "headers",
        "key",
        "method",
        "parsed",
        "path",
        "request_id",
        "route",
        "started",
        "status",
        "texts",
        "tokens",
    )

    def __init__(self, scope: Scope, route: str) -> None:
        self.started = time.monotonic()
        self.parsed = self.computed = self.answered = 0.0
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.route = route
        self.door: Door | None = DOORS_BY_PATH.get(self.path) if self.method == "POST" else None
        self.headers: Headers = dict(scope["headers"])
        self.client: str | None = scope["client"][0] if scope.get("client") else None
        self.request_id = choose_request_id(self.headers.get(b"x-request-id"))
        self.status = 500
        self.encoder: Encoder | None = None  # the version that answers, once it is chosen
        self.adapter: Adapter | None = None  # that its vectors go through
        self.key: str | None = None  # its fingerprint
        self.texts = self.tokens = 0

    def names(self, live: Encoder | None = None) -> tuple[str, str, str | None]:
        """Tag of the version, space of the vectors, and the space that they were mapped from, of this answer.

        Args:
            live: stands in while no version is chosen.
        """
        encoder = self.encoder or live
        if encoder is None:
            return UNAVAILABLE, UNAVAILABLE, None
        tag, own = encoder.tag, encoder.manifest.space_id
        return (tag, own, None) if self.adapter is None else (tag, self.adapter.space_id, own)

    def count(self, request: DoorRequest, content: Mapping[str, Any]) -> None:
        """Take note of how much was asked and answered."""
        self.texts = sum(len(field.texts) for field in request.text_fields())
        self.tokens = _count_tokens(content["usage"])

    def tell(self, metrics: ServeMetrics, *, log: bool, tracing: Tracing | None) -> None:
        """Once it is over, say how it went."""
        ended = time.monotonic()
        metrics.record_request(self.route, self.status, ended - self.started)
        if self.computed and self.answered:
            metrics.record_stage("respond", self.answered - self.computed)
        if log:
            log_request(
                method=self.method,
                route=self.route,
                code=self.status,
                seconds=ended - self.started,
                texts=self.texts,
                tokens=self.tokens,
                key=self.key,
                client=self.client,
            )
        if tracing is not None:
            tracing.record_request(
                method=self.method,
                route=self.route,
                code=self.status,
                began=self.started,
                ended=ended,
                stages=self._stages(ended),
                traceparent=self.headers.get(b"traceparent"),
                tracestate=self.headers.get(b"tracestate"),
                request_id=self.request_id,
                texts=self.texts,
                tokens=self.tokens,
            )

    def _stages(self, ended: float) -> dict[str, tuple[float, float]]:
        """How long it took to read, to embed (tokenizing, queue and inference) and to respond."""
        if not self.parsed:
            return {}
        embedded = self.computed or ended
        stages = {"read": (self.started, self.parsed), "embed": (self.parsed, embedded)}
        return stages | ({"respond": (embedded, ended)} if self.computed else {})


def _count_tokens(usage: Mapping[str, Any]) -> int:
    """All tokens of an answer, whichever door gave it."""
    total: int | None = usage.get("total_tokens")
    return sum(_count_tokens(part) for part in usage.values()) if total is None else total
