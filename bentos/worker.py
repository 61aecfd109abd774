"""One worker's hands: it compares the plan with its own shelf, again and again, and closes the difference."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from bentos.crew import Crew, Failure, Holding, Item, Plan, Report
from bentos.errors import LunchboxError
from bentos.loading import load_version, unload_version
from bentos.observer import Observer, Version
from bentos.settings import ServeSettings
from bentos.shelf import Shelf

LOOK_EVERY_S = 0.1
RETRY_S = 20.0  # until a version that must be there and could not be loaded is tried again
REPORT_EVERY_S = 1.0  # what changes without the plan, such as requests in flight
logger = logging.getLogger("bentos")

ChooseFirst = Callable[[], Item]


class Worker:
    """Carries out the plan in this process. Runs on the event loop that serves."""

    def __init__(self, crew: Crew, shelf: Shelf, settings: ServeSettings, observer: Observer) -> None:
        self._crew = crew
        self._shelf = shelf
        self._settings = settings
        self._observer = observer
        self._done = -1  # serial of the plan that was carried out
        self._retry_at = float("inf")
        self._report_at = 0.0
        self._reported: list[tuple[str, str]] = []
        self._failures: dict[str, Failure] = {}
        self._own: ChooseFirst | None = None

    async def join(self, choose_first: ChooseFirst, own: Callable[[], Item]) -> None:
        """Load what the server serves, and only then become one of those whom a swap waits for.

        Args:
            choose_first: names the version to begin with; asked of the first worker only, in a thread.
            own: the version of the Bento, for when that one cannot be loaded by anybody.
        """
        self._own = own
        await asyncio.to_thread(self._make_plan, choose_first)
        while True:
            plan = self._crew.read_plan() or Plan()
            await self._have(plan.items(), plan.serial)
            if self._give_up(plan, own):
                continue
            with self._crew.locked():  # nobody commits meanwhile
                if (self._crew.read_plan() or plan).items() == plan.items():
                    self._show(plan)
                    if plan.coming is None:
                        self._done = plan.serial
                    if plan.live is None:
                        self._retry_at = time.monotonic() + RETRY_S
                    self._report()
                    return

    def _make_plan(self, choose_first: ChooseFirst) -> None:
        with self._crew.locked():
            if self._crew.read_plan() is None:
                try:
                    live = choose_first()
                except LunchboxError as error:
                    self._shelf.refusal = str(error)
                    live = None
                self._crew.write_plan(Plan(live=live, at=time.monotonic()))

    def _give_up(self, plan: Plan, own: Callable[[], Item]) -> bool:
        """Fall back to the Bento's own version when the live one is not to be had, and no other worker has it."""
        live = plan.live
        if live is None or self._shelf.find(live.tag) is not None:
            return False
        self._shelf.refusal = self._failures[live.tag].reason
        if any(report.live == live.tag for report in self._crew.reports()):
            return False
        try:
            first = own()
        except LunchboxError:
            return False
        if first.tag == live.tag:
            return False

        def fall_back(now: Plan) -> Plan:
            update = {"live": first, "at": time.monotonic(), "instead_of": live.tag}
            return now.model_copy(update=update) if now.live == live else now

        self._crew.change_plan(fall_back)
        return True

    def _begin_late(self) -> Plan:
        """Try again to find the Bento's own version, when the server has begun without any."""
        try:
            if self._own is None:
                raise LunchboxError("the server is still starting")
            own = self._own()
        except LunchboxError as error:
            self._shelf.refusal = str(error)
            self._retry_at = time.monotonic() + RETRY_S
            return self._crew.read_plan() or Plan()
        return self._crew.change_plan(lambda now: now if now.live else now.model_copy(update={"live": own}))

    async def run(self) -> None:
        """Carry out the plan until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self.look()
            except Exception:  # whatever it is, the next look may find it gone
                logger.exception("the plan could not be carried out")
                self._retry_at = time.monotonic() + RETRY_S
                self._done = (self._crew.read_plan() or Plan()).serial

    async def look(self) -> None:
        """Do what the plan asks and is not done yet."""
        plan = self._crew.read_plan()
        if plan is None:
            return
        if plan.coming is not None and not self._crew.is_alive(plan.coming.by):
            plan = self._crew.change_plan(self._forget_orphan)
        self._shelf.turn()
        now = time.monotonic()
        if plan.serial != self._done or now >= self._retry_at:
            self._retry_at = float("inf")
            if plan.live is None:
                plan = await asyncio.to_thread(self._begin_late)
            await self._have(plan.items(), plan.serial)
            await self._prepare(plan)
            self._show(plan)
            self._done = plan.serial
            self._report()
        elif now >= self._report_at or self._roles() != self._reported:
            self._report()

    def _forget_orphan(self, plan: Plan) -> Plan:
        """The plan without a version that is to come for a worker that has died."""
        orphan = plan.coming is not None and not self._crew.is_alive(plan.coming.by)
        return plan.model_copy(update={"coming": None}) if orphan else plan

    async def _have(self, items: list[Item], attempt: int) -> None:
        """Load what must be there."""
        for item in items:
            if self._shelf.find(item.tag) is None and not await self._load(item, attempt):
                self._retry_at = time.monotonic() + RETRY_S
                logger.error("%s is to be served and cannot be loaded: %s", item.tag, self._failures[item.tag].reason)

    async def _prepare(self, plan: Plan) -> None:
        """Load what is to come, unless nobody waits for it any more."""
        coming = plan.coming
        if coming is None or self._shelf.find(coming.item.tag) is not None:
            return
        if self._crew.is_alive(coming.by):
            await self._load(coming.item, coming.attempt)

    async def _load(self, item: Item, attempt: int) -> bool:
        """Load a version to standby; False when it cannot be, for the reason that is noted."""
        try:
            encoder, memory_mb = await load_version(item.path, self._settings, self._observer)
            if encoder.manifest.tag != item.tag:
                await unload_version(encoder)
                raise LunchboxError(f"{item.path} holds {encoder.manifest.tag}, not {item.tag}")
        except Exception as error:  # whatever it is: the version is not served, and the others go on
            if not isinstance(error, LunchboxError):
                logger.exception("%s could not be loaded", item.tag)
            self._failures[item.tag] = Failure(reason=str(error) or repr(error), attempt=attempt)
            return False
        self._failures.pop(item.tag, None)
        self._shelf.add(encoder, memory_mb=memory_mb)
        return True

    def _show(self, plan: Plan) -> None:
        """Let requests see what the plan wants them to see, and let go what it does not name."""
        self._shelf.aliases = plan.aliases
        beside = {item.tag for item in plan.beside}
        wanted = {item.tag for item in plan.items()} | ({plan.coming.item.tag} if plan.coming else set())
        for tag in beside & set(self._shelf.tags()):
            self._shelf.show(tag)
        live = plan.live
        if live is not None and self._shelf.find(live.tag) is not None:
            self._shelf.flip(live.tag, plan.at, keep=beside)
        for tag in self._shelf.tags():
            if tag not in wanted:
                self._shelf.retire(tag)  # the live one stays, and leaves with the flip

    def _roles(self) -> list[tuple[str, str]]:
        return [(copy.tag, copy.role) for copy in self._shelf.copies()]

    def _report(self) -> None:
        """Tell the other workers, and the metrics, what is here."""
        self._report_at = time.monotonic() + REPORT_EVERY_S
        self._reported = self._roles()
        copies = self._shelf.copies()
        holdings = {
            copy.tag: Holding(
                role=copy.role,
                memory_mb=round(copy.memory_mb, 1),
                requests=copy.holders,
                used_at=round(copy.used_at, 1),
                problem=copy.problem,
            )
            for copy in sorted(copies, key=lambda copy: copy.role != "leaving")  # the one that stays counts
        }
        live = next((copy.tag for copy in copies if copy.role == "live"), None)
        self._crew.report(
            Report(
                pid=self._crew.pid,
                live=live,
                holdings=holdings,
                failures=self._failures,
            )
        )
        self._observer.set_versions(
            [Version(copy.encoder.manifest, copy.encoder.box.engine.precision, copy.role == "live") for copy in copies]
        )
