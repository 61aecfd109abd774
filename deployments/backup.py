"""Save the state of the stack into a folder, or bring it back: PostgreSQL's databases, then the buckets of S3.

    python deployments/backup.py save FOLDER
    python deployments/backup.py restore FOLDER [--force]

Runs, registry, studies, deployments, schedules and history are in the databases; data, models and lunchboxes are in the
buckets. The databases are dumped first: whatever they name is in the buckets by then. `backup.json` is written last; a
folder without it is not whole. Not in it: images, .env and the Bento store (docs/operations.md, "Backup and restore").

Without more, both go through `docker compose`. With --direct they are reached from here: PostgreSQL by PGHOST, PGUSER
and PGPASSWORD, S3 by AWS_ENDPOINT_URL_S3 and its keys.

Standard library only; restoring needs the services that use the databases to be stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

DATABASES = ("mlflow", "mlflow_auth", "optuna", "prefect")
MARK = "backup.json"
HERE = Path(__file__).resolve().parent
# Tables that are there as soon as a service has begun: a database without them is a new one.
FIRST_TABLES = {"mlflow": "experiments", "mlflow_auth": "users", "optuna": "studies", "prefect": "flow"}


class BackupError(Exception):
    """What keeps the state from being saved or restored, as one line for the user."""


@dataclass(frozen=True)
class Tools:
    """How the programs are reached that read and write the state."""

    postgres: list[str]  # before `pg_dump ...`
    buckets: list[str]  # before `save FOLDER`
    folder: str | None = None  # how the program of the buckets knows the folder; None: by its own name
    user: list[str] = field(default_factory=list)


def compose_tools(folder: Path) -> Tools:
    """Through `docker compose`, from the project's folder."""
    line = ["docker", "compose", "run", "--rm", "--no-deps", "-T", "--user", "0", "-v", f"{folder.resolve()}:/backup"]
    return Tools(
        postgres=["docker", "compose", "exec", "-T", "postgres"],
        buckets=[*line, "worker", "python", "deployments/buckets.py"],
        folder="/backup",
        user=["--username", "postgres"],
    )


def direct_tools() -> Tools:
    """As programs of this machine."""
    return Tools(postgres=[], buckets=[sys.executable, str(HERE / "buckets.py")])


def save(folder: Path, tools: Tools) -> None:
    """Save everything.

    Raises:
        BackupError: a part could not be saved; the folder has no mark then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).unlink(missing_ok=True)
    sums = {}
    for name in DATABASES:
        dump = folder / f"{name}.dump"
        with dump.open("wb") as file:
            _run([*tools.postgres, "pg_dump", *tools.user, "--format=custom", "--dbname", name], output=file)
        sums[name] = _digest(dump)
        sys.stdout.write(f"backup: database {name}, {dump.stat().st_size} bytes\n")
    _run([*tools.buckets, "save", tools.folder or str(folder)])
    at = datetime.now(UTC).isoformat(timespec="seconds")
    (folder / MARK).write_text(json.dumps({"saved": at, "databases": sums}, indent=1), encoding="utf-8")


def restore(folder: Path, tools: Tools, *, force: bool = False) -> None:
    """Bring everything back.

    Raises:
        BackupError: the folder is not whole or the stack is not empty (nothing was written then), or a part could not
            be restored.
    """
    if not (folder / MARK).exists():
        raise BackupError(f"{folder} holds no whole backup: {MARK} is missing")
    sums = json.loads((folder / MARK).read_text(encoding="utf-8"))["databases"]
    for name in DATABASES:
        if not (folder / f"{name}.dump").is_file() or _digest(folder / f"{name}.dump") != sums.get(name):
            raise BackupError(f"{folder}/{name}.dump is missing or altered")
    filled = [name for name in DATABASES if _is_filled(name, tools)]
    if filled and not force:
        raise BackupError(
            f"the database {filled[0]} is in use already: restore into a new stack of which only postgres and s3 have "
            "been started, or give --force to replace what is there"
        )
    _run([*tools.buckets, "restore", tools.folder or str(folder), *(["--force"] if force else [])])
    for name in DATABASES:
        command = [*tools.postgres, "pg_restore", *tools.user, "--clean", "--if-exists", "--exit-on-error"]
        with (folder / f"{name}.dump").open("rb") as file:
            _run([*command, "--single-transaction", "--dbname", name], source=file)
        sys.stdout.write(f"restore: database {name}\n")


def _is_filled(name: str, tools: Tools) -> bool:
    query = f"select to_regclass('public.{FIRST_TABLES[name]}') is not null"
    command = [*tools.postgres, "psql", *tools.user, "--no-psqlrc", "--tuples-only", "--no-align"]
    return _run([*command, "--dbname", name, "--command", query], output=subprocess.PIPE).strip() == b"t"


def _run(command: list[str], *, source: Any = None, output: Any = None) -> bytes:
    try:
        done = subprocess.run(command, stdin=source, stdout=output, stderr=subprocess.PIPE, check=False)
    except FileNotFoundError:
        raise BackupError(f"{command[0]} is not on this machine") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise BackupError(f"{' '.join(command[:8])} ...: {said[-800:] or f'exit code {done.returncode}'}")
    return bytes(done.stdout or b"")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Read the command line, save or restore."""
    parser = argparse.ArgumentParser(description="Save the state of the stack into a folder, or bring it back.")
    parser.add_argument("what", choices=["save", "restore"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--force", action="store_true", help="replace what is in the databases and buckets")
    parser.add_argument("--direct", action="store_true", help="reach PostgreSQL by PG*, S3 by AWS_* variables")
    given = parser.parse_args()
    tools = direct_tools() if given.direct else compose_tools(given.folder)
    try:
        if given.what == "save":
            save(given.folder, tools)
        else:
            restore(given.folder, tools, force=given.force)
    except BackupError as error:
        sys.exit(f"backup: {error}")
    sys.stdout.write(f"backup: {given.what}d, {given.folder}\n")


if __name__ == "__main__":
    main()
