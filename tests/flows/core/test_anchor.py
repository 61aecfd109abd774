from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bentos.engine import Engine
from bentos.lunchbox import open_lunchbox
from bentos.manifest import read_manifest
from bentos.vectors import normalize
from flows.core.anchor import Anchor, load_anchor, same_text_cosine, shorten_anchor
from flows.core.models import load_base_model
from flows.core.tracking import Tracker
from flows.core.training import make_encode
from flows.errors import NothingReleasedError, ParamsError
from flows.settings import load_settings
from tests.factories import TINY_DIM, make_tiny_lunchbox

TEXTS = ["a young child rides a horse", "  the server is down again\n", "jazz"]


class Known:
    """An anchor whose vectors one can write by hand: 4 dimensions, of which 2 were trained to stand alone."""

    tag = "ekiben:7-abcdef01"
    nested_dims = (2,)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return np.tile(np.array([[3.0, 4.0, 0.0, 12.0]], dtype=np.float32) / 13, (len(texts), 1))


def test_an_anchor_gives_the_unit_vectors_that_the_lunchbox_serves(tiny_lunchbox_path: Path) -> None:
    box = open_lunchbox(tiny_lunchbox_path)
    anchor = Anchor(tiny_lunchbox_path, box.manifest)
    vectors = anchor(TEXTS)
    assert np.allclose(vectors, box.engine.embed([text.strip() for text in TEXTS]), atol=1e-6)
    assert (anchor.tag, anchor.dim, anchor.nested_dims) == (box.manifest.tag, TINY_DIM, ())
    assert anchor([]).shape == (0, TINY_DIM)


def test_an_anchor_computes_in_fp32_and_under_the_default_prompt(tmp_path: Path) -> None:
    path = make_tiny_lunchbox(tmp_path / "box", normalize=False, prompts={"query": "find the "}, default_prompt="query")
    manifest = read_manifest(path)
    int8 = manifest.model_copy(update={"precisions": {**manifest.precisions, "int8": "missing.onnx"}})
    anchor = Anchor(path, int8.model_copy(update={"default_precision": "int8"}))
    expected = Engine(path, manifest).embed([f"find the {text.strip()}" for text in TEXTS], normalize=True)
    assert np.allclose(anchor(TEXTS), expected, atol=1e-6)


def test_an_anchor_agrees_with_the_model_that_it_was_packed_from(
    tiny_lunchbox_path: Path, tiny_model_path: Path
) -> None:
    encode = make_encode(load_base_model(str(tiny_model_path)), batch_size=2)
    anchor = Anchor(tiny_lunchbox_path, read_manifest(tiny_lunchbox_path))
    assert same_text_cosine(TEXTS, encode, anchor) == pytest.approx(1, abs=1e-5)
    other = make_encode(load_base_model(str(tiny_model_path), layers=1), batch_size=2)
    assert same_text_cosine(TEXTS, other, anchor) < 0.999


def test_an_anchor_is_cut_only_to_what_it_was_trained_for() -> None:
    anchor = Known()
    assert shorten_anchor(anchor, 4) is anchor
    cut = shorten_anchor(anchor, 2)
    assert cut(["a", "b"]) == pytest.approx(np.array([[0.6, 0.8], [0.6, 0.8]]))
    assert same_text_cosine(["a"], lambda _: np.array([[6.0, 8.0]], dtype=np.float32), anchor) == pytest.approx(1)
    with pytest.raises(ParamsError) as caught:
        shorten_anchor(anchor, 3)
    message = str(caught.value)
    for part in ("ekiben:7-abcdef01", "4 dimensions", "model have 3", "train.dimensions=4 or 2", "anchor_weight=0"):
        assert part in message


def test_an_anchor_without_a_name_is_called_the_champion() -> None:
    with pytest.raises(ParamsError, match=r"stay near the champion, whose vectors have 3 .*dimensions=3 "):
        shorten_anchor(lambda texts: normalize(np.ones((len(texts), 3), dtype=np.float32)), 2)  # type: ignore[return-value]


def test_the_champion_is_the_anchor_once_there_is_one(
    tracker: Tracker, tiny_model_path: Path, isolated_environment: Path
) -> None:
    settings = load_settings()
    assert load_anchor(tracker, settings) is None
    model = load_base_model(str(tiny_model_path))
    run_id = tracker.start_run("train")
    version = tracker.register(run_id, tracker.log_model(run_id, model, example=["a text"]))
    assert load_anchor(tracker, settings) is None  # registered is not released
    tracker._client.set_registered_model_alias(tracker.model_name, "champion", version)
    with pytest.raises(NothingReleasedError, match="lunchbox"):
        load_anchor(tracker, settings)
    box = settings.lunchboxes_path / f"{version}-{run_id[:8]}"
    make_tiny_lunchbox(box, model_path=tiny_model_path, version=version, run_id=run_id)
    anchor = load_anchor(tracker, settings)
    assert anchor is not None
    assert anchor.tag == f"ekiben:{version}-{run_id[:8]}"
    assert same_text_cosine(TEXTS, make_encode(model, 2), anchor) == pytest.approx(1, abs=1e-5)


def test_a_lunchbox_that_the_settings_name_is_the_anchor(
    tracker: Tracker, tiny_lunchbox_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EKIBEN_ANCHOR_BOX", str(tiny_lunchbox_path))
    anchor = load_anchor(tracker, load_settings())
    assert anchor is not None
    assert anchor.tag == read_manifest(tiny_lunchbox_path).tag
