"""A team's own checkout of the project, with data of its own in DVC."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
AUTHOR = {
    "GIT_AUTHOR_NAME": "Ana",
    "GIT_AUTHOR_EMAIL": "ana@example.com",
    "GIT_COMMITTER_NAME": "Ana",
    "GIT_COMMITTER_EMAIL": "ana@example.com",
}


def clone(source: Path, to: Path) -> Path:
    """Clone a repository."""
    _run(["git", "clone", "--quiet", str(source), str(to)], source.parent, {})
    return to


def copy_working_tree(to: Path) -> Path:
    """Clone the project with what is changed and not yet committed, and commit that there."""
    clone(ROOT, to)
    listed = _run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT, {})
    for name in filter(None, listed.split("\0")):
        source = ROOT / name
        if source.is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, to / name)
        else:
            (to / name).unlink(missing_ok=True)
    commit(to, "As it is in the working tree")
    return to


def commit(project: Path, message: str) -> str:
    """Commit all that is changed; returns the commit that is checked out then."""
    _run(["git", "add", "--all"], project, {})
    _run(["git", "commit", "--quiet", "--allow-empty", "-m", message], project, {})
    return _run(["git", "rev-parse", "HEAD"], project, {}).strip()


def pull(project: Path) -> None:
    """Bring a clone up to date."""
    _run(["git", "pull", "--quiet", "--ff-only"], project, {})


def dvc(project: Path, environment: Mapping[str, str], *arguments: str) -> str:
    """Run dvc in a checkout, with the S3 of the stack."""
    s3 = {name: value for name, value in environment.items() if name.startswith("AWS_")}
    return _run([sys.executable, "-m", "dvc", *arguments], project, s3 | {"DVC_NO_ANALYTICS": "1"})


def _run(command: list[str], cwd: Path, changes: Mapping[str, str]) -> str:
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(command, cwd=cwd, env=own | AUTHOR | changes, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout
