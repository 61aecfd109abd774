"""What was released, refused and rolled back, when, by whom and why. Core layer.

Each act is one tag of the registered model, `history.<time>.<kind>`, with the act as JSON. Acts are only ever added,
so that writers cannot lose each other's, and an act is written *before* it is done: whatever kills the process, the
history knows what was under way. Whether an act was done follows from what came after it, see `was_done`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from flows.core.registry import Registry
from flows.core.release_lock import whoami

PREFIX = "history."
TAG_NAME = re.compile(r"history\.(\d{8}T\d{12}Z)\.([a-z]+)")
STAMP = "%Y%m%dT%H%M%S%fZ"
MAX_REASON_CHARS = 2000  # a tag holds 5000 characters
Kind = Literal["release", "challenger", "rollback", "refusal"]
MOVES: tuple[Kind, ...] = ("release", "rollback")  # they change the champion


class Act(BaseModel):
    """One entry of the history."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    at: str  # 20261123T101112345678Z: UTC, with microseconds
    kind: Kind
    version: str  # that it is about
    replaces: str = ""  # version that was champion before; empty: none
    reason: str = ""
    by: str = ""  # user@host, process
    tag: str = ""  # ekiben:3-1f2e3d4c; empty when no Bento was made
    space_id: str = ""
    compat: str = ""  # class of its space against that of `replaces`
    gates: list[str] = []  # that refused

    @field_validator("at")
    @classmethod
    def _check_time(cls, at: str) -> str:
        if at:  # an act that has not begun has none
            datetime.strptime(at, STAMP)
        return at

    @property
    def time(self) -> str:
        """When, in ISO 8601, UTC."""
        return datetime.strptime(self.at, STAMP).replace(tzinfo=UTC).isoformat(timespec="seconds")

    @property
    def moves_champion(self) -> bool:
        """Whether it is about who the champion is."""
        return self.kind in MOVES


def read_history(registry: Registry) -> list[Act]:
    """All acts, the oldest first."""
    return read_acts(registry.model_tags())


def read_acts(tags: Mapping[str, str]) -> list[Act]:
    """The acts among the tags of the registered model, the oldest first; what is none under such a name is left out."""
    acts = []
    for name, value in tags.items():
        if TAG_NAME.fullmatch(name) is None:
            continue
        try:
            acts.append(Act.model_validate_json(value))
        except ValidationError:
            continue
    return sorted((act for act in acts if act.at), key=lambda act: act.at)


def begin_act(registry: Registry, act: Act) -> Act:
    """Write an act that is about to be done, and return it with its time; a repeated one keeps its first time.

    An act is repeated when the newest one of its sort says the same: its process was killed before the end, or the
    same candidate is refused again for the same reason. A rollback for another reason is another act.

    Args:
        registry: Where the history is kept.
        act: What is about to be done; `at` and `by` may be empty.
    """
    begun = find_begun(read_history(registry), act)
    if begun is not None:
        return begun
    act = act.model_copy(update={"at": act.at or now(), "by": act.by or whoami(), "reason": shorten_reason(act.reason)})
    registry.set_model_tag(f"{PREFIX}{act.at}.{act.kind}", act.model_dump_json(exclude_defaults=True))
    return act


def find_begun(history: Sequence[Act], act: Act) -> Act | None:
    """The newest act that concerns the same thing, when it is the same act; else None.

    What concerns the champion is compared with the newest move of the champion, a challenger with the newest
    challenger, a refusal with whatever was last.
    """
    same_sort = [
        item
        for item in history
        if act.kind == "refusal" or item.kind == act.kind or (item.moves_champion and act.moves_champion)
    ]
    newest = same_sort[-1] if same_sort else None
    return newest if newest is not None and _identity(newest) == _identity(act) else None


def was_done(history: Sequence[Act], champion: str) -> dict[str, bool]:
    """Whether each move of the champion was carried through: time of the act -> yes or no.

    The champion after a move is the one that the next move replaces, and after the last move the one that there is.

    Args:
        history: All acts, the oldest first.
        champion: Version that is the champion; empty when there is none.
    """
    moves = [act for act in history if act.moves_champion]
    after = [act.replaces for act in moves[1:]] + [champion] * bool(moves)
    return {act.at: version == act.version for act, version in zip(moves, after, strict=True)}


def find_promotion(history: Sequence[Act], champion: str) -> Act | None:
    """The act by which the champion came, the newest one; None when its alias was moved by hand.

    Args:
        history: All acts, the oldest first.
        champion: Version that is the champion.
    """
    done = was_done(history, champion)
    newest = next((act for act in reversed(history) if done.get(act.at)), None)
    return newest if newest is not None and newest.version == champion else None


def find_left(history: Sequence[Act], version: str, champion: str) -> Act | None:
    """The rollback by which a version was left for another one, when it was not champion since; else None.

    Args:
        history: All acts, the oldest first.
        version: That may have been left.
        champion: Version that is the champion; empty when there is none.
    """
    done = was_done(history, champion)
    moves = [act for act in history if done.get(act.at) and version in (act.version, act.replaces)]
    newest = moves[-1] if moves and version != champion else None
    return newest if newest is not None and newest.kind == "rollback" and newest.replaces == version else None


def now() -> str:
    """The time as it stands in the names of the tags."""
    return datetime.now(UTC).strftime(STAMP)


def _identity(act: Act) -> tuple[object, ...]:
    about = act.gates if act.kind == "refusal" else shorten_reason(act.reason) if act.kind == "rollback" else None
    return act.kind, act.version, act.replaces, act.compat, about


def shorten_reason(reason: str) -> str:
    """A reason as the history keeps it: on one line, of limited length."""
    text = " ".join(reason.split())
    return text if len(text) <= MAX_REASON_CHARS else f"{text[: MAX_REASON_CHARS - 3]}..."
