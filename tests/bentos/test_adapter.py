"""Maps into older spaces: which files are taken for one, and what they do to vectors."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bentos.adapter import Adapter, find_problem, name_adapter, read_adapter
from bentos.errors import LunchboxError
from bentos.lunchbox import open_lunchbox
from bentos.manifest import Compat, read_manifest, sha256_file, write_manifest

OLD = "00112233aabbccdd"
DIM = 32  # of the tiny model


def make_turn(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """A random matrix with orthonormal rows or columns."""
    longer = max(rows, columns)
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(longer, longer)))[0]
    return turn[:rows, :columns].astype(np.float32)


def relate(box: Path, matrix: np.ndarray | None, **changed: object) -> Path:
    """Give a box a relation to an older space, with its map, as a release does."""
    manifest = read_manifest(box)
    fields = {"kind": "adapter", "version": "1", "tag": "ekiben:1-0", "space_id": OLD} | changed
    files = dict(manifest.files)
    if matrix is not None:
        fields["adapter"] = name_adapter(OLD)
        np.save(box / name_adapter(OLD), matrix)
        files[name_adapter(OLD)] = sha256_file(box / name_adapter(OLD))
    write_manifest(box, manifest.model_copy(update={"compat": Compat.model_validate(fields), "files": files}))
    return box


@pytest.fixture
def box(tiny_lunchbox_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_lunchbox_path, tmp_path / "box"))


@settings(max_examples=30, deadline=None)
@given(
    dims=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_mapped_vectors_have_length_1_whatever_length_they_came_with(
    dims: tuple[int, int], seed: int, scale: float
) -> None:
    adapter = Adapter(OLD, make_turn(*dims, seed=seed))
    vectors = np.random.default_rng(seed).normal(size=(7, dims[0])).astype(np.float32)
    mapped = adapter.apply(vectors * scale)
    assert mapped.shape == (7, adapter.dim)
    assert mapped.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(mapped, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(mapped, adapter.apply(vectors), atol=1e-5)


def test_a_turn_keeps_every_angle_and_a_zero_vector_stays_zero() -> None:
    adapter = Adapter(OLD, make_turn(8, 8))
    vectors = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    mapped = adapter.apply(vectors)
    np.testing.assert_allclose(mapped @ mapped.T, unit @ unit.T, atol=1e-5)
    assert not adapter.apply(np.zeros((1, 8), dtype=np.float32)).any()


def test_an_opened_lunchbox_has_the_map_and_it_cannot_be_changed(box: Path) -> None:
    matrix = make_turn(DIM, 12)
    opened = open_lunchbox(relate(box, matrix, dim=12))
    assert list(opened.adapters) == [OLD]
    np.testing.assert_array_equal(opened.adapters[OLD].matrix, matrix)
    assert opened.adapters[OLD].apply(opened.canary.vectors).shape == (len(opened.canary.texts), 12)
    with pytest.raises(ValueError, match="read-only"):
        opened.adapters[OLD].matrix[0, 0] = 1.0
    assert opened.find_alteration() is None
    np.save(box / name_adapter(OLD), -matrix)
    assert name_adapter(OLD) in (opened.find_alteration() or "")


def test_no_relation_no_map(box: Path) -> None:
    assert open_lunchbox(box).adapters == {}
    assert open_lunchbox(relate(box, None, kind="breaking")).adapters == {}
    assert open_lunchbox(relate(box, None, kind="adapter")).adapters == {}


@pytest.mark.parametrize("kind", ["identical", "compatible"])
def test_a_space_that_needs_no_map_is_reached_as_it_is(kind: str, box: Path) -> None:
    opened = open_lunchbox(relate(box, None, kind=kind))
    unit = opened.engine.embed(opened.canary.texts, normalize=True)
    np.testing.assert_allclose(opened.adapters[OLD].apply(unit), unit, atol=1e-6)
    own = read_manifest(box).space_id
    assert open_lunchbox(relate(box, None, kind=kind, space_id=own)).adapters == {}


def test_maps_into_spaces_before_the_last_one_are_there_too(box: Path) -> None:
    relate(box, make_turn(DIM, DIM))
    manifest = read_manifest(box)
    older = Compat(kind="identical", version="0", tag="ekiben:0-0", space_id="ffee")
    write_manifest(box, manifest.model_copy(update={"earlier": [older]}))
    assert list(open_lunchbox(box).adapters) == [OLD, "ffee"]


@pytest.mark.parametrize(
    ("matrix", "reason"),
    [
        (make_turn(DIM - 1, DIM), "shape"),
        (make_turn(DIM, DIM).ravel(), "shape"),
        (make_turn(DIM, DIM).astype(np.float64), "float64"),
        (np.empty((DIM, 0), dtype=np.float32), "shape"),
        (np.full((DIM, DIM), np.nan, dtype=np.float32), "not finite"),
        (np.where(np.eye(DIM) == 1, np.inf, 0).astype(np.float32), "not finite"),
        (1.01 * make_turn(DIM, DIM), "stretches"),
        (np.ones((DIM, 4), dtype=np.float32), "stretches"),
        (np.zeros((DIM, 4), dtype=np.float32), "stretches"),
    ],
    ids=["other dims", "flat", "float64", "empty", "nan", "infinite", "longer", "all one", "all zero"],
)
def test_what_is_no_map_is_refused_by_name(box: Path, matrix: np.ndarray, reason: str) -> None:
    with pytest.raises(LunchboxError, match=f"adapter.{OLD}.npy has .*{reason}|adapter.{OLD}.npy {reason}"):
        open_lunchbox(relate(box, matrix))


def test_a_map_to_other_dimensions_than_the_manifest_says_is_refused(box: Path) -> None:
    with pytest.raises(LunchboxError, match="leads to 12 dimensions"):
        open_lunchbox(relate(box, make_turn(DIM, 12), dim=13))


def test_a_map_without_a_hash_is_refused(box: Path) -> None:
    relate(box, make_turn(DIM, DIM))
    manifest = read_manifest(box)
    files = {name: digest for name, digest in manifest.files.items() if not name.startswith("adapter.")}
    write_manifest(box, manifest.model_copy(update={"files": files}))
    with pytest.raises(LunchboxError, match="has no hash"):
        open_lunchbox(box)


def test_an_altered_or_missing_map_is_refused(box: Path) -> None:
    relate(box, make_turn(DIM, DIM))
    path = box / name_adapter(OLD)
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(LunchboxError, match="was altered"):
        open_lunchbox(box)
    path.unlink()
    with pytest.raises(LunchboxError, match="is missing"):
        open_lunchbox(box)


@pytest.mark.parametrize("kind", ["text", "pickle", "archive", "cut short"])
def test_a_file_that_is_no_array_is_refused_and_never_unpickled(kind: str, tmp_path: Path) -> None:
    path = tmp_path / name_adapter(OLD)
    content = io.BytesIO()
    if kind == "pickle":
        np.save(content, np.array([[object()]]), allow_pickle=True)
    elif kind == "archive":
        np.savez(content, make_turn(DIM, DIM))
    else:
        np.save(content, make_turn(DIM, DIM))
    path.write_bytes({"text": b"no array", "cut short": content.getvalue()[:200]}.get(kind, content.getvalue()))
    with pytest.raises(LunchboxError, match=f"adapter.{OLD}.npy"):
        read_adapter(path, OLD, DIM)


def test_rounding_to_float32_is_no_problem_even_for_large_maps() -> None:
    assert find_problem(make_turn(768, 768), 768) is None
    assert find_problem(make_turn(768, 64), 768) is None
