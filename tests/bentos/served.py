"""A real server that follows `champion` in a home of its own, and what a test asks of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from bentos.aliases import write_alias
from bentos.manifest import read_manifest
from bentos.sources import point_at
from tests.serving import Server, serve

ADMIN_KEY = "an-admin-key-0123456789"
WAIT_S = 120.0


@dataclass
class Served:
    """A server that follows `champion` in a home of its own."""

    server: Server
    client: httpx.Client
    home: Path

    @property
    def workers(self) -> list[int]:
        """The worker processes that have joined."""
        return [worker["pid"] for worker in self.info()["workers"]]

    def info(self) -> dict[str, Any]:
        """What some worker says, over a connection of its own."""
        return httpx.get(f"{self.server.url}/models/info", timeout=30).json()  # type: ignore[no-any-return]

    def box(self, tag: str) -> Path:
        return self.home / "models" / "ekiben-model" / tag.partition(":")[2]

    def point(self, tag: str, alias: str = "champion") -> None:
        write_alias(self.home, "ekiben", alias, point_at(read_manifest(self.box(tag))))

    def wait_known(self, alias: str = "champion") -> None:
        """Wait until every worker knows what an alias means."""
        self.wait(lambda info: alias in info["aliases"])
        time.sleep(0.5)  # the others read the same plan ten times a second

    def load(self, reference: str, **body: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        path = f"/models/load/{reference.partition(':')[2] or reference}"
        return self.client.post(path, headers=headers, json=body or None, timeout=WAIT_S)

    def wait(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until /models/info says so."""
        deadline = time.monotonic() + WAIT_S
        info: dict[str, Any] = {}
        while True:
            with contextlib.suppress(httpx.TransportError):  # a worker that was ended
                if condition(info := self.info()):
                    return info
            assert time.monotonic() < deadline, info
            time.sleep(0.05)

    def wait_live(self, tag: str) -> None:
        """Wait until a version is the only one in all workers."""
        self.wait(lambda info: all(list(each["loaded"]) == [tag] and each["live"] == tag for each in info["workers"]))

    def memory_mb(self) -> float:
        return sum(psutil.Process(pid).memory_info().rss for pid in self.workers) / 2**20


@contextlib.contextmanager
def open_server(home: Path, cwd: Path, target: str, *, workers: int, **environment: str) -> Iterator[Served]:
    settings = {
        "BENTOML_CONFIG_OPTIONS": f"services.ekiben.workers={workers}",
        "EKIBEN_ADMIN_KEYS": ADMIN_KEY,
        "EKIBEN_FOLLOW": "champion",
        "EKIBEN_FOLLOW_EVERY_S": "0.2",
        **environment,
    }
    with serve(target, home, cwd, settings) as server, server.client() as client:
        served = Served(server, client, home)
        try:
            deadline = time.monotonic() + WAIT_S
            while client.get("/readyz").status_code != 200 or len(served.workers) < workers:
                assert time.monotonic() < deadline, server.log.read_text()
                time.sleep(0.1)
            yield served
        except BaseException:
            print(server.log.read_text()[-8000:])  # noqa: T201
            raise
