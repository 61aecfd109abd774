"""The secrets of a stack: all are made, none is ever changed, weak ones are refused, nobody else may read them."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.stack_env import LEAST_CHARACTERS, OPTIONS, SECRETS, complete, read_names, write_env

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deployments" / "stack_env.py"


def test_a_new_file_has_every_secret_each_another_and_all_strong() -> None:
    secrets = read_names(complete(""))
    assert set(secrets) == set(SECRETS)
    assert len(set(secrets.values())) == len(SECRETS)
    assert min(map(len, secrets.values())) >= LEAST_CHARACTERS
    assert set(read_names(complete("")).values()).isdisjoint(secrets.values()), "the same secrets for everybody"


def test_secrets_fit_into_addresses_and_shells_as_they_are() -> None:
    assert all(value.isalnum() for value in read_names(complete("")).values())


def test_the_options_are_shown_and_change_nothing() -> None:
    assert OPTIONS in complete("")
    assert read_names(OPTIONS) == {}


def test_a_complete_file_is_left_as_it_is() -> None:
    text = complete("")
    assert complete(text) == text


@pytest.mark.parametrize("end", ["\n", ""], ids=["with a last line end", "without"])
def test_what_is_missing_is_added_below_what_is_there(end: str) -> None:
    name = "GRAFANA_PASSWORD"
    own = f"# ours\n{name}=chosen-by-somebody\nSTACK_BIND=10.0.0.7{end}"
    text = complete(own)
    assert text.startswith(own.rstrip("\n") + "\n")
    names = read_names(text)
    assert names[name] == "chosen-by-somebody"
    assert names["STACK_BIND"] == "10.0.0.7"
    assert set(SECRETS) <= set(names)
    assert text.count(f"{name}=") == 1


@pytest.mark.parametrize("weak", ["", "x" * (LEAST_CHARACTERS - 1)], ids=["empty", "short"])
def test_a_weak_secret_is_refused_without_being_shown(weak: str, tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text(f"S3_SECRET_KEY={weak}\n")
    done = subprocess.run([sys.executable, str(SCRIPT), str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "S3_SECRET_KEY" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not weak or weak not in done.stdout + done.stderr
    assert path.read_text() == f"S3_SECRET_KEY={weak}\n"
    assert list(tmp_path.iterdir()) == [path]


def test_an_identity_is_a_name_and_may_be_short_but_not_empty() -> None:
    assert read_names(complete("S3_ACCESS_KEY=team\n"))["S3_ACCESS_KEY"] == "team"
    with pytest.raises(ValueError, match="S3_ACCESS_KEY"):
        complete("S3_ACCESS_KEY=\n")


@pytest.mark.parametrize("character", ["@", "$", "/", ":", "#", " "])
def test_a_password_that_would_break_an_address_is_refused(character: str) -> None:
    with pytest.raises(ValueError, match="MLFLOW_DB_PASSWORD"):
        complete(f"MLFLOW_DB_PASSWORD=long-enough-{character}-to-be-one\n")


@pytest.mark.parametrize("character", ["$", "#", " ", "'", '"', "\\"])
def test_a_secret_that_compose_would_read_as_something_else_is_refused(character: str) -> None:
    with pytest.raises(ValueError, match="GRAFANA_PASSWORD holds"):
        complete(f"GRAFANA_PASSWORD=long-enough-{character}-to-be-one\n")


@pytest.mark.parametrize("name", ["", "missing/.env"], ids=["a folder", "no folder"])
def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path, name: str) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_only_the_owner_may_read_the_file(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    assert sorted(write_env(path)) == sorted(SECRETS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("\n".join(path.read_text().splitlines()[:-40]) + "\n")
    path.chmod(0o644)
    assert write_env(path), "nothing was missing: this test shows nothing"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert write_env(path) == []
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_the_command_says_names_and_no_values(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    first, second = (
        subprocess.run([sys.executable, str(SCRIPT), str(path)], capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    for name, value in read_names(path.read_text()).items():
        assert name in first.stdout
        assert value not in first.stdout + second.stdout
    assert second.stdout == f"{path}: complete\n"


def test_the_page_on_operations_says_how_each_secret_is_changed() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = page.partition("\n## Changing keys\n")[2].partition("\n## ")[0]
    first_cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
    missing = [name for name in SECRETS if not any(f"`{name}`" in cell for cell in first_cells)]
    assert missing == []
