"""How MLflow is opened: addresses, patience, silence."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from flows.core.mlflow_client import open_client
from flows.core.tracking import Tracker
from flows.errors import ParamsError


class Unavailable(BaseHTTPRequestHandler):
    """A server that is there and never well."""

    requests = 0

    def do_POST(self) -> None:
        type(self).requests += 1
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def unavailable_server() -> Iterator[str]:
    Unavailable.requests = 0
    server = HTTPServer(("127.0.0.1", 0), Unavailable)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_importing_the_tracker_does_not_import_mlflow() -> None:
    code = "import sys, flows.core.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_new_database_is_made_in_silence(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'new' / 'folder' / 'mlflow.db'}"
    code = (
        "import sys, pathlib; from flows.core.tracking import Tracker\n"
        "t = Tracker(sys.argv[1], experiment='e', model_name='m', artifact_root=pathlib.Path('artifacts'))\n"
        "r = t.start_run('a'); t.log_metrics(r, {'x': 1.0}); t.end_run(r)"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", code, uri], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "mlruns").exists()


def test_a_server_that_is_not_there_is_named_with_a_cure() -> None:
    with socket.socket() as free:  # bound, never listening
        free.bind(("127.0.0.1", 0))
        uri = f"http://user:secret@127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ParamsError) as caught:
            Tracker(uri, experiment="e", model_name="m")
    message = str(caught.value)
    assert "no MLflow at http://***@127.0.0.1" in message
    assert "mlflow server" in message
    assert "MLFLOW_TRACKING_URI" in message
    assert "secret" not in message
    assert "\n" not in message


def test_a_sick_server_is_asked_twice_at_most_and_the_patience_comes_back(unavailable_server: str) -> None:
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    MLFLOW_HTTP_REQUEST_TIMEOUT.set(77)
    with pytest.raises(ParamsError, match="no MLflow at"):
        open_client(unavailable_server)
    assert 1 <= Unavailable.requests <= 2
    assert not MLFLOW_HTTP_REQUEST_MAX_RETRIES.is_set()
    assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == 77
    MLFLOW_HTTP_REQUEST_TIMEOUT.unset()


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "", "ftp://host", "databricks"])
def test_an_address_of_an_unknown_kind_is_refused_with_the_allowed_ones(uri: str) -> None:
    with pytest.raises(ParamsError, match=r"allowed are a server .* or a database") as caught:
        open_client(uri)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("this is not SQLite, " * 100)
    with pytest.raises(ParamsError, match="file is not a database"):
        open_client(f"sqlite:///{path}")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ParamsError, match="the folder can be written"):
        open_client(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")


def test_a_missing_database_driver_is_named() -> None:
    with pytest.raises(ParamsError, match="needs the Python package 'pymssql'"):
        open_client("mssql+pymssql://user:secret@localhost/db")
