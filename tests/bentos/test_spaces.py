"""In which space an answer is, and what a caller is told who needs another one. No model: manifests and maps only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bentos.adapter import Adapter
from bentos.errors import SpaceMismatchError
from bentos.lunchbox import Lunchbox
from bentos.manifest import Compat, Manifest
from bentos.schemas import DoorRequest, EncodeRequest, PredictRequest, SimilarityRequest
from bentos.spaces import check_expected, choose_adapter, list_spaces
from tests.bentos.shelves import make_map

A, B, C, D = (letter * 16 for letter in "abcd")
SPACES = st.sampled_from([A, B, C, D])


def make_box(version: int, space: str, *older: str, compatible: str | None = None) -> Lunchbox:
    relations = [
        Compat(kind="compatible", version="1", tag="ekiben:1-x", space_id=other) for other in [compatible] if other
    ]
    manifest = Manifest.model_construct(
        name="ekiben", version=str(version), run_id=f"{version}" * 32, space_id=space, dim=32, earlier=relations
    )
    maps = {to: Adapter(to, make_map()) for to in older}
    return Lunchbox(Path(), manifest, None, None, {}, maps)  # type: ignore[arg-type]


def encode(**fields: Any) -> EncodeRequest:
    return EncodeRequest(texts=["a"], **fields)


@given(SPACES, st.sets(SPACES), st.none() | SPACES, st.none() | SPACES)
def test_an_answer_is_in_the_space_asked_for_and_in_no_other_than_the_one_expected(
    own: str, older: set[str], asked: str | None, expected: str | None
) -> None:
    box, request = make_box(1, own, *(older - {own})), encode(space=asked)
    found = asked or own
    if found != own and found not in older:
        with pytest.raises(SpaceMismatchError) as refused:
            choose_adapter(box, request)
        assert refused.value.details["available"] == list_spaces(box) == [own, *box.adapters]
        return
    adapter = choose_adapter(box, request)
    assert (own if adapter is None else adapter.space_id) == found
    if expected is None or expected == found:
        check_expected(expected or found, box, adapter, request)
    else:
        with pytest.raises(SpaceMismatchError) as mismatch:
            check_expected(expected, box, adapter, request)
        assert mismatch.value.details == {"expected": expected, "found": found, "available": list_spaces(box)}
        helps = [each for each in box.adapters if f"Send `space`: {each!r}" in mismatch.value.message]
        assert helps == ([expected] if expected in box.adapters else [])


LIVE = make_box(3, C, B)
LOADED = [LIVE, make_box(2, B, A), make_box(1, A)]


@pytest.mark.parametrize(
    ("request_made", "expected", "told", "untold"),
    [
        (encode(), B, ["Send `space`: 'bbbb", "Name `model`: 'ekiben:2-22222222', which is"], ["Embed your"]),
        (encode(), A, ["Name `model`: 'ekiben:1-11111111', which is loaded here and makes them"], ["Send", "with `sp"]),
        (encode(), D, ["Embed your texts again, or ask the server that made the old vectors"], ["Send", "Name"]),
        (encode(space=B), C, ["`space` asks for vectors of space 'bbbb", "Leave `space` out: ekiben:3-3"], ["Send"]),
        (PredictRequest(text="a"), B, ["Send `space`", "Name `model_version`: 'ekiben:2-2"], []),
        (SimilarityRequest(a=["a"], b=["b"]), B, ["Name `model`: 'ekiben:2-2"], ["Send `space`"]),
    ],
)
def test_what_would_help_is_told_and_nothing_else(
    request_made: DoorRequest, expected: str, told: list[str], untold: list[str]
) -> None:
    with pytest.raises(SpaceMismatchError) as refused:
        check_expected(expected, LIVE, choose_adapter(LIVE, request_made), request_made, LOADED)
    for part in told:
        assert part in refused.value.message
    for part in untold:
        assert part not in refused.value.message


def test_a_version_that_has_the_map_is_named_when_none_makes_such_vectors_itself() -> None:
    loaded = LOADED[:2]
    with pytest.raises(SpaceMismatchError, match="Name `model`: 'ekiben:2-22222222' with `space`: 'aaaa") as refused:
        check_expected(A, LIVE, None, encode(), loaded)
    assert "which has a map into it" in refused.value.message
    with pytest.raises(SpaceMismatchError, match="Name `model`: 'ekiben:2-22222222' with `space`: 'aaaa"):
        choose_adapter(LIVE, encode(space=A), loaded)
    with pytest.raises(SpaceMismatchError, match="Embed your texts again"):
        check_expected(A, LIVE, None, SimilarityRequest(a=["a"], b=["b"]), loaded)


def test_a_space_that_the_release_found_compatible_is_named_as_such() -> None:
    box = make_box(2, B, compatible=A)
    with pytest.raises(SpaceMismatchError, match=f"both spaces compatible.*to accept that, expect '{B}'"):
        check_expected(A, box, None, encode())
    with pytest.raises(SpaceMismatchError) as other:
        check_expected(C, box, None, encode())
    assert "compatible" not in other.value.message


@pytest.mark.parametrize("space", ["", "x" * 5000, "ü", "\x7f"])
def test_nonsense_is_shown_shortened(space: str) -> None:
    for refuse in (
        lambda: choose_adapter(LIVE, encode(space=space)),
        lambda: check_expected(space, LIVE, None, encode()),
    ):
        with pytest.raises(SpaceMismatchError) as refused:
            refuse()
        assert len(refused.value.message) < 400
        assert len(refused.value.details["expected"]) <= 60
