"""From lunchbox to a tested Bento: real BentoML store, real builds, real servers."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import bentoml
import pytest

from bentos.errors import LunchboxError
from bentos.manifest import Manifest, read_manifest, write_manifest
from flows.core.packing import (
    bento_exists,
    build_bento,
    hash_manifest,
    install,
    is_stored,
    model_tag,
    point_latest,
    put_back,
    stage_bento,
    store_model,
    stored_path,
)
from flows.errors import EkibenError, InputError
from tests.serving import bento_home, copy_lunchbox

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with bento_home(tmp_path_factory.mktemp("bentoml")) as home:
        yield home


@pytest.fixture(autouse=True)
def _in_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENTOML_HOME", str(home))


@pytest.fixture(scope="module")
def built(home: Path, tiny_lunchbox_path: Path) -> Manifest:
    """The manifest of the tiny lunchbox, whose Bento is in the store."""
    manifest = read_manifest(tiny_lunchbox_path)
    with bento_home(home):
        store_model(tiny_lunchbox_path, manifest)
        build_bento(manifest, root=ROOT)
    return manifest


@pytest.fixture
def box(tiny_lunchbox_path: Path, tmp_path: Path) -> Path:
    """A lunchbox of another run, not yet stored."""
    return copy_lunchbox(tiny_lunchbox_path, tmp_path / "box", version="7", run_id=uuid.uuid4().hex)


def stored_folder(home: Path, manifest: Manifest) -> Path:
    return home / "models" / f"{manifest.name}-model" / manifest.bento_version


def test_a_stored_model_is_the_lunchbox(home: Path, box: Path) -> None:
    manifest = read_manifest(box)
    assert not is_stored(manifest)
    tag = store_model(box, manifest)
    assert is_stored(manifest)
    assert not is_stored(manifest.model_copy(update={"default_precision": "int8"}))  # packed anew
    assert tag == model_tag(manifest) == f"ekiben-model:{manifest.bento_version}"
    assert read_manifest(stored_folder(home, manifest)) == manifest
    assert bentoml.models.get(tag).info.labels["run_id"] == manifest.run_id
    assert stored_path(manifest) == stored_folder(home, manifest)


def test_a_model_that_is_not_stored_has_no_folder(box: Path) -> None:
    with pytest.raises(LunchboxError, match=r"ekiben-model:7-.* is not in the model store; release the version again"):
        stored_path(read_manifest(box))


def test_storing_again_changes_nothing(home: Path, box: Path) -> None:
    manifest = read_manifest(box)
    store_model(box, manifest)
    before = {path: path.stat().st_mtime_ns for path in stored_folder(home, manifest).iterdir()}
    store_model(box, manifest)
    assert before == {path: path.stat().st_mtime_ns for path in stored_folder(home, manifest).iterdir()}


@pytest.mark.parametrize("name", ["model.fp32.onnx", "manifest.json", "model.yaml"])
def test_a_stored_copy_that_was_cut_short_is_replaced(home: Path, box: Path, name: str) -> None:
    manifest = read_manifest(box)
    store_model(box, manifest)
    (stored_folder(home, manifest) / name).unlink()
    assert not is_stored(manifest)
    store_model(box, manifest)
    assert (stored_folder(home, manifest) / name).is_file()


def test_an_altered_lunchbox_is_not_stored(home: Path, box: Path) -> None:
    manifest = read_manifest(box)
    (box / "tokenizer.json").write_text("{}")
    with pytest.raises(LunchboxError, match=r"tokenizer\.json"):
        store_model(box, manifest)
    assert not stored_folder(home, manifest).exists()


def test_a_bento_is_built_once_and_found_by_its_whole_tag(home: Path, built: Manifest) -> None:
    path = home / "bentos" / built.name / built.bento_version / "bento.yaml"
    before = path.stat().st_mtime_ns
    assert build_bento(built, root=ROOT) == built.tag
    assert path.stat().st_mtime_ns == before
    assert bento_exists(built.tag)
    assert not bento_exists(built.tag[:-1])
    assert not bento_exists("ekiben:99-ffffffff")


def test_a_bento_that_was_cut_short_is_built_again(home: Path, box: Path) -> None:
    manifest = read_manifest(box)
    half = home / "bentos" / manifest.name / manifest.bento_version
    (half / "src").mkdir(parents=True)
    assert not bento_exists(manifest.tag)
    store_model(box, manifest)
    build_bento(manifest, root=ROOT)
    assert (half / "bento.yaml").is_file()


def test_a_folder_without_a_bentofile_is_named(built: Manifest, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"no bentofile\.yaml in {tmp_path}"):
        build_bento(built, root=tmp_path)


def test_a_failing_build_says_why_in_one_line(box: Path, tmp_path: Path) -> None:
    (tmp_path / "bentofile.yaml").write_text("service: nowhere:Service\n")
    manifest = read_manifest(box)
    store_model(box, manifest)
    with pytest.raises(EkibenError, match="nowhere") as caught:
        build_bento(manifest, root=tmp_path)
    assert "\n" not in str(caught.value)
    assert not bento_exists(manifest.tag)


def test_a_build_without_its_model_says_so(box: Path) -> None:
    manifest = read_manifest(box)
    with pytest.raises(EkibenError, match=model_tag(manifest)):
        build_bento(manifest, root=ROOT)


def test_a_build_that_does_not_end_is_told_in_one_line(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(box)
    store_model(box, manifest)
    monkeypatch.setattr("flows.core.packing.BUILD_TIMEOUT_S", 0.1)
    with pytest.raises(EkibenError, match=rf"`bentoml build` of {manifest.tag} did not end within 0\.1 s"):
        build_bento(manifest, root=ROOT)
    assert not bento_exists(manifest.tag)


def test_what_the_stores_have_lost_is_put_back_from_the_box(
    home: Path, built: Manifest, tiny_lunchbox_path: Path, tmp_path: Path
) -> None:
    assert not put_back(tiny_lunchbox_path, built, root=ROOT, staging=tmp_path / "staging")
    assert not (tmp_path / "staging").exists()
    shutil.rmtree(stored_folder(home, built))
    assert put_back(tiny_lunchbox_path, built, root=ROOT, staging=tmp_path / "staging")
    assert is_stored(built)
    assert hash_manifest(stored_folder(home, built)) == hash_manifest(tiny_lunchbox_path)


def test_what_is_staged_is_nowhere_else_until_it_is_installed(home: Path, box: Path, tmp_path: Path) -> None:
    manifest = read_manifest(box)
    staged = tmp_path / "staged"
    assert stage_bento(box, manifest, root=ROOT, home=staged) == manifest.tag
    assert bento_exists(manifest.tag, home=staged)
    assert is_stored(manifest, home=staged)
    assert not bento_exists(manifest.tag)
    assert not is_stored(manifest)
    latest = home / "bentos" / manifest.name / "latest"
    before = latest.read_text() if latest.is_file() else None
    install(box, manifest, staged=staged)
    assert bento_exists(manifest.tag)
    assert is_stored(manifest)
    assert (latest.read_text() if latest.is_file() else None) == before  # untested ones are never the latest
    built = home / "bentos" / manifest.name / manifest.bento_version
    assert {path.name for path in built.iterdir()} >= {"bento.yaml", "src"}
    stamps = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    install(box, manifest, staged=staged)
    assert stamps == {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    assert not list((home / "tmp").glob(".ekiben*"))


def test_latest_means_the_version_that_it_is_told_to_mean(home: Path, built: Manifest, box: Path) -> None:
    manifest = read_manifest(box)
    store_model(box, manifest)
    build_bento(manifest, root=ROOT)
    for one in (built, manifest, built):
        point_latest(one.name, one.bento_version, home)
        assert str(bentoml.bentos.get(f"{one.name}:latest").tag) == one.tag
        assert str(bentoml.models.get(f"{one.name}-model:latest").tag) == model_tag(one)
    point_latest(built.name, "99-ffffffff", home)  # not in this store
    assert str(bentoml.bentos.get("ekiben:latest").tag) == built.tag


def test_a_box_packed_anew_takes_the_place_of_the_old_one_in_one_instant(
    home: Path, box: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no moment is there no model under the tag: the folder is exchanged, not removed and made again."""
    manifest = read_manifest(box)
    store_model(box, manifest)
    folder = stored_folder(home, manifest)
    seen: list[bool] = []
    for name in ("rename", "replace", "rmdir", "unlink"):
        real = getattr(Path, name)

        def watch(path: Path, *given: object, real: object = real, **named: object) -> object:
            seen.append((folder / "manifest.json").is_file())
            return real(path, *given, **named)  # type: ignore[operator]

        monkeypatch.setattr(Path, name, watch)
    anew = manifest.model_copy(update={"decision_threshold": 0.123})
    write_manifest(box, anew)
    store_model(box, anew)
    assert is_stored(anew)
    assert all(seen)
    assert hash_manifest(folder) == hash_manifest(box)
