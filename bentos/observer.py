"""What the batcher tells about its work; here to nobody. `metrics.ServeMetrics` passes it on to Prometheus."""

from __future__ import annotations

from collections.abc import Collection, Sequence
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


@dataclass(frozen=True, slots=True)
class Version:
    """One version that is loaded."""

    manifest: Manifest
    precision: str
    live: bool


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

    def set_queue(self, lane: str, texts: int, tokens: int, oldest_s: float, owner: int = 0) -> None:
        """Take note of what waits now in the lane of one version; `owner` tells the versions apart."""

    def record_texts(self, texts: int, tokens: int, truncated: int) -> None:
        """Take note of what a request that was answered held."""

    def record_answer(self, model: str, space: str) -> None:
        """Take note of an answer: the tag of the version that gave it, and the space of its vectors."""

    def record_shadow(self, outcome: str) -> None:
        """Take note of a request that was shown to the shadow: `compared`, `dropped` or `failed`."""

    def record_shadow_texts(self, model: str, cosines: Sequence[float], overlaps: Sequence[float]) -> None:
        """Take note of how far a shadow's vectors are from the live version's; `model` is the shadow's tag."""

    def set_versions(self, versions: Sequence[Version]) -> None:
        """Take note of all versions that are loaded; those of the last call that are missing have left."""

    def record_swap(self, result: str) -> None:
        """Take note of a version that was brought to all workers (`done`), or not: `refused`, `incomplete`, `busy`."""

    def set_refused(self, tags: Collection[str]) -> None:
        """Take note of the versions that failed their checks and are not served for that."""

    def set_followed(self, seen_at: float | None, failures: int) -> None:
        """Take note of when the alias was last read, in seconds since 1970, and how often in a row it was not since."""

    def set_ready(self, ready: bool) -> None:
        """Take note of what the readiness check found."""
