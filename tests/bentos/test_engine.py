"""The engine gives sentence-transformers' vectors, whatever the batch; real model, real tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from bentos.engine import Engine, group_by_length
from bentos.errors import LunchboxError, NotReadyError
from bentos.manifest import Manifest, read_manifest

TEXTS = [
    "the quick brown fox",
    "bread",
    "A",
    "  spaces   around and   between  ",
    "Größe, naïve café — 東京 🍱",
    "[CLS] special tokens [SEP] in the text [MASK]",
    "tabs\tand\nnew lines",
    "?!",
    "station lunch " * 20,
    "long " * 500,
    "x" * 3000,
]


@pytest.fixture(scope="module")
def manifest(tiny_lunchbox_path: Path) -> Manifest:
    return read_manifest(tiny_lunchbox_path)


@pytest.fixture(scope="module")
def engine(tiny_lunchbox_path: Path, manifest: Manifest) -> Engine:
    return Engine(tiny_lunchbox_path, manifest)


@pytest.fixture(scope="module")
def reference(tiny_model_path: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(tiny_model_path), device="cpu")


@pytest.fixture
def box_copy(tiny_lunchbox_path: Path, tmp_path: Path) -> Iterator[Path]:
    return shutil.copytree(tiny_lunchbox_path, tmp_path / "box")  # type: ignore[return-value]


def test_vectors_equal_those_of_sentence_transformers(engine: Engine, reference: Any) -> None:
    np.testing.assert_allclose(engine.embed(TEXTS), reference.encode(TEXTS), atol=1e-5)


def test_a_text_has_the_same_vector_alone_and_in_any_batch(engine: Engine) -> None:
    together = engine.embed(TEXTS, batch_tokens=10_000)
    for row, text in enumerate(TEXTS):
        np.testing.assert_allclose(engine.embed([text])[0], together[row], atol=1e-5)


def test_vectors_come_back_in_the_order_of_the_texts(engine: Engine) -> None:
    backwards = engine.embed(TEXTS[::-1], batch_tokens=80)
    np.testing.assert_allclose(backwards[::-1], engine.embed(TEXTS, batch_tokens=80), atol=1e-5)


def test_token_ids_are_cut_as_sentence_transformers_cuts_them(engine: Engine, reference: Any) -> None:
    for text, tokenized in zip(TEXTS, engine.tokenize(TEXTS), strict=True):
        assert tokenized.ids == reference.tokenize([text])["input_ids"][0].tolist()


def test_a_long_text_is_counted_in_full(engine: Engine, manifest: Manifest, reference: Any) -> None:
    text = "long " * 500
    (tokenized,) = engine.tokenize([text])
    assert len(tokenized.ids) == manifest.max_tokens
    assert tokenized.tokens_total == len(reference.tokenizer(text, truncation=False)["input_ids"])
    assert tokenized.truncated
    assert not engine.tokenize(["bread"])[0].truncated


def test_a_text_of_exactly_max_tokens_is_not_truncated(engine: Engine, manifest: Manifest) -> None:
    exact, longer = engine.tokenize(["bread " * (manifest.max_tokens - 2), "bread " * (manifest.max_tokens - 1)])
    assert (len(exact.ids), exact.truncated) == (manifest.max_tokens, False)
    assert (len(longer.ids), longer.truncated) == (manifest.max_tokens, True)


def test_vectors_have_length_one_only_when_normalized(engine: Engine) -> None:
    unit, raw = engine.embed(TEXTS, normalize=True), engine.embed(TEXTS, normalize=False)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1.0, atol=1e-5)
    assert abs(lengths - 1.0).max() > 0.01
    np.testing.assert_allclose(raw / lengths, unit, atol=1e-5)


def test_no_texts_give_no_vectors(engine: Engine, manifest: Manifest) -> None:
    assert engine.embed([]).shape == (0, manifest.dim)
    assert engine.infer([]).dtype == np.float32


def test_a_vector_that_is_not_finite_is_withheld(box_copy: Path, manifest: Manifest) -> None:
    path = box_copy / manifest.precisions["fp32"]
    model = onnx.load(path)
    for weights in model.graph.initializer:
        array = numpy_helper.to_array(weights)
        if array.dtype == np.float32 and array.ndim == 2:
            weights.CopyFrom(numpy_helper.from_array(np.full_like(array, np.nan), weights.name))
    onnx.save(model, path)
    with pytest.raises(NotReadyError, match="not finite"):
        Engine(box_copy, manifest).embed(["bread"])


@pytest.mark.parametrize("name", ["tokenizer.json", "model.fp32.onnx"])
def test_an_unusable_file_is_named(box_copy: Path, manifest: Manifest, name: str) -> None:
    (box_copy / name).write_bytes(b"not what it was")
    with pytest.raises(LunchboxError, match=f"{name} cannot be loaded"):
        Engine(box_copy, manifest)


def test_an_unknown_precision_is_named(tiny_lunchbox_path: Path, manifest: Manifest) -> None:
    with pytest.raises(LunchboxError, match="'int4'"):
        Engine(tiny_lunchbox_path, manifest.model_copy(update={"default_precision": "int4"}))


@given(st.lists(st.integers(1, 200), max_size=60), st.integers(1, 500))
def test_groups_hold_every_row_once_and_keep_the_budget(lengths: list[int], batch_tokens: int) -> None:
    groups = group_by_length(lengths, batch_tokens)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or max(lengths[row] for row in group) * len(group) <= batch_tokens


def test_a_precision_that_did_not_ship_is_refused_by_name(tiny_lunchbox_path: Path, manifest: Manifest) -> None:
    with pytest.raises(LunchboxError, match="'int4' is not in this lunchbox, which has fp32"):
        Engine(tiny_lunchbox_path, manifest, precision="int4")


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this machine can")
def test_a_device_that_is_not_there_is_refused_with_the_cure(tiny_lunchbox_path: Path, manifest: Manifest) -> None:
    with pytest.raises(
        LunchboxError, match="install onnxruntime-gpu in place of onnxruntime, or set EKIBEN_DEVICE=cpu"
    ):
        Engine(tiny_lunchbox_path, manifest, device="cuda")
