"""A BentoML home of one's own, and real servers in it, for the tests of the service and of packing."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from bentos.manifest import read_manifest, write_manifest
from tests.processes import find_free_port

START_TIMEOUT_S = 120.0


@contextlib.contextmanager
def bento_home(home: Path) -> Iterator[Path]:
    """Make this process and its children use the stores in `home`; BentoML itself reads BENTOML_HOME only once."""
    from bentoml._internal.bento import BentoStore
    from bentoml._internal.configuration.containers import BentoMLContainer
    from bentoml._internal.models import ModelStore

    for name in ("bentos", "models", "tmp"):
        (home / name).mkdir(parents=True, exist_ok=True)
    before = os.environ.get("BENTOML_HOME")
    stores = (BentoMLContainer.bento_store.get(), BentoMLContainer.model_store.get())  # perhaps of a home around this
    os.environ["BENTOML_HOME"] = str(home)
    BentoMLContainer.bento_store.set(BentoStore(home / "bentos"))
    BentoMLContainer.model_store.set(ModelStore(home / "models"))
    try:
        yield home
    finally:
        BentoMLContainer.bento_store.set(stores[0])
        BentoMLContainer.model_store.set(stores[1])
        if before is None:
            del os.environ["BENTOML_HOME"]
        else:
            os.environ["BENTOML_HOME"] = before


def copy_lunchbox(box: Path, to: Path, *, version: str, run_id: str) -> Path:
    """Copy a lunchbox under another version and run."""
    shutil.copytree(box, to)
    write_manifest(to, read_manifest(to).model_copy(update={"version": version, "run_id": run_id}))
    return to


@dataclass(frozen=True)
class Server:
    """A running `bentoml serve`."""

    url: str
    pid: int
    log: Path

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30)

    def worker_pid(self) -> int:
        children = psutil.Process(self.pid).children(recursive=True)
        return int(max(children, key=lambda child: child.memory_info().rss).pid)


@contextlib.contextmanager
def serve(target: str, home: Path, cwd: Path, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run `bentoml serve TARGET` on a free port until the block ends; yields when it answers, ready or not."""
    port = find_free_port()
    cwd.mkdir(parents=True, exist_ok=True)
    log = cwd / f"serve-{port}.log"
    command = [sys.executable, "-m", "bentoml", "serve", target, "--host", "127.0.0.1", "--port", str(port)]
    own = {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "true", **(environment or {})}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=cwd, env=os.environ | own, stdout=output, stderr=output)
    server = Server(f"http://127.0.0.1:{port}", process.pid, log)
    family: list[psutil.Process] = []
    try:
        _wait_for_an_answer(server, process)
        family = psutil.Process(process.pid).children(recursive=True)
        yield server
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        for left in psutil.wait_procs([*family, process], timeout=5)[1]:
            with contextlib.suppress(psutil.NoSuchProcess, AttributeError):
                left.kill()


def _wait_for_an_answer(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with server.client() as client:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                client.get("/livez")
                return
            time.sleep(0.1)
    raise AssertionError(f"the server did not start:\n{server.log.read_text()}")
