"""All that a worker does about versions: what it begins with, loading on demand, following, watching, describing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from bentos.aliases import Pointer
from bentos.crew import Crew, Item, Plan
from bentos.encoder import Encoder
from bentos.errors import (
    IncompleteLoadError,
    LunchboxError,
    NoRoomError,
    NotReadyError,
    RefusedVersionError,
    RegistryError,
    UnknownModelError,
)
from bentos.follow import Follower
from bentos.manifest import read_manifest
from bentos.observer import Observer
from bentos.refusals import Refusals
from bentos.rules import list_names
from bentos.settings import ServeSettings
from bentos.shelf import Copy, Shelf
from bentos.sources import LocalSource, Source, UnknownVersionError, UnreadableVersionError, check_box, mark_used
from bentos.swaps import Outcome, Swaps
from bentos.worker import Worker

WATCH_EVERY_S = 10.0
logger = logging.getLogger("bentos")


class Keeper:
    """Keeps this worker's shelf as the plan of all workers wants it. Runs on the event loop that serves."""

    def __init__(
        self, shelf: Shelf, crew: Crew, settings: ServeSettings, observer: Observer, find_own: Callable[[], Path]
    ) -> None:
        """Prepare to keep a shelf.

        Args:
            shelf: of this worker.
            crew: of all workers.
            settings: what is followed, and how.
            observer: told of versions, swaps and refusals.
            find_own: gives the folder of the Bento's own lunchbox; raises LunchboxError.
        """
        self.shelf = shelf
        self.crew = crew
        self._settings = settings
        self._observer = observer
        self._find_own = find_own
        self._source: Source | None = None
        self._worker = Worker(crew, shelf, settings, observer)
        self._swaps = Swaps(crew, settings, observer)
        self._refusals = Refusals(crew)
        self._followers: list[Follower] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Load what is to be served, and keep it so until `stop`."""
        await self._worker.join(self._choose_first, self._choose_own)
        settings = self._settings
        self.shelf.followed = settings.follow or None
        for alias, live in ((settings.follow, True), (settings.shadow, False)):
            if alias:
                parts = (self.crew, self._swaps, self._refusals, settings, self._observer)
                self._followers.append(Follower(alias, self.source, *parts, live=live))
        await self.find_problems()  # also tells the metrics
        self._run(self._worker.run(), "worker")
        self._run(self._watch(), "watch")
        for follower in self._followers:
            self._run(follower.run(), "follow")

    async def stop(self) -> None:
        """Finish the batches in flight, and leave the crew."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.crew.leave()
        await self.shelf.stop()

    def _run(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=f"ekiben-{name}")
        task.add_done_callback(_say_why_it_ended)
        self._tasks.append(task)

    # --- what a server begins with

    @property
    def source(self) -> Source:
        """Where versions come from: an MLflow server when the settings name one, else this machine."""
        if self._source is None:
            self._source = self._open_source()
        return self._source

    def _open_source(self) -> Source:
        settings = self._settings
        try:
            own: Path | None = self._find_own()
        except LunchboxError:
            own = None
        local = LocalSource(settings.home, settings.model_name, own=own)
        if not settings.registry_uri.startswith(("http://", "https://")):
            return local
        from bentos.registry_client import MlflowSource  # only those who need it pay for it

        return MlflowSource(settings, local)

    def _choose_own(self) -> Item:
        path = self._find_own()
        return Item(tag=read_manifest(path).tag, path=path)

    def _choose_first(self) -> Item:
        """What the alias names, when it is on this machine and whole; else the Bento's own version.

        While the registry cannot be reached: what it named when this machine last served it.
        """
        alias = self._settings.follow
        if alias:
            try:
                pointer = self._look_or_recall(alias)
                if pointer is not None and (path := self.source.find_here(pointer)) is not None:
                    check_box(path, pointer, hashes=True)
                    return Item(tag=f"{self._settings.model_name}:{pointer.bento_version}", path=path)
            except (RegistryError, LunchboxError, OSError) as error:
                logger.warning("begins with the Bento's own version: %s", error)
        return self._choose_own()

    def _look_or_recall(self, alias: str) -> Pointer | None:
        try:
            return self.source.look(alias)
        except RegistryError as error:
            if (pointer := self.source.recall(alias)) is None:
                raise
            logger.warning("begins with what %s named when it was last served here: %s", alias, error)
            return pointer

    # --- loading by hand

    async def load(self, reference: str, *, live: bool, timeout_s: float) -> dict[str, Any]:
        """Have all workers load a version; see `EmbeddingService.load_version`."""
        until = time.monotonic() + timeout_s
        item, fingerprint = self._find_loaded(reference), ""
        if item is None:
            pointer = await self._find(reference)
            tag = f"{self._settings.model_name}:{pointer.bento_version}"
            try:
                path = await asyncio.wait_for(asyncio.to_thread(self.source.fetch, pointer), timeout_s)
            except TimeoutError:
                raise IncompleteLoadError(
                    f"{tag} was not fetched within {timeout_s:g} s; that goes on, and nothing else has changed. Send "
                    "the request again, or allow more time",
                    model=tag,
                    workers=Outcome().describe(),
                ) from None
            except RegistryError as error:
                raise NotReadyError(f"{tag} cannot be fetched: {error}") from None
            except LunchboxError as error:
                self._observer.record_swap("refused")
                raise self._refuse(tag, str(error), await self._fingerprint(pointer)) from None
            item, fingerprint = Item(tag=tag, path=path), await self._fingerprint(pointer)
        try:
            answer = await self._swaps.bring(item, live=live, until=until, pinned=not live)
        except NoRoomError:
            raise  # nothing is wrong with it
        except RefusedVersionError as error:
            self._refusals.refuse(item.tag, error.reason, fingerprint)
            raise
        self._refusals.forgive(item.tag)
        return answer

    async def _fingerprint(self, pointer: Pointer) -> str:
        with contextlib.suppress(RegistryError):
            return await asyncio.to_thread(self.source.fingerprint, pointer)
        return ""

    def _find_loaded(self, reference: str) -> Item | None:
        """The version meant, when all workers have it; an alias may have moved since, so that the source is asked."""
        plan = self.crew.read_plan() or Plan()
        found = [item for item in plan.items() if reference in (item.tag, item.tag.partition(":")[2])]
        return found[0] if found else None

    async def _find(self, reference: str) -> Pointer:
        try:
            return await asyncio.to_thread(self.source.find, reference)
        except UnknownVersionError as error:
            raise UnknownModelError(str(error), field="version") from None
        except RegistryError as error:
            raise NotReadyError(f"{reference[:200]!r} cannot be looked up: {error}") from None
        except UnreadableVersionError as error:
            raise self._refuse(f"{self._settings.model_name}:{error.bento_version}", str(error), "") from None

    def _refuse(self, tag: str, reason: str, fingerprint: str) -> RefusedVersionError:
        self._refusals.refuse(tag, reason, fingerprint)
        return RefusedVersionError(tag, reason)

    # --- watching

    async def _watch(self) -> None:
        """Ask every version's canary now and then, also when nobody asks: wrong vectors must stop by themselves."""
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            try:
                await self.find_problems()
                self.observe()
                self.crew.stay()
                for encoder in self.shelf.encoders():
                    await asyncio.to_thread(mark_used, encoder.box.path)
            except Exception:  # whatever it is, the next look may find out more
                logger.exception("the server could not be looked after")

    async def find_problem(self) -> str | None:
        """Look at the live version; say what is wrong with it, or None when it may be trusted."""
        try:
            live = self.shelf.live
        except NotReadyError as error:
            self._observer.set_ready(False)
            return error.message
        problem = await self._ask(live)
        self._observer.set_ready(problem is None)
        return problem

    async def find_problems(self) -> None:
        """Look at every version, those that stand beside the live one included."""
        await self.find_problem()
        for copy in self.shelf.copies():
            if copy.role == "beside":
                await self._ask(copy.encoder)

    async def _ask(self, encoder: Encoder) -> str | None:
        with self.shelf.holding(encoder) as copy:
            found = await encoder.find_problem()
        if found != copy.problem:
            logger.log(logging.ERROR if found else logging.INFO, "%s: %s", copy.tag, found or "it is well again")
        copy.problem = found
        return found

    def observe(self) -> None:
        """Bring the metrics up to date; called before they are read."""
        for encoder in self.shelf.encoders():
            encoder.report_queues()
        self._observer.set_refused(self._refusals.read().keys())
        for follower in self._followers:
            follower.observe()

    # --- describing

    def describe(self) -> dict[str, Any]:
        """The content of GET /models/info."""
        plan = self.crew.read_plan() or Plan()
        reports = self.crew.reports()
        copies = sorted(self.shelf.copies(), key=lambda copy: copy.role != "live")
        live = next((copy.tag for copy in copies if copy.role == "live"), None)
        following = {follower.name: follower.describe() for follower in self._followers}
        beside_mb = sum(copy.memory_mb for copy in copies if copy.role != "live")
        return {
            "live": live,
            "problem": self.shelf.refusal if live is None else None,
            "models": [self._describe_copy(copy) for copy in copies],
            "loading": None if plan.coming is None else plan.coming.item.tag,
            "aliases": plan.aliases,
            "following": following.get("follow"),
            "following_shadow": following.get("shadow"),
            "refused": self._refusals.describe(),
            "shelf": {"beside_mb": round(beside_mb, 1), "limit_mb": self._settings.shelf_mb},
            "workers": [
                {
                    "pid": report.pid,
                    "answers": report.pid == self.crew.pid,
                    "live": report.live,
                    "loaded": {tag: held.model_dump(exclude={"used_at"}) for tag, held in report.holdings.items()},
                    "failures": {tag: failure.reason for tag, failure in report.failures.items()},
                }
                for report in reports
            ],
        }

    def _describe_copy(self, copy: Copy) -> dict[str, Any]:
        manifest, box = copy.encoder.manifest, copy.encoder.box
        aliases = [alias for alias, encoder in self.shelf.known_aliases().items() if encoder is copy.encoder]
        return {
            **copy.encoder.describe(),
            "role": copy.role,
            "names": [*list_names(manifest), *aliases],
            "aliases": aliases,
            "compat": None if manifest.compat is None else manifest.compat.model_dump(),
            "adapters": sorted(box.adapters),
            "path": str(box.path),
            "memory_mb": round(copy.memory_mb, 1),
            "requests": copy.holders,
            "problem": copy.problem,
        }


def _say_why_it_ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical("%s has ended and does not come back: restart the server", task.get_name(), exc_info=error)
