"""What a flow says while it runs: to Prefect's log and artifacts, and to the terminal when `ekiben` owns it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flows.core.training import Progress as FitProgress

ARTIFACT_SECONDS = 2.0  # an update is an API call: not more often than this
PLAIN_LINES = 10  # of a fit, without a live terminal

_terminal: Console | None = None


def use_terminal(console: Console) -> None:
    """Let the flows of this process speak to `console` as well (standard error, so that standard output stays data)."""
    global _terminal
    _terminal = console


def say(message: str) -> None:
    """Tell the user one line about what happens."""
    get_run_logger().info(message)
    if _terminal is not None:
        _terminal.print(message, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def fit_progress(title: str) -> Iterator[Callable[[FitProgress], None]]:
    """Give what the trainer calls after each step: it feeds a progress artifact in Prefect and a terminal bar."""
    artifact = create_progress_artifact(progress=0.0, key="fit", description=title)
    assert isinstance(artifact, UUID)
    bar = _Bar(title)
    last_sent = 0.0

    def on_progress(progress: FitProgress) -> None:
        nonlocal last_sent
        bar.show(progress)
        if time.monotonic() - last_sent >= ARTIFACT_SECONDS or progress.step == progress.steps:
            last_sent = time.monotonic()
            with suppress(httpx.HTTPError):  # a busy server may miss an update; it must not end the fit
                update_progress_artifact(
                    artifact, progress=100.0 * progress.step / progress.steps, description=_describe(title, progress)
                )

    try:
        yield on_progress
    finally:
        bar.close()


def _describe(title: str, progress: FitProgress) -> str:
    speed = progress.step / progress.elapsed_s if progress.elapsed_s > 0 else 0.0
    left_s = (progress.steps - progress.step) / speed if speed else 0.0
    return (
        f"{_name(title, progress)}: step {progress.step} of {progress.steps}, {speed:.2f} steps/s, "
        f"about {left_s:.0f} s left, loss {progress.loss:.4f}"
    )


def _name(title: str, progress: FitProgress) -> str:
    return f"{title}, distilling" if progress.distilling else title


class _Bar:
    """A live bar when the terminal can show one, plain lines when it cannot, nothing without a terminal."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._lines = 0
        self._distilling = False
        if _terminal is not None and _terminal.is_terminal:
            self._live = Progress(
                TextColumn("  {task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[loss]}"),
                console=_terminal,
                transient=True,
            )
            self._live.start()

    def show(self, progress: FitProgress) -> None:
        if progress.distilling != self._distilling:  # the steps count anew
            self._distilling, self._lines = progress.distilling, 0
        if self._live is not None:
            loss = f"loss {progress.loss:.4f}"
            name = _name(self._title, progress)
            if self._task is None:
                self._task = self._live.add_task(name, total=progress.steps, loss=loss)
            self._live.update(self._task, completed=progress.step, total=progress.steps, description=name, loss=loss)
        elif _terminal is not None and progress.step * PLAIN_LINES // progress.steps > self._lines:
            self._lines = progress.step * PLAIN_LINES // progress.steps
            _terminal.print(f"  {_describe(self._title, progress)}", highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
