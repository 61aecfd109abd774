"""Content to bytes: what goes out must come back as the same numbers, in every form; and who gets which form."""

from __future__ import annotations

import base64
import contextlib
import io
import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bentos.errors import InvalidRequestError, NotAcceptableError
from bentos.render import JSON, MAX_LISTED_ROWS, NPY, OCTETS, VECTOR_TYPES, Base64Rows, convert_rows, negotiate, render

DTYPES = {"float32": "<f4", "float16": "<f2", "int8": "|i1"}
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
vectors = arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 8)),
    elements=st.floats(-1000, 1000, width=32, allow_subnormal=False),
)


def content(rows: Any, truncated: list[int] | None = None) -> dict[str, Any]:
    usage = {"tokens": [3], "truncated": truncated or [], "total_tokens": 3}
    return {"embeddings": rows, "model": "ekiben:1-abc", "usage": usage}


@given(vectors, st.sampled_from(sorted(DTYPES)))
def test_every_form_of_every_dtype_holds_the_same_numbers(vectors: npt.NDArray[Any], dtype: Any) -> None:
    rows = convert_rows(vectors, dtype)
    assert rows.dtype.str == DTYPES[dtype]
    as_json = json.loads(render(content(rows)).body)["embeddings"]
    np.testing.assert_array_equal(np.array(as_json, dtype=rows.dtype), rows)
    packed = json.loads(render(content(Base64Rows(rows))).body)["embeddings"]
    unpacked = np.array([np.frombuffer(base64.b64decode(text), rows.dtype) for text in packed])
    np.testing.assert_array_equal(unpacked, rows)
    for form in (rows, Base64Rows(rows)):  # a binary answer has no encoding
        bare = render(content(form), OCTETS)
        shape = tuple(map(int, bare.headers["X-Ekiben-Shape"].split(",")))
        read = np.frombuffer(bare.body, np.dtype(bare.headers["X-Ekiben-Dtype"])).reshape(shape)
        np.testing.assert_array_equal(read, rows)
        file = np.load(io.BytesIO(render(content(form), NPY).body), allow_pickle=False)
        np.testing.assert_array_equal(file, rows)
        assert file.dtype == rows.dtype


@given(vectors)
def test_int8_keeps_directions_and_uses_its_whole_range(vectors: npt.NDArray[Any]) -> None:
    rows = convert_rows(vectors, "int8").astype(np.float64)
    for row, vector in zip(rows, vectors.astype(np.float64), strict=True):
        if not vector.any():
            assert not row.any()
            continue
        assert np.abs(row).max() == 127
        np.testing.assert_allclose(row / 127, vector / np.abs(vector).max(), atol=0.5 / 127 + 1e-6)


def test_a_component_beyond_float16_is_an_error_and_not_infinite() -> None:
    with pytest.raises(InvalidRequestError, match="'float16', which ends at 65504, and a vector reaches 70000"):
        convert_rows(np.array([[1.0, -70000.0]], dtype=np.float32), "float16")


def test_the_columns_that_are_left_of_a_cut_vector_are_what_goes_out() -> None:
    cut = np.arange(12, dtype=np.float32).reshape(3, 4)[:, :2]
    for dtype in DTYPES:
        rows = convert_rows(cut, dtype)  # type: ignore[arg-type]
        assert np.frombuffer(render(content(rows), OCTETS).body, rows.dtype).reshape(3, 2).tolist() == rows.tolist()


def test_json_has_the_digits_that_float32_needs_and_no_more() -> None:
    body = render({"similarity": np.float32(0.1), "scores": np.array([0.7], dtype=np.float32)}).body
    assert body == b'{"similarity":0.1,"scores":[0.7]}'


def test_headers_say_what_json_would_have_said_beside_the_vectors() -> None:
    rows = np.zeros((2, 3), dtype="<f4")
    assert render(content(rows)).headers == {}
    expected = {"X-Ekiben-Shape": "2,3", "X-Ekiben-Dtype": "float32", "X-Ekiben-Total-Tokens": "3"}
    assert render(content(rows), OCTETS).headers == expected
    assert render(content(rows, [0, 1]), NPY).headers == expected | {"X-Ekiben-Truncated": "0,1"}


def test_a_list_of_cut_texts_never_outgrows_a_header() -> None:
    listed = render(content(np.zeros((1, 3), dtype="<f4"), list(range(100_000))), OCTETS).headers["X-Ekiben-Truncated"]
    assert len(listed) < 4096
    assert listed.endswith(f",{MAX_LISTED_ROWS - 1},...")


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", JSON),
        ("*/*", JSON),
        ("application/json", JSON),
        ("application/json; charset=utf-8", JSON),
        ("application/*", JSON),
        (BROWSER, JSON),
        (OCTETS, OCTETS),
        ("Application/Octet-Stream", OCTETS),
        (f"{NPY}, */*", NPY),
        (f"*/*, {NPY}", NPY),
        (f"{NPY};q=0.5, {OCTETS}", OCTETS),
        (f"{OCTETS}, {JSON}", OCTETS),
        (f"{JSON}, {OCTETS}", JSON),
        (f"{JSON};q=0, */*", OCTETS),
        (f"{NPY};q=many, {OCTETS};q=0.1", OCTETS),
        (f"text/csv, {NPY};q=0.1", NPY),
    ],
)
def test_the_type_that_is_wanted_most_is_chosen(accept: str, chosen: str) -> None:
    assert negotiate(accept, VECTOR_TYPES) == chosen
    assert render(content(np.zeros((1, 2), dtype="<f4")), accept).media_type == chosen


@pytest.mark.parametrize("accept", ["text/csv", "image/*", f"{JSON};q=0", "*/*;q=0", ",", "json"])
def test_what_cannot_be_given_is_refused_with_what_can(accept: str) -> None:
    with pytest.raises(
        NotAcceptableError, match=r"application/json, application/octet-stream, application/x-npy"
    ) as caught:
        negotiate(accept, VECTOR_TYPES)
    assert caught.value.details == {"offered": list(VECTOR_TYPES)}


def test_only_vectors_go_out_as_bytes() -> None:
    with pytest.raises(NotAcceptableError, match="this route answers application/json"):
        render({"similarity": [0.5]}, OCTETS)


@given(st.text(max_size=40))
def test_no_accept_header_breaks_the_choice(accept: str) -> None:
    with contextlib.suppress(NotAcceptableError):
        assert negotiate(accept, VECTOR_TYPES) in VECTOR_TYPES


def test_what_is_no_part_of_an_answer_is_not_written() -> None:
    with pytest.raises(TypeError):
        render({"embeddings": object()})
