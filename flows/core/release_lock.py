"""One release at a time: a lock in the model registry, and the check that it is still held. Core layer.

The registry has no compare-and-set; the one thing that it does for a single caller only is to make a registered model
of a name that is not taken. So the lock is a registered model without versions, `<model>-release-lock`, whose tags say
who holds it. Who ends well deletes it.

Who is killed leaves it behind. Another one may take over when the holder is dead (same machine: its process is gone),
or when its heartbeat has stood still for `LEASE_S`. It does not touch the old lock: it makes the *next* name
(`...-release-lock.2`, `.3`), which again only one can do, and only then clears the old one away. A holder that was
merely asleep finds this out in `check`, which is asked before anything that others see.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import random
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from flows.core.processes import identify_process, is_alive
from flows.core.registry import Registry
from flows.errors import EkibenError, ReleaseRaceError

LOCK_SUFFIX = "-release-lock"
BEAT_S = 5.0
LEASE_S = 60.0  # a heartbeat older than this is looked at closely
WATCH_S = 3 * BEAT_S  # for so long, as the clocks of two machines may differ
TRIES = 4
NEWCOMER_S = 2.0  # how long somebody may be seen who is about to find the lock taken
DESCRIPTION = "Ekiben: a release or rollback is at work. It goes by itself; the next release clears one left behind."
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """What a lock says about who holds it."""

    name: str  # of the registered model
    token: str
    what: str  # `release of version 3`
    who: str  # `ana@laptop, process 4711`
    since: str  # ISO 8601, UTC
    beat: float  # Unix time of the last sign of life, by the holder's clock
    mark: dict[str, Any]  # of the process

    @property
    def generation(self) -> int:
        """1 for the plain name; higher after takeovers."""
        number = self.name.rpartition(LOCK_SUFFIX)[2]
        return int(number[1:]) if number else 1

    def __str__(self) -> str:
        return f"{self.what} by {self.who} since {self.since}"


class ReleaseLock:
    """The lock of one registered model, held from `acquire` to `release`; a context manager does both."""

    def __init__(
        self,
        registry: Registry,
        what: str,
        *,
        beat_s: float = BEAT_S,
        lease_s: float = LEASE_S,
        watch_s: float = WATCH_S,
    ) -> None:
        """Prepare; nothing is asked of the registry yet.

        Args:
            registry: Whose model is to be changed.
            what: What is about to be done, for others to read: `release of version 3`.
            beat_s: Seconds between two signs of life.
            lease_s: Seconds without one after which a holder is suspected to be gone.
            watch_s: Seconds for which a suspect is watched.
        """
        self._registry = registry
        self._what = what
        self._beat_s, self._lease_s, self._watch_s = beat_s, lease_s, watch_s
        self._token = uuid.uuid4().hex
        self._name = ""
        self._beaten_at = 0.0  # monotonic
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ReleaseLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock, or find that somebody has it.

        Raises:
            ReleaseRaceError: names who, and since when.
        """
        for _ in range(TRIES):
            holders = list_holders(self._registry)
            for holder in holders:
                if not self._is_gone(holder):
                    raise _busy(holder)
            generation = max((holder.generation for holder in holders), default=0) + 1
            name = _lock_name(self._registry, generation)
            # MLflow's client sends a request again whose answer was lost: the name may be taken by this very lock.
            if not (self._registry.claim(name, self._tags(), description=DESCRIPTION) or self._has(name)):
                raise _busy(next(iter(list_holders(self._registry)), None))  # another one was quicker
            self._name = name
            try:
                if self._clear_away({holder.token for holder in holders}):
                    self._start_beating()
                    return
            except BaseException:
                self.release()
                raise
            self.release()
            time.sleep(random.uniform(0.05, 0.5))
        raise _busy(next(iter(list_holders(self._registry)), None))

    def _clear_away(self, gone: set[str]) -> bool:
        """Remove the locks with the tokens `gone`; False when there is one more.

        That is when a holder that was thought gone came back and ended well, and somebody else began: chance decides.
        """
        others = self._others()
        if any(holder.token not in gone for holder in others):
            return False
        for holder in others:
            self._registry.unclaim(holder.name)
        return True

    def check(self) -> None:
        """Make sure that the lock is still held: ask this before every write that others see.

        Raises:
            ReleaseRaceError: it was taken over, or could not be renewed in time.
        """
        deadline = time.monotonic() + NEWCOMER_S
        while True:
            held = {holder.name: holder.token for holder in list_holders(self._registry)}
            if held.get(self._name) != self._token or time.monotonic() - self._beaten_at > self._lease_s:
                raise ReleaseRaceError(
                    f"{self._what}: it stood still for so long that its place was given to another one; nothing more "
                    "was changed. Look at `ekiben history`, then run the same command again if it is still wanted"
                )
            if len(held) == 1:
                return
            if time.monotonic() > deadline:
                raise _busy(next(iter(self._others()), None))
            time.sleep(0.1)

    def release(self) -> None:
        """Give the lock back. When the registry cannot be reached, it is left for the next one to clear away."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._name:
            try:
                if self._token in {holder.token for holder in list_holders(self._registry)}:
                    self._registry.unclaim(self._name)
            except EkibenError as error:
                logger.warning("the release lock could not be given back: %s", error)
            self._name = ""

    def _has(self, name: str) -> bool:
        """Whether a lock of that name is this one."""
        return any((holder.name, holder.token) == (name, self._token) for holder in list_holders(self._registry))

    def _others(self) -> list[Holder]:
        return [holder for holder in list_holders(self._registry) if holder.token != self._token]

    def _tags(self) -> dict[str, str]:
        self._beaten_at = time.monotonic()
        return {
            "token": self._token,
            "what": self._what,
            "who": whoami(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "beat": f"{time.time():.3f}",
            "process": json.dumps(identify_process() | {"namespace": _process_namespace()}),
        }

    def _start_beating(self) -> None:
        self._thread = threading.Thread(target=self._beat, name="release-lock", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_s):
            with contextlib.suppress(Exception):  # `check` sees what comes of it
                if not self._registry.note_claim(self._name, "beat", f"{time.time():.3f}"):
                    return
                self._beaten_at = time.monotonic()

    def _is_gone(self, holder: Holder) -> bool:
        """Whether a holder has ended without giving the lock back."""
        if holder.mark.get("namespace") == _process_namespace() and not is_alive(holder.mark):
            return True
        if abs(time.time() - holder.beat) < self._lease_s:
            return False
        deadline = time.monotonic() + self._watch_s
        while time.monotonic() < deadline:
            time.sleep(min(self._beat_s, self._watch_s) / 5)
            now = {item.token: item.beat for item in list_holders(self._registry)}
            if now.get(holder.token, holder.beat) != holder.beat:
                return False
            if holder.token not in now:
                break
        return True


def list_holders(registry: Registry) -> list[Holder]:
    """Every lock of the registry's model, the newest generation first: none, one, or a stale one and its successor."""
    prefix = f"{registry.model_name}{LOCK_SUFFIX}"
    holders = [
        _read_holder(name, tags)
        for name, tags in registry.claims(prefix).items()
        if name == prefix or name.removeprefix(f"{prefix}.").isdecimal()
    ]
    return sorted(holders, key=lambda holder: holder.generation, reverse=True)


def whoami() -> str:
    """User, machine and process, for people."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}, process {os.getpid()}"


def _lock_name(registry: Registry, generation: int) -> str:
    return f"{registry.model_name}{LOCK_SUFFIX}{'' if generation == 1 else f'.{generation}'}"


def _read_holder(name: str, tags: dict[str, str]) -> Holder:
    try:
        mark = json.loads(tags.get("process", "{}"))
        beat = float(tags.get("beat", "0"))
    except ValueError:
        mark, beat = {}, 0.0
    return Holder(
        name=name,
        token=tags.get("token", ""),
        what=tags.get("what", "something"),
        who=tags.get("who", "somebody"),
        since=tags.get("since", "an unknown time"),
        beat=beat,
        mark=mark if isinstance(mark, dict) and {"host", "pid", "started"} <= mark.keys() else {},
    )


def _process_namespace() -> str:
    """What process ids mean: they can be compared within one boot and one container only."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _busy(holder: Holder | None) -> ReleaseRaceError:
    who = f"({holder}) " if holder is not None else ""
    return ReleaseRaceError(
        f"another release or rollback is at work {who}and nothing was changed by this one: wait for its end and run "
        "the same command again; `ekiben status` shows whether it goes on"
    )
