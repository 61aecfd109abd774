"""The batcher and its lanes, with a model whose answers can be written by hand.

A text is a row of numbers, its ids; its vector is their sum and their count.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bentos.batcher import Batcher
from bentos.engine import TokenCount, TokenizedText
from bentos.errors import DeadlineExceededError, NotReadyError, OverloadedError, TextTooLongError
from bentos.inflight import LaneName
from bentos.observer import BatchRecord, Observer
from tests.factories import make_limits

POISON, KILLER, HANGER = 666, 667, 668
MAX_TOKENS = 30


class FakeModel:
    """Records its batches; waits at the gate when there is one; fails, dies or hangs on some numbers."""

    def __init__(self, *, gated: bool = False, lives: int = 0) -> None:
        self.batches: list[list[list[int]]] = []
        self.tokenized: list[str] = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Semaphore(0 if gated else 1_000_000)
        self.lives = lives  # how often a killer kills
        self.awake = threading.Event()

    def tokenize(self, texts: Sequence[str]) -> list[TokenizedText]:
        self.tokenized += texts
        numbers = [[int(number) for number in text.split()] for text in texts]
        return [TokenizedText(ids[:MAX_TOKENS], len(ids)) for ids in numbers]

    def infer(self, token_ids: Sequence[Sequence[int]], *, normalize: bool | None = None) -> np.ndarray:
        assert normalize is False
        self.batches.append([list(ids) for ids in token_ids])
        self.entered.release()
        self.gate.acquire()
        numbers = {number for ids in token_ids for number in ids}
        if POISON in numbers:
            raise ValueError("poison")
        if KILLER in numbers and self.lives > 0:
            self.lives -= 1
            raise SystemExit
        if HANGER in numbers and self.lives > 0:
            self.lives -= 1
            self.awake.wait(20)
        return np.array([expected(ids) for ids in token_ids], dtype=np.float32)

    @property
    def texts(self) -> list[list[int]]:
        return [ids for batch in self.batches for ids in batch]

    async def wait_until_busy(self, threads: int = 1) -> None:
        for _ in range(threads):
            await asyncio.to_thread(self.entered.acquire)


class Notes(Observer):
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.batches: list[BatchRecord] = []
        self.heard: list[tuple[Any, ...]] = []

    def record_batch(self, record: BatchRecord) -> None:
        self.batches.append(record)

    def record_shed(self, reason: str) -> None:
        self.heard.append(("shed", reason))

    def record_cache(self, hits: int, misses: int) -> None:
        self.heard.append(("cache", hits, misses))

    def record_duplicates(self, texts: int) -> None:
        self.heard.append(("duplicates", texts))

    def record_lane_restart(self, lane: str) -> None:
        self.heard.append(("restart", lane))

    def set_queue(self, lane: str, texts: int, tokens: int, oldest_s: float, owner: int = 0) -> None:
        self.heard.append(("queue", lane, texts, tokens))


def expected(ids: Sequence[int]) -> list[float]:
    return [float(sum(ids)), float(len(ids))]


def text(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def run(
    test: Callable[[Batcher], Awaitable[None]], model: FakeModel, observer: Observer | None = None, **limits: Any
) -> None:
    async def main() -> None:
        batcher = Batcher(model, make_limits(max_tokens=MAX_TOKENS, **{"batch_tokens": 64, **limits}), observer)
        batcher.start()
        try:
            await asyncio.wait_for(test(batcher), timeout=20)
        finally:
            model.gate.release(1000)
            model.awake.set()
            await batcher.stop()

    asyncio.run(main())


def embed(batcher: Batcher, *texts: Sequence[int], **options: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(batcher.embed([text(ids) for ids in texts], **options))


async def settle(batcher: Batcher, texts: int) -> None:
    """Wait until so many texts wait in the lanes."""
    while sum(lane.texts for lane in batcher._lanes.values()) != texts:
        await asyncio.sleep(0.001)


number_lists = st.lists(st.integers(1, 9), min_size=1, max_size=20)
request_lists = st.lists(st.lists(number_lists, min_size=1, max_size=8), min_size=1, max_size=10)


@settings(deadline=None, max_examples=50)
@given(request_lists, st.integers(1, 80), st.integers(1, 8), st.integers(1, 3), st.sampled_from([0, 2000, 10**6]))
def test_every_request_gets_its_own_vectors_in_order(
    requests: list[list[list[int]]], batch_tokens: int, batch_texts: int, threads: int, cache_bytes: int
) -> None:
    model = FakeModel()

    async def test(batcher: Batcher) -> None:
        answers = await asyncio.gather(*(embed(batcher, *texts) for texts in requests))
        for texts, answer in zip(requests, answers, strict=True):
            assert answer.vectors.tolist() == [expected(ids) for ids in texts]
            assert answer.texts == [TokenCount(len(ids), truncated=False) for ids in texts]

    run(
        test,
        model,
        batch_tokens=batch_tokens,
        batch_texts=batch_texts,
        threads=threads,
        cache_bytes=cache_bytes,
    )
    for batch in model.batches:
        assert len(batch) == 1 or max(map(len, batch)) * len(batch) <= batch_tokens


def test_an_idle_batcher_computes_at_once_and_a_busy_one_gathers() -> None:
    model, notes = FakeModel(gated=True), Notes()

    async def test(batcher: Batcher) -> None:
        first = embed(batcher, [1])
        await model.wait_until_busy()
        others = [embed(batcher, [n]) for n in range(2, 8)]
        await settle(batcher, 6)
        model.gate.release(2)
        await asyncio.gather(first, *others)

    run(test, model, notes)
    assert model.batches == [[[1]], [[2], [3], [4], [5], [6], [7]]]
    assert [(batch.lane, batch.texts, batch.tokens) for batch in notes.batches] == [
        ("interactive", 1, 1),
        ("interactive", 6, 6),
    ]


def test_token_ids_are_taken_as_they_are() -> None:
    async def test(batcher: Batcher) -> None:
        answer = await batcher.embed([[4, 5], "1 2 3"])
        assert answer.vectors.tolist() == [[9.0, 2.0], [6.0, 3.0]]
        assert answer.texts == [TokenCount(2, truncated=False), TokenCount(3, truncated=False)]

    run(test, FakeModel())


def test_short_requests_do_not_wait_for_long_ones() -> None:
    model = FakeModel(gated=True)

    async def test(batcher: Batcher) -> None:
        long = embed(batcher, *[[n] for n in range(10)])
        await model.wait_until_busy()  # the only thread of the bulk lane
        short = embed(batcher, [100])
        await model.wait_until_busy()  # the interactive lane has its own
        assert model.batches[1] == [[100]]
        model.gate.release(100)
        await asyncio.gather(long, short)

    run(test, model, interactive_texts=4)


def test_duplicates_in_flight_are_computed_once() -> None:
    model, notes = FakeModel(gated=True), Notes()

    async def test(batcher: Batcher) -> None:
        requests = [embed(batcher, [1], [2], [1]), embed(batcher, [2], [3])]
        await model.wait_until_busy()
        requests.append(embed(batcher, [1]))
        await asyncio.sleep(0.01)
        model.gate.release(100)
        answers = await asyncio.gather(*requests)
        assert [answer.vectors[:, 0].tolist() for answer in answers] == [[1, 2, 1], [2, 3], [1]]

    run(test, model, notes)
    assert sorted(model.texts) == [[1], [2], [3]]
    assert [each[1] for each in notes.heard if each[0] == "duplicates"] == [1, 1, 1]


def test_a_duplicate_outlives_the_request_that_brought_it() -> None:
    model = FakeModel(gated=True)

    async def test(batcher: Batcher) -> None:
        first = embed(batcher, [9])
        await model.wait_until_busy()
        bringer, joiner = embed(batcher, [1]), embed(batcher, [1], [2])
        await settle(batcher, 2)
        bringer.cancel()
        await asyncio.sleep(0)
        model.gate.release(100)
        assert (await joiner).vectors[:, 0].tolist() == [1, 2]
        await first

    run(test, model)


def test_the_cache_answers_without_the_model() -> None:
    model, notes = FakeModel(), Notes()

    async def test(batcher: Batcher) -> None:
        for _ in range(3):
            answer = await embed(batcher, [1, 2], [3])
            assert answer.vectors.tolist() == [[3, 2], [3, 1]]
            assert answer.texts == [TokenCount(2, truncated=False), TokenCount(1, truncated=False)]

    run(test, model, notes, cache_bytes=100_000)
    assert sorted(model.texts) == [[1, 2], [3]]
    assert [each[1:] for each in notes.heard if each[0] == "cache"] == [(0, 2), (2, 0), (2, 0)]


def test_a_cancelled_request_is_never_computed() -> None:
    model = FakeModel(gated=True)

    async def test(batcher: Batcher) -> None:
        first = embed(batcher, [1])
        await model.wait_until_busy()
        dead, alive = embed(batcher, [2], [3]), embed(batcher, [4])
        await settle(batcher, 3)
        dead.cancel()
        await settle(batcher, 1)
        model.gate.release(100)
        await asyncio.gather(first, alive)
        with pytest.raises(asyncio.CancelledError):
            await dead

    run(test, model)
    assert model.texts == [[1], [4]]


def test_a_request_past_its_deadline_fails_and_is_not_computed() -> None:
    model, notes = FakeModel(gated=True), Notes()

    async def test(batcher: Batcher) -> None:
        first = embed(batcher, [1])
        await model.wait_until_busy()
        with pytest.raises(DeadlineExceededError):
            await embed(batcher, [2], deadline=time.monotonic() + 0.05)
        await settle(batcher, 0)
        model.gate.release(100)
        await first

    run(test, model, notes)
    assert model.texts == [[1]]
    assert ("shed", "deadline") in notes.heard


def test_a_deadline_that_the_queue_cannot_meet_is_refused_at_once() -> None:
    model = FakeModel(gated=True)

    async def test(batcher: Batcher) -> None:
        first = embed(batcher, [1])
        await model.wait_until_busy()
        waiting = [embed(batcher, [n, *[1] * 29]) for n in range(50)]
        await settle(batcher, 50)
        with pytest.raises(OverloadedError, match="longer than the"):
            await embed(batcher, [2], deadline=time.monotonic() + 0.001)
        model.gate.release(1000)
        await asyncio.gather(first, *waiting)

    run(test, model)


def test_one_failing_text_fails_its_own_request_only() -> None:
    model = FakeModel(gated=True)

    async def test(batcher: Batcher) -> None:
        first = embed(batcher, [1])
        await model.wait_until_busy()
        guilty, *innocent = embed(batcher, [7], [POISON]), embed(batcher, [2], [3]), embed(batcher, [4])
        await settle(batcher, 5)
        model.gate.release(100)
        await asyncio.gather(first, *innocent)
        with pytest.raises(ValueError, match="poison"):
            await guilty
        assert (await embed(batcher, [5])).vectors.tolist() == [[5.0, 1.0]]

    run(test, model)


def test_a_request_may_be_refused_for_its_lengths_without_harm_to_others() -> None:
    model = FakeModel(gated=True)

    def refuse(counts: Sequence[TokenCount]) -> None:
        assert [count.tokens_total for count in counts] == [1, 40]
        raise TextTooLongError("too long")

    async def test(batcher: Batcher) -> None:
        first = embed(batcher, [9])
        await model.wait_until_busy()
        refused = embed(batcher, [1], [2] * 40, inspect=refuse)
        joined = embed(batcher, [2] * 40)
        with pytest.raises(TextTooLongError):
            await refused
        await settle(batcher, 1)
        model.gate.release(100)
        answer = await joined
        assert answer.texts == [TokenCount(40, truncated=True)]
        await first

    run(test, model)
    assert model.texts == [[9], [2] * MAX_TOKENS]


def test_a_model_that_loses_vectors_is_an_error_and_not_a_shifted_answer() -> None:
    class Loser(FakeModel):
        def infer(self, token_ids: Sequence[Sequence[int]], *, normalize: bool | None = None) -> np.ndarray:
            return np.zeros((len(token_ids) - 1, 2), np.float32)

    async def test(batcher: Batcher) -> None:
        with pytest.raises(RuntimeError, match="0 vectors for 1 texts"):
            await embed(batcher, [1])

    run(test, Loser())


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    model, notes = FakeModel(gated=True), Notes()

    async def test(batcher: Batcher) -> None:
        first = embed(batcher, [1])  # an estimate of one token each
        await model.wait_until_busy()
        waiting = embed(batcher, [2], [3], [4])
        await settle(batcher, 3)
        with pytest.raises(OverloadedError, match=r"4 tokens are waiting .* at most 5 may wait") as caught:
            await embed(batcher, [5], [6])
        assert 1 <= caught.value.details["retry_after_s"] <= 60
        small, urgent = embed(batcher, [8]), embed(batcher, [10], [11], urgent=True)
        bulk = embed(batcher, *[[n] for n in range(20, 26)])  # the other lane has room of its own
        await settle(batcher, 3 + 1 + 2 + 5)  # the bulk thread has one in hand
        model.gate.release(100)
        await asyncio.gather(first, waiting, small, urgent, bulk)

    run(test, model, notes, queue_tokens={"interactive": 5, "bulk": 5}, batch_texts=1)
    assert ("shed", "queue") in notes.heard


def test_an_interactive_request_that_would_wait_too_long_is_refused() -> None:
    model, notes = FakeModel(gated=True), Notes()

    async def test(batcher: Batcher) -> None:
        first = embed(batcher, [1])
        await model.wait_until_busy()
        waiting = [embed(batcher, [n]) for n in range(2, 10)]  # one batch of eight may always wait
        await settle(batcher, 8)
        with pytest.raises(OverloadedError, match="EKIBEN_INTERACTIVE_WAIT_S"):
            await embed(batcher, [10])
        bulk = embed(batcher, *[[n] for n in range(20, 26)])
        model.gate.release(100)
        await asyncio.gather(first, bulk, *waiting)

    run(test, model, notes, interactive_wait_s=1e-6)
    assert ("shed", "wait") in notes.heard


def test_what_is_known_already_is_answered_however_full_the_queue_is() -> None:
    model = FakeModel(gated=True)

    async def test(batcher: Batcher) -> None:
        model.gate.release(1)
        await embed(batcher, [7])  # into the cache
        await model.wait_until_busy()
        first = embed(batcher, [1])
        await model.wait_until_busy()
        waiting = embed(batcher, [2], [3], [4], [5])
        await settle(batcher, 4)
        with pytest.raises(OverloadedError):
            await embed(batcher, [6], [8])
        assert (await embed(batcher, [7])).vectors.tolist() == [[7, 1]]
        shared = embed(batcher, [2], [7])
        model.gate.release(100)
        await asyncio.gather(first, waiting, shared)

    run(test, model, cache_bytes=100_000, queue_tokens={"interactive": 5, "bulk": 5})


def test_vectors_that_are_not_to_be_trusted_leave_the_cache_and_do_not_come_back() -> None:
    model = FakeModel(gated=True)

    async def test(batcher: Batcher) -> None:
        model.gate.release(1)
        await embed(batcher, [7])
        await model.wait_until_busy()
        in_flight = embed(batcher, [8])
        await model.wait_until_busy()
        batcher.forget()
        model.gate.release(100)
        await in_flight
        await asyncio.gather(embed(batcher, [7]), embed(batcher, [8]))

    run(test, model, cache_bytes=100_000)
    assert sorted(model.texts) == [[7], [7], [8], [8]]


def test_a_short_request_does_not_wait_for_the_same_text_in_the_bulk_lane() -> None:
    model = FakeModel(gated=True)

    async def test(batcher: Batcher) -> None:
        bulk = embed(batcher, *[[n] for n in range(1, 21)])
        await model.wait_until_busy()
        short = embed(batcher, [20])
        await model.wait_until_busy()
        assert model.batches[1] == [[20]]
        model.gate.release(100)
        answers = await asyncio.gather(bulk, short)
        assert [len(answer.vectors) for answer in answers] == [20, 1]

    run(test, model)


def test_a_request_that_is_gone_is_not_even_tokenized() -> None:
    class Slow(FakeModel):
        def tokenize(self, texts: Sequence[str]) -> list[TokenizedText]:
            self.entered.release()
            self.gate.acquire()
            return super().tokenize(texts)

    model = Slow(gated=True)

    async def test(batcher: Batcher) -> None:
        first = embed(batcher, [1])
        await model.wait_until_busy()
        dead, alive = embed(batcher, [2], [3]), embed(batcher, [4])
        await asyncio.sleep(0.01)
        dead.cancel()
        await asyncio.sleep(0.01)
        model.gate.release(100)
        await asyncio.gather(first, alive)

    run(test, model)
    assert model.tokenized == ["1", "4"]


def test_a_text_that_cannot_be_tokenized_fails_its_own_request_only() -> None:
    model = FakeModel(gated=True)

    async def test(batcher: Batcher) -> None:
        first = embed(batcher, [9])
        await model.wait_until_busy()
        guilty = asyncio.create_task(batcher.embed(["5", "six"]))
        sharing = embed(batcher, [5])
        with pytest.raises(ValueError, match="six"):
            await guilty
        model.gate.release(100)
        assert (await sharing).vectors.tolist() == [[5, 1]]
        await first

    run(test, model)


def test_a_thread_that_ends_its_long_batch_as_it_is_given_up_loses_nothing() -> None:
    model = FakeModel(gated=True)

    async def test(batcher: Batcher) -> None:
        tasks = [embed(batcher, [1])]
        await model.wait_until_busy()
        tasks.append(embed(batcher, [2]))
        await settle(batcher, 1)
        await asyncio.sleep(0.1)  # it hangs by now
        lane = batcher._lanes["interactive"]
        await asyncio.gather(asyncio.to_thread(lane.supervise), asyncio.to_thread(model.gate.release, 100))
        answers = await asyncio.gather(*tasks)
        assert [answer.vectors.tolist() for answer in answers] == [[[1, 1]], [[2, 1]]]

    for _ in range(20):
        model = FakeModel(gated=True)
        run(test, model, stall_s=0.05)


def test_the_supervisor_outlives_an_observer_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Notes):
        def set_queue(self, lane: str, texts: int, tokens: int, oldest_s: float, owner: int = 0) -> None:
            self.heard.append(("queue",))
            raise OSError("disk full")

    monkeypatch.setattr("bentos.batcher.SUPERVISE_EVERY_S", 0.01)
    notes = Failing()

    async def test(batcher: Batcher) -> None:
        while notes.heard.count(("queue",)) < 3:
            await asyncio.sleep(0.01)

    run(test, FakeModel(), notes)


def test_a_request_larger_than_the_queue_finds_room_when_it_is_empty() -> None:
    async def test(batcher: Batcher) -> None:
        for _ in range(2):  # the first one has left the books
            assert len((await embed(batcher, *[[n] for n in range(50)])).vectors) == 50

    run(test, FakeModel(), queue_tokens={"interactive": 5, "bulk": 5})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_is_replaced_and_its_texts_are_computed() -> None:
    model, notes = FakeModel(lives=1), Notes()

    async def test(batcher: Batcher) -> None:
        answer = await embed(batcher, [KILLER], [1])
        assert answer.vectors.tolist() == [[KILLER, 1], [1, 1]]
        assert (await embed(batcher, [5])).vectors.tolist() == [[5.0, 1.0]]

    run(test, model, notes)
    assert notes.heard.count(("restart", "interactive")) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_text_that_kills_every_thread_is_given_up() -> None:
    model, notes = FakeModel(lives=100), Notes()

    async def test(batcher: Batcher) -> None:
        with pytest.raises(NotReadyError, match="ended twice"):
            await embed(batcher, [KILLER])
        assert (await embed(batcher, [5])).vectors.tolist() == [[5.0, 1.0]]

    run(test, model, notes)
    assert notes.heard.count(("restart", "interactive")) == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_text_that_kills_every_thread_takes_nobody_with_it() -> None:
    model = FakeModel(gated=True, lives=2)

    async def test(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.embed(["1"]))
        await model.wait_until_busy()
        asked = [asyncio.create_task(batcher.embed([text([number])])) for number in (2, KILLER, 3)]
        await asyncio.sleep(0.05)
        model.gate.release(1_000_000)
        assert (await first).vectors.tolist() == [expected([1])]
        for number, task in zip((2, KILLER, 3), asked, strict=True):
            if number == KILLER:
                with pytest.raises(NotReadyError, match="ended twice"):
                    await task
            else:
                assert (await task).vectors.tolist() == [expected([number])]
        assert sorted(model.batches[1]) == sorted([[2], [KILLER], [3]]), "they went together at first"

    run(test, model)


def test_a_thread_that_hangs_is_replaced_and_its_late_answer_is_not_heard() -> None:
    model, notes = FakeModel(lives=1), Notes()

    async def test(batcher: Batcher) -> None:
        answer = await embed(batcher, [HANGER])
        assert answer.vectors.tolist() == [[HANGER, 1]]
        model.awake.set()
        assert (await embed(batcher, [5])).vectors.tolist() == [[5.0, 1.0]]

    run(test, model, notes, stall_s=0.2)
    assert notes.heard.count(("restart", "interactive")) == 1
    assert model.texts == [[HANGER], [HANGER], [5]]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("number", "how"), [(KILLER, "is dead"), (HANGER, "hangs")])
@pytest.mark.parametrize(("lane", "others"), [("interactive", []), ("bulk", [[1], [2], [3], [4]])])
def test_until_it_is_replaced_a_thread_that_died_or_hangs_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, number: int, how: str, lane: LaneName, others: list[list[int]]
) -> None:
    monkeypatch.setattr("bentos.batcher.SUPERVISE_EVERY_S", 3600)

    async def test(batcher: Batcher) -> None:
        assert batcher.find_problem() is None
        asked = embed(batcher, [number], *others)
        while (problem := batcher.find_problem()) is None:
            await asyncio.sleep(0.001)
        assert problem == f"a thread of the lane {lane} {how}"
        batcher._lanes[lane].supervise()
        assert batcher.find_problem() is None
        assert (await asked).vectors.tolist() == [expected(ids) for ids in ([number], *others)]

    run(test, FakeModel(lives=1), stall_s=0.2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_tokenizer_that_dies_fails_one_request_and_is_replaced() -> None:
    class Dying(FakeModel):
        def tokenize(self, texts: Sequence[str]) -> list[TokenizedText]:
            if texts == [str(KILLER)]:
                raise SystemExit
            return super().tokenize(texts)

    async def test(batcher: Batcher) -> None:
        with pytest.raises(NotReadyError, match="the tokenizer ended"):
            await embed(batcher, [KILLER])
        assert (await embed(batcher, [5])).vectors.tolist() == [[5.0, 1.0]]

    run(test, Dying())


def test_a_long_request_is_tokenized_in_turns_with_short_ones_between() -> None:
    class Held(FakeModel):
        """Tokenizes nothing until both requests have come."""

        both = threading.Event()

        def tokenize(self, texts: Sequence[str]) -> list[TokenizedText]:
            assert self.both.wait(10)
            return super().tokenize(texts)

    model = Held()

    async def test(batcher: Batcher) -> None:
        long = asyncio.create_task(batcher.embed([f"{n} " * 15_000 for n in range(10)]))
        await asyncio.sleep(0)
        short = asyncio.ensure_future(embed(batcher, [77]))
        await asyncio.sleep(0.05)
        model.both.set()
        await asyncio.gather(long, short)

    run(test, model)
    assert model.tokenized.index("77") < 9


def test_what_waits_is_told() -> None:
    model, notes = FakeModel(gated=True), Notes()

    async def test(batcher: Batcher) -> None:
        first = embed(batcher, [1])
        await model.wait_until_busy()
        others = embed(batcher, [2, 3], [4])
        await settle(batcher, 2)
        batcher.report_queues()
        assert ("queue", "interactive", 2, 3) in notes.heard
        model.gate.release(100)
        await asyncio.gather(first, others)

    run(test, model, notes)


def test_stopping_finishes_the_batches_in_flight_and_refuses_the_rest() -> None:
    model, before = FakeModel(gated=True), set(threading.enumerate())  # other tests may have left some that end later

    async def main() -> None:
        batcher = Batcher(model, make_limits())
        with pytest.raises(NotReadyError):
            await batcher.embed(["1"])
        batcher.start()
        in_flight = embed(batcher, [1])
        await model.wait_until_busy()
        waiting = embed(batcher, [2])
        await settle(batcher, 1)
        stopping = asyncio.create_task(batcher.stop())
        await asyncio.sleep(0.05)
        model.gate.release(100)
        await stopping
        assert (await in_flight).vectors.tolist() == [[1.0, 1.0]]
        with pytest.raises(NotReadyError):
            await waiting
        with pytest.raises(NotReadyError):
            await batcher.embed(["3"])

    asyncio.run(main())
    assert model.texts == [[1]]
    ours = [thread for thread in threading.enumerate() if thread.name.startswith("ekiben-") and thread not in before]
    assert not [thread for thread in ours if thread.is_alive()]
