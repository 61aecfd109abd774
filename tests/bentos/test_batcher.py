"""The batcher with a model whose answers can be written by hand: a text's vector is its ids' sum, and its length."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bentos.batcher import Batcher
from bentos.errors import NotReadyError, OverloadedError

POISON = 666


class FakeModel:
    """Records its batches; waits at the gate when there is one; fails on poison."""

    def __init__(self, *, gated: bool = False) -> None:
        self.batches: list[tuple[list[list[int]], bool]] = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Semaphore(0 if gated else 1_000_000)

    def __call__(self, token_ids: list[Any], normalize: bool) -> np.ndarray:
        self.batches.append(([list(ids) for ids in token_ids], normalize))
        self.entered.release()
        self.gate.acquire()
        if any(POISON in ids for ids in token_ids):
            raise ValueError("poison")
        return np.array([expected(ids) for ids in token_ids], dtype=np.float32)

    @property
    def texts(self) -> list[list[int]]:
        return [ids for batch, _ in self.batches for ids in batch]

    async def wait_until_busy(self) -> None:
        await asyncio.to_thread(self.entered.acquire)


def expected(ids: list[int]) -> list[float]:
    return [float(sum(ids)), float(len(ids))]


def run(
    test: Callable[[Batcher], Awaitable[None]], model: FakeModel, *, batch_tokens: int = 64, queue_texts: int = 100
) -> None:
    async def main() -> None:
        batcher = Batcher(model, batch_tokens=batch_tokens, queue_texts=queue_texts)
        batcher.start()
        try:
            await asyncio.wait_for(test(batcher), timeout=20)
        finally:
            model.gate.release(1000)
            await batcher.stop()

    asyncio.run(main())


def submit(batcher: Batcher, *texts: list[int], normalize: bool = True, urgent: bool = False) -> asyncio.Task[Any]:
    return asyncio.create_task(batcher.submit(texts, normalize=normalize, urgent=urgent))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


request_lists = st.lists(
    st.tuples(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=30), min_size=1, max_size=8), st.booleans()),
    min_size=1,
    max_size=10,
)


@settings(deadline=None, max_examples=50)
@given(request_lists, st.integers(1, 80))
def test_every_request_gets_its_own_vectors_in_order(
    requests: list[tuple[list[list[int]], bool]], batch_tokens: int
) -> None:
    model = FakeModel()

    async def test(batcher: Batcher) -> None:
        answers = await asyncio.gather(*(submit(batcher, *texts, normalize=unit) for texts, unit in requests))
        for (texts, _), vectors in zip(requests, answers, strict=True):
            assert vectors.tolist() == [expected(ids) for ids in texts]

    run(test, model, batch_tokens=batch_tokens)
    assert sorted(model.texts) == sorted(ids for texts, _ in requests for ids in texts)
    for batch, normalize in model.batches:
        assert len(batch) == 1 or max(map(len, batch)) * len(batch) <= batch_tokens
        allowed = [ids for texts, unit in requests if unit == normalize for ids in texts]
        assert all(ids in allowed for ids in batch)


def test_an_idle_batcher_computes_at_once_and_a_busy_one_gathers() -> None:
    model = FakeModel(gated=True)

    async def test(batcher: Batcher) -> None:
        first = submit(batcher, [1])
        await model.wait_until_busy()
        others = [submit(batcher, [n]) for n in range(2, 8)]
        await settle()
        model.gate.release(2)
        await asyncio.gather(first, *others)

    run(test, model)
    assert [batch for batch, _ in model.batches] == [[[1]], [[2], [3], [4], [5], [6], [7]]]


def test_the_text_whose_turn_it_is_goes_with_those_most_like_it() -> None:
    model = FakeModel(gated=True)

    async def test(batcher: Batcher) -> None:
        first = submit(batcher, [1])
        await model.wait_until_busy()
        others = [submit(batcher, [length] * length) for length in (10, 1, 30, 9, 2, 11)]
        await settle()
        model.gate.release(100)
        await asyncio.gather(first, *others)

    run(test, model, batch_tokens=33)
    assert [[len(ids) for ids in batch] for batch, _ in model.batches] == [[1], [10, 9, 11], [1, 2], [30]]


def test_a_short_request_passes_a_long_one() -> None:
    model = FakeModel(gated=True)

    async def test(batcher: Batcher) -> None:
        long = submit(batcher, *[[n] for n in range(50)])
        await model.wait_until_busy()
        short = submit(batcher, [100], [101])
        await settle()
        model.gate.release(100)
        await asyncio.gather(long, short)

    run(test, model, batch_tokens=2)
    assert [100] in model.batches[1][0]
    assert [101] in model.batches[2][0]


def test_a_long_request_goes_on_however_many_short_ones_arrive() -> None:
    model = FakeModel(gated=True)

    async def test(batcher: Batcher) -> None:
        long = submit(batcher, *[[1, n] for n in range(10)])
        short = []
        for n in range(40):
            short += [submit(batcher, [2, n]), submit(batcher, [3, n])]  # more than the model can take
            await model.wait_until_busy()
            model.gate.release(1)
            if long.done():
                break
        assert long.done()
        model.gate.release(1000)
        await asyncio.gather(*short)

    run(test, model, batch_tokens=2)


def test_a_text_above_the_budget_is_computed_alone() -> None:
    model = FakeModel()

    async def test(batcher: Batcher) -> None:
        assert len(await batcher.submit([[1] * 500, [2]], normalize=True)) == 2

    run(test, model, batch_tokens=10)
    assert [len(batch) for batch, _ in model.batches] == [1, 1]


def test_a_cancelled_request_is_never_computed() -> None:
    model = FakeModel(gated=True)

    async def test(batcher: Batcher) -> None:
        first = submit(batcher, [1])
        await model.wait_until_busy()
        dead, alive = submit(batcher, [2], [3]), submit(batcher, [4])
        await settle()
        dead.cancel()
        await settle()
        assert batcher.texts_waiting == 1
        model.gate.release(100)
        await asyncio.gather(first, alive)
        with pytest.raises(asyncio.CancelledError):
            await dead

    run(test, model)
    assert model.texts == [[1], [4]]


def test_a_request_cancelled_in_the_same_moment_as_a_batch_is_taken_is_not_computed() -> None:
    model = FakeModel()

    async def test(batcher: Batcher) -> None:
        dead, alive = submit(batcher, [2]), submit(batcher, [4])
        await asyncio.sleep(0)  # both have submitted; the batcher has not run yet
        dead.cancel()
        await alive

    run(test, model)
    assert model.texts == [[4]]


def test_a_request_cancelled_while_computed_harms_nobody() -> None:
    model = FakeModel(gated=True)

    async def test(batcher: Batcher) -> None:
        dead = submit(batcher, [1], [2])
        await model.wait_until_busy()
        dead.cancel()
        await settle()
        model.gate.release(100)
        assert (await batcher.submit([[5]], normalize=True)).tolist() == [[5.0, 1.0]]

    run(test, model)


def test_one_failing_text_fails_its_own_request_only() -> None:
    model = FakeModel(gated=True)

    async def test(batcher: Batcher) -> None:
        first = submit(batcher, [1])
        await model.wait_until_busy()
        guilty, *innocent = submit(batcher, [7], [POISON]), submit(batcher, [2], [3]), submit(batcher, [4])
        await settle()
        model.gate.release(100)
        await asyncio.gather(first, *innocent)
        with pytest.raises(ValueError, match="poison"):
            await guilty
        assert (await batcher.submit([[5]], normalize=True)).tolist() == [[5.0, 1.0]]

    run(test, model)


def test_a_model_that_loses_vectors_is_an_error_and_not_a_shifted_answer() -> None:
    async def main() -> None:
        batcher = Batcher(lambda ids, _: np.zeros((len(ids) - 1, 2), np.float32), batch_tokens=64, queue_texts=10)
        batcher.start()
        with pytest.raises(RuntimeError, match="0 vectors for 1 texts"):
            await batcher.submit([[1]], normalize=True)
        await batcher.stop()

    asyncio.run(main())


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    model = FakeModel(gated=True)

    async def test(batcher: Batcher) -> None:
        first = submit(batcher, [1])
        await model.wait_until_busy()
        waiting = submit(batcher, [2], [3], [4])
        await settle()
        with pytest.raises(OverloadedError, match="3 texts are waiting and the request has 3; at most 5") as caught:
            await batcher.submit([[5], [6], [7]], normalize=True)
        assert 1 <= caught.value.details["retry_after_s"] <= 60
        small = submit(batcher, [8], [9])
        urgent = submit(batcher, [10], urgent=True)
        await settle()
        model.gate.release(100)
        await asyncio.gather(first, waiting, small, urgent)

    run(test, model, queue_texts=5)


def test_texts_that_are_being_tokenized_take_room_in_the_queue() -> None:
    async def test(batcher: Batcher) -> None:
        with batcher.reserve(4):
            with pytest.raises(OverloadedError, match="4 texts are waiting and the request has 2"), batcher.reserve(2):
                pass
            with pytest.raises(OverloadedError):
                await batcher.submit([[1], [2]], normalize=True)
            await batcher.submit([[1]], normalize=True)
        with batcher.reserve(5):
            pass

    run(test, FakeModel(), queue_texts=5)


def test_an_urgent_request_goes_to_the_head_of_the_queue() -> None:
    model = FakeModel(gated=True)

    async def test(batcher: Batcher) -> None:
        first = submit(batcher, [1])
        await model.wait_until_busy()
        others = [submit(batcher, [n]) for n in (2, 3)]
        await settle()
        urgent = submit(batcher, [8], [9], urgent=True)
        await settle()
        model.gate.release(100)
        await asyncio.gather(first, urgent, *others)

    run(test, model, batch_tokens=1)
    assert model.texts == [[1], [8], [9], [2], [3]]


def test_stopping_finishes_the_batch_in_flight_and_refuses_the_rest() -> None:
    model = FakeModel(gated=True)

    async def main() -> None:
        batcher = Batcher(model, batch_tokens=64, queue_texts=10)
        with pytest.raises(NotReadyError):
            await batcher.submit([[1]], normalize=True)
        batcher.start()
        in_flight = submit(batcher, [1])
        await model.wait_until_busy()
        waiting = submit(batcher, [2])
        await settle()
        stopping = asyncio.create_task(batcher.stop())
        await settle()
        model.gate.release(100)
        await stopping
        assert (await in_flight).tolist() == [[1.0, 1.0]]
        with pytest.raises(NotReadyError):
            await waiting
        with pytest.raises(NotReadyError):
            await batcher.submit([[3]], normalize=True)

    asyncio.run(main())
    assert model.texts == [[1]]
    assert not any(thread.name.startswith("ekiben-infer") and thread.is_alive() for thread in threading.enumerate())
