"""The Prefect server that the flows of a command report to: the one that is set, or a temporary one."""

from __future__ import annotations

import signal

import httpx
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE

from flows.errors import ParamsError

ANSWER_TIMEOUT_S = 10.0


def open_server() -> None:
    """See that the server at `PREFECT_API_URL` answers; without that address start a temporary one.

    Prefect would start it by itself, but then Ctrl-C in a terminal ends it together with the command, which could not
    report any more how its flow ended, and would try to for minutes. So the server is started with SIGINT blocked,
    which a process hands on to its children; it ends when the command does.

    Raises:
        ParamsError: nothing answers; names the address and the cure.
    """
    address = PREFECT_API_URL.value()
    if address is not None:
        _check_answer(address)
    elif PREFECT_SERVER_ALLOW_EPHEMERAL_MODE.value():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            SubprocessASGIServer().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _check_answer(address: str) -> None:
    try:
        httpx.get(f"{address.rstrip('/')}/health", timeout=ANSWER_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ParamsError(
            f"no Prefect server answers at {address} ({error}): start it (`prefect server start`), correct "
            "PREFECT_API_URL, or unset it to have a temporary one started"
        ) from None
