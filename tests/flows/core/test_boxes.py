"""Where the lunchbox of a version is found, what is passed over, and how it gets to the run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bentos.errors import LunchboxError
from bentos.manifest import read_manifest, sha256_file, write_manifest
from flows.core.boxes import MANIFEST_TAG, box_path, check_box, find_box, keep_box
from flows.core.packing import hash_manifest, store_model, stored_path
from flows.core.registry import Release
from flows.core.tracking import Tracker
from flows.errors import EkibenError, NothingReleasedError
from tests.flows.core.test_registry import register_run
from tests.serving import bento_home, copy_lunchbox


@pytest.fixture(autouse=True)
def home(tmp_path: Path) -> Iterator[Path]:
    with bento_home(tmp_path / "bentoml") as home:
        yield home


@pytest.fixture
def lunchboxes(tmp_path: Path) -> Path:
    return tmp_path / "lunchboxes"


@pytest.fixture
def release(tracker: Tracker) -> Release:
    return register_run(tracker)


@pytest.fixture
def box(lunchboxes: Path, release: Release, tiny_lunchbox_path: Path) -> Path:
    """Its box where a release packs it."""
    lunchboxes.mkdir()
    to = box_path(lunchboxes, release)
    return copy_lunchbox(tiny_lunchbox_path, to, version=release.version, run_id=release.run_id)


def test_the_box_in_the_home_folder_is_taken_first(
    tracker: Tracker, release: Release, box: Path, lunchboxes: Path
) -> None:
    store_model(box, read_manifest(box))
    assert find_box(tracker, release, lunchboxes) == box


def test_then_the_one_in_the_model_store(tracker: Tracker, release: Release, box: Path, lunchboxes: Path) -> None:
    manifest = read_manifest(box)
    store_model(box, manifest)
    shutil.rmtree(box)
    assert find_box(tracker, release, lunchboxes) == stored_path(manifest)


def test_then_the_one_of_the_run_which_is_fetched(
    tracker: Tracker, release: Release, box: Path, lunchboxes: Path, tmp_path: Path
) -> None:
    keep_box(tracker, release.run_id, box)
    before = sorted((path.name, sha256_file(path)) for path in box.iterdir())
    shutil.rmtree(box)
    apart = tmp_path / "apart"
    assert find_box(tracker, release, lunchboxes, fetch_to=apart) == box_path(apart, release)
    assert not box.exists()
    assert find_box(tracker, release, lunchboxes) == box
    assert sorted((path.name, sha256_file(path)) for path in box.iterdir()) == before


def spoil_file(box: Path) -> None:
    (box / "tokenizer.json").write_text("{}")


def cut_short(box: Path) -> None:
    (box / "model.fp32.onnx").unlink()


def be_another(box: Path) -> None:
    write_manifest(box, read_manifest(box).model_copy(update={"version": "8"}))


def be_packed_anew(box: Path) -> None:
    write_manifest(box, read_manifest(box).model_copy(update={"created_at": "2031-01-01T00:00:00+00:00"}))


@pytest.mark.parametrize("spoil", [spoil_file, cut_short, be_another, be_packed_anew])
def test_what_is_not_the_released_box_is_passed_over(
    spoil: Callable[[Path], None], tracker: Tracker, release: Release, box: Path, lunchboxes: Path
) -> None:
    manifest = read_manifest(box)
    store_model(box, manifest)
    tracker.set_version_tags(release.version, {MANIFEST_TAG: hash_manifest(box)})
    release = tracker.version(release.version)
    spoil(box)
    assert find_box(tracker, release, lunchboxes) == stored_path(manifest)
    spoil(stored_path(manifest))
    with pytest.raises(
        NothingReleasedError, match=r"cannot be found whole \(.*; .*; .*no artifact.*is not packed anew"
    ):
        find_box(tracker, release, lunchboxes)
    assert box.exists()  # what could not be used is left for somebody to look at


def test_a_version_that_was_never_packed_says_what_to_do(tracker: Tracker, release: Release, lunchboxes: Path) -> None:
    with pytest.raises(NothingReleasedError, match=r"ekiben release --run 1"):
        find_box(tracker, release, lunchboxes)
    assert not any(lunchboxes.glob("*"))


def test_only_what_has_changed_is_sent_and_the_manifest_last(
    tracker: Tracker, release: Release, box: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[set[str]] = []
    log_folder = tracker.log_folder

    def watch(run_id: str, folder: Path, *, to: str = "") -> None:
        assert to == "lunchbox"
        sent.append({path.name for path in folder.iterdir()})
        log_folder(run_id, folder, to=to)

    monkeypatch.setattr(tracker, "log_folder", watch)
    keep_box(tracker, release.run_id, box)
    assert sent == [set(read_manifest(box).files), {"manifest.json"}]
    keep_box(tracker, release.run_id, box)
    assert len(sent) == 2
    (box / "MODEL_CARD.md").write_text("# anew")
    files = read_manifest(box).files | {"MODEL_CARD.md": sha256_file(box / "MODEL_CARD.md")}
    write_manifest(box, read_manifest(box).model_copy(update={"files": files}))
    keep_box(tracker, release.run_id, box)
    assert sent[2:] == [{"MODEL_CARD.md"}, {"manifest.json"}]


def test_an_upload_that_was_cut_short_is_no_box_and_is_completed_by_the_next_one(
    tracker: Tracker, release: Release, box: Path, lunchboxes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_folder = tracker.log_folder

    def die(run_id: str, folder: Path, *, to: str = "") -> None:
        if (folder / "manifest.json").exists():
            raise EkibenError("killed")
        log_folder(run_id, folder, to=to)

    monkeypatch.setattr(tracker, "log_folder", die)
    with pytest.raises(EkibenError, match="killed"):
        keep_box(tracker, release.run_id, box)
    monkeypatch.undo()
    with pytest.raises(NothingReleasedError, match=r"manifest\.json"):
        find_box(tracker, release, tmp_path / "elsewhere")
    keep_box(tracker, release.run_id, box)
    assert find_box(tracker, release, tmp_path / "elsewhere").is_dir()


def test_a_box_of_another_run_is_told_by_name(release: Release, box: Path) -> None:
    check_box(box, release)
    be_another(box)
    with pytest.raises(LunchboxError, match="holds ekiben:8-"):
        check_box(box, release)
