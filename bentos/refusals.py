"""Which versions were refused, why, and when they may be tried again: known to all workers of the server."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, Field

from bentos.aliases import locked
from bentos.crew import STATE, Crew

FILE = "refusals"
FIRST_WAIT_S = 30.0
LONGEST_WAIT_S = 1800.0
DIED = "a worker died, or was ended, while it was being loaded"


class Refusal(BaseModel):
    """Why a version is not served."""

    model_config = STATE

    reason: str
    refused_at: str = Field(description="ISO 8601, UTC.")
    fingerprint: str = Field(description="Of its files; when it changes, the version may be tried at once.")
    attempts: int = 1
    beside_only: bool = Field(False, description="Whether it is only too large to stand beside the live version.")
    under_way: str | None = Field(None, description="Process that is trying it: until that dies it is not refused.")
    next_try: float = Field(description="Not before this, by `time.monotonic()`, unless the files change.")


class _Refusals(BaseModel):
    model_config = STATE

    by_tag: dict[str, Refusal] = Field(default_factory=dict)


class Refusals:
    """The versions that were refused, in a file of the crew's folder."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew

    def read(self) -> dict[str, Refusal]:
        """Every refused version by its tag; not those that are being tried, nor those that nobody tries any more."""
        now = time.monotonic()
        return {
            tag: refusal
            for tag, refusal in self._recall().items()
            if (refusal.under_way is None or not self._crew.is_alive(refusal.under_way))
            and now < refusal.next_try + LONGEST_WAIT_S
        }

    def _recall(self) -> dict[str, Refusal]:
        return (self._crew.recall(FILE, _Refusals) or _Refusals()).by_tag

    def begin(self, tag: str, fingerprint: str) -> Refusal | None:
        """Before a version is tried: should that kill the process, the next one must not try it again at once.

        Returns:
            What was known against it before, for `restore`.
        """
        with self._locked():
            known = self._recall()
            self._note(known, tag, DIED, fingerprint, under_way=self._crew.me)
        return known.get(tag)

    def refuse(self, tag: str, reason: str, fingerprint: str, *, beside_only: bool = False) -> Refusal:
        """Take note of a version that is not served; each time in a row it has to wait twice as long as before.

        An empty fingerprint says that it is not known: the one that was noted before holds.
        """
        with self._locked():
            known = self._recall()
            if not fingerprint and tag in known:
                fingerprint = known[tag].fingerprint
            return self._note(known, tag, reason, fingerprint, beside_only=beside_only)

    def restore(self, tag: str, before: Refusal | None) -> None:
        """After a try that has shown nothing about the version: what was known before holds again."""
        with self._locked():
            known = self._recall()
            known.pop(tag, None)
            self._write(known if before is None else {**known, tag: before})

    def _note(
        self,
        known: dict[str, Refusal],
        tag: str,
        reason: str,
        fingerprint: str,
        *,
        under_way: str | None = None,
        beside_only: bool = False,
    ) -> Refusal:
        attempts, before = 1, known.get(tag)
        if before is not None and before.fingerprint == fingerprint:
            counted = under_way is None and before.under_way == self._crew.me  # by `begin`
            attempts = before.attempts + (not counted)
        wait_s = min(FIRST_WAIT_S * 2 ** (attempts - 1), LONGEST_WAIT_S)
        refusal = Refusal(
            reason=reason,
            refused_at=datetime.now(UTC).isoformat(timespec="seconds"),
            fingerprint=fingerprint,
            attempts=attempts,
            beside_only=beside_only,
            under_way=under_way,
            next_try=time.monotonic() + wait_s,
        )
        self._write({**known, tag: refusal})
        return refusal

    def forgive(self, tag: str) -> None:
        """Take note of a version that is served now, or that nobody asks for any more."""
        if tag not in self._recall():
            return
        with self._locked():
            refused = self._recall()
            if refused.pop(tag, None) is not None:
                self._write(refused)

    def must_wait(self, tag: str, fingerprint: str, *, live: bool) -> Refusal | None:
        """The refusal of a version that has not changed since, and was tried not long ago; else None."""
        refusal = self.read().get(tag)
        if refusal is None or refusal.fingerprint != fingerprint or time.monotonic() >= refusal.next_try:
            return None
        return None if live and refusal.beside_only else refusal

    def describe(self) -> list[dict[str, Any]]:
        """What GET /models/info says of them."""
        now = time.monotonic()
        return [
            {
                "model": tag,
                "reason": refusal.reason,
                "refused_at": refusal.refused_at,
                "attempts": refusal.attempts,
                "next_try_s": round(max(refusal.next_try - now, 0.0)),
            }
            for tag, refusal in self.read().items()
        ]

    def _locked(self) -> AbstractContextManager[None]:
        return locked(self._crew.folder / f"{FILE}.lock")

    def _write(self, by_tag: dict[str, Refusal]) -> None:
        self._crew.keep(FILE, _Refusals(by_tag=by_tag))
