from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Dropout, Normalize, StaticEmbedding
from tokenizers import Tokenizer

from bentos.lunchbox import open_lunchbox
from flows.core import graph
from flows.core.export import dissect_model, export_model, find_max_tokens, hash_weights, write_tokenizer
from flows.core.graph import make_encoder, write_graph
from flows.core.heads import attach_head, note_nested_dims, set_head
from flows.core.models import load_base_model
from flows.core.training import save_model
from flows.errors import UnsupportedModelError
from tests.factories import TINY_DIM, TINY_MAX_TOKENS, make_tiny_lunchbox, make_tiny_model


def load(path: Path) -> SentenceTransformer:
    return SentenceTransformer(str(path), device="cpu")


def encoder_of(path: Path) -> torch.nn.Module:
    anatomy = dissect_model(load(path))
    return make_encoder(anatomy.backbone, anatomy.pooling, anatomy.heads)


def test_an_export_is_two_files_with_free_axes_and_nothing_of_this_machine(
    tiny_model_path: Path, tiny_lunchbox_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    box = tmp_path / "box"
    box.mkdir()
    export = export_model(tiny_model_path, box)
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""
    assert (export.dim, export.max_tokens, export.pooling) == (TINY_DIM, TINY_MAX_TOKENS, "mean")
    assert (export.normalize, export.prompts, export.default_prompt, export.nested_dims) == (True, {}, None, ())
    assert {path.name for path in box.iterdir()} == {"model.fp32.onnx", "tokenizer.json"}
    for path in box.iterdir():  # exporting again gives the same bytes
        assert path.read_bytes() == (tiny_lunchbox_path / path.name).read_bytes()
    raw = (box / "model.fp32.onnx").read_bytes()
    assert [word for word in (b"site-packages", b"stack_trace", str(Path.cwd()).encode()) if word in raw] == []
    model = onnx.load(box / "model.fp32.onnx")
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "input_ids": ["batch", "tokens"],
        "attention_mask": ["batch", "tokens"],
        "vectors": ["batch", TINY_DIM],
        "unit_vectors": ["batch", TINY_DIM],
    }


def test_a_model_of_fewer_dimensions_is_exported_and_certified_like_any_other(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    body = load_base_model(str(tiny_model_path), layers=1)
    model = attach_head(body, 24, "tiny")
    set_head(model, np.random.default_rng(0).normal(size=(24, TINY_DIM)))
    note_nested_dims(model, (24, 12))
    save_model(model, tmp_path / "model")
    box = make_tiny_lunchbox(tmp_path / "box", model_path=tmp_path / "model")  # certifies to 0.9999
    opened = open_lunchbox(box)
    texts = ["a young child rides a horse", "jazz"]
    assert opened.manifest.dim == 24
    assert opened.manifest.nested_dims == [12]
    assert np.allclose(opened.engine.embed(texts), load(tmp_path / "model").encode(texts), atol=1e-5)
    assert export_model(tmp_path / "model", tmp_path).nested_dims == (12,)


def test_the_hash_of_the_weights_is_of_every_weight_and_head(tiny_model_path: Path, tmp_path: Path) -> None:
    encoder = encoder_of(tiny_model_path)
    before = hash_weights(encoder)
    assert before == hash_weights(encoder_of(tiny_model_path))
    for parameter in encoder.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
        changed = hash_weights(encoder)
        assert changed != before
        before = changed
    tanh, identity = Dense(4, 4), Dense(4, 4, activation_function=torch.nn.Identity())
    identity.load_state_dict(tanh.state_dict())
    backbone = torch.nn.Linear(1, 1)
    assert hash_weights(make_encoder(backbone, "mean", [tanh])) != hash_weights(
        make_encoder(backbone, "mean", [identity])
    )


def test_the_tokenizer_file_neither_cuts_nor_pads(tiny_model_path: Path, tmp_path: Path) -> None:
    model = load(tiny_model_path)
    model.encode(["a text", "word " * 200])  # leaves truncation and padding set in the tokenizer
    write_tokenizer(model, tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert content["truncation"] is None
    assert content["padding"] is None
    assert len(Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("word " * 200).ids) == 202


def test_a_tokenizer_in_python_only_is_refused(tmp_path: Path) -> None:
    model = SimpleNamespace(tokenizer=SimpleNamespace(is_fast=False))
    with pytest.raises(UnsupportedModelError, match="exists in Python only"):
        write_tokenizer(model, tmp_path / "tokenizer.json")  # type: ignore[arg-type]


def test_max_tokens_never_exceed_the_positions(tiny_model_path: Path) -> None:
    model = load(tiny_model_path)
    model.max_seq_length = 4096
    assert find_max_tokens(model) == 512


@pytest.mark.parametrize(
    ("variant", "named"),
    [
        ({"pooling": "weightedmean"}, "'weightedmean'"),
        ({"pooling": ("mean", "max")}, "'mean', 'max'"),
        ({"include_prompt": False}, "include_prompt"),
        ({"extra_modules": (Dropout(0.1),)}, "Dropout"),
        ({"extra_modules": (Normalize(), Dense(TINY_DIM, 4)), "normalize": False}, "Normalize > Dense"),
        ({"extra_modules": (Dense(TINY_DIM, 4, module_output_name="other"),)}, "other"),
    ],
)
def test_what_cannot_be_reproduced_is_refused_by_name(variant: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "m", **variant)
    with pytest.raises(UnsupportedModelError, match=r"supported|set include_prompt") as caught:
        export_model(path, tmp_path)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_static_embeddings_and_cut_vectors_are_refused(tiny_model_path: Path) -> None:
    model = load(tiny_model_path)
    static = SentenceTransformer(
        modules=[StaticEmbedding(model.tokenizer.backend_tokenizer, embedding_dim=8)], device="cpu"
    )
    with pytest.raises(UnsupportedModelError, match="the model is StaticEmbedding"):
        dissect_model(static)
    model.truncate_dim = 16
    with pytest.raises(UnsupportedModelError, match="truncate_dim"):
        dissect_model(model)


def test_weights_that_do_not_fit_into_one_file_are_refused(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "MAX_FILE_BYTES", 1000)
    with pytest.raises(UnsupportedModelError, match=r"GB in fp32.*train\.layers"):
        write_graph(encoder_of(tiny_model_path), load(tiny_model_path).tokenizer, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
