"""Where a run comes from: the commit of the code and the hash of the package lock. Core layer, no vendor."""

from __future__ import annotations

import subprocess
from pathlib import Path

from bentos.manifest import sha256_file

LOCK_FILE = Path("deployments") / "requirements.lock"
GIT_TIMEOUT_S = 20.0


def git_commit(root: Path) -> str | None:
    """Return the commit that is checked out at `root` (40 hex digits).

    `-dirty` is appended when a tracked file differs from it. None when `root` is no Git working tree, has no commit
    yet, or Git is not installed or does not answer in time: a run never fails for want of a commit.
    """
    commit = _ask_git(root, "rev-parse", "--verify", "HEAD")
    if not commit:
        return None
    # --untracked-files=no: a stray file does not change what the tracked code does.
    changes = _ask_git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changes is None or changes else commit


def lock_sha256(root: Path) -> str | None:
    """Return the SHA-256 of `deployments/requirements.lock` below `root`, in hex; None when there is no such file."""
    path = root / LOCK_FILE
    return sha256_file(path) if path.is_file() else None


def _ask_git(root: Path, *arguments: str) -> str | None:
    # --no-optional-locks: asking must not disturb a Git command that runs at the same time.
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
