"""What the batcher tells about its work; here to nobody. `metrics.ServeMetrics` passes it on to Prometheus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bentos.manifest import Manifest


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """One batch that was computed."""

    lane: str  # `interactive` or `bulk`
    texts: int
    tokens: int  # without padding
    padded_tokens: int  # texts x the longest of them
    queue_s: Sequence[float]  # how long each text had waited since its request came
    infer_s: float


class Observer:
    """Hears of the work and does nothing with it. Methods are called from any thread, and must be quick."""

    def record_batch(self, record: BatchRecord) -> None:
        """Take note of a batch."""

    def record_stage(self, stage: str, seconds: float) -> None:
        """Take note of time spent: `tokenize` or `respond`; `queue` and `infer` come with the batches."""

    def record_shed(self, reason: str) -> None:
        """Take note of a request that found no room or no time: `requests`, `queue`, `wait` or `deadline`."""

    def record_cache(self, hits: int, misses: int) -> None:
        """Take note of texts looked up in the cache."""

    def record_duplicates(self, texts: int) -> None:
        """Take note of texts that were being computed already."""

    def record_lane_restart(self, lane: str) -> None:
        """Take note of a lane's thread that died or hung, and was replaced."""

    def set_queue(self, lane: str, texts: int, tokens: int, oldest_s: float) -> None:
        """Take note of what waits now."""

    def record_texts(self, texts: int, tokens: int, truncated: int) -> None:
        """Take note of what a request that was answered held."""

    def set_model(self, manifest: Manifest, precision: str) -> None:
        """Take note of the model that is served."""

    def set_ready(self, ready: bool) -> None:
        """Take note of what the readiness check found."""
