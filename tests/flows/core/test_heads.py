from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from bentos.vectors import normalize
from flows.core.heads import (
    MIN_NESTED,
    attach_head,
    nearest_axes,
    nest_dims,
    note_nested_dims,
    read_nested_dims,
    set_head,
)
from flows.core.models import load_base_model
from flows.errors import ParamsError
from tests.factories import TINY_DIM, make_tiny_model

TEXTS = ["a young child rides a horse", "the server is down again", "jazz"]


@given(st.integers(8, 8192))
def test_nested_dims_halve_as_long_as_there_is_something_to_halve(dimensions: int) -> None:
    dims = nest_dims(dimensions)
    assert dims[0] == dimensions
    assert all(small * 2 == large for large, small in pairwise(dims))
    assert all(dim >= MIN_NESTED and dim % 2 == 0 for dim in dims[1:])
    assert dims[-1] % 4 or dims[-1] // 2 < MIN_NESTED


@given(st.integers(0, 10_000))
def test_nearest_axes_find_the_rotation_between_two_spaces(seed: int) -> None:
    random = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(random.normal(size=(6, 6)))
    vectors = normalize(random.normal(size=(40, 6)))
    assert nearest_axes(vectors, vectors @ rotation) == pytest.approx(rotation.T, abs=1e-6)
    axes = nearest_axes(vectors, normalize((vectors @ rotation)[:, :4]))
    assert axes @ axes.T == pytest.approx(np.eye(4), abs=1e-9)


def test_a_head_keeps_the_first_dimensions_until_it_is_set(tiny_model_path: Path) -> None:
    body = load_base_model(str(tiny_model_path), max_tokens=32)
    model = attach_head(body, 12, "tiny")
    expected = normalize(body.encode(TEXTS)[:, :12])
    assert model.get_embedding_dimension() == 12
    assert model.max_seq_length == 32
    assert np.allclose(model.encode(TEXTS), expected, atol=1e-6)
    axes = np.random.default_rng(0).normal(size=(12, TINY_DIM))
    set_head(model, axes)
    assert np.allclose(model.encode(TEXTS), normalize(body.encode(TEXTS) @ axes.T), atol=1e-5)


@pytest.mark.parametrize(
    "variant",
    [
        {"normalize": False, "pooling": "cls"},
        {"dense_dim": 16, "prompts": {"query": "query: "}, "default_prompt": "query"},
    ],
)
def test_a_head_sits_on_any_model_and_loads_in_plain_sentence_transformers(
    variant: dict[str, object], tmp_path: Path
) -> None:
    body = load_base_model(str(make_tiny_model(tmp_path / "base", **variant)))  # type: ignore[arg-type]
    model = attach_head(body, 8, "tiny")
    note_nested_dims(model, (8, 4))
    model.save(str(tmp_path / "saved"), create_model_card=False)
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert np.array_equal(plain.encode(TEXTS), model.encode(TEXTS))
    assert plain.get_embedding_dimension() == 8
    assert plain.prompts == body.prompts
    assert plain.default_prompt_name == body.default_prompt_name
    assert plain.similarity_fn_name == body.similarity_fn_name
    assert (type(list(plain)[-1]).__name__ == "Normalize") is ("normalize" not in variant)
    first = body.encode(TEXTS)[:, :8]
    assert np.allclose(normalize(plain.encode(TEXTS)), normalize(first), atol=1e-5)


def test_more_dimensions_than_the_model_has_are_refused(tiny_model_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"train\.dimensions is 33, but tiny has vectors of 32 .*set 32 or less"):
        attach_head(load_base_model(str(tiny_model_path)), TINY_DIM + 1, "tiny")


def test_nested_dims_stand_in_the_saved_config_and_are_read_back(tiny_model_path: Path, tmp_path: Path) -> None:
    model = load_base_model(str(tiny_model_path))
    assert read_nested_dims(model) == ()
    note_nested_dims(model, (16, 32, 8))
    assert read_nested_dims(model) == (16, 8)  # the full number is no smaller one
    model.save(str(tmp_path / "saved"), create_model_card=False)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["matryoshka_dimensions"] == [32, 16, 8]
    loaded = load_base_model(str(tmp_path / "saved"))
    assert read_nested_dims(loaded) == (16, 8)
    note_nested_dims(loaded, ())
    assert read_nested_dims(loaded) == ()
    loaded.save(str(tmp_path / "again"), create_model_card=False)
    assert "matryoshka_dimensions" not in json.loads((tmp_path / "again" / "config.json").read_text())
