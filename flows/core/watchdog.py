"""The servers that a command starts end with it, even when it is killed outright. Core layer.

A command ends its own servers (Prefect's temporary one, the Bento under test) in every way but one: `kill -9`, or the
kernel out of memory. So a small watchdog holds the reading end of a pipe whose other end is held by nobody but the
command. When the command is gone the pipe closes, and the watchdog ends every process that inherited its mark.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import uuid

import psutil  # type: ignore[import-untyped]

from flows.settings import hand_on

OWNER = "EKIBEN_OWNER"  # variable that children inherit
STOP_TIMEOUT_S = 15.0


@functools.cache
def end_children_with_this_process() -> subprocess.Popen[bytes]:
    """Mark every process that is started from now on, and start the watchdog; a second call changes nothing."""
    mark = uuid.uuid4().hex
    hand_on(OWNER, mark)
    return subprocess.Popen(  # kept by the cache: letting it go would close the pipe
        [sys.executable, "-P", "-m", "flows.core.watchdog", mark],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the command
    )


def end_marked(mark: str) -> None:
    """End every process of this user that carries `mark`, politely, then not."""
    marked = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(OWNER) == mark:
                process.terminate()
                marked.append(process)
    for process in psutil.wait_procs(marked, STOP_TIMEOUT_S)[1]:
        with contextlib.suppress(psutil.Error):
            process.kill()


def main() -> None:
    """Wait until the command that holds the pipe is gone, then end what it left behind."""
    sys.stdin.buffer.read()
    end_marked(sys.argv[1])


if __name__ == "__main__":
    main()
