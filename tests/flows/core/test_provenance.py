"""The commit and the lock hash of a run."""

from __future__ import annotations

import hashlib
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from flows.core.provenance import differing_packages, find_commit, git_commit, lock_sha256


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "code.py").write_text("x = 1\n")
    git(folder, "add", "code.py")
    git(folder, "commit", "--quiet", "-m", "first")
    return folder


def test_a_clean_tree_gives_its_commit(repository: Path) -> None:
    assert git_commit(repository) == git(repository, "rev-parse", "HEAD")


def test_an_image_has_a_file_in_place_of_a_repository(tmp_path: Path) -> None:
    (tmp_path / "REVISION").write_text("0123456789" * 4 + "\n")
    assert git_commit(tmp_path) == "0123456789" * 4
    (tmp_path / "REVISION").write_text("unknown\n")
    assert git_commit(tmp_path) is None


def test_a_changed_tracked_file_makes_the_commit_dirty(repository: Path) -> None:
    (repository / "code.py").write_text("x = 2\n")
    assert git_commit(repository) == git(repository, "rev-parse", "HEAD") + "-dirty"


def test_an_untracked_file_does_not_make_the_commit_dirty(repository: Path) -> None:
    (repository / "notes.txt").write_text("hello\n")
    assert git_commit(repository) == git(repository, "rev-parse", "HEAD")


def test_no_repository_and_no_commit_yet_give_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit(tmp_path) is None
    assert git_commit(tmp_path / "missing") is None
    git(tmp_path, "init", "--quiet")
    assert git_commit(tmp_path) is None


def test_without_git_the_commit_is_none(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_commit(repository) is None


def test_the_lock_is_hashed_and_may_be_missing(tmp_path: Path) -> None:
    assert lock_sha256(tmp_path) is None
    lock = tmp_path / "deployments" / "requirements.lock"
    lock.parent.mkdir()
    lock.write_bytes(b"numpy==2.4.0\n")
    assert lock_sha256(tmp_path) == hashlib.sha256(b"numpy==2.4.0\n").hexdigest()


def test_a_commit_is_found_by_its_hash_and_by_nothing_else(repository: Path) -> None:
    sha = git(repository, "rev-parse", "HEAD")
    for name in (sha, sha[:8], f"{sha}-dirty"):
        found = find_commit(repository, name)
        assert found is not None
        assert (found.sha, found.subject) == (sha, "first")
        assert found.date.startswith("20")
    for name in ("HEAD", "main", "", "--help", "f" * 40):
        assert find_commit(repository, name) is None
    assert find_commit(repository / "missing", sha) is None


def test_only_pins_for_this_machine_are_compared(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    version = metadata.version("pytest").partition("+")[0]
    lines = [
        "# a comment",
        f"pytest=={version}",
        "hypothesis==0.0.1 \\",
        "    --hash=sha256:abc",
        "numpy==0.0.1 ; python_full_version < '3'",
        "ruff[x]==0.0.2 ; python_full_version >= '3'  # why",
        "nothing-of-that-name==1",
        "--index-url https://example.org",
    ]
    lock.write_text("\n".join(lines))
    assert differing_packages(lock) == {
        "hypothesis": ("0.0.1", metadata.version("hypothesis")),
        "ruff": ("0.0.2", metadata.version("ruff")),
    }
