"""Do indexes that were built with one version still match another one? What a rollback must tell. Core layer.

It goes by what the lunchboxes say of each other's spaces; what was never compared counts as no match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bentos.errors import LunchboxError
from bentos.manifest import Manifest
from flows.core.boxes import fetch_manifest
from flows.core.history import Act, was_done
from flows.core.relations import can_be_asked, describe_mismatch
from flows.core.tracking import Tracker
from flows.errors import EkibenError, one_line


@dataclass(frozen=True)
class Match:
    """Whether vectors of one version can be used with another one."""

    version: str  # whose vectors are in the index
    space_id: str  # empty when nothing is known of it
    matches: bool  # the index can be asked as it is
    advice: str  # in one or two sentences

    def as_json(self) -> dict[str, Any]:
        """All fields, ready for `json.dumps`."""
        return dict(vars(self))


def served_since(history: Sequence[Act], target: str, champion: str) -> list[str]:
    """Versions that were champion after `target` was it for the last time, the newest first.

    Args:
        history: All acts, the oldest first.
        target: A version.
        champion: The champion. When it is `target`, by a rollback, the answer is about the time before.
    """
    done = was_done(history, champion)
    moves = [act for act in history if done.get(act.at)]
    line = [act.version for act in moves]
    if not line or line[-1] != champion:  # moved by hand
        line.append(champion)
    elif champion == target and moves[-1].kind == "rollback":  # looked at again: as it was when it was done
        line.pop()
    since: list[str] = []
    for version in reversed(line):
        if version == target:
            break
        if version not in since:
            since.append(version)
    return since


def match_indexes(tracker: Tracker, served: Manifest, left: Sequence[str]) -> list[Match]:
    """Say of each version that was left whether its indexes match the one that is served now.

    Args:
        tracker: Where the versions and their lunchboxes are.
        served: Manifest of the version that is served now.
        left: Versions whose vectors may be in indexes.
    """
    matches = []
    for version in left:
        try:
            made_with = fetch_manifest(tracker, tracker.version(version).run_id)
        except (EkibenError, LunchboxError, OSError) as error:
            unknown = f"It is unknown whether vectors made by version {version} match: {one_line(error)}"
            matches.append(Match(version, "", False, unknown))
            continue
        matches.append(match_index(made_with, served))
    return matches


def match_index(made_with: Manifest, served: Manifest) -> Match:
    """Say whether an index of the vectors of `made_with` can be asked with `served`."""
    usable = can_be_asked(made_with, served)
    return Match(made_with.version, made_with.space_id, usable, describe_mismatch(made_with, served))
