"""The way back from a version to its run, data and code, read from the registry. Core layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from flows.core.history import Act, find_left, find_promotion, read_history
from flows.core.registry import CHAMPION, Release
from flows.core.tracking import Tracker


@dataclass(frozen=True)
class Lineage:
    """One registered version and everything that leads back to its origin; empty text where nothing is known."""

    version: str
    aliases: tuple[str, ...]
    created_at: str  # ISO 8601, UTC
    run_id: str
    run_name: str
    base_model: str
    data_path: str
    data_md5: str
    data_rev: str
    git_commit: str
    lock_sha256: str
    primary_metric: str
    metrics: dict[str, float]
    bento_tag: str = ""  # empty until it was released
    space_id: str = ""
    compat: str = ""  # class of its space against `compat_space_id`: identical, compatible, adapter, breaking
    compat_space_id: str = ""  # of the champion at its release
    replaces: str = ""  # version that was champion before it: where a rollback leads
    promoted_at: str = ""  # ISO 8601, UTC: when it was released as the champion; empty until then
    champion_since: str = ""  # ISO 8601, UTC; empty when it is not the champion, or was made it by hand
    champion_by: Literal["", "release", "rollback", "hand"] = ""  # how it became the champion; empty: it is not
    left_at: str = ""  # ISO 8601, UTC: the rollback that left it, when it was not champion since
    verdict: str = ""  # of the gates: passed, refused; empty until they were asked

    @property
    def base_score(self) -> float | None:
        """The base model's primary metric on test."""
        return self.metrics.get(f"base/{self.primary_metric}")

    @property
    def score(self) -> float | None:
        """The tuned model's primary metric on test."""
        return self.metrics.get(f"eval/{self.primary_metric}")

    @property
    def is_champion(self) -> bool:
        """Whether it is the version that is served by default."""
        return CHAMPION in self.aliases

    def as_json(self) -> dict[str, Any]:
        """All fields, ready for `json.dumps`."""
        return asdict(self) | {"base_score": self.base_score, "score": self.score}


def trace_version(tracker: Tracker, reference: str) -> Lineage:
    """Resolve a version, alias, Bento tag, header value or run, and gather where it comes from.

    Raises:
        NothingReleasedError: when there is no such version.
    """
    return _trace(tracker, tracker.version(reference), *_read_past(tracker))


def trace_all(tracker: Tracker) -> list[Lineage]:
    """Every registered version, newest first."""
    past = _read_past(tracker)
    return [_trace(tracker, release, *past) for release in tracker.versions()]


def trace_champion(tracker: Tracker) -> Lineage | None:
    """The champion, or None before the first release."""
    champion = tracker.champion()
    return None if champion is None else _trace(tracker, champion, *_read_past(tracker))


def _read_past(tracker: Tracker) -> tuple[list[Act], str]:
    """The history, and the champion's version, empty when there is none."""
    champion = tracker.champion()
    return read_history(tracker), "" if champion is None else champion.version


def _trace(tracker: Tracker, release: Release, history: Sequence[Act], champion: str) -> Lineage:
    run = tracker.find_run(release.run_id)
    tags = run.tags | release.tags
    is_champion = release.version == champion
    promotion = find_promotion(history, champion) if is_champion else None
    left = find_left(history, release.version, champion)
    how: Literal["release", "rollback"] = "rollback" if promotion and promotion.kind == "rollback" else "release"
    return Lineage(
        version=release.version,
        aliases=release.aliases,
        created_at=release.created_at,
        run_id=release.run_id,
        run_name=run.name,
        base_model=run.params.get("train.base_model", ""),
        data_path=tags.get("data_path", ""),
        data_md5=tags.get("data_md5", ""),
        data_rev=tags.get("data_rev", ""),
        git_commit=tags.get("git_commit", ""),
        lock_sha256=tags.get("lock_sha256", ""),
        primary_metric=tags.get("primary_metric", ""),
        metrics=run.metrics,
        bento_tag=tags.get("bento_tag", ""),
        space_id=tags.get("space_id", ""),
        compat=release.tags.get("compat", ""),
        compat_space_id=release.tags.get("compat_space_id", ""),
        replaces=release.tags.get("replaces", ""),
        promoted_at=release.tags.get("promoted_at", ""),
        verdict=release.tags.get("verdict", ""),
        champion_since="" if promotion is None else promotion.time,
        champion_by=("hand" if promotion is None else how) if is_champion else "",
        left_at="" if left is None else left.time,
    )
