"""deployments/backup.py with stand-ins for PostgreSQL and the buckets; tests/stack does it with real ones."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from deployments.backup import MARK, OWNERS, BackupError, Tools, compose_tools, restore, save

# Stands for every program: notes its words, fails where FAIL says, and answers as the real one does.
PROGRAM = """\
import os, sys
from pathlib import Path
words = sys.argv[1:]
here = Path(os.environ["STAGE"])
with (here / "log").open("a") as log:
    log.write(" ".join(words) + "\\n")
fail = (here / "fail").read_text() if (here / "fail").exists() else ""
if fail and fail in " ".join(words):
    sys.exit("it failed")
if words[0] == "pg_dump":
    sys.stdout.write((here / "state").read_text() + words[-1])
if words[0] == "psql" and words[-1].startswith("select coalesce"):
    sys.stdout.write((here / "connected").read_text())
if words[0] == "psql" and "to_regclass" in words[-1]:
    sys.stdout.write((here / "filled").read_text())
"""


class Stage:
    """A machine of stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "program.py").write_text(PROGRAM)
        self.put(state="one ", connected="", filled="f")
        command = [sys.executable, str(folder / "program.py")]
        self.tools = Tools(postgres=command, buckets=[*command, "buckets"])
        self.backup = folder / "backup"

    def put(self, **files: str) -> None:
        for name, content in files.items():
            (self.folder / name).write_text(content)

    @property
    def log(self) -> list[str]:
        return (self.folder / "log").read_text().splitlines()


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setenv("STAGE", str(tmp_path))
    return Stage(tmp_path)


def test_a_save_that_fails_leaves_the_backup_of_before(stage: Stage) -> None:
    save(stage.backup, stage.tools)
    for failing in ("--dbname prefect", "buckets save"):
        stage.put(state="two ", fail=failing)
        with pytest.raises(BackupError, match="it failed"):
            save(stage.backup, stage.tools)
        assert (stage.backup / "mlflow.dump").read_text() == "one mlflow"
        assert [path.name for path in stage.folder.iterdir() if "backup" in path.name] == ["backup"], "half a backup"
        assert json.loads((stage.backup / MARK).read_text())["databases"].keys() == OWNERS.keys()
    stage.put(fail="")
    save(stage.backup, stage.tools)
    assert (stage.backup / "mlflow.dump").read_text() == "two mlflow"
    assert [path.name for path in stage.folder.iterdir() if "backup" in path.name] == ["backup"]


def test_a_folder_with_something_else_is_left_alone(stage: Stage) -> None:
    stage.backup.mkdir()
    (stage.backup / "photo.jpg").write_text("x")
    with pytest.raises(BackupError, match="something else"):
        save(stage.backup, stage.tools)
    assert [path.name for path in stage.backup.iterdir()] == ["photo.jpg"]
    with pytest.raises(BackupError, match="something else"):
        save(stage.backup / "photo.jpg", stage.tools)


@pytest.mark.parametrize(
    ("state", "match"), [({"connected": "mlflow (mlflow)"}, "are connected"), ({"filled": "t"}, "in use already")]
)
def test_a_stack_in_use_is_not_touched(stage: Stage, state: dict[str, str], match: str) -> None:
    save(stage.backup, stage.tools)
    stage.put(**state)
    (stage.folder / "log").unlink()
    with pytest.raises(BackupError, match=rf"{match}.*Nothing was written"):
        restore(stage.backup, stage.tools)
    assert all(line.startswith("psql") and " select " in line for line in stage.log)


def test_force_replaces_databases_in_use_but_never_under_somebody(stage: Stage) -> None:
    save(stage.backup, stage.tools)
    stage.put(filled="t")
    restore(stage.backup, stage.tools, force=True)
    assert sum("DROP DATABASE" in line for line in stage.log) == len(OWNERS)
    assert any(line.startswith("buckets restore") and line.endswith("--force") for line in stage.log)
    stage.put(connected="prefect (prefect)")
    with pytest.raises(BackupError, match="are connected"):
        restore(stage.backup, stage.tools, force=True)


def test_a_restore_that_fails_says_what_is_done_and_can_be_given_again(stage: Stage) -> None:
    save(stage.backup, stage.tools)
    stage.put(fail="pg_restore --exit-on-error --single-transaction --dbname optuna")
    with pytest.raises(BackupError, match=r"half restored \(buckets, mlflow, mlflow_auth; .*--force"):
        restore(stage.backup, stage.tools)
    stage.put(fail="", filled="t")
    restore(stage.backup, stage.tools, force=True)


def test_a_backup_that_is_not_whole_is_refused(stage: Stage) -> None:
    save(stage.backup, stage.tools)
    (stage.backup / "optuna.dump").write_text("altered")
    with pytest.raises(BackupError, match=r"optuna\.dump is missing or altered"):
        restore(stage.backup, stage.tools)
    for damaged in ("{", "[]", "{}"):
        (stage.backup / MARK).write_text(damaged)
        with pytest.raises(BackupError, match=rf"{MARK} is damaged. Nothing was written"):
            restore(stage.backup, stage.tools)
    (stage.backup / MARK).unlink()
    with pytest.raises(BackupError, match="no whole backup"):
        restore(stage.backup, stage.tools)


def test_compose_is_told_the_project_the_folder_and_the_user() -> None:
    tools = compose_tools()
    assert str(Path(__file__).parents[2]) in tools.postgres
    assert f"{os.getuid()}:{os.getgid()}" in tools.buckets
    assert "{folder}:/backup" in tools.buckets
