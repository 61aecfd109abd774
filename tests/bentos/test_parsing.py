"""What a body may hold. The messages over HTTP are in test_service.py; here are the corners of the parser."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bentos.doors import DOORS
from bentos.errors import InvalidRequestError, MalformedBodyError, ServeError, TooLargeError
from bentos.openai import EmbeddingsRequest
from bentos.parsing import parse_request
from bentos.schemas import EncodeRequest, PredictRequest, RankRequest, SimilarityRequest
from bentos.settings import ServeSettings

SETTINGS = ServeSettings(max_texts=4, max_chars=10, max_prompt_chars=10)
RANKING = {"query": "a", "documents": ["b"]}


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
    for body in ({"texts": "x" * 10_000}, {"texts": ["a"], "x" * 10_000: 1}):
        with pytest.raises(InvalidRequestError, match=r"x{60}\.\.\.") as caught:
            parse(body)
        assert len(caught.value.message) < 300
        assert len(str(caught.value.details)) < 400


def test_both_lists_of_a_similarity_count() -> None:
    parse({"a": ["1", "2"], "b": ["3", "4"]}, SimilarityRequest)
    with pytest.raises(TooLargeError, match="`a` and `b` have 5 items; at most 4"):
        parse({"a": ["1", "2", "3"], "b": ["4", "5"]}, SimilarityRequest)


def test_pairs_need_lists_of_one_length() -> None:
    with pytest.raises(InvalidRequestError, match="`a` has 1 texts and `b` has 2"):
        parse({"a": ["1"], "b": ["2", "3"], "pairwise": True}, SimilarityRequest)


@pytest.mark.parametrize(
    ("model", "body", "field"),
    [
        (EncodeRequest, {"texts": ["a"]}, "prompt_text"),
        (SimilarityRequest, {"a": ["a"], "b": ["b"]}, "prompt_text"),
        (EmbeddingsRequest, {"input": "a"}, "prompt_text"),
        (RankRequest, RANKING, "query_prompt_text"),
        (RankRequest, RANKING, "document_prompt_text"),
    ],
)
def test_a_literal_prompt_may_be_empty_but_not_bad_long_or_beside_a_name(model: Any, body: Any, field: str) -> None:
    assert getattr(parse(body | {field: ""}, model), field) == ""
    with pytest.raises(InvalidRequestError, match=f"`{field}` contains a null byte"):
        parse(body | {field: "\0"}, model)
    with pytest.raises(TooLargeError, match=f"`{field}` has 11 characters; at most 10"):
        parse(body | {field: "x" * 11}, model)
    name = field.removesuffix("_text")
    with pytest.raises(InvalidRequestError, match=f"`{name}` and `{field}` are both given"):
        parse(body | {field: "", name: "query"}, model)


def test_a_query_counts_as_a_text_beside_its_documents() -> None:
    parse({"query": "q", "documents": ["1", "2", "3"]}, RankRequest)
    with pytest.raises(TooLargeError, match="`query` and `documents` have 5 items; at most 4"):
        parse({"query": "q", "documents": ["1", "2", "3", "4"]}, RankRequest)


def test_a_single_text_is_named_without_a_position() -> None:
    with pytest.raises(TooLargeError, match="`query` has 11 characters"):
        parse({"query": "q" * 11, "documents": ["1"]}, RankRequest)
    with pytest.raises(InvalidRequestError, match="`text` is empty"):
        parse({"text": " "}, PredictRequest)


def test_ids_are_texts_or_numbers_one_a_document() -> None:
    assert parse({"query": "q", "documents": ["1", "2"], "ids": ["a", 7]}, RankRequest).ids == ["a", 7]
    with pytest.raises(InvalidRequestError, match="`ids` has 1 items and `documents` has 2"):
        parse({"query": "q", "documents": ["1", "2"], "ids": ["a"]}, RankRequest)
    with pytest.raises(InvalidRequestError) as caught:
        parse({"query": "q", "documents": ["1", "2"], "ids": [None, 1.5]}, RankRequest)
    assert [error["field"] for error in caught.value.details["errors"]] == ["ids[0]", "ids[1]"]
    assert caught.value.message == "`ids[0]` is null; it must be a valid string or a valid integer (and 1 more)"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "`input` is null; it must be a text, a list of texts, a list of token ids"),
        (7, "`input` is the number 7"),
        ({}, "`input` is an object"),
        ([], "`input` is an empty list; give at least one text"),
        ([None], "`input` has null as item 0; it must be"),
        ([True], "`input` has true as item 0; it must be"),
        ([1, True], "`input` has true as item 1; it must be"),
        ([1.5], "`input` has the number 1.5 as item 0"),
        (["a", 7], "`input` has the number 7 as item 1"),
        ([7, "a"], "`input` has the string 'a' as item 1"),
        ([[1], "a"], "`input` has the string 'a' as item 1"),
        ([[1], []], "`input` has an empty list as item 1; give at least one token id a text"),
        ([[1, None]], "`input` has null in item 0; a list inside the list holds token ids only"),
        ([[1, "{x}"]], "`input` has the string '{x}' in item 0"),
        ([[[1]]], "`input` has a list in item 0"),
        ([" "], r"`input\[0\]` is empty"),
        ("", "`input` is empty"),
    ],
)
def test_what_is_none_of_openais_forms_is_named(value: Any, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem) as caught:
        parse({"input": value}, EmbeddingsRequest)
    details = caught.value.details
    assert details.get("field", details.get("errors", [{}])[0].get("field")) in ("input", "input[0]")


@pytest.mark.parametrize("field", ["dimensions", "top_k"])
def test_a_whole_number_may_have_a_point_and_no_fraction(field: str) -> None:
    model, body = (EncodeRequest, {"texts": ["a"]}) if field == "dimensions" else (RankRequest, RANKING)
    assert getattr(parse({**body, field: 8.0}, model), field) == 8
    for value in (8.5, 1e400, True, "8"):
        with pytest.raises((InvalidRequestError, MalformedBodyError)):
            parse({**body, field: value}, model)


@pytest.mark.parametrize("value", ["a", ["a", "b"], [1, 2], [[1, 2], [3]]])
def test_openais_four_forms_of_input_pass_as_they_are(value: Any) -> None:
    assert parse({"input": value, "model": "ekiben", "user": "me"}, EmbeddingsRequest).input == value


def test_a_list_of_ids_is_one_text_and_lists_of_them_are_counted() -> None:
    parse({"input": [1, 2, 3, 4, 5]}, EmbeddingsRequest)
    with pytest.raises(TooLargeError, match="`input` has 5 items; at most 4"):
        parse({"input": [[1]] * 5}, EmbeddingsRequest)


@pytest.mark.parametrize("prompt", [{"prompt": "query"}, {"prompt_text": "find: "}])
def test_a_prompt_cannot_go_before_token_ids(prompt: dict[str, str]) -> None:
    (name,) = prompt
    for value in ([1, 2], [[1, 2]]):
        with pytest.raises(InvalidRequestError, match=f"`{name}` is given and `input` holds token ids"):
            parse({"input": value, **prompt}, EmbeddingsRequest)
    parse({"input": ["a"], **prompt}, EmbeddingsRequest)


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.path)
def test_every_door_refuses_a_field_it_does_not_know(door: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse({"colour": 1}, door.request)
    assert "colour" in [error["field"] for error in caught.value.details["errors"]]


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


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.path)
@given(st.data())
def test_any_object_is_a_request_or_an_error_of_ours(door: Any, data: st.DataObject) -> None:
    fields = st.sampled_from([*door.request.model_fields, "other"])
    body = data.draw(st.dictionaries(fields, json_values, max_size=5))
    try:
        request = parse(body, door.request)
    except ServeError as error:
        assert error.status in (413, 422)  # noqa: PT017 -- either is right
    else:
        assert request.model_dump(include=set(body)) == body
