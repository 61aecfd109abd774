"""Save the state of the stack into a folder, or bring it back: PostgreSQL's databases and the buckets of S3.

    python deployments/backup.py save FOLDER
    python deployments/backup.py restore FOLDER [--force]

Runs, registry, studies, deployments, schedules and history are in the databases; data, models and lunchboxes in the
buckets. The databases are dumped first: what they name is in the buckets by then, unless it is deleted meanwhile.
FOLDER appears when everything is in it; what was saved there before is kept until then. It holds hashes of passwords
and Prefect's own key: only its owner may read it. Not in it: images, .env (a restore needs the passwords of then), and
the Bento store (docs/operations.md, "Backup and restore").

Without more, both go through `docker compose`. With --direct they are reached from here: PostgreSQL by PGHOST, PGUSER
and PGPASSWORD, S3 by AWS_ENDPOINT_URL_S3 and its keys. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

OWNERS = {"mlflow": "mlflow", "mlflow_auth": "mlflow", "optuna": "optuna", "prefect": "prefect"}  # database -> role
# Tables that are there as soon as a service has begun: a database without them is a new one.
FIRST_TABLES = {"mlflow": "experiments", "mlflow_auth": "users", "optuna": "studies", "prefect": "flow"}
MARK = "backup.json"
HERE = Path(__file__).resolve().parent
NOTHING_DONE = "Nothing was written."


class BackupError(Exception):
    """What keeps the state from being saved or restored, as one line for the user."""


@dataclass(frozen=True)
class Tools:
    """How the programs are reached that read and write the state."""

    postgres: list[str]  # before `pg_dump ...`
    buckets: list[str]  # before `save FOLDER`; {folder} stands for the folder on this machine
    folder: str = "{folder}"  # how the program of the buckets knows it
    user: list[str] = field(default_factory=list)


def compose_tools() -> Tools:
    """Through `docker compose`."""
    compose = ["docker", "compose", "--project-directory", str(HERE.parent)]
    line = ["run", "--rm", "--no-deps", "-T", "--user", f"{os.getuid()}:{os.getgid()}", "-v", "{folder}:/backup"]
    return Tools(
        postgres=[*compose, "exec", "-T", "postgres"],
        buckets=[*compose, *line, "worker", "python", "deployments/buckets.py"],
        folder="/backup",
        user=["--username", "postgres"],
    )


def direct_tools() -> Tools:
    """As programs of this machine."""
    return Tools(postgres=[], buckets=[sys.executable, str(HERE / "buckets.py")])


def save(folder: Path, tools: Tools) -> None:
    """Save everything; a backup that was there before is replaced when the new one is whole.

    Raises:
        BackupError: a part could not be saved; what was there before still is.
    """
    folder = folder.resolve()
    if folder.exists() and not (folder / MARK).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BackupError(f"{folder} holds something else than a backup: choose another folder")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        _save_into(part, tools)
    except BaseException:  # Ctrl-C as well: nobody would look for it there, and it may fill the disk
        shutil.rmtree(part, ignore_errors=True)
        raise
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _save_into(part: Path, tools: Tools) -> None:
    part.mkdir(parents=True)
    sums = {}
    for name in OWNERS:
        dump = part / f"{name}.dump"
        with dump.open("wb") as file:
            _run([*tools.postgres, "pg_dump", *tools.user, "--format=custom", "--dbname", name], output=file)
        sums[name] = _digest(dump)
        sys.stdout.write(f"backup: database {name}, {dump.stat().st_size} bytes\n")
    _run_buckets(tools, part, "save")
    at = datetime.now(UTC).isoformat(timespec="seconds")
    (part / MARK).write_text(json.dumps({"saved": at, "databases": sums}, indent=1), encoding="utf-8")


def restore(folder: Path, tools: Tools, *, force: bool = False) -> None:
    """Bring everything back: the buckets, then each database, dropped and made anew.

    Args:
        folder: that `save` has filled.
        tools: to do it with.
        force: also when databases and buckets are in use: databases are replaced, objects of the same name overwritten.

    Raises:
        BackupError: the folder is not whole, the stack is not empty, or somebody is connected (nothing was written
            then); or a part could not be restored, and which ones were.
    """
    folder = folder.resolve()
    _check_whole(folder)
    if connected := _ask(tools, "postgres", _CONNECTED):
        raise BackupError(
            f"{connected} are connected to the databases: stop all services but postgres and s3. {NOTHING_DONE}"
        )
    if not force:
        filled = [name for name in OWNERS if _is_filled(tools, name)]
        if filled:
            raise BackupError(
                f"the database {filled[0]} is in use already: restore into a new stack of which only postgres and s3 "
                f"have been started, or give --force to replace what is there. {NOTHING_DONE}"
            )
    done: list[str] = []
    try:
        _run_buckets(tools, folder, "restore", *(["--force"] if force else []))
        done.append("buckets")
        for name, owner in OWNERS.items():
            _replace_database(tools, name, owner, folder / f"{name}.dump")
            done.append(name)
            sys.stdout.write(f"restore: database {name}\n")
    except BackupError as error:
        if not done:
            raise
        raise BackupError(
            f"half restored ({', '.join(done)}; not the rest): {error}. Start no service; give the command again with "
            "--force when the reason is gone"
        ) from None


_CONNECTED = (
    "select coalesce(string_agg(distinct datname || ' (' || usename || ')', ', '), '') from pg_stat_activity "
    f"where datname in ({', '.join(repr(name) for name in OWNERS)}) and pid <> pg_backend_pid()"
)


def _replace_database(tools: Tools, name: str, owner: str, dump: Path) -> None:
    for query in (
        f'DROP DATABASE IF EXISTS "{name}"',
        f'CREATE DATABASE "{name}" OWNER "{owner}"',
        f'REVOKE CONNECT ON DATABASE "{name}" FROM PUBLIC',
    ):
        _ask(tools, "postgres", query)
    command = [*tools.postgres, "pg_restore", *tools.user, "--exit-on-error", "--single-transaction", "--dbname", name]
    with dump.open("rb") as file:
        _run(command, source=file)


def _check_whole(folder: Path) -> None:
    if not (folder / MARK).exists():
        raise BackupError(f"{folder} holds no whole backup: {MARK} is missing. {NOTHING_DONE}")
    try:
        sums = dict(json.loads((folder / MARK).read_text(encoding="utf-8"))["databases"])
    except (ValueError, KeyError, TypeError):
        raise BackupError(f"{folder} holds no whole backup: {MARK} is damaged. {NOTHING_DONE}") from None
    for name in OWNERS:
        if not (folder / f"{name}.dump").is_file() or _digest(folder / f"{name}.dump") != sums.get(name):
            raise BackupError(f"{folder}/{name}.dump is missing or altered. {NOTHING_DONE}")


def _is_filled(tools: Tools, name: str) -> bool:
    return _ask(tools, name, f"select to_regclass('public.{FIRST_TABLES[name]}') is not null") == "t"


def _ask(tools: Tools, database: str, query: str) -> str:
    command = [*tools.postgres, "psql", *tools.user, "--no-psqlrc", "--tuples-only", "--no-align", "--quiet"]
    command += ["--set=ON_ERROR_STOP=1", "--dbname", database, "--command", query]
    return _run(command, output=subprocess.PIPE).decode().strip()


def _run_buckets(tools: Tools, folder: Path, *words: str) -> None:
    command = [*tools.buckets, words[0], tools.folder, *words[1:]]
    _run([part.replace("{folder}", str(folder)) for part in command])


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
    parser.add_argument("--force", action="store_true", help="replace databases that are in use, overwrite objects")
    parser.add_argument("--direct", action="store_true", help="reach PostgreSQL by PG*, S3 by AWS_* variables")
    given = parser.parse_args()
    os.umask(0o077)
    tools = direct_tools() if given.direct else compose_tools()
    try:
        if given.what == "save":
            save(given.folder, tools)
        else:
            restore(given.folder, tools, force=given.force)
    except (BackupError, OSError) as error:
        sys.exit(f"backup: {error}")
    sys.stdout.write(f"backup: {given.what}d, {given.folder}\n")


if __name__ == "__main__":
    main()
