"""A real MLflow server, for tests of whatever speaks to one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.processes import find_free_port

START_TIMEOUT_S = 240


@contextlib.contextmanager
def run_mlflow(template: Path, folder: Path, *, port: int | None = None) -> Iterator[str]:
    """Run an MLflow server, which keeps the artifacts itself, until the block ends; yields its address.

    Args:
        template: database to begin with, when the folder has none.
        folder: where database, artifacts and log are.
        port: to listen on; None: a free one.
    """
    folder.mkdir(exist_ok=True)
    if not (folder / "mlflow.db").exists():
        shutil.copy(template, folder / "mlflow.db")
    if port is None:
        port = find_free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/store"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("a") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not _answers(f"{uri}/health"):
                assert process.poll() is None, (folder / "server.log").read_text()
                assert time.monotonic() < deadline, (folder / "server.log").read_text()
                time.sleep(0.5)
            yield uri
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # the group of this server: it was started as one of its own
            process.wait(timeout=60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False
