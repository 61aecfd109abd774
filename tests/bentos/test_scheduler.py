"""The queue alone: order, packing, counts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bentos.scheduler import Queue, QueuedText


def texts_of(*lengths: int) -> list[QueuedText]:
    return [QueuedText(ids=[1] * length) for length in lengths]


def lengths(batch: list[QueuedText]) -> list[int]:
    return [len(text.ids) for text in batch]


def drain(queue: Queue[QueuedText], takers: int = 1) -> list[list[QueuedText]]:
    batches = []
    while batch := queue.take(takers):
        batches.append(batch)
    return batches


requests = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=12)


@given(requests, st.integers(1, 100), st.integers(1, 10), st.integers(1, 4), st.randoms())
def test_every_text_leaves_once_and_every_batch_keeps_its_budget(
    arriving: list[list[int]], batch_tokens: int, batch_texts: int, takers: int, random: object
) -> None:
    queue: Queue[QueuedText] = Queue(batch_tokens=batch_tokens, batch_texts=batch_texts)
    added = [texts_of(*request) for request in arriving]
    for request in added:
        queue.add(request)
    everything = [text for request in added for text in request]
    dropped = everything[::3]
    for text in dropped:
        queue.drop(text)
    assert queue.texts == len(everything) - len(dropped)
    batches = drain(queue, takers)
    assert sorted(map(id, (text for batch in batches for text in batch))) == sorted(
        id(text) for text in everything if text not in dropped
    )
    for batch in batches:
        assert len(batch) <= batch_texts
        assert len(batch) == 1 or max(lengths(batch)) * len(batch) <= batch_tokens
    assert (queue.texts, queue.tokens, queue.first()) == (0, 0, None)


def test_the_text_whose_turn_it_is_goes_with_those_most_like_it() -> None:
    queue: Queue[QueuedText] = Queue(batch_tokens=33, batch_texts=8)
    for length in (10, 1, 30, 9, 2, 11):
        queue.add(texts_of(length))
    assert [lengths(batch) for batch in drain(queue)] == [[10, 9, 11], [1, 2], [30]]


def test_a_short_request_passes_a_long_one() -> None:
    queue: Queue[QueuedText] = Queue(batch_tokens=2, batch_texts=8)
    queue.add(texts_of(*[1] * 50))
    queue.take()
    short = texts_of(1, 1)
    queue.add(short)
    assert short[0] in queue.take()
    assert short[1] in queue.take()


def test_a_long_request_goes_on_however_many_short_ones_arrive() -> None:
    queue: Queue[QueuedText] = Queue(batch_tokens=1, batch_texts=8)
    long = texts_of(*[1] * 10)
    queue.add(long)
    for _ in range(40):
        queue.add(texts_of(1))
        queue.add(texts_of(1))
        queue.take()
    assert not any(text.queued for text in long)


def test_an_urgent_request_goes_to_the_head_in_its_order() -> None:
    queue: Queue[QueuedText] = Queue(batch_tokens=5, batch_texts=1)
    queue.add(texts_of(1, 2))
    queue.add(texts_of(3, 4), urgent=True)
    assert [lengths(batch) for batch in drain(queue)] == [[3], [4], [1], [2]]


def test_nobody_takes_more_than_their_share() -> None:
    queue: Queue[QueuedText] = Queue(batch_tokens=1000, batch_texts=8)
    queue.add(texts_of(*[3] * 6))
    assert [len(queue.take(2)) for _ in range(3)] == [3, 2, 1]


def test_a_text_that_was_dropped_before_it_came_is_not_queued() -> None:
    queue: Queue[QueuedText] = Queue(batch_tokens=10, batch_texts=8)
    gone, alive = texts_of(1, 2)
    queue.drop(gone)
    queue.add([gone, alive])
    assert (queue.texts, queue.tokens) == (1, 2)
    assert queue.take() == [alive]


def test_many_dropped_texts_do_not_hide_the_living_ones() -> None:
    queue: Queue[QueuedText] = Queue(batch_tokens=10, batch_texts=8)
    dead = texts_of(*[1] * 1000)
    queue.add(dead)
    alive = texts_of(2)
    queue.add(alive)
    for text in dead:
        queue.drop(text)
    assert queue.take() == alive


def test_a_text_that_is_to_go_alone_has_no_mates() -> None:
    queue: Queue[QueuedText] = Queue(batch_tokens=100, batch_texts=8)
    texts = texts_of(3, 3, 3, 3)
    texts[0].alone = texts[2].alone = True
    queue.add(texts)
    assert drain(queue) == [[texts[0]], [texts[1], texts[3]], [texts[2]]]
