"""From lunchbox to a tested Bento: real BentoML store, real builds, real servers."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import bentoml
import psutil
import pytest

from bentos.errors import LunchboxError
from bentos.manifest import Manifest, read_manifest, sha256_file, write_manifest
from flows.core.packing import bento_exists, build_bento, is_stored, model_tag, remove_bento, smoke_test, store_model
from flows.errors import EkibenError, InputError, SmokeTestError
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


def stored_path(home: Path, manifest: Manifest) -> Path:
    return home / "models" / f"{manifest.name}-model" / manifest.bento_version


def test_a_stored_model_is_the_lunchbox(home: Path, box: Path) -> None:
    manifest = read_manifest(box)
    assert not is_stored(manifest)
    tag = store_model(box, manifest)
    assert is_stored(manifest)
    assert not is_stored(manifest.model_copy(update={"default_precision": "int8"}))  # packed anew
    assert tag == model_tag(manifest) == f"ekiben-model:{manifest.bento_version}"
    assert read_manifest(stored_path(home, manifest)) == manifest
    assert bentoml.models.get(tag).info.labels["run_id"] == manifest.run_id


def test_storing_again_changes_nothing(home: Path, box: Path) -> None:
    manifest = read_manifest(box)
    store_model(box, manifest)
    before = {path: path.stat().st_mtime_ns for path in stored_path(home, manifest).iterdir()}
    store_model(box, manifest)
    assert before == {path: path.stat().st_mtime_ns for path in stored_path(home, manifest).iterdir()}


@pytest.mark.parametrize("name", ["model.fp32.onnx", "manifest.json", "model.yaml"])
def test_a_stored_copy_that_was_cut_short_is_replaced(home: Path, box: Path, name: str) -> None:
    manifest = read_manifest(box)
    store_model(box, manifest)
    (stored_path(home, manifest) / name).unlink()
    assert not is_stored(manifest)
    store_model(box, manifest)
    assert (stored_path(home, manifest) / name).is_file()


def test_an_altered_lunchbox_is_not_stored(home: Path, box: Path) -> None:
    manifest = read_manifest(box)
    (box / "tokenizer.json").write_text("{}")
    with pytest.raises(LunchboxError, match=r"tokenizer\.json"):
        store_model(box, manifest)
    assert not stored_path(home, manifest).exists()


def test_a_bento_is_built_once_and_found_by_its_whole_tag(home: Path, built: Manifest) -> None:
    path = home / "bentos" / built.name / built.bento_version / "bento.yaml"
    before = path.stat().st_mtime_ns
    assert build_bento(built, root=ROOT) == built.tag
    assert path.stat().st_mtime_ns == before
    assert bento_exists(built.tag)
    assert not bento_exists(built.tag[:-1])
    assert not bento_exists("ekiben:99-ffffffff")


def test_a_bento_that_was_cut_short_is_built_again_and_a_removed_one_is_gone(home: Path, box: Path) -> None:
    manifest = read_manifest(box)
    half = home / "bentos" / manifest.name / manifest.bento_version
    (half / "src").mkdir(parents=True)
    assert not bento_exists(manifest.tag)
    store_model(box, manifest)
    build_bento(manifest, root=ROOT)
    assert (half / "bento.yaml").is_file()
    remove_bento(manifest.tag)
    assert not half.exists()
    remove_bento(manifest.tag)


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


def test_a_good_bento_passes_the_smoke_test_and_is_measured(built: Manifest, tmp_path: Path) -> None:
    log = tmp_path / "serve.log"
    before = find_servers(built.tag)
    measured = smoke_test(built.tag, built, log=log)
    assert set(measured) == {"serve/p95_ms", "serve/texts_per_s", "serve/rss_mb", "serve/bytes_per_vector"}
    assert all(value > 0 for value in measured.values())
    assert measured["serve/bytes_per_vector"] == 4 * built.dim
    assert built.tag in log.read_text()  # the server wrote to it
    assert find_servers(built.tag) == before


def test_a_bento_with_wrong_vectors_fails_the_smoke_test(home: Path, built: Manifest, tmp_path: Path) -> None:
    stored = stored_path(home, built)
    kept = shutil.copytree(stored, home / "kept")
    canary = json.loads((stored / "canary.json").read_text())
    canary["vectors"] = [[-value for value in vector] for vector in canary["vectors"]]
    (stored / "canary.json").write_text(json.dumps(canary))
    files = built.files | {"canary.json": sha256_file(stored / "canary.json")}
    write_manifest(stored, built.model_copy(update={"files": files}))
    before = find_servers(built.tag)
    try:
        with pytest.raises(SmokeTestError, match=r"answered 503.*canary vectors are wrong.*log .* ends: ") as caught:
            smoke_test(built.tag, built, log=tmp_path / "serve.log")
    finally:
        shutil.rmtree(stored)
        kept.rename(stored)
    assert "\n" not in str(caught.value)
    assert find_servers(built.tag) == before


def test_a_bento_that_is_not_there_fails_the_smoke_test(built: Manifest, tmp_path: Path) -> None:
    with pytest.raises(SmokeTestError, match=r"ended with exit code 1.*not found"):
        smoke_test("ekiben:99-ffffffff", built, log=tmp_path / "serve.log")


def test_a_bento_of_another_space_fails_the_smoke_test(built: Manifest, tmp_path: Path) -> None:
    with pytest.raises(SmokeTestError, match=r"X-Ekiben-Space is .*, expected 'another'"):
        smoke_test(built.tag, built.model_copy(update={"space_id": "another"}), log=tmp_path / "serve.log")


def find_servers(tag: str) -> set[int]:
    """Processes that serve `tag`, workers included; those of other tests are the same before and after."""
    return {process.pid for process in psutil.process_iter(["cmdline"]) if tag in (process.info["cmdline"] or [])}
