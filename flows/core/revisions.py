"""Data as it was at a git revision, through DVC's API. The only module that imports dvc.

Core layer, knows nothing about Prefect. It reads what DVC tracks (from its cache, else from its remote) and what git
tracks (outputs with `cache: false`, such as the shipped sample), without touching the working tree.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from flows.errors import DataError, one_line

GIT_TIMEOUT_S = 20.0


class NotTrackedError(DataError):
    """Neither git nor DVC knows the path at that revision."""


def read_at_revision(path: Path, revision: str, *, root: Path) -> bytes:
    """Read a file as it was at a revision.

    Args:
        path: a local path inside a DVC repository; the file need not exist any more. Relative paths start at `root`.
        revision: branch, tag or commit.
        root: where relative paths start.

    Raises:
        NotTrackedError: the path is not tracked at that revision.
        DataError: not in a DVC repository, unknown revision, a folder, or content that neither cache nor remote holds.
        OSError: trouble on the way to a remote that may pass.
    """
    repository, name = _locate(path, root=root)
    with _open_at(repository, revision) as files:
        try:
            if files.isdir(name):
                raise DataError(f"{path} is a folder at revision {revision!r}; give one file in it")
            if not files.exists(name):
                raise NotTrackedError(
                    f"{path} is not tracked at revision {revision!r} of {repository}: `dvc add` or commit it, "
                    "or give a revision that has it"
                )
            content = files.read_bytes(name)
        except FileNotFoundError:
            raise DataError(
                f"{path} is tracked at revision {revision!r}, but neither the DVC cache nor a DVC remote holds "
                "its content: `dvc push` it where it was made, or check `dvc remote list`"
            ) from None
    return bytes(content)


def resolve_revision(path: Path, revision: str, *, root: Path) -> str:
    """The full commit hash that a branch, tag or short hash means in the DVC repository around `path`.

    Raises:
        DataError: not in a DVC repository, or unknown revision.
    """
    repository, _ = _locate(path, root=root)
    with _open_at(repository, revision) as files:
        return str(files.repo.get_rev())


def committed_at(path: Path, revision: str, *, root: Path) -> datetime | None:
    """When the commit was made that last changed the file up to the revision, in UTC; None when git does not say.

    DVC's own files stand for what they track: `data/pairs.csv.dvc`, or `data.dvc` of the folder. What a pipeline made
    has the time of the revision itself.

    Raises:
        DataError: not in a DVC repository, or unknown revision.
    """
    repository, name = _locate(path, root=root)
    commit = resolve_revision(path, revision, root=root)
    parents = [parent.as_posix() for parent in PurePosixPath(name).parents][:-1]
    for names in ([name, *(f"{each}.dvc" for each in (name, *parents))], []):
        said = _ask_git(repository, "log", "-1", "--format=%ct", commit, "--", *names)
        if said:
            return datetime.fromtimestamp(int(said), tz=UTC)
    return None


def _ask_git(repository: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(repository), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _locate(path: Path, *, root: Path) -> tuple[Path, str]:
    """The DVC repository around a path, and the path's name in it."""
    absolute = Path(os.path.abspath(root / path))
    for parent in (absolute, *absolute.parents):
        if (parent / ".dvc").is_dir():
            return parent, absolute.relative_to(parent).as_posix()
    raise DataError(
        f"{absolute} is not in a DVC repository, so it has no revisions: run `dvc init`, or leave out --data-rev"
    )


@contextmanager
def _open_at(repository: Path, revision: str) -> Iterator[Any]:
    """DVC's view of a repository at a revision, its errors translated."""
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc.scm import RevError, SCMError

    if not revision.strip():
        raise DataError("the data revision is empty: give a branch, tag or commit, or leave out --data-rev")
    try:
        files = DVCFileSystem(os.fspath(repository), rev=revision)
        yield files
    except RevError:
        raise DataError(
            f"there is no revision {revision!r} in {repository}: give a branch, tag or commit (`git log "
            "--oneline` lists them)"
        ) from None
    except (DvcException, SCMError) as error:
        raise DataError(f"revision {revision!r} of {repository} cannot be read: {one_line(error)}") from error
