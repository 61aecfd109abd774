"""A command that is killed outright leaves no server behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

SERVER = "import time; time.sleep(600)"
COMMAND = f"""
import subprocess, sys, time
from flows.core.watchdog import end_children_with_this_process
before = subprocess.Popen([sys.executable, "-c", {SERVER!r}])
end_children_with_this_process()
end_children_with_this_process()
after = subprocess.Popen([sys.executable, "-c", {SERVER!r}], start_new_session=True)
print(before.pid, after.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_command_has_started_ends_with_it(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "flows").mkdir()  # a folder of that name where the command runs is not our package
    (tmp_path / "flows" / "__init__.py").write_text("raise RuntimeError")
    environment = {name: value for name, value in os.environ.items() if name != "EKIBEN_OWNER"}
    command = subprocess.Popen(
        [sys.executable, "-P", "-c", COMMAND], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    )
    assert command.stdout is not None
    before, after = (psutil.Process(int(pid)) for pid in command.stdout.readline().split())
    try:
        command.send_signal(number)
        command.wait(30)
        psutil.wait_procs([after], timeout=30)
        assert not after.is_running()
        assert before.is_running(), "only what was started under the mark is ended"
    finally:
        for process in (before, after):
            if process.is_running():
                process.kill()


def test_the_watchdog_leaves_with_a_command_that_ends_by_itself() -> None:
    code = "from flows.core.watchdog import end_children_with_this_process as e; print(e().pid, flush=True)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    try:
        watchdog = psutil.Process(int(ended.stdout))
    except psutil.NoSuchProcess:
        return
    watchdog.wait(30)
