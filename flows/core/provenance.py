"""Where a run comes from: the commit of the code and the hash of the package lock; and a way back there.

Core layer, no vendor.
"""

from __future__ import annotations

import re
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from bentos.manifest import sha256_file

DIRTY = "-dirty"
REVISION_FILE = "REVISION"  # what an image has in place of a repository: deployments/images/line.Dockerfile writes it
LOCK_FILE = Path("deployments") / "requirements.lock"
GIT_TIMEOUT_S = 20.0


def git_commit(root: Path) -> str | None:
    """Return the commit that is checked out at `root` (40 hex digits).

    `-dirty` is appended when a tracked file differs from it. In an image it is what the file `REVISION` says. None when
    there is neither such a file nor a Git working tree with a commit, or Git is not installed or does not answer in
    time: a run never fails for want of a commit.
    """
    commit = ask_git(root, "rev-parse", "--verify", "HEAD")
    if not commit:
        return _recorded_commit(root)
    # --untracked-files=no: a stray file does not change what the tracked code does.
    changes = ask_git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}{DIRTY}" if changes is None or changes else commit


def _recorded_commit(root: Path) -> str | None:
    try:
        recorded = (root / REVISION_FILE).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return recorded if re.fullmatch(rf"[0-9a-f]{{40}}({DIRTY})?", recorded) else None


def lock_sha256(root: Path) -> str | None:
    """Return the SHA-256 of `deployments/requirements.lock` below `root`, in hex; None when there is no such file."""
    path = root / LOCK_FILE
    return sha256_file(path) if path.is_file() else None


@dataclass(frozen=True)
class Commit:
    """A commit that a repository has."""

    sha: str  # 40 hex digits
    date: str  # ISO 8601, of the commit
    subject: str


def find_commit(root: Path, commit: str) -> Commit | None:
    """Look a commit up in the repository around `root`; None when it is not there, or there is no repository.

    Args:
        root: Any folder of the repository.
        commit: A commit's hash, or its beginning; `-dirty` at its end is passed over.
    """
    sha = commit.removesuffix(DIRTY)
    if not re.fullmatch(r"[0-9a-fA-F]{4,64}", sha):  # a branch of that name may have moved on
        return None
    answer = ask_git(root, "show", "--no-patch", "--format=%H%n%cI%n%s", f"{sha}^{{commit}}", "--")
    if not answer:
        return None
    found, date, subject = [*answer.split("\n", 2), "", ""][:3]
    return Commit(found, date, subject)


def differing_packages(lock: Path) -> dict[str, tuple[str, str]]:
    """Packages of a lock that this interpreter has in another version: name -> (locked, installed).

    Packages that are not installed, pins for other machines and Pythons, and the local part of a version (`+cpu`) are
    passed over.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    differing = {}
    for line in lock.read_text(encoding="utf-8").splitlines():
        with suppress(InvalidRequirement, metadata.PackageNotFoundError):  # a comment, an option, a hash; not installed
            pin = Requirement(line.partition(" #")[0].rstrip(" \\"))
            locked = next((item.version for item in pin.specifier if item.operator == "=="), None)
            if locked is None or (pin.marker is not None and not pin.marker.evaluate()):
                continue
            installed = metadata.version(pin.name)
            if installed.partition("+")[0] != locked.partition("+")[0]:
                differing[pin.name] = (locked, installed)
    return differing


def ask_git(root: Path, *arguments: str) -> str | None:
    """Return what a Git command that only reads answers in the folder `root`; None when it fails or there is no Git."""
    # --no-optional-locks: asking must not disturb a Git command that runs at the same time.
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
