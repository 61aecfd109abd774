"""What a body may hold. The messages over HTTP are in test_service.py; here are the corners of the parser."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bentos.errors import InvalidRequestError, MalformedBodyError, ServeError, TooLargeError
from bentos.schemas import EncodeRequest, SimilarityRequest, parse_request
from bentos.settings import ServeSettings

SETTINGS = ServeSettings(max_texts=4, max_chars=10)


def parse(body: Any, model: type[Any] = EncodeRequest) -> Any:
    return parse_request(model, body if isinstance(body, bytes) else json.dumps(body).encode(), SETTINGS)


def test_a_good_body_becomes_a_request_with_defaults() -> None:
    request = parse({"texts": ["a", "b"], "normalize": False})
    assert request.texts == ["a", "b"]
    assert (request.normalize, request.encoding, request.on_overflow, request.prompt) == (
        False,
        "float",
        "truncate",
        None,
    )


@pytest.mark.parametrize("value", [1, 1.5, True, None, "texts", {"0": "a"}, [1], [None], [["a"]], ["a", 2]])
def test_texts_are_never_converted(value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="`texts"):
        parse({"texts": value})


def test_the_message_names_field_found_and_allowed() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse({"texts": ["a", 7], "normalize": "yes", "colour": 1})
    assert caught.value.message == "`texts[1]` is the number 7; it must be a valid string (and 2 more)"
    assert [error["field"] for error in caught.value.details["errors"]] == ["texts[1]", "normalize", "colour"]


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse({"texts": "x" * 10_000})
    assert len(caught.value.message) < 200


def test_both_lists_of_a_similarity_count() -> None:
    parse({"a": ["1", "2"], "b": ["3", "4"]}, SimilarityRequest)
    with pytest.raises(TooLargeError, match="`a` and `b` have 5 items; at most 4"):
        parse({"a": ["1", "2", "3"], "b": ["4", "5"]}, SimilarityRequest)


def test_pairs_need_lists_of_one_length() -> None:
    with pytest.raises(InvalidRequestError, match="`a` has 1 texts and `b` has 2"):
        parse({"a": ["1"], "b": ["2", "3"], "pairwise": True}, SimilarityRequest)


def test_an_empty_prompt_text_is_allowed_and_a_bad_one_is_not() -> None:
    assert parse({"texts": ["a"], "prompt_text": ""}).prompt_text == ""
    with pytest.raises(InvalidRequestError, match="`prompt_text` contains a null byte"):
        parse({"texts": ["a"], "prompt_text": "\0"})


@given(st.binary(max_size=60))
def test_no_bytes_crash_the_parser(body: bytes) -> None:
    with pytest.raises((MalformedBodyError, InvalidRequestError)):
        parse(body)


texts = st.text(alphabet="aö\0 \n", max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.5, "base64", "error"]) | texts,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from([*EncodeRequest.model_fields, "other"])


@given(st.dictionaries(fields, json_values, max_size=5))
def test_any_object_is_a_request_or_an_error_of_ours(body: dict[str, Any]) -> None:
    try:
        texts = parse(body).texts
    except ServeError as error:
        texts = body.get("texts")
        refused_with = error.status
    else:
        refused_with = None
    assert texts == body.get("texts")
    assert refused_with in (None, 413, 422)
