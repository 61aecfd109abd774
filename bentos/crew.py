"""The workers of one server, in one folder: the plan that they carry out, and what each of them has done of it.

```
plan.json            which version is live and since when, which stand beside it, which one is to come: `Plan`
worker-<name>.json   what a worker has loaded, and what it could not: `Report`
*.lock               held by flock, so that the kernel frees it when its holder dies
```

The plan is a wish, not a command: a worker compares it with what it has, again and again, and closes the difference. So
a worker that was started anew, or has slept, does the same as all others. A version comes in two steps: first it is
only `coming`, and every worker loads and checks it; once all have it, the plan makes it live from an instant on that is
a moment away, by the clock that all processes of a machine share. Who writes the plan is in swaps.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bentos.aliases import locked, replace_file, try_lock
from bentos.siblings import is_alive, name_process, open_server_folder

FOLDER_PREFIX = "ekiben-crew-"
PLAN_FILE = "plan.json"
REPORT_PREFIX = "worker-"
STATE = ConfigDict(extra="ignore", frozen=True)
S = TypeVar("S", bound=BaseModel)


class Item(BaseModel):
    """A version, and the folder on this machine that holds its lunchbox."""

    model_config = STATE

    tag: str
    path: Path
    pinned: bool = Field(False, description="Whether it was asked for beside the live one, and stays when it is not.")


class Coming(BaseModel):
    """A version that every worker shall load and check before any of them serves it."""

    model_config = STATE

    item: Item
    attempt: int = Field(description="Serial of the plan that began it: an older failure does not count.")
    by: str = Field(description="Process that waits for it; when that has died, nobody need go on.")


class Plan(BaseModel):
    """What every worker shall have."""

    model_config = STATE

    serial: int = 0
    live: Item | None = None
    at: float = Field(0.0, description="Instant from which on `live` is so, by `time.monotonic()`.")
    beside: tuple[Item, ...] = ()
    coming: Coming | None = None
    instead_of: str | None = Field(
        None, description="Tag of the version that could not be loaded, so that `live` took its place."
    )
    aliases: dict[str, str] = Field(default_factory=dict, description="Alias -> tag, as the registry was last seen.")

    def items(self) -> list[Item]:
        """All versions that a worker must have, the live one first."""
        return [*([self.live] if self.live else []), *self.beside]


class Holding(BaseModel):
    """A version as one worker has it."""

    model_config = STATE

    role: str = Field(description="`live`, `beside`, `standby` or `leaving`.")
    memory_mb: float
    requests: int = Field(description="That use it now.")
    used_at: float = Field(description="When one last did, by `time.monotonic()`.")
    problem: str | None = Field(None, description="What the last look at it found wrong.")


class Failure(BaseModel):
    """Why a worker could not load a version."""

    model_config = STATE

    reason: str
    attempt: int


class Report(BaseModel):
    """What one worker has."""

    model_config = STATE

    pid: int
    live: str | None = None
    holdings: dict[str, Holding] = Field(default_factory=dict, description="By tag.")
    failures: dict[str, Failure] = Field(default_factory=dict, description="By tag.")


class Crew:
    """This worker's side of the folder. Methods take well under a millisecond, but for waiting in `locked`."""

    def __init__(self, folder: Path, *, me: str | None = None) -> None:
        """Join.

        Args:
            folder: that all workers of the server share.
            me: name of the process that this worker is; None: the one that asks.
        """
        self.folder = folder
        self.me = me or name_process(os.getpid()) or f"{os.getpid()}-"
        self.pid = int(self.me.partition("-")[0])
        self._plan: Plan | None = None
        self._stamp: tuple[int, ...] | None = None
        self._reported = ""

    def read_plan(self) -> Plan | None:
        """The plan as it stands; None before the first worker has made it."""
        path = self.folder / PLAN_FILE
        try:
            status = path.stat()
        except OSError:
            return self._plan
        if (stamp := (status.st_ino, status.st_mtime_ns, status.st_size)) != self._stamp:
            self._plan = _read(Plan, path) or self._plan
            self._stamp = stamp
        return self._plan

    def change_plan(self, change: Callable[[Plan], Plan]) -> Plan:
        """Write a new plan, made from the one that stands; nobody else writes meanwhile.

        Raises:
            OSError: when it cannot be written, such as on a full disk.
        """
        with self.locked():
            return self.write_plan(change(self.read_plan() or Plan()))

    def write_plan(self, plan: Plan) -> Plan:
        """Write a plan with the next serial, unless it is the one that stands; the caller holds the lock."""
        before = self.read_plan()
        if plan == before:
            return plan
        new = plan.model_copy(update={"serial": (before.serial if before else 0) + 1})
        replace_file(self.folder / PLAN_FILE, new.model_dump_json(), lasting=False)
        self._plan, self._stamp = new, None
        return new

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only one who writes the plan, or joins."""
        with locked(self.folder / "plan.lock"):
            yield

    def take(self, role: str) -> IO[bytes] | None:
        """Take a role that one worker at a time can have, until the file returned is closed; None when it is taken."""
        return try_lock(self.folder / f"{role}.lock")

    def report(self, report: Report) -> None:
        """Tell the others what this worker has.

        Raises:
            OSError: when it cannot be written, such as on a full disk.
        """
        if (content := report.model_dump_json()) != self._reported:
            replace_file(self._own_file(self.me), content, lasting=False)
            self._reported = content

    def reports(self) -> list[Report]:
        """What every living worker has; the files of the dead are removed."""
        found = []
        for path in sorted(self.folder.glob(f"{REPORT_PREFIX}*.json")):
            name = path.stem.removeprefix(REPORT_PREFIX)
            if not self.is_alive(name):
                path.unlink(missing_ok=True)
            elif (report := _read(Report, path)) is not None:
                found.append(report)
        return found

    def is_alive(self, name: str) -> bool:
        """Whether a worker still runs."""
        return name == self.me or is_alive(name)

    def stay(self) -> None:
        """Keep the folder from being taken for an old one by what cleans folders of temporary files."""
        for path in (self.folder, self.folder / PLAN_FILE, self._own_file(self.me)):
            with contextlib.suppress(OSError):
                os.utime(path)

    def leave(self) -> None:
        """Tell the others that this worker ends."""
        with contextlib.suppress(OSError):
            self._own_file(self.me).unlink(missing_ok=True)

    def keep(self, name: str, state: BaseModel) -> None:
        """Write something for all workers into the file `name`.json.

        Raises:
            OSError: when it cannot be written.
        """
        replace_file(self.folder / f"{name}.json", state.model_dump_json(), lasting=False)

    def recall(self, name: str, kind: type[S]) -> S | None:
        """Read what a worker has written by `keep`, if any has."""
        return _read(kind, self.folder / f"{name}.json")

    def _own_file(self, name: str) -> Path:
        return self.folder / f"{REPORT_PREFIX}{name}.json"


def open_crew(*, shared: bool) -> Crew:
    """Join the workers of this server; alone, when they cannot be known (`shared` is false, or this is not Linux)."""
    folder = open_server_folder(FOLDER_PREFIX) if shared else None
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="ekiben-alone-"))
        crew = Crew(folder)
        weakref.finalize(crew, shutil.rmtree, folder, ignore_errors=True)
        return crew
    return Crew(folder)


def _read(kind: type[S], path: Path) -> S | None:
    """A state that was written whole; None when it is not there, or of another version of this program."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
