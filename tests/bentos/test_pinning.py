"""Texts that pass BentoML's batching keep their version, however they are mixed and cut."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bentos import pinning
from bentos.encoder import Encoder
from bentos.pinning import embed_pinned, pin


class Named:
    """Stands for an encoder: a text's vector is the encoder's number and the text's length."""

    def __init__(self, number: int) -> None:
        self.number = number

    async def embed_texts(self, texts: list[str]) -> Any:
        return np.array([[self.number, len(text)] for text in texts], dtype=np.float32)


def make(number: int) -> Encoder:
    return cast(Encoder, Named(number))


LIVE = make(99)


@given(st.lists(st.tuples(st.integers(0, 3), st.text(st.characters(exclude_characters="\0"))), max_size=20))
def test_every_text_is_embedded_by_its_own_version(asked: list[tuple[int, str]]) -> None:
    encoders = [make(number) for number in range(3)]
    with contextlib.ExitStack() as requests:
        texts = [
            text if number == 3 else requests.enter_context(pin([text], encoders[number]))[0] for number, text in asked
        ]
        rows = asyncio.run(embed_pinned(texts, lambda: LIVE))
    assert rows == [[99 if number == 3 else number, len(text)] for number, text in asked]


def test_the_live_version_is_not_asked_for_when_every_text_is_pinned() -> None:
    with pin(["a", "bb"], make(1)) as texts:
        assert asyncio.run(embed_pinned(texts, lambda: pytest.fail("not needed"))) == [[1, 1], [1, 2]]


def test_a_request_that_was_given_up_does_no_harm_to_those_that_share_its_batch() -> None:
    with pin(["a"], make(1)) as given_up:
        pass
    with pin(["bb"], make(2)) as waiting:
        rows = asyncio.run(embed_pinned([*given_up, *waiting], lambda: pytest.fail("not needed")))
    assert rows == [[], [2, 2]]


def test_nothing_is_kept_of_requests_that_are_over() -> None:
    with contextlib.suppress(RuntimeError), pin(["a"], make(1)):
        assert len(pinning._pinned) == 1
        raise RuntimeError
    assert pinning._pinned == {}
