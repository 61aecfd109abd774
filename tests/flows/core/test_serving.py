from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flows.core.serving import check_port, stop, wait_ready
from flows.errors import EkibenError, ParamsError


def test_a_taken_port_is_refused_with_the_cure() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ParamsError, match="--port"):
            check_port("127.0.0.1", taken.getsockname()[1])


def test_a_server_that_ends_at_once_is_reported_with_its_log(tmp_path: Path) -> None:
    log = tmp_path / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-c", "print('no such Bento'); raise SystemExit(4)"], stdout=output)
    process.wait()
    with pytest.raises(EkibenError, match=r"exit code 4.*no such Bento"):
        wait_ready(process, "http://127.0.0.1:1", log)


def test_stop_ends_a_process_that_does_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.core.serving.STOP_TIMEOUT_S", 0.2)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    stop(process)
    assert process.returncode == -9
