"""Which processes belong to one server, and which have ended."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bentos.siblings import is_alive, name_process, open_server_folder, started


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


def test_a_process_is_alive_until_it_ends(child: subprocess.Popen[bytes]) -> None:
    name = name_process(child.pid)
    assert name is not None
    assert is_alive(name)
    child.kill()
    child.wait()
    assert not is_alive(name)
    assert name_process(child.pid) is None


def test_a_process_that_ended_and_was_not_waited_for_is_dead(child: subprocess.Popen[bytes]) -> None:
    name = name_process(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert name is not None
    assert not is_alive(name)


def test_the_same_number_started_at_another_time_is_another_process() -> None:
    assert not is_alive(f"{os.getpid()}-1")
    assert not is_alive("")
    assert started("no-process") is None


def test_the_workers_of_a_server_share_a_folder_and_sweep_those_of_the_dead(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    here = Path("/proc/self/ns/pid").stat().st_ino
    other = tmp_path / f"test-{here}-{name_process(child.pid)}"
    dead, strange, elsewhere = (tmp_path / name for name in (f"test-{here}-1-1", "another-1-1", "test-7-1-1"))
    for folder in (other, dead, strange, elsewhere):
        folder.mkdir()
        (folder / "file").touch()
    folder = open_server_folder("test-")
    assert folder == open_server_folder("test-") == tmp_path / f"test-{here}-{name_process(os.getppid())}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (other.exists(), dead.exists(), strange.exists()) == (True, False, True)
    assert elsewhere.exists(), "another container's processes cannot be seen from here"


def test_a_folder_that_somebody_else_put_there_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    here = Path("/proc/self/ns/pid").stat().st_ino
    (tmp_path / f"test-{here}-{name_process(os.getppid())}").symlink_to(tmp_path / "elsewhere")
    assert open_server_folder("test-") is None
