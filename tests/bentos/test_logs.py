"""Log lines: their fields, the request's id, and that no text of a caller gets in, alone and under BentoML."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from bentos.errors import InvalidRequestError
from bentos.logs import REQUEST_ID, JsonFormatter, TextFormatter, choose_request_id, log_request
from bentos.settings import ServeSettings
from tests.serving import Server, serve

CANARY = "a text of a caller"


def record_of(work: Callable[[], Any], message: str = "failed") -> logging.LogRecord:
    """The record that `logger.exception` makes of what `work` raises."""
    try:
        work()
    except BaseException:
        return logging.LogRecord("bentos", logging.ERROR, __file__, 1, message, None, sys.exc_info())
    raise AssertionError("nothing was raised")


def record(message: str, *arguments: Any, name: str = "bentos") -> logging.LogRecord:
    return logging.LogRecord(name, logging.WARNING, __file__, 1, message, arguments, None)


def as_json(record: logging.LogRecord, *, show_all: bool = False) -> dict[str, Any]:
    line = JsonFormatter(show_all).format(record)
    assert "\n" not in line
    return json.loads(line)  # type: ignore[no-any-return]


# --- lines


def test_a_json_line_says_when_who_and_what() -> None:
    line = as_json(record("queue of %d\ntexts", 7))
    assert line.pop("time").endswith("Z")
    assert line == {"level": "warning", "logger": "bentos", "message": "queue of 7\ntexts"}


def test_a_line_of_text_is_one_line() -> None:
    line = TextFormatter().format(record("one\ntwo\r\x1b[31m\u2028three"))
    assert len(line.splitlines()) == 1
    assert "WARNING [bentos] one two" in line


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_the_requests_id_is_on_every_line_of_its_task(formatter: logging.Formatter) -> None:
    async def answer(request_id: str) -> str:
        REQUEST_ID.set(request_id)
        await asyncio.sleep(0)
        return formatter.format(record("hello"))

    async def main() -> list[str]:
        return list(await asyncio.gather(*(answer(f"id-{number}") for number in range(3))))

    for number, line in enumerate(asyncio.run(main())):
        assert f"id-{number}" in line
    assert "id-" not in formatter.format(record("hello"))


def test_what_utf8_cannot_hold_is_logged_all_the_same() -> None:
    assert as_json(record("half \ud800"))["message"] == "half \ud800"


def test_a_request_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    log_request(
        method="POST", route="/encode", code=200, seconds=0.0123456789, texts=2, tokens=9, key="ab", client="::1"
    )
    log_request(method="GET", route="/livez", code=503, seconds=0.5)
    first, second = map(as_json, caplog.records)
    assert first.pop("time")
    assert first == {
        "level": "info",
        "logger": "bentos.access",
        "message": "request",
        "method": "POST",
        "route": "/encode",
        "code": 200,
        "seconds": 0.012346,
        "texts": 2,
        "tokens": 9,
        "key": "ab",
        "client": "::1",
    }
    assert (second["code"], second["texts"], second["key"], second["client"]) == (503, 0, None, None)


# --- request ids


@pytest.mark.parametrize("shown", [b"a", b"9f3c-01.A_b", b"x" * 128])
def test_a_well_formed_id_is_kept(shown: bytes) -> None:
    assert choose_request_id(shown) == shown.decode()


@pytest.mark.parametrize(
    "shown", [None, b"", b"x" * 129, b"a b", b"a\n", b"a\r\nSet-Cookie: x", b'"', "ä".encode(), b"{}"]
)
def test_any_other_gets_a_new_one(shown: bytes | None) -> None:
    made = choose_request_id(shown)
    assert choose_request_id(made.encode()) == made
    assert made != choose_request_id(shown)


def test_new_ids_differ_between_processes() -> None:
    code = "from bentos.logs import choose_request_id; print(*(choose_request_id(None) for _ in range(1000)))"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert len({made for run in runs for made in run.stdout.split()}) == 2000


# --- exceptions


class Strict(BaseModel):
    number: int


def raise_group() -> None:
    raise ExceptionGroup("several", [KeyError(CANARY), OSError("disk full")])


def raise_caused() -> None:
    try:
        {}[CANARY]
    except KeyError as error:
        raise RuntimeError("lane died") from error


def raise_in_handler() -> None:
    try:
        raise OSError("disk full")
    except OSError:
        int(CANARY)


@pytest.mark.parametrize(
    ("work", "shown"),
    [
        (lambda: int(CANARY), ["ValueError: (message shown at log level debug)"]),
        (lambda: {}[CANARY], ["KeyError: (message shown at log level debug)"]),
        (lambda: Strict(number=CANARY), ["pydantic_core._pydantic_core.ValidationError: (message"]),  # type: ignore[arg-type]
        (lambda: (_ for _ in ()).throw(InvalidRequestError(CANARY)), ["bentos.errors.InvalidRequestError: (message"]),
        (raise_caused, ["RuntimeError: lane died", "because of:", "KeyError: (message"]),
        (raise_in_handler, ["ValueError: (message", "because of:", "OSError: disk full"]),
        (raise_group, ["ExceptionGroup: several (2 sub-exceptions)", "KeyError: (message", "OSError: disk full"]),
    ],
)
@pytest.mark.parametrize("formatter", [JsonFormatter, TextFormatter])
def test_an_exception_shows_its_place_and_causes_but_quotes_nobody(
    formatter: Callable[[bool], logging.Formatter], work: Callable[[], Any], shown: list[str]
) -> None:
    line = formatter(False).format(record_of(work))
    assert CANARY not in line
    assert Path(__file__).name in line
    for part in shown:
        assert part in line
    assert CANARY in formatter(True).format(record_of(work))


def test_an_exception_that_causes_itself_ends() -> None:
    def work() -> None:
        error = RuntimeError("round")
        error.__cause__ = OSError("and round")
        error.__cause__.__cause__ = error
        raise error

    assert as_json(record_of(work))["exception"].count("round") <= 4


def test_a_long_message_of_an_exception_is_cut() -> None:
    def work() -> None:
        raise RuntimeError("x" * 10_000)

    assert len(as_json(record_of(work))["exception"]) < 2000


@pytest.mark.parametrize(
    "message",
    [
        "Task exception was never retrieved\nfuture: <Task exception=KeyError(%r)>",
        "Exception in callback int(%r)",
        "Executing <Task name=%r> took 1 s",
    ],
)
def test_asyncio_does_not_quote_either(message: str) -> None:
    told = record(message, CANARY, name="asyncio")
    assert as_json(told)["message"] in message
    assert CANARY not in as_json(told)["message"]
    assert CANARY in as_json(told, show_all=True)["message"]


# --- under BentoML

SERVICE = """
import asyncio
import logging
import bentoml
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from bentos.logs import REQUEST_ID, choose_request_id, configure_logging, log_request
from bentos.settings import ServeSettings

logger = logging.getLogger("bentos")


async def answer(request):
    text = (await request.body()).decode()
    REQUEST_ID.set(choose_request_id(request.headers["x-request-id"].encode()))
    logger.info("begun")
    asyncio.get_running_loop().call_soon(int, text)
    task = asyncio.create_task(quote(text))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    del task
    logging.getLogger("some.library").info("chatter")
    logging.getLogger("some.library").warning("careful")
    log_request(method=request.method, route="/answer", code=500, seconds=0.1)
    raise KeyError(text)


async def quote(text):
    raise ValueError(text)


class LoggingService(bentoml.Service):
    def to_asgi(self, is_main=True):
        configure_logging(ServeSettings())
        self.mount_asgi_app(Starlette(routes=[Route("/answer", answer, methods=["POST"])]))
        return super().to_asgi(is_main)


@bentoml.service(service_class=LoggingService, workers=1, logging={"access": {"enabled": False}})
class Logging:
    pass
"""


def address(server: Server) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def ask(server: Server) -> str:
    """Send a text to a route that fails in every way; return the worker's log."""
    headers = {"x-request-id": "id-of-the-caller"}
    assert httpx.post(f"{server.url}/answer", content=CANARY, headers=headers, timeout=30).status_code == 500
    with contextlib.suppress(OSError), socket.create_connection(address(server), timeout=30) as connection:
        connection.sendall(b"this is no HTTP\r\n\r\n")
        connection.recv(1000)
    return server.log.read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logging")
    (folder / "logged.py").write_text(SERVICE)
    return folder


def test_the_worker_logs_json_lines_without_texts_and_without_bentomls_own(folder: Path) -> None:
    with serve("logged:Logging", folder / "home", folder) as server:
        log = ask(server)
    lines = [json.loads(line) for line in log.splitlines() if not line.endswith("(Press CTRL+C to quit)")]
    assert CANARY not in log
    told = [line["message"] for line in lines]
    assert told.count("begun") == told.count("careful") == told.count("request") == 1
    assert "chatter" not in told
    assert {line["request_id"] for line in lines if line["message"] in ("begun", "careful", "request")} == {
        "id-of-the-caller"
    }
    failures = {line["message"]: line["exception"] for line in lines if line["level"] == "error"}
    assert set(failures) == {
        "Exception in callback",
        "Exception in ASGI application",
        "Task exception was never retrieved",
    }
    assert all("(message shown at log level debug)" in exception for exception in failures.values())
    assert not [line for line in lines if "HTTP" in line["message"]]


def test_the_worker_logs_text_when_asked(folder: Path) -> None:
    with serve(
        "logged:Logging", folder / "home", folder, {"EKIBEN_LOG_FORMAT": "text", "EKIBEN_LOG_LEVEL": "error"}
    ) as server:
        log = ask(server)
    assert CANARY not in log
    assert "INFO [bentos.access] request request_id=id-of-the-caller method=POST route=/answer code=500" in log
    assert "begun" not in log
    assert "\nKeyError: (message shown at log level debug)\n" in log


def test_unfit_settings_are_named() -> None:
    for name, value in (("log_format", "xml"), ("log_level", "loud"), ("access_log", "perhaps")):
        with pytest.raises(ValidationError, match=name):
            ServeSettings(**{name: value})  # type: ignore[arg-type]
