"""The soak, for a moment: does the server hold, and would the soak notice if it did not?"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest

from tests.soak.client import Answer
from tests.soak.ledger import Ledger, Outage
from tests.soak.questions import Questions
from tests.soak.reference import Reference, make_reference
from tests.soak.report import render
from tests.soak.soak import soak
from tests.soak.watch import Fault, MemoryWatch, Poll, ReadinessWatch


@pytest.fixture(scope="module")
def reference(tiny_lunchbox_path: Path) -> Reference:
    return make_reference(tiny_lunchbox_path, seed=1)


@pytest.mark.slow
def test_the_server_holds(tmp_path: Path, tiny_lunchbox_path: Path) -> None:
    report = soak(tmp_path, seconds=50, model=tiny_lunchbox_path, seed=1)
    assert report["problems"] == [], render(report)
    for leg in report["legs"]:
        assert leg["workers_ended"] == len(leg["recoveries_s"]) == 1
        assert leg["answered"] > 100
        assert leg["refused"] > 20
        assert leg["cut_off"] > 20
        assert leg["readiness"]["green"] > leg["readiness"]["silent"] > 0, "it was down once"
    assert len(report["legs"][1]["spells"]) >= 3, "threads died and hung, or failed: which of them is chance"
    json.dumps(report)


# --- a soak that could not fail would prove nothing


def answer_to(rows: list[int], reference: Reference, vectors: np.ndarray) -> Answer:
    tokens = [reference.tokens[row] for row in rows]
    cut = [place for place, row in enumerate(rows) if reference.truncated[row]]
    usage = {"tokens": tokens, "truncated": cut, "total_tokens": sum(tokens)}
    return Answer(200, {}, json.dumps({"embeddings": vectors.tolist(), "usage": usage}).encode())


def test_wrong_vectors_are_found(reference: Reference) -> None:
    rows = [0, 5, 9, 40]
    asked = (Questions(reference, random.Random(seed), max_texts=8)._encode("few", rows) for seed in range(100))
    question = next(question for question in asked if question.kind == "few float float32")
    right = reference.vectors[rows]
    assert question.check(answer_to(rows, reference, right)) is None
    swapped, fewer, shorter = right[[1, 0, 2, 3]], right[:3], right[:, :-1]
    off = right + np.float32(0.05) * np.eye(*right.shape, dtype=np.float32)
    none = np.full_like(right, np.nan)
    for wrong in (swapped, fewer, shorter, off, none):
        assert question.check(answer_to(rows, reference, wrong)) is not None


def test_every_kind_of_question_is_asked_and_checked(reference: Reference) -> None:
    questions = Questions(reference, random.Random(0), max_texts=8)
    made = [questions.make() for _ in range(300)]
    assert {question.path for question in made} == {
        "/encode",
        "/similarity",
        "/rank",
        "/v1/embeddings",
        "/predict",
        "/predict/similarity",
        "/encode_batchable",
    }


def test_only_an_outage_excuses_and_only_for_its_time() -> None:
    ledger = Ledger([Outage(100.0, 110.0)])
    assert ledger.outages[0].touches(90.0, 105.0)
    assert ledger.outages[0].touches(110.5, 200.0), "its aftermath"
    assert not ledger.outages[0].touches(112.0, 200.0)
    assert not ledger.outages[0].touches(90.0, 99.0)
    assert Outage(100.0).touches(500.0, 501.0), "not over yet"


def judge(polls: list[Poll], faults: list[Fault], blackouts: list[Fault]) -> Ledger:
    ledger = Ledger()
    ReadinessWatch(None, ledger, polls).judge(faults, blackouts)  # type: ignore[arg-type]
    return ledger


def test_readiness_that_lies_is_found() -> None:
    green = Poll(10.0, 10.1, 200, proof=200, proof_end=10.2)
    assert not judge([green], [], []).problems
    assert judge([green], [], [Fault(9.0, 11.0)]).problems, "green, though nothing could be computed"
    assert judge([dataclasses.replace(green, proof=503)], [], []).problems, "green, and then no answer"
    red = Poll(10.0, 10.1, 503)
    assert judge([red], [], []).problems, "red, for no reason"
    assert not judge([red], [Fault(9.5, 10.5)], []).problems
    assert judge([dataclasses.replace(red, status=None)], [], []).problems, "silent, for no reason"


def test_memory_that_grows_is_found() -> None:
    flat, growing = Ledger(), Ledger()
    MemoryWatch(0, [(float(second), 200 + second % 3) for second in range(60)]).judge(flat, 0)
    MemoryWatch(0, [(float(second), 200 + second) for second in range(60)]).judge(growing, 0)
    assert not flat.problems
    assert growing.problems


def test_answers_that_nobody_asked_for_are_found() -> None:
    from tests.soak.client import Connection

    async def main() -> bytes:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}" * 2)

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            connection = await Connection.open(server.sockets[0].getsockname()[1])
            await connection.send(b"GET / HTTP/1.1\r\n\r\n")
            assert (await connection.read_answer()).status == 200
            return await connection.close()

    assert asyncio.run(main()).startswith(b"HTTP/1.1 200")
