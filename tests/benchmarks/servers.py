"""A server under test: started as a process of its own, watched (time, memory, CPU of all its processes), ended."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from flows.core.serving import stop
from flows.core.watchdog import OWNER, end_children_with_this_process
from tests.benchmarks.connection import HOST
from tests.benchmarks.peers import Peer
from tests.processes import find_free_port

logger = logging.getLogger(__name__)
START_TIMEOUT_S, ANSWER_TIMEOUT_S = 180.0, 60.0
POLL_S = 0.02
# What the environment of whoever starts the benchmark must not decide.
NOT_INHERITED = ("EKIBEN_", "BENTOML_", "INFINITY_", "OMP_", "MKL_", "TOKENIZERS_PARALLELISM", "PYTHONPATH")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
MIB = 2**20


class ServerError(Exception):
    """A server did not start, or answered wrongly."""


@dataclass(frozen=True)
class Memory:
    """Memory of all processes of a server together, in MiB."""

    pss_mb: float  # shared pages divided among those that share them: what the machine really gives
    rss_mb: float  # shared pages counted once in every process


@dataclass(frozen=True)
class RunningServer:
    """A server that answers."""

    peer: Peer
    port: int
    process: psutil.Process
    started: float  # time.perf_counter() at the start of the process
    ready_s: float  # until readiness first answered 200

    def post(self, body: bytes) -> bytes:
        """Send one request and return the body of its answer.

        Raises:
            ServerError: when there is no answer, or its status is not 200.
        """
        try:
            status, answer = _request(self.port, "POST", self.peer.path, body)
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{self.peer.name}: POST {self.peer.path}: {error!r}") from error
        if status != 200:
            raise ServerError(f"{self.peer.name}: POST {self.peer.path} answered {status}: {answer[:300]!r}")
        return answer

    def cpu_s(self) -> float:
        """CPU time, user and system, that all processes of the server have taken so far."""
        total = 0.0
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def measure_memory(self) -> Memory:
        """Resident memory of all processes of the server."""
        pss = rss = 0
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                info = process.memory_full_info()
                pss += info.pss
                rss += info.rss
        return Memory(pss / MIB, rss / MIB)

    def _family(self) -> list[psutil.Process]:
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            raise ServerError(f"{self.peer.name} has ended by itself; its log is in .bench/logs") from None


@contextlib.contextmanager
def running(peer: Peer, log: Path) -> Iterator[RunningServer]:
    """Run `peer` on a free port until the block ends; yields when its readiness answers 200.

    Raises:
        ServerError: when it does not become ready; quotes the end of its log.
    """
    port = find_free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [part.format(port=port) for part in peer.command]
    end_children_with_this_process()  # also when this one is killed
    with log.open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=log.parent,
            env=_make_environment(peer.environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        _wait_until_ready(process, port, peer, log)
        ready_s = time.perf_counter() - started
        yield RunningServer(peer, port, psutil.Process(process.pid), started, ready_s)
    finally:
        stop(process)


def _make_environment(own: Mapping[str, str]) -> dict[str, str]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED) or name == OWNER
    }
    return {**inherited, **OFFLINE, **own}


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, peer: Peer, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if _request(port, "GET", peer.ready_path)[0] == 200:
                return
        time.sleep(POLL_S)
    end = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise ServerError(f"{peer.name} did not become ready (exit code {process.poll()}); its log ends:\n{end}")


def _request(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(HOST, port, timeout=ANSWER_TIMEOUT_S)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"} if body is not None else {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
