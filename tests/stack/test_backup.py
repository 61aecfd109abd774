"""A backup of the running stack, brought back into empty servers: runs, registry, data, and the champion's vectors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.stack.conftest import PAIRS, Line
from tests.stack.line import Encoder, Prefect, say
from tests.stack.native import NativeStack, ended, make_database
from tests.stack.project import clone, dvc, pull
from tests.stack.registry import champion, read_runs, read_versions

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]


def test_a_backup_of_the_running_stack_is_whole_or_refused(line: Line) -> None:
    folder = line.stack.root / "backup"
    backup(line.stack, "save", folder)
    assert folder.stat().st_mode & 0o077 == 0, "it holds what only its owner may read"
    assert "are connected" in backup(line.stack, "restore", folder, expected=1)
    with altered(folder / "mlflow.dump"):
        refused = backup(line.stack, "restore", folder, expected=1)
    assert "mlflow.dump is missing or altered" in refused


def test_a_stack_that_is_lost_comes_back_from_its_backup(line: Line, tmp_path: Path) -> None:
    folder = line.stack.root / "backup"
    before = (read_runs(line.stack), read_versions(line.stack), champion(line.stack))
    deployments = {found["name"] for found in line.prefect.post("/deployments/filter")}
    model, vectors = line.encoder.encode()
    assert model == before[2]
    backup(line.stack, "save", folder)
    line.stack.stop()
    with new_stack(line) as other:
        make_database(other)
        other["s3"].start()
        other["s3"].wait_healthy()
        with altered(largest_object(folder)):  # only an empty stack gets as far as the objects
            refused = backup(other, "restore", folder, expected=1)
        assert "1 objects in" in refused
        assert "missing or altered" in refused
        backup(other, "restore", folder)
        assert "in use already" in backup(other, "restore", folder, expected=1)
        other.start("mlflow", "prefect")
        other["setup"].run()
        other.start("encoder")
        assert (read_runs(other), read_versions(other), champion(other)) == before
        assert {found["name"] for found in Prefect(other).post("/deployments/filter")} == deployments
        same = Encoder(other).wait_for_version(str(model))
        assert abs(same - vectors).max() < 1e-5
        clean = clone(line.team, tmp_path / "clean")
        pull(clean)
        dvc(clean, other["worker"].environment, "pull", PAIRS)
        assert (clean / PAIRS).read_bytes() == (line.team / PAIRS).read_bytes()
    say(
        f"backup: {len(before[0])} runs, {len(before[1])} versions, the data and {model} came back into empty servers; "
        "a new encoder answers with the same vectors"
    )


def backup(stack: NativeStack, what: str, folder: Path, *, expected: int = 0) -> str:
    """Run deployments/backup.py against a stack; returns what it said."""
    postgres = stack["postgres"].environment
    own = {"PGHOST": stack.addresses["postgres"], "PGUSER": "postgres", "PGPASSWORD": postgres["POSTGRES_PASSWORD"]}
    command = [sys.executable, "deployments/backup.py", what, str(folder), "--direct"]
    environment = stack["worker"].environment | own
    done = subprocess.run(
        command, cwd=stack.app, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout + done.stderr


@contextmanager
def altered(path: Path) -> Iterator[None]:
    """One byte of a file is another one until the block ends."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        yield
    finally:
        path.write_bytes(content)


def largest_object(folder: Path) -> Path:
    """A file of the backup that was an object of a bucket, and is not empty."""
    index = json.loads((folder / "buckets.json").read_text(encoding="utf-8"))
    return max((folder / name for name in index), key=lambda path: path.stat().st_size)


@contextmanager
def new_stack(line: Line) -> Iterator[NativeStack]:
    """Another stack with the same .env and nothing in it."""
    root = line.stack.root / "other"
    root.mkdir(mode=0o711)
    old = line.stack
    stack = NativeStack(old.services, root, old.project, old.app, line.image_tag, old.bento_home, number=1)
    with ended(stack):
        yield stack
