"""Opening a lunchbox, and noticing when it stops being what it was."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from bentos.errors import LunchboxError
from bentos.lunchbox import open_lunchbox, read_canary
from bentos.manifest import read_manifest, sha256_file, write_manifest


@pytest.fixture
def box(tiny_lunchbox_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_lunchbox_path, tmp_path / "box"))


def rewrite(box: Path, name: str, content: bytes) -> None:
    """Alter a file and make the manifest agree, as whoever packs a wrong box would."""
    (box / name).write_bytes(content)
    manifest = read_manifest(box)
    files = manifest.files | {name: sha256_file(box / name)}
    write_manifest(box, manifest.model_copy(update={"files": files}))


def test_a_whole_lunchbox_has_no_problem(box: Path) -> None:
    opened = open_lunchbox(box)
    assert opened.find_alteration() is None
    assert opened.find_deviation(opened.engine.embed(opened.canary.texts)) is None


@pytest.mark.parametrize("name", ["model.fp32.onnx", "tokenizer.json", "canary.json", "manifest.json"])
def test_a_missing_file_is_named(box: Path, name: str) -> None:
    (box / name).unlink()
    with pytest.raises(LunchboxError, match=name):
        open_lunchbox(box)


@pytest.mark.parametrize("name", ["model.fp32.onnx", "tokenizer.json", "canary.json"])
def test_one_altered_byte_is_found_before_and_after_loading(box: Path, name: str) -> None:
    opened = open_lunchbox(box)
    content = bytearray((box / name).read_bytes())
    content[len(content) // 2] ^= 1
    (box / name).write_bytes(content)
    assert name in (opened.find_alteration() or "")
    with pytest.raises(LunchboxError, match=f"{name}.*altered"):
        open_lunchbox(box)


def test_an_altered_manifest_is_found_after_loading(box: Path) -> None:
    opened = open_lunchbox(box)
    write_manifest(box, opened.manifest.model_copy(update={"run_id": "another"}))
    assert "manifest.json" in (opened.find_alteration() or "")
    (box / "manifest.json").unlink()
    assert "manifest.json cannot be read" in (opened.find_alteration() or "")


def test_a_file_that_was_only_touched_is_no_alteration(box: Path) -> None:
    opened = open_lunchbox(box)
    os.utime(box / "model.fp32.onnx", (1, 1))
    assert opened.find_alteration() is None


def test_wrong_vectors_are_told_with_their_cosine(box: Path) -> None:
    opened = open_lunchbox(box)
    right = opened.canary.vectors
    assert "cosine" in (opened.find_deviation(np.roll(right, 1, axis=1)) or "")
    assert "not finite" in (opened.find_deviation(np.full_like(right, np.nan)) or "")
    assert "shape" in (opened.find_deviation(right[:, :-1]) or "")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"texts": []}', '{"texts": [], "vectors": []}', '{"texts": ["a"], "vectors": [[1]]}']
)
def test_an_unusable_canary_is_refused(box: Path, content: str) -> None:
    rewrite(box, "canary.json", content.encode())
    with pytest.raises(LunchboxError, match=r"canary\.json"):
        open_lunchbox(box)


def test_the_canary_of_a_lunchbox_can_be_read_by_itself(box: Path) -> None:
    canary = read_canary(box, read_manifest(box))
    assert canary.texts == json.loads((box / "canary.json").read_text())["texts"]
