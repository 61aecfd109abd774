"""Following an alias: when it comes to name another version, that version is fetched, brought to all workers, served.

One worker follows for all. A version that was loaded by hand stays until the alias moves; one that was refused is tried
again when its files change, and else more and more seldom. Whatever goes wrong, what is served goes on. The version to
be shadowed is followed in the same way, and stands beside the live one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from datetime import UTC, datetime
from typing import IO, Any

from pydantic import BaseModel, Field

from bentos.aliases import Pointer
from bentos.crew import STATE, Crew, Item, Plan
from bentos.errors import BusyError, LunchboxError, NoRoomError, RefusedVersionError, RegistryError, ServeError
from bentos.observer import Observer
from bentos.refusals import Refusals
from bentos.settings import ServeSettings
from bentos.sources import Source, UnknownVersionError
from bentos.swaps import Swaps

BRING_TIMEOUT_S = 300.0  # for all workers to load a version, on a busy machine
LONGEST_WAIT_S = 60.0  # between two attempts to reach a registry that does not answer
ALIASES_EVERY_S = 60.0  # the other aliases, which requests may name
logger = logging.getLogger("bentos")


class FollowState(BaseModel):
    """What the worker that follows has seen, for all others and for the next one."""

    model_config = STATE

    points_to: str | None = Field(None, description="Tag of the version that the alias names.")
    followed: Pointer | None = Field(None, description="The version that was last served because the alias named it.")
    looked_at: str | None = Field(None, description="When the alias was last looked at, ISO 8601, UTC.")
    seen_at: float | None = Field(None, description="When it was last read, in seconds since 1970.")
    failures: int = Field(0, description="How often in a row something failed since.")
    error: str | None = None
    doing: str | None = Field(None, description="What it is at now.")


class Follower:
    """Follows one alias. Every worker runs one; one of them at a time looks."""

    def __init__(
        self,
        alias: str,
        source: Source,
        crew: Crew,
        swaps: Swaps,
        refusals: Refusals,
        settings: ServeSettings,
        observer: Observer,
        *,
        live: bool = True,
    ) -> None:
        """Prepare to follow.

        Args:
            alias: to follow; when not `live`, it may also be a version.
            source: asked for it.
            crew: of all workers.
            swaps: bring a version to them.
            refusals: of versions that failed their checks.
            settings: how often to look.
            observer: told of what was refused, and how the following goes.
            live: whether the version becomes the live one; else it stands beside.
        """
        self._alias = alias
        self._live = live
        self.name = "follow" if live else "shadow"
        self._source = source
        self._crew = crew
        self._swaps = swaps
        self._refusals = refusals
        self._settings = settings
        self._observer = observer
        self._office: IO[bytes] | None = None  # held while this worker is the one that looks
        self._aliases_at = float("-inf")
        self._state = FollowState()

    async def run(self) -> None:
        """Follow until cancelled."""
        try:
            while True:
                wait_s = self._settings.follow_every_s
                try:
                    if self._has_office():
                        await self.look()
                except Exception as error:  # whatever it is, the next look may find it gone
                    logger.exception("the alias %s could not be followed", self._alias)
                    if self._office is not None:
                        self._note(error=repr(error), failures=self._state.failures + 1, doing=None)
                if self._office is not None and self._state.failures:
                    wait_s = min(wait_s * 2 ** min(self._state.failures, 10), max(LONGEST_WAIT_S, wait_s))
                await asyncio.sleep(wait_s)
        finally:
            if self._office is not None:
                self._office.close()

    def _has_office(self) -> bool:
        """Whether this worker is the one that looks; it becomes so when nobody else is."""
        if self._office is None and (office := self._crew.take(self.name)) is not None:
            self._office = office
            self._state = self._crew.recall(self.name, FollowState) or FollowState()
        return self._office is not None

    async def look(self) -> None:
        """See what the alias names, and serve it when that is new."""
        alias = self._alias
        self._note(looked_at=_now())
        try:
            pointer = await asyncio.to_thread(self._find)
            if not self._live and self._state.followed not in (None, pointer):
                self._let_go()
            if pointer is None:
                error = f"{self._source.name} has no alias {alias!r} yet"
                self._note(points_to=None, error=error, seen_at=time.time(), failures=0)
                return
            tag = self._tag(pointer)
            if tag != self._state.points_to:
                self._aliases_at = float("-inf")
                if self._state.points_to is not None:
                    self._refusals.forgive(self._state.points_to)  # nobody asks for it any more
            self._note(points_to=tag, seen_at=time.time())
            await self._spread_aliases()
            await self._serve(pointer)
            self._note(failures=0)
        except (RegistryError, LunchboxError, ServeError, OSError) as error:
            if str(error) != self._state.error:
                logger.warning("the alias %s cannot be followed: %s", alias, error)
            self._note(error=str(error), failures=self._state.failures + 1, doing=None)

    def _find(self) -> Pointer | None:
        pointer = self._source.look(self._alias)
        if pointer is not None or self._live:
            return pointer
        try:
            return self._source.find(self._alias)
        except UnknownVersionError:
            return None

    async def _serve(self, pointer: Pointer) -> None:
        """Bring the version to all workers, unless it is served, or must wait.

        Raises:
            RegistryError: when it cannot be fetched.
            ServeError: when the workers could not take it now, for a reason that is not its own.
            OSError: when the folder of the workers cannot be written to.
        """
        tag, plan = self._tag(pointer), self._crew.read_plan() or Plan()
        there = plan.items() if not self._live else [plan.live] if plan.live else []
        if any(item.tag == tag for item in there):
            self._refusals.forgive(tag)
            await self._note_followed(pointer)
            return
        replaced_by_hand = pointer == self._state.followed and plan.instead_of != tag
        if self._live and replaced_by_hand:  # it was served, and another was asked for since
            self._note(error=None)
            return
        fingerprint = await asyncio.to_thread(self._source.fingerprint, pointer)
        if (refusal := self._refusals.must_wait(tag, fingerprint, live=self._live)) is not None:
            self._note(error=f"{tag} is refused: {refusal.reason}")
            return
        logger.info("%s names %s: it is fetched and checked", self._alias, tag)
        before = self._refusals.begin(tag, fingerprint)
        try:
            self._note(doing=f"fetching {tag}")
            path = await asyncio.to_thread(self._source.fetch, pointer)
            fingerprint = await asyncio.to_thread(self._source.fingerprint, pointer)
            self._note(doing=f"loading {tag}")
            until = time.monotonic() + BRING_TIMEOUT_S
            await self._swaps.bring(Item(tag=tag, path=path), live=self._live, until=until)
        except BusyError:
            self._refusals.restore(tag, before)  # another is being loaded by hand: the next look will see
            self._note(doing=None)
        except (LunchboxError, RefusedVersionError) as error:
            reason = error.reason if isinstance(error, RefusedVersionError) else str(error)
            if isinstance(error, LunchboxError):
                logger.error("%s is refused: %s", tag, error)
                self._observer.record_swap("refused")
            no_room = isinstance(error, NoRoomError)
            refusal = self._refusals.refuse(tag, reason, fingerprint, beside_only=no_room)
            wait_s = refusal.next_try - time.monotonic()
            logger.info("%s is tried again in %.0f s, or when it changes", tag, wait_s)
            self._note(error=f"{tag} is refused: {reason}", doing=None)
        except (RegistryError, ServeError, OSError):
            self._refusals.restore(tag, before)  # nothing new is known against it
            raise
        else:
            self._refusals.forgive(tag)
            await self._note_followed(pointer)

    async def _note_followed(self, pointer: Pointer) -> None:
        """The version is served because the alias names it: noted for the workers, and once for the next start."""
        if self._live and pointer != self._state.followed:
            try:
                await asyncio.to_thread(self._source.remember, self._alias, pointer)
            except OSError as error:
                logger.warning("a start without the registry will not know of %s: %s", self._tag(pointer), error)
        self._note(followed=pointer, error=None, doing=None)

    def _let_go(self) -> None:
        """Let the version leave that stood beside because the alias named it."""
        if self._state.followed is not None:
            self._swaps.drop(self._tag(self._state.followed))
            self._note(followed=None)

    async def _spread_aliases(self) -> None:
        """Let all workers know the other aliases, which requests may name."""
        now = time.monotonic()
        if now < self._aliases_at + ALIASES_EVERY_S:
            return
        found = await asyncio.to_thread(self._source.list_aliases)
        self._aliases_at = now
        tags = {alias: self._tag(pointer) for alias, pointer in found.items()}
        self._crew.change_plan(lambda plan: plan.model_copy(update={"aliases": tags}))

    def _tag(self, pointer: Pointer) -> str:
        return f"{self._settings.model_name}:{pointer.bento_version}"

    def _note(self, **changes: Any) -> None:
        self._state = self._state.model_copy(update=changes)
        with contextlib.suppress(OSError):  # a full disk must not end the following
            self._crew.keep(self.name, self._state)

    def describe(self) -> dict[str, Any]:
        """What GET /models/info says, in whichever worker it is asked."""
        state = self._crew.recall(self.name, FollowState) or FollowState()
        return {
            "alias": self._alias,
            "source": self._source.name,
            "every_s": self._settings.follow_every_s,
            **state.model_dump(include={"points_to", "looked_at", "failures", "error", "doing"}),
            "seen_s_ago": None if state.seen_at is None else round(max(time.time() - state.seen_at, 0.0), 1),
        }

    def observe(self) -> None:
        """Tell the metrics how the live version is followed; every worker does, so that none keeps an old figure."""
        if not self._live:
            return
        state = self._crew.recall(self.name, FollowState) or FollowState()
        self._observer.set_followed(state.seen_at, state.failures)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
