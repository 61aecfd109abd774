"""The load generator against a real little server, which answers as its path says."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.benchmarks.connection import HOST, LoadError, render_request
from tests.benchmarks.load import GAVE_UP, RESET, Requests, run, run_closed, run_open, run_paced

PAUSES_S = {b"/slow": 0.5, b"/endless": 60.0}


@dataclass
class LittleServer:
    port: int = 0
    connections: int = 0
    bodies: list[bytes] = field(default_factory=list)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                body = await reader.readexactly(length)
                self.bodies.append(body)
                path = head.split(b" ")[1]
                if path == b"/hangup":
                    break
                if path in PAUSES_S:
                    await asyncio.sleep(PAUSES_S[path])
                if path == b"/chunked":
                    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
                elif path == b"/busy":
                    writer.write(b"HTTP/1.1 429 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
                elif path == b"/once":
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
                    break
                else:  # the head in two pieces, the body in another
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-")
                    await writer.drain()
                    await asyncio.sleep(0)
                    writer.write(b"Length: %d\r\n\r\n" % length + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()


@pytest.fixture
def server() -> Iterator[LittleServer]:
    little, ready, stop = LittleServer(), threading.Event(), threading.Event()

    async def serve() -> None:
        async with await asyncio.start_server(little.answer, HOST, 0) as listening:
            little.port = listening.sockets[0].getsockname()[1]
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(0.01)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(10)
    yield little
    stop.set()
    thread.join(10)


def make_requests(path: str, count: int = 20_000, keep: range = range(0)) -> Requests:
    return Requests([render_request(path, b"text %d" % number) for number in range(count)], keep)


def test_a_closed_loop_sends_every_text_once_and_keeps_the_answers_asked_for(server: LittleServer) -> None:
    warm = Requests([render_request("/", b"warm %d" % number) for number in range(20_000)])
    edges: list[str] = []
    requests = make_requests("/", keep=range(3))
    load = run(
        lambda: run_closed(
            server.port, warm, requests, connections=4, warm_s=0.1, seconds=0.3, on_edge=lambda: edges.append("edge")
        )
    )
    assert len(server.bodies) == len(set(server.bodies)) == len(load.shots)
    assert {shot.status for shot in load.shots} == {200}
    assert load.bodies == {0: b"text 0", 1: b"text 1", 2: b"text 2"}
    assert any(body.startswith(b"warm") for body in server.bodies)
    assert edges == ["edge", "edge"]
    assert load.generator_cpu_s > 0  # of the whole process: here the little server is in it, too
    assert all(shot.done >= shot.due for shot in load.shots)


def test_a_refusal_is_seen_with_its_retry_after(server: LittleServer) -> None:
    load = run(lambda: run_paced(server.port, make_requests("/busy"), per_second=50, warm_s=0, seconds=0.2))
    assert {(shot.status, shot.has_retry_after) for shot in load.shots} == {(429, True)}


def test_a_server_that_hangs_up_is_a_reset_and_not_an_endless_loop(server: LittleServer) -> None:
    requests = make_requests("/hangup")
    load = run(lambda: run_closed(server.port, requests, requests, connections=1, warm_s=0, seconds=0.2))
    assert {shot.status for shot in load.shots} == {RESET}


def test_a_connection_that_the_server_ends_after_its_answer_is_opened_anew(server: LittleServer) -> None:
    requests = make_requests("/once")
    load = run(lambda: run_closed(server.port, requests, requests, connections=1, warm_s=0, seconds=0.2))
    assert {shot.status for shot in load.shots} == {200}
    assert len(load.shots) > 1


def test_the_open_loop_keeps_its_rate_when_the_server_does_not_follow(server: LittleServer) -> None:
    requests = make_requests("/endless")
    load = run(lambda: run_open(server.port, requests, per_second=100, patience_s=0.1, warm_s=0.1, seconds=0.3))
    assert [shot.status for shot in load.shots] == [GAVE_UP] * 40
    assert server.connections == 40


def test_the_open_loop_uses_connections_again(server: LittleServer) -> None:
    load = run(lambda: run_open(server.port, make_requests("/"), per_second=100, patience_s=5, warm_s=0.1, seconds=0.3))
    assert [shot.status for shot in load.shots] == [200] * 40
    assert server.connections < 40


def test_a_schedule_that_cannot_be_followed_is_counted_to_its_end(server: LittleServer) -> None:
    load = run(lambda: run_paced(server.port, make_requests("/slow"), per_second=20, warm_s=0, seconds=1))
    assert len(load.shots) == 20
    statuses = [shot.status for shot in load.shots]
    assert statuses.count(200) + statuses.count(GAVE_UP) == 20
    assert statuses.count(GAVE_UP) > statuses.count(200)
    second = load.shots[1]
    assert second.done - second.due > 0.5  # it waited for the first


def test_no_text_is_sent_twice_for_lack_of_others(server: LittleServer) -> None:
    few = make_requests("/", count=3)
    with pytest.raises(LoadError, match="all 3 texts were sent"):
        run(lambda: run_closed(server.port, few, few, connections=2, warm_s=0, seconds=1))


def test_an_answer_that_cannot_be_read_is_an_error(server: LittleServer) -> None:
    requests = make_requests("/chunked")
    with pytest.raises(LoadError, match="Content-Length"):
        run(lambda: run_closed(server.port, requests, requests, connections=1, warm_s=0, seconds=0.2))
