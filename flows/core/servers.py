"""Telling running servers which version to serve, and hearing what became of it. Core layer."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from flows.errors import ParamsError, one_line

LOAD_TIMEOUT_S = 660.0  # a little longer than a server gives its workers
CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Answer:
    """What one server said."""

    url: str
    done: bool  # every worker serves the version
    said: str


def check_servers(urls: Sequence[str], admin_key: str | None) -> None:
    """Refuse what cannot work, before anything is changed.

    Raises:
        ParamsError: an address is none, or there is no key to show.
    """
    for url in urls:
        if not _is_address(url):
            raise ParamsError(f"--server {url!r} is no address of a server; give one such as http://127.0.0.1:3000")
    if urls and not admin_key:
        raise ParamsError(
            "a server changes its version for an admin only: set EKIBEN_ADMIN_KEY, or give --admin-key-file, with one "
            "of the keys in the server's EKIBEN_ADMIN_KEYS"
        )


def load_everywhere(urls: Sequence[str], version: str, admin_key: str) -> list[Answer]:
    """Have every server serve a version, all at the same time, and wait until they do.

    Args:
        urls: Addresses of the servers.
        version: Name of the version that they can find, e.g. `3-1f2e3d4c`.
        admin_key: The key to show.
    """
    if not urls:
        return []
    with ThreadPoolExecutor(len(urls)) as pool:
        return list(pool.map(lambda url: _load(url, version, admin_key), urls))


def _is_address(url: str) -> bool:
    try:
        found = httpx.URL(url)
    except httpx.InvalidURL:  # a port that is no number
        return False
    return found.scheme in ("http", "https") and bool(found.host)


def _load(url: str, version: str, admin_key: str) -> Answer:
    timeout = httpx.Timeout(LOAD_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    try:
        response = httpx.post(
            f"{url.rstrip('/')}/models/load/{version}",
            json={"live": True},
            headers={"Authorization": f"Bearer {admin_key}"},
            timeout=timeout,
        )
    except httpx.HTTPError as error:
        return Answer(url, False, f"{type(error).__name__}: {one_line(error)}")
    if response.status_code == httpx.codes.OK:
        return Answer(url, True, "every worker serves it")
    return Answer(url, False, f"HTTP {response.status_code}: {_message(response)}")


def _message(response: httpx.Response) -> str:
    try:
        return one_line(ValueError(response.json()["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return one_line(ValueError(response.text))
