"""`bentoml serve` as a child of the `ekiben` command: start, wait until ready, pass signals on, end it."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]

from flows.core.watchdog import end_children_with_this_process
from flows.errors import EkibenError, ParamsError
from flows.settings import child_environment, default_serving_environment

READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 15.0
LOG_LINES = 8


def check_port(host: str, port: int) -> None:
    """Refuse a port that is taken, before any work is done.

    Raises:
        ParamsError: names the port and the cure.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ParamsError(
                f"cannot listen on {host}:{port} ({error.strerror}); give another one with --port, or stop what uses it"
            ) from None


def local_url(host: str, port: int) -> str:
    """Address at which this machine reaches a server that listens on `host`."""
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"


@contextlib.contextmanager
def served_bento(
    tag: str, *, host: str, port: int, log: Path, by_default: bool = False, home: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `bentoml serve TAG` until the block ends; its output goes to the file `log`.

    With `by_default` the server does not get the settings that the user made for his own; with `home` it has the stores
    of that BentoML home folder.
    """
    command = [str(Path(sys.executable).with_name("bentoml")), "serve", tag, "--host", host, "--port", str(port)]
    end_children_with_this_process()
    environment = default_serving_environment() if by_default else child_environment({})
    if home is not None:
        environment["BENTOML_HOME"] = str(home)
    with log.open("wb") as output:
        # A session of its own: Ctrl-C reaches the server once, through us, and not a second time from the terminal.
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, env=environment)
        try:
            yield process
        finally:
            stop(process)


def wait_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until `url`/readyz answers. Once the server answers at all its model is loaded, so a 503 is final.

    Raises:
        EkibenError: when the server ends, says that it is not ready, or does not answer in time; quotes its log.
    """
    deadline = time.monotonic() + READY_TIMEOUT_S
    problem = f"the server did not answer within {READY_TIMEOUT_S:.0f} s"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            problem = f"the server ended with exit code {process.returncode} before it was ready"
            break
        with contextlib.suppress(httpx.TransportError):
            response = httpx.get(f"{url}/readyz", timeout=30)
            if response.status_code == 200:
                return
            problem = f"/readyz answered {response.status_code}: {response.text[:300]}"
            break
        time.sleep(0.1)
    raise EkibenError(f"{problem}. {quote_log(log)}")


def wait_for_end(process: subprocess.Popen[bytes]) -> int:
    """Wait for the server; SIGINT and SIGTERM are passed on to it. Returns its exit code, 0 when we ended it."""
    with passing_signals(process) as passed:
        code = process.wait()
    return 0 if passed else code


@contextlib.contextmanager
def passing_signals(process: subprocess.Popen[Any]) -> Iterator[list[int]]:
    """While the block runs, hand SIGINT and SIGTERM on to `process`; yields the list of those that were."""
    passed: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        passed.append(number)
        process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield passed
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server, politely, then not; and its workers, which outlive a parent that had to be killed."""
    workers: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        workers = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for worker in psutil.wait_procs(workers, timeout=5)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()


def quote_log(log: Path) -> str:
    """The end of a server's log, in one line."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LOG_LINES:]
    return f"The server's log ({log}) ends: {' | '.join(lines) or '(empty)'}"
