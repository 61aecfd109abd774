"""A real browser for the tests of pages: Chromium or a relative of it, as it is installed on the machine."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
APPLICATIONS = (
    Path("/Applications/Chromium.app/Contents/MacOS/Chromium"),
    Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"),
)
MISSING = (
    "no browser found: `make browser` installs Chromium on Debian and Ubuntu; elsewhere install Chromium or Chrome "
    f"so that one of {', '.join(NAMES)} is on PATH"
)


def find_browser() -> str | None:
    """Path of the first browser found; Playwright's own downloads are not looked for."""
    on_path = (shutil.which(name) for name in NAMES)
    return next(filter(None, on_path), None) or next((str(path) for path in APPLICATIONS if path.exists()), None)


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """Run a headless browser until the block ends; skip the test when there is none.

    Playwright keeps an event loop running in this thread: hold it for one module only, others use `asyncio.run`.
    """
    path = find_browser()
    if path is None:
        pytest.skip(MISSING)
    flags = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        flags.append("--no-sandbox")  # Chromium's sandbox refuses root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


if __name__ == "__main__":  # `make browser` asks whether there is one
    raise SystemExit(0 if find_browser() else MISSING)
