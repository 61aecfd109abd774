"""Slow, greedy and broken clients against a real `bentoml serve`: they are told why, and the others do not notice."""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from bentos.connections import MAX_BODIES
from tests.serving import Server, serve

HEADER_BYTES, BODY_BYTES, CONNECTIONS = 4096, 100_000, 20
SETTINGS = {
    "EKIBEN_MAX_BODY_BYTES": str(BODY_BYTES),
    "EKIBEN_MAX_HEADER_BYTES": str(HEADER_BYTES),
    "EKIBEN_MAX_CONNECTIONS": str(CONNECTIONS),
    "EKIBEN_HEADER_TIMEOUT_S": "1",
    "EKIBEN_BODY_TIMEOUT_S": "1.5",
    "EKIBEN_SEND_TIMEOUT_S": "1",
    "EKIBEN_KEEP_ALIVE_S": "4",
}
WAIT_S = 30.0  # for what must happen in any case, on a machine however slow
SERVICE = """
import asyncio
from collections import Counter
from contextlib import suppress
import bentoml
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from bentos.connections import guard_connections
from bentos.logs import configure_logging
from bentos.settings import ServeSettings

told = Counter()
guard = None


async def hello(request):
    with suppress(ClientDisconnect):
        return JSONResponse({"bytes": len(await request.body()), "headers": dict(request.headers)})
    return Response()


async def large(request):
    return Response(b"x" * 50_000_000)


async def slow(request):
    told["begun"] += 1
    while not await request.is_disconnected():
        await asyncio.sleep(0.05)
    told["client has gone"] += 1
    return Response()


async def state(request):
    return JSONResponse({"told": told, "connections": guard.connections})


class GuardedService(bentoml.Service):
    def to_asgi(self, is_main=True):
        global guard
        configure_logging(ServeSettings())
        guard = guard_connections(ServeSettings(), lambda reason: told.update([reason]))
        routes = [Route(f"/{work.__name__}", work, methods=["GET", "POST"]) for work in (hello, large, slow, state)]
        self.mount_asgi_app(Starlette(routes=routes))
        return super().to_asgi(is_main)


@bentoml.service(service_class=GuardedService, workers=1, logging={"access": {"enabled": False}})
class Guarded:
    pass
"""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "guarded.py").write_text(SERVICE)
    with serve("guarded:Guarded", folder / "home", folder, SETTINGS) as server:
        yield server


class Client:
    """A connection of bare bytes."""

    def __init__(self, server: Server, **options: int) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        self.socket = socket.socket()
        for name, value in options.items():
            self.socket.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        self.socket.settimeout(WAIT_S)
        self.socket.connect((host, int(port)))

    def send(self, *pieces: bytes) -> Client:
        with contextlib.suppress(OSError):  # refused in the middle: the answer says why
            for piece in pieces:
                self.socket.sendall(piece)
        return self

    def read(self) -> bytes:
        """All that comes until the server closes."""
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := self.socket.recv(65536):
                answer += piece
        self.socket.close()
        return answer

    def ask(self, request: bytes) -> bytes:
        """Send a request and read its answer, and no more."""
        self.socket.sendall(request)
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += self.socket.recv(1)
        length = re.search(rb"content-length: (\d+)", answer)
        assert length is not None
        return answer + self.socket.recv(int(length[1]), socket.MSG_WAITALL)

    def dribble(self, piece: bytes) -> bytes:
        """Send `piece` again and again, slowly, until the server closes."""
        answer = b""
        self.socket.settimeout(0.1)
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            try:
                self.socket.sendall(piece)
                received = self.socket.recv(65536)
            except TimeoutError:
                continue
            except ConnectionError:
                return answer
            if not received:
                return answer
            answer += received
        raise AssertionError(f"the connection is still open; it got {answer!r}")


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error(answer: bytes) -> dict[str, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head
    assert b"connection: close" in head
    return json.loads(body)["error"]  # type: ignore[no-any-return]


def state(server: Server) -> dict[str, Any]:
    return httpx.get(f"{server.url}/state", timeout=WAIT_S).json()  # type: ignore[no-any-return]


def told(server: Server, reason: str) -> int:
    return int(state(server)["told"].get(reason, 0))


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


POST = b"POST /hello HTTP/1.1\r\nHost: x\r\n"
GET = b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(autouse=True)
def _others_are_served(guarded: Server) -> Iterator[None]:
    """After every attack, and with nothing of it left behind."""
    yield
    with guarded.client() as client:
        for _ in range(5):
            assert client.post("/hello", content=b"abc").json()["bytes"] == 3
    assert wait_until(lambda: state(guarded)["connections"] <= 2)
    assert "Traceback" not in guarded.log.read_text()
    assert '"level":"error"' not in guarded.log.read_text()


# --- headers


def test_headers_up_to_the_limit_pass(guarded: Server) -> None:
    value = "a" * (HEADER_BYTES - 300)
    answer = httpx.get(f"{guarded.url}/hello", headers={"x-long": value}, timeout=WAIT_S)
    assert answer.json()["headers"]["x-long"] == value


@pytest.mark.parametrize("pieces", [1, 50], ids=["at once", "in pieces"])
@pytest.mark.parametrize("kind", ["one long line", "many lines", "a long address", "a line that never ends"])
def test_larger_headers_are_refused(guarded: Server, kind: str, pieces: int) -> None:
    before = told(guarded, "headers")
    filler = b"a" * (HEADER_BYTES * 3)
    request = {
        "one long line": POST + b"X-Long: " + filler + b"\r\n\r\n",
        "many lines": POST + b"".join(b"X-%d: a\r\n" % number for number in range(HEADER_BYTES // 3)) + b"\r\n",
        "a long address": b"GET /hello?" + filler + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        "a line that never ends": POST + b"X-Long: " + filler * 30,
    }[kind]
    size = len(request) // pieces + 1
    client = Client(guarded)
    client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for start in range(0, len(request), size):
        client.send(request[start : start + size])
        time.sleep(0.002)
    answer = client.read()
    assert status(answer) == 431
    assert error(answer)["code"] == "headers_too_large"
    assert str(HEADER_BYTES) in error(answer)["message"]
    assert told(guarded, "headers") == before + 1


def test_a_flood_of_header_bytes_takes_no_memory(guarded: Server) -> None:
    process = psutil.Process(guarded.worker_pid())
    before = process.memory_info().rss
    client = Client(guarded).send(POST + b"X-Long: ")
    for _ in range(50):
        client.send(b"a" * 1_000_000)
    assert status(client.read() or b"HTTP/1.1 431 ") == 431  # sent for too long, it may be cut off unread
    assert process.memory_info().rss - before < 20_000_000


def test_slow_headers_are_answered_408(guarded: Server) -> None:
    answer = Client(guarded).send(POST).dribble(b"X-Slow: 1\r\n")
    assert status(answer) == 408
    assert error(answer)["code"] == "timeout"
    assert "headers were not complete after 1 s" in error(answer)["message"]


@pytest.mark.parametrize("piece", [b"", b"\r\n"], ids=["nothing", "blank lines"])
def test_a_connection_that_says_nothing_is_closed_without_a_word(guarded: Server, piece: bytes) -> None:
    assert Client(guarded).dribble(piece) == b""


def test_the_second_request_must_come_in_time_too(guarded: Server) -> None:
    client = Client(guarded)
    assert status(client.ask(GET)) == 200
    answer = client.send(b"GET /hello HTTP/1.1\r\n").read()
    assert status(answer) == 408


def test_what_is_no_http_is_told_so(guarded: Server) -> None:
    for garbage in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
        answer = Client(guarded).send(garbage).read()
        assert status(answer) == 400
        assert error(answer)["code"] == "malformed_request"


def test_a_websocket_is_an_ordinary_request(guarded: Server) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    client = Client(guarded)
    assert status(client.ask(b"GET /hello HTTP/1.1\r\nHost: x\r\n" + upgrade + b"Sec-WebSocket-Key: a\r\n\r\n")) == 200
    client.socket.close()


# --- bodies


def test_a_slow_body_is_answered_408_and_the_application_hears_of_it(guarded: Server) -> None:
    before = told(guarded, "body_timeout")
    answer = Client(guarded).send(POST + b"Content-Length: 100000\r\n\r\n").dribble(b"a")
    assert status(answer) == 408
    assert "body was not complete after 1.5 s" in error(answer)["message"]
    assert told(guarded, "body_timeout") == before + 1
    gone = told(guarded, "client has gone")
    answer = Client(guarded).send(POST.replace(b"hello", b"slow") + b"Content-Length: 100000\r\n\r\n").dribble(b"a")
    assert status(answer) == 408
    assert wait_until(lambda: told(guarded, "client has gone") == gone + 1)


def test_a_body_that_was_answered_early_is_not_answered_again(guarded: Server) -> None:
    answer = Client(guarded).send(POST.replace(b"hello", b"nowhere") + b"Content-Length: 100000\r\n\r\n").dribble(b"a")
    assert status(answer) == 404
    assert answer.count(b"HTTP/1.1") == 1


def test_a_body_that_is_slow_but_in_time_passes(guarded: Server) -> None:
    client = Client(guarded).send(POST + b"Content-Length: 3\r\nConnection: close\r\n\r\n")
    for byte in (b"a", b"b", b"c"):
        time.sleep(0.1)
        client.send(byte)
    assert b'"bytes":3' in client.read()


def test_a_body_in_the_smallest_pieces_passes(guarded: Server) -> None:
    body = b"1\r\na\r\n" * 20_000 + b"0\r\n\r\n"
    answer = Client(guarded).send(POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + body).read()
    assert b'"bytes":20000' in answer


def test_bodies_that_do_not_end_make_room_for_others(guarded: Server) -> None:
    before = told(guarded, "evicted")
    half = b"a" * (MAX_BODIES * BODY_BYTES // 8)
    endless = [Client(guarded).send(POST + b"Content-Length: 9999999\r\n\r\n" + half) for _ in range(12)]
    assert wait_until(lambda: told(guarded, "evicted") > before)
    with guarded.client() as client:
        assert client.post("/hello", content=half).json()["bytes"] == len(half)
    for one in endless:
        one.socket.close()


def test_trailers_are_no_headers_and_not_endless(guarded: Server) -> None:
    head = POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n3\r\nabc\r\n0\r\n"
    answer = Client(guarded).send(head + b"X-Api-Key: smuggled\r\n\r\n").read()
    assert b'"bytes":3' in answer
    assert b"smuggled" not in answer
    before = told(guarded, "headers")
    client = Client(guarded).send(head)
    for _ in range(100):
        client.send(b"X-Long: " + b"a" * 10_000 + b"\r\n")
    client.read()
    assert told(guarded, "headers") == before + 1


def test_an_answer_that_is_not_read_is_given_up(guarded: Server) -> None:
    before = told(guarded, "send_timeout")
    client = Client(guarded, SO_RCVBUF=4096).send(GET.replace(b"hello", b"large"))
    assert wait_until(lambda: told(guarded, "send_timeout") == before + 1)
    client.socket.close()


def test_an_answer_that_is_read_slowly_is_not(guarded: Server) -> None:
    before = told(guarded, "send_timeout")
    client = Client(guarded, SO_RCVBUF=65536).send(
        GET.replace(b"hello", b"large").replace(b"x\r\n", b"x\r\nConnection: close\r\n")
    )
    size = 0
    while piece := client.socket.recv(1_000_000):
        if size < 2_000_000 or (size // 1_000_000) % 5 == 0:
            time.sleep(0.02)
        size += len(piece)
    assert size > 50_000_000
    assert told(guarded, "send_timeout") == before


# --- connections


def test_a_client_that_goes_away_is_noticed(guarded: Server) -> None:
    before = state(guarded)["told"]
    client = Client(guarded).send(GET.replace(b"hello", b"slow"))
    assert wait_until(lambda: told(guarded, "begun") == before.get("begun", 0) + 1)
    client.socket.close()
    assert wait_until(lambda: told(guarded, "client has gone") == before.get("client has gone", 0) + 1)


def test_a_connection_rests_between_requests_and_is_closed_at_last(guarded: Server) -> None:
    client = Client(guarded)
    assert status(client.ask(GET)) == 200
    time.sleep(2)  # longer than any other timeout
    assert status(client.ask(GET)) == 200
    assert client.read() == b""


def test_pipelined_requests_are_answered_in_order(guarded: Server) -> None:
    requests = b"".join(b"GET /hello HTTP/1.1\r\nHost: x\r\nX-Number: %d\r\n\r\n" % number for number in range(10))
    answer = Client(guarded).send(requests.replace(b"9\r\n\r\n", b"9\r\nConnection: close\r\n\r\n")).read()
    assert [answer.count(b"HTTP/1.1 200"), answer.index(b'"x-number":"0"') < answer.index(b'"x-number":"9"')] == [
        10,
        True,
    ]


def test_a_flood_of_pipelined_requests_is_cut_off(guarded: Server) -> None:
    before = told(guarded, "pipelined")
    assert Client(guarded).send(GET * 5000).read().count(b"HTTP/1.1") < 5000
    assert told(guarded, "pipelined") == before + 1


def test_silent_connections_make_room_for_others(guarded: Server) -> None:
    before = told(guarded, "evicted")
    silent = [Client(guarded) for _ in range(CONNECTIONS * 2)]
    with guarded.client() as client:
        assert client.post("/hello", content=b"abc").json()["bytes"] == 3
    assert told(guarded, "evicted") >= before + CONNECTIONS
    assert wait_until(lambda: state(guarded)["connections"] <= 2)
    for one in silent:
        one.socket.close()


def test_when_all_connections_are_busy_new_ones_are_told_to_come_back(guarded: Server) -> None:
    begun = told(guarded, "begun")
    ask = GET.replace(b"hello", b"slow")
    busy = [Client(guarded).send(ask) for _ in range(CONNECTIONS - 1)]
    assert wait_until(lambda: told(guarded, "begun") == begun + CONNECTIONS - 1)
    busy.append(Client(guarded).send(ask))  # takes the place of the one that has just asked
    late = [Client(guarded).send(ask) for _ in range(3)]
    readable, _, _ = select.select([client.socket for client in late], [], [], WAIT_S)
    answer = next(client for client in late if client.socket in readable).read()
    assert status(answer) == 503
    assert b"retry-after: 1" in answer
    assert error(answer)["code"] == "overloaded"
    for client in busy + late:
        client.socket.close()


def test_the_fast_event_loop_and_parser_are_in_use(guarded: Server) -> None:
    mapped = Path(f"/proc/{guarded.worker_pid()}/maps").read_text()
    assert "site-packages/uvloop/" in mapped
    assert "site-packages/httptools/" in mapped


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits")
@pytest.mark.parametrize(("soft", "hard", "allowed"), [(200, 4000, 1000), (200, 500, 372), (4000, 4000, 1000)])
def test_the_systems_limit_of_open_files_is_raised_or_kept(soft: int, hard: int, allowed: int) -> None:
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from bentos.connections import Guard
from bentos.settings import ServeSettings
print(Guard(ServeSettings(max_connections=1000), print).max_connections)
"""
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert int(run.stdout.split()[-1]) == allowed
