"""The Prefect server that a command reports to answers, outlives Ctrl-C, or is refused before any work."""

from __future__ import annotations

import signal
import socket

import pytest
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.errors import ParamsError
from flows.prefect_server import open_server


def test_a_server_that_does_not_answer_is_refused_with_the_cure() -> None:
    with socket.socket() as closed:  # bound, not listening: nobody else can take the port
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/api"
        with (
            temporary_settings({PREFECT_API_URL: address}),
            pytest.raises(ParamsError, match=f"{address}.*prefect server start.*PREFECT_API_URL"),
        ):
            open_server()


def test_the_temporary_server_is_started_where_ctrl_c_does_not_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = []

    def start(self: SubprocessASGIServer) -> None:
        blocked.append(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    monkeypatch.setattr(SubprocessASGIServer, "start", start)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        open_server()
    assert blocked == [True]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
