"""How a version comes to all workers, or to none: one worker at a time leads, whichever was asked.

It lets every worker load and check the version, waits until all have it, and then writes into the plan from which
instant on it is live. Before that, one failure is enough, and nothing has changed; after that, nothing can fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from bentos.crew import Coming, Crew, Item, Plan
from bentos.errors import (
    BusyError,
    IncompleteLoadError,
    LunchboxError,
    NoRoomError,
    NotReadyError,
    RefusedVersionError,
)
from bentos.loading import estimate_memory_mb
from bentos.observer import Observer
from bentos.settings import ServeSettings

RESULTS = {RefusedVersionError: "refused", IncompleteLoadError: "incomplete", BusyError: "busy"}  # in the metrics
LOOK_EVERY_S = 0.05
FLIP_AFTER_S = 0.5  # from the plan to the flip: every worker has read it by then
PREPARED = ("standby", "beside", "live")
CONFIRM_S = 5.0  # for the workers to say that they have flipped
logger = logging.getLogger("bentos")


@dataclass
class Outcome:
    """How far the workers have come, by process id."""

    done: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """The content of an answer."""
        failed = {str(pid): reason for pid, reason in self.failed.items()}
        return {"done": self.done, "failed": failed, "missing": self.missing}


class Swaps:
    """Brings versions to all workers of the server."""

    def __init__(self, crew: Crew, settings: ServeSettings, observer: Observer) -> None:
        self._crew = crew
        self._settings = settings
        self._observer = observer

    async def bring(self, item: Item, *, live: bool, until: float, pinned: bool = False) -> dict[str, Any]:
        """Have every worker load a version, and serve it as the live one or beside it.

        Args:
            item: the version, and its folder on this machine.
            live: whether it takes the place of the live version; else it stands beside.
            until: when to give up, by `time.monotonic()`.
            pinned: whether it stays beside when another takes its place, as long as there is room.

        Returns:
            `{"model", "live", "workers": {"done", "failed", "missing"}, "seconds"}`.

        Raises:
            RefusedVersionError: when a worker could not load it, or there is no room beside the live one.
            IncompleteLoadError: when not every worker had it in time.
            BusyError: when another swap did not end in time.
            NotReadyError: when the folder of the workers cannot be written to.
        """
        began = time.monotonic()
        item = item.model_copy(update={"pinned": pinned})
        try:
            turn = await self._wait_for_turn(until)
            try:
                outcome = await self._bring(item, live=live, until=until)
            finally:
                turn.close()
        except (RefusedVersionError, IncompleteLoadError, BusyError) as error:
            self._observer.record_swap(next(name for kind, name in RESULTS.items() if isinstance(error, kind)))
            logger.error("%s was not brought to all workers: %s", item.tag, error)
            raise
        except OSError as error:
            folder, problem = self._crew.folder, error.strerror or error
            raise NotReadyError(
                f"{item.tag} was not brought to all workers: they cannot write into {folder}: {problem}"
            ) from None
        self._observer.record_swap("done")
        seconds = time.monotonic() - began
        where = "live" if live else "beside the live version"
        logger.info("%s is %s in %d worker(s) after %.1f s", item.tag, where, len(outcome.done), seconds)
        return {"model": item.tag, "live": live, "workers": outcome.describe(), "seconds": round(seconds, 3)}

    async def _wait_for_turn(self, until: float) -> IO[bytes]:
        while (turn := self._crew.take("swap")) is None:
            if time.monotonic() > until:
                coming = (self._crew.read_plan() or Plan()).coming
                tag = coming.item.tag if coming else "another version"
                raise BusyError(
                    f"{tag} is being loaded; one version at a time. Try again in 5 s", model=tag, retry_after_s=5
                )
            await asyncio.sleep(LOOK_EVERY_S)
        return turn

    async def _bring(self, item: Item, *, live: bool, until: float) -> Outcome:
        plan = self._crew.read_plan() or Plan()
        known = any(item.tag == other.tag for other in plan.items())
        if known and not self._look(item.tag, PREPARED).missing:
            plan = self._crew.change_plan(lambda plan: self._place(item, plan, live=live))
        else:
            self._refuse_too_large(item, live)
            plan = await self._bring_new(item, live=live, until=until)
        if plan.live is not None and plan.live.tag == item.tag:
            return await self._confirm(item.tag, ("live",), max(until, plan.at + CONFIRM_S))
        return await self._confirm(item.tag, ("beside", "live"), max(until, time.monotonic() + CONFIRM_S))

    async def _bring_new(self, item: Item, *, live: bool, until: float) -> Plan:
        """Wait until every worker has the version on standby, and let requests see it; else nobody keeps it."""

        def begin(plan: Plan) -> Plan:
            return plan.model_copy(update={"coming": Coming(item=item, attempt=plan.serial + 1, by=self._crew.me)})

        def commit(plan: Plan) -> Plan:
            ready = self._look(item.tag, PREPARED, attempt)  # nobody joins while the plan is written
            return plan if ready.missing or not ready.done else self._place(item, plan, live=live)

        def forget(plan: Plan) -> Plan:
            return plan.model_copy(update={"coming": None}) if plan.coming and plan.coming.item == item else plan

        attempt = self._crew.change_plan(begin).serial
        try:
            while True:
                outcome = self._look(item.tag, PREPARED, attempt)
                if outcome.failed:
                    raise RefusedVersionError(item.tag, next(iter(outcome.failed.values())), outcome.describe())
                if outcome.missing and time.monotonic() > until:
                    raise IncompleteLoadError(
                        f"{item.tag} was not loaded in time by the worker(s) {_join(outcome.missing)}; nothing has "
                        "changed. Allow more time, or look into the log",
                        model=item.tag,
                        workers=outcome.describe(),
                    )
                if not outcome.missing and (plan := self._crew.change_plan(commit)).coming is None:
                    return plan
                await asyncio.sleep(LOOK_EVERY_S)
        finally:
            with contextlib.suppress(OSError):  # on a full disk: the next swap takes its place
                self._crew.change_plan(forget)

    def _place(self, item: Item, plan: Plan, *, live: bool) -> Plan:
        """The plan in which a version that all workers have is the live one, or stands beside it."""
        before = plan.live
        here = next((other for other in plan.items() if other.tag == item.tag), item)
        item = here.model_copy(update={"pinned": here.pinned or item.pinned})
        others = [other for other in plan.beside if other.tag != item.tag]
        if before is not None and before.tag == item.tag:
            return plan.model_copy(update={"live": item, "coming": None, "instead_of": None})
        if not live:
            return plan.model_copy(update={"beside": self._fit([*others, item], keep=item), "coming": None})
        if before is not None and before.pinned:
            others.append(before)
        at = time.monotonic() + (FLIP_AFTER_S if before is not None else 0.0)
        beside = self._fit(others)
        return plan.model_copy(update={"live": item, "at": at, "beside": beside, "coming": None, "instead_of": None})

    def drop(self, tag: str) -> None:
        """Let a version leave that stands beside the live one, unless it was asked to stay."""

        def drop(plan: Plan) -> Plan:
            return plan.model_copy(
                update={"beside": tuple(item for item in plan.beside if item.tag != tag or item.pinned)}
            )

        self._crew.change_plan(drop)

    async def _confirm(self, tag: str, roles: Sequence[str], until: float) -> Outcome:
        while (outcome := self._look(tag, roles)).missing:
            if time.monotonic() > until:
                raise IncompleteLoadError(
                    f"{tag} is served, but not yet by the worker(s) {_join(outcome.missing)}: they hang, or have just "
                    "started. GET /models/info shows when they have it",
                    model=tag,
                    workers=outcome.describe(),
                )
            await asyncio.sleep(LOOK_EVERY_S)
        return outcome

    def _look(self, tag: str, roles: Sequence[str], attempt: int | None = None) -> Outcome:
        """Who has the version in one of the roles, who failed to load it, and who is still at it."""
        outcome = Outcome()
        for report in self._crew.reports():
            holding, failure = report.holdings.get(tag), report.failures.get(tag)
            if holding is not None and holding.role in roles:
                outcome.done.append(report.pid)
            elif attempt is not None and failure is not None and failure.attempt >= attempt:
                outcome.failed[report.pid] = failure.reason
            else:
                outcome.missing.append(report.pid)
        return outcome

    # --- room beside the live version

    def _refuse_too_large(self, item: Item, live: bool) -> None:
        """Refuse what cannot stand beside the live version, before anything is loaded."""
        if live:
            return
        try:
            memory_mb = estimate_memory_mb(item.path, self._settings)
        except LunchboxError:
            return  # the workers will say so
        if memory_mb > self._settings.shelf_mb:
            raise self._no_room(item, memory_mb, self._settings.shelf_mb)

    def _fit(self, items: list[Item], keep: Item | None = None) -> tuple[Item, ...]:
        """As many of the versions beside the live one as there is room for: the least recently used leave.

        Those that were asked for by hand leave after those that were not: a shadow takes nobody's place.

        Raises:
            NoRoomError: when there is no room for `keep`.
        """
        held = [report.holdings for report in self._crew.reports()]
        copies = {item.tag: [holdings[item.tag] for holdings in held if item.tag in holdings] for item in items}
        used_at = {tag: max((copy.used_at for copy in found), default=0.0) for tag, found in copies.items()}
        memory_mb = {tag: max((copy.memory_mb for copy in found), default=0.0) for tag, found in copies.items()}
        room = float(self._settings.shelf_mb)
        kept: list[Item] = []
        for item in sorted(items, key=lambda item: (not item.pinned, item != keep, -used_at[item.tag])):
            if memory_mb[item.tag] <= room:
                kept.append(item)
                room -= memory_mb[item.tag]
            elif item == keep:
                raise self._no_room(item, memory_mb[item.tag], room)
            else:
                allowed = self._settings.shelf_mb
                logger.info("%s leaves: EKIBEN_SHELF_MB allows %d MiB beside the live version", item.tag, allowed)
        return tuple(kept)

    def _no_room(self, item: Item, memory_mb: float, room_mb: float) -> NoRoomError:
        allowed = self._settings.shelf_mb
        left = "" if room_mb == allowed else f", of which {room_mb:.0f} are not taken by versions that were asked for"
        return NoRoomError(
            item.tag,
            f"it takes about {memory_mb:.0f} MiB beside the live version, and EKIBEN_SHELF_MB allows {allowed}{left}",
            cure="Raise EKIBEN_SHELF_MB, or load it as the live version",
        )


def _join(pids: Sequence[int]) -> str:
    return ", ".join(map(str, pids))
