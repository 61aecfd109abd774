"""One client after another on one task: good ones, bad ones, slow ones, and those that hang up at any moment."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from tests.soak.bad import JSON, make_refusals
from tests.soak.client import Answer, BrokenError, Connection, LostError, MalformedError, render_request
from tests.soak.ledger import Ledger
from tests.soak.questions import Question, Questions
from tests.soak.reference import Reference

OK, REFUSED, SHED, LATE, CUT, BROKEN = "answered", "refused", "429", "504", "cut off", "ended with the worker"
PIPELINED = 5
PIECES = 6
MAX_PAUSE_S = 0.03


@dataclass(frozen=True)
class Target:
    """The server, and the limits that it was given."""

    port: int
    key: Mapping[str, str]  # the header that shows the key, or nothing
    max_texts: int
    max_chars: int
    max_bytes: int
    header_timeout_s: float
    body_timeout_s: float


class Driver:
    """Sends requests one after the other until the time is up."""

    _numbers = itertools.count()

    def __init__(self, target: Target, reference: Reference, ledger: Ledger, *, seed: str) -> None:
        self._target = target
        self._reference = reference
        self._ledger = ledger
        self._random = random.Random(seed)
        self._questions = Questions(reference, self._random, max_texts=target.max_texts)
        self._connection: Connection | None = None
        self._acts: dict[Callable[[], Awaitable[None]], float] = {
            self._ask: 60,
            self._ask_at_once: 3,
            self._be_refused: 14,
            self._ask_in_a_hurry: 4,
            self._ask_slowly: 1.5,
            self._read_slowly: 1.5,
            self._stall: 0.4,
            self._leave_before_the_body: 3,
            self._leave_within_the_body: 3,
            self._leave_while_waiting: 8,
            self._leave_within_the_answer: 4,
        }

    async def run(self, until: float) -> None:
        """Act until `time.monotonic()` is `until`."""
        while time.monotonic() < until:
            (act,) = self._random.choices(list(self._acts), list(self._acts.values()))
            await act()
            await asyncio.sleep(self._random.uniform(0, MAX_PAUSE_S))
        await self._hang_up()

    # --- with an answer

    async def _ask(self) -> None:
        question = self._questions.make()
        request, request_id = self._render(question)
        answer = await self._exchange(question.kind, [request], 0)
        if answer is not None:
            self._judge(question, request_id, answer)

    async def _ask_at_once(self) -> None:
        """Several requests on one connection, without waiting for the answers."""
        questions = [self._questions.make() for _ in range(PIPELINED)]
        rendered = [self._render(question) for question in questions]
        kind = "pipelined"
        try:
            connection = await self._connect()
            await connection.send(b"".join(request for request, _ in rendered))
            for question, (_, request_id) in zip(questions, rendered, strict=True):
                self._judge(question, request_id, await connection.read_answer(), kind)
        except (BrokenError, LostError, MalformedError) as error:
            self._take_note(kind, error)

    async def _be_refused(self) -> None:
        target, request_id = self._target, self._new_id()
        limits = {"max_texts": target.max_texts, "max_chars": target.max_chars, "max_bytes": target.max_bytes}
        dim = self._reference.manifest.dim
        refusal = self._random.choice(make_refusals(target.key, request_id, **limits, dim=dim))
        if not refusal.is_http:
            await self._hang_up()  # it would end a connection that others use
        answer = await self._exchange(refusal.kind, [refusal.request], 0)
        if answer is None or self._is_excused(refusal.kind, answer):
            return
        if answer.status not in refusal.statuses:
            self._complain(refusal.kind, f"{answer.status} {answer.body!r:.200}, expected {refusal.statuses}")
            return
        if answer.status >= 400 and not _is_error(answer):
            self._complain(refusal.kind, f"the error is {answer.body!r:.200}")
        if refusal.is_http:
            self._check_id(refusal.kind, request_id, answer)
        self._ledger.count(refusal.kind, f"{REFUSED} {answer.status}" if answer.status >= 400 else OK)

    async def _ask_in_a_hurry(self) -> None:
        question = self._questions.make()
        limit_ms = self._random.choice([1, 2, 5, 20, 100])
        request, request_id = self._render(question, {"X-Ekiben-Timeout-Ms": str(limit_ms)})
        answer = await self._exchange("in a hurry", [request], 0)
        if answer is not None and answer.status == 504:
            self._check_id("in a hurry", request_id, answer)
            self._ledger.count("in a hurry", LATE)
        elif answer is not None:
            self._judge(question, request_id, answer, "in a hurry")

    async def _ask_slowly(self) -> None:
        """A request in small pieces."""
        question = self._questions.make()
        request, request_id = self._render(question)
        cuts = sorted(self._random.sample(range(1, len(request)), PIECES - 1))
        pieces = [request[begin:end] for begin, end in itertools.pairwise([0, *cuts, len(request)])]
        answer = await self._exchange("in pieces", pieces, self._target.header_timeout_s / PIECES / 3)
        if answer is not None:
            self._judge(question, request_id, answer, "in pieces")

    async def _read_slowly(self) -> None:
        """A large answer that nobody takes for a while."""
        question = self._questions.make_bulk()
        request, request_id = self._render(question)
        answer = await self._exchange("read late", [request], 0, wait_s=self._random.uniform(0.2, 1))
        if answer is not None:
            self._judge(question, request_id, answer, "read late")

    async def _stall(self) -> None:
        """A request that never becomes complete: in the headers, or in the body."""
        await self._hang_up()
        request, _ = self._render(self._questions.make())
        in_body = self._random.random() < 0.5
        sent = request[: request.index(b"\r\n\r\n") + (5 if in_body else 0)]
        kind = "stalled in the body" if in_body else "stalled in the headers"
        answer = await self._exchange(kind, [sent], 0)
        if answer is None or self._is_excused(kind, answer):
            return
        if answer.status == 408:
            self._ledger.count(kind, f"{REFUSED} 408")
        else:
            self._complain(kind, f"{answer.status} {answer.body!r:.200}, expected 408")

    # --- without one

    async def _leave_before_the_body(self) -> None:
        request, _ = self._render(self._questions.make())
        end = request.index(b"\r\n\r\n")
        await self._leave("left before the body", request[: self._random.choice([0, end // 2, end, end + 4])])

    async def _leave_within_the_body(self) -> None:
        request, _ = self._render(self._questions.make_bulk())
        begin = request.index(b"\r\n\r\n") + 5
        await self._leave("left within the body", request[: self._random.randint(begin, len(request) - 1)])

    async def _leave_while_waiting(self) -> None:
        question = self._questions.make_bulk() if self._random.random() < 0.6 else self._questions.make()
        wait_s = self._random.choice([0, 0.001, 0.005, 0.02, 0.06, 0.12, 0.3])
        await self._leave("left while waiting", self._render(question)[0], wait_s=wait_s)

    async def _leave_within_the_answer(self) -> None:
        await self._leave("left within the answer", self._render(self._questions.make_bulk())[0], read=500)

    async def _leave(self, kind: str, sent: bytes, *, wait_s: float = 0, read: int = 0) -> None:
        try:
            connection = await Connection.open(self._target.port)
            await connection.send(sent)
            await asyncio.sleep(wait_s)
            if read:
                await connection.read_some(read)
        except BrokenError as error:
            self._take_note(kind, error, since=time.monotonic() - wait_s)
            return
        if self._random.random() < 0.5:
            connection.abort()
        else:
            await connection.close()
        self._ledger.count(kind, CUT)

    # --- parts

    def _new_id(self) -> str:
        return f"soak-{next(self._numbers)}"

    def _render(self, question: Question, headers: Mapping[str, str] | None = None) -> tuple[bytes, str]:
        request_id = self._new_id()
        body = json.dumps(question.body, ensure_ascii=self._random.random() < 0.5).encode()
        all_headers = {**JSON, **self._target.key, **question.headers, "X-Request-Id": request_id, **(headers or {})}
        return render_request("POST", question.path, body, all_headers), request_id

    async def _connect(self) -> Connection:
        if self._connection is None or self._connection.ended or self._random.random() < 0.1:
            await self._hang_up()
            self._connection = await Connection.open(self._target.port)
        return self._connection

    async def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and (stray := await connection.close()):
            self._complain("stray bytes", f"{stray!r:.200}")

    async def _exchange(self, kind: str, pieces: list[bytes], pause_s: float, wait_s: float = 0) -> Answer | None:
        """Send the pieces of one request and wait for its answer; None when the worker was ended meanwhile."""
        try:
            connection = await self._connect()
            for number, piece in enumerate(pieces):
                await asyncio.sleep(pause_s if number else 0)
                await connection.send(piece)
            await asyncio.sleep(wait_s)
            return await connection.read_answer()
        except (BrokenError, LostError, MalformedError) as error:
            self._take_note(kind, error)
            return None

    def _take_note(self, kind: str, error: Exception, since: float | None = None) -> None:
        """A request came to nothing: there must have been an outage since its connection began."""
        connection, self._connection = self._connection, None
        if since is None:
            since = time.monotonic() if connection is None else connection.opened
        if isinstance(error, BrokenError) and self._ledger.excuses(since):
            self._ledger.count(kind, BROKEN)
        else:
            self._complain(kind, str(error))

    def _judge(self, question: Question, request_id: str, answer: Answer, kind: str | None = None) -> None:
        kind = kind or question.kind
        self._check_id(kind, request_id, answer)
        if answer.status == 429 and answer.headers.get("retry-after", "").isdigit():
            self._ledger.count(kind, SHED)
        elif self._is_excused(kind, answer):
            pass
        elif answer.status != 200:
            self._complain(kind, f"{answer.status} {answer.body!r:.300}")
        elif (wrong := _find_wrong(question, answer)) is not None:
            self._complain(kind, wrong)
        else:
            self._ledger.count(kind, OK)

    def _is_excused(self, kind: str, answer: Answer) -> bool:
        """Whether it is an answer of a worker that is just being started again."""
        since = time.monotonic() if self._connection is None else self._connection.opened
        excused = answer.status in (503, 504) and self._ledger.excuses(since)
        if excused:
            self._ledger.count(kind, BROKEN)
        return excused

    def _check_id(self, kind: str, request_id: str, answer: Answer) -> None:
        """Whether this is the answer to that request, and the first one."""
        given = answer.headers.get("x-request-id", "")
        if given != request_id:
            self._complain(kind, f"the answer is to the request {given!r}, expected {request_id!r}")
        if given in self._ledger.request_ids:
            self._complain(kind, f"the request {given!r} was answered twice")
        self._ledger.request_ids.add(given)

    def _complain(self, kind: str, problem: str) -> None:
        self._ledger.complain(kind, problem)


def _is_error(answer: Answer) -> bool:
    try:
        error = json.loads(answer.body)["error"]
        return isinstance(error["code"], str) and isinstance(error["message"], str)
    except (ValueError, KeyError, TypeError):
        return False


def _find_wrong(question: Question, answer: Answer) -> str | None:
    try:
        return question.check(answer)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        return f"{error!r} in {answer.body!r:.200}"
