"""Processes of their own that run a flow and are killed at a given step: what the kill tests drive.

A process comes from a server that has imported everything once and forks. In it the functions that do the steps are
wrapped, so that the n-th call of any of them can be the last thing that the process does, before or after its work; the
code of the product knows nothing of it.
"""

from __future__ import annotations

import errno
import importlib
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.serving import bento_home

# Whatever writes something that outlives the process: object > its function, as the caller knows it.
STEPS = (
    "flows.core.boxes:replaced_folder",
    "flows.core.folders:put_folder",
    "flows.core.lunchbox:replace_files",
    "flows.core.packing:put_folder",
    "flows.core.packing:store_model",
    "flows.core.promotion:begin_act",
    "flows.core.promotion:point_latest",
    "flows.core.promotion:write_alias",
    "flows.core.tracking:Tracker.claim",
    "flows.core.tracking:Tracker.log_folder",
    "flows.core.tracking:Tracker.log_metrics",
    "flows.core.tracking:Tracker.set_alias",
    "flows.core.tracking:Tracker.set_model_tag",
    "flows.core.tracking:Tracker.set_tags",
    "flows.core.tracking:Tracker.set_version_tags",
    "flows.core.tracking:Tracker.unclaim",
    "flows.release:attach_compat",
    "flows.release:carry_out",
    "flows.release:finish_card",
    "flows.release:install",
    "flows.release:keep_again",
    "flows.release:keep_release",
    "flows.release:measure_bentos",
    "flows.release:pack_lunchbox",
    "flows.release:put_back",
    "flows.release:stage_bento",
    "flows.rollback:carry_out",
    "flows.rollback:put_back",
)
PRELOADED = ("tests.flows.killing", "flows.release", "flows.rollback", "flows.train", "bentoml", "mlflow", "torch")
QUICK = {"p95_ms": 5.0, "texts_per_s": 500.0, "start_s": 4.0, "memory_mb": 200.0, "bytes_per_vector": 128.0}


@dataclass(frozen=True)
class Drive:
    """What a process is to do."""

    home: Path
    prefect_url: str
    log: Path  # gets a line `NAME#n` for each step that is begun, and the error that ended it
    flow: str = "flows.release:release"
    arguments: str = "{}"  # JSON
    kill_at: str = ""  # `NAME#n`: the n-th step that is begun, which must be of that name; empty: no kill
    after: bool = False  # when that step has done its work, instead of before it
    how: Literal["kill", "disk full", "no registry"] = "kill"
    pause_at: str = ""  # name of a step that waits for `go`
    go: Path | None = None


def start(drive: Drive) -> multiprocessing.process.BaseProcess:
    """Start a process; its exit code is that of the `ekiben` command, or minus the signal that killed it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    process = context.Process(target=_run, args=(drive,))
    process.start()
    return process


def run(drive: Drive, *, timeout_s: float = 600.0) -> int:
    """Start a process, wait for its end and return its exit code."""
    process = start(drive)
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"it did not end within {timeout_s:.0f} s; it said: {drive.log.read_text()}")
    return process.exitcode


def steps_of(log: Path) -> list[str]:
    """The steps that a process has begun, in order: `NAME#n`."""
    return [line for line in log.read_text().splitlines() if "#" in line.partition(" ")[0]]


def _run(drive: Drive) -> None:
    os.environ["EKIBEN_HOME"] = str(drive.home)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    from flows.errors import EkibenError

    with drive.log.open("a") as log:
        sys.stdout = sys.stderr = log
        _wrap_steps(drive)
        with bento_home(drive.home / "bentoml"):
            from prefect.settings import PREFECT_API_URL, temporary_settings

            with temporary_settings({PREFECT_API_URL: drive.prefect_url}):
                module, _, name = drive.flow.partition(":")
                try:
                    getattr(importlib.import_module(module), name)(**json.loads(drive.arguments))
                except EkibenError as error:
                    log.write(f"{type(error).__name__}: {error}\n")
                    log.flush()
                    os._exit(error.exit_code)
                except OSError as error:
                    log.write(f"{error}\n")
                    log.flush()
                    os._exit(1)
                except BaseException:
                    traceback.print_exc(file=log)
                    log.flush()
                    os._exit(99)
        log.flush()
    os._exit(0)


def _wrap_steps(drive: Drive) -> None:
    count = 0
    steps = drive.log.with_suffix(".steps").open("a")

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*given: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            label = f"{name}#{count}"
            steps.write(f"{label}\n")
            steps.flush()
            if drive.go is not None and drive.pause_at == name:
                _wait_for(drive.go)
            if label == drive.kill_at and not drive.after:
                _strike(drive.how)
            result = real(*given, **named)
            if label == drive.kill_at:
                _strike(drive.how)
            return result

        return step

    for path in STEPS:
        module, _, name = path.partition(":")
        owner: Any = importlib.import_module(module)
        *classes, name = name.split(".")
        for part in classes:
            owner = getattr(owner, part)
        real = _answer_quickly if name == "measure_bentos" else getattr(owner, name)
        setattr(owner, name, wrap(path.partition(":")[2], real))


def _strike(how: str) -> None:
    from flows.errors import EkibenError

    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "disk full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    raise EkibenError("MLflow, search_model_versions: API request failed: connection refused")


def _answer_quickly(candidate: Any, rival: Any, *, log: Path, home: Path) -> tuple[Any, Any]:
    """The one thing that is not real here: serving both Bentos takes many seconds; test_measuring.py does it."""
    from flows.core.measuring import Serving
    from flows.core.packing import bento_exists

    assert all(bento_exists(tag, home=home) for tag, _ in filter(None, (candidate, rival)))
    return Serving(**QUICK), Serving(**QUICK) if rival else None


def _wait_for(path: Path) -> None:
    import time

    while not path.exists():
        time.sleep(0.02)
