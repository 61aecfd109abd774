"""The local source: what an alias or any other reference means, and whether the folder holds that version."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bentos.aliases import Pointer, write_alias
from bentos.errors import LunchboxError, RegistryError
from bentos.manifest import read_manifest
from bentos.sources import LocalSource, UnknownVersionError, check_box, point_at
from tests.serving import copy_lunchbox

RUN = {"1": "1" * 32, "2": "2" * 32}


@pytest.fixture
def home(tmp_path: Path, tiny_lunchbox_path: Path) -> Path:
    """A BentoML home with two versions in its model store."""
    for version, run_id in RUN.items():
        to = tmp_path / "models" / "ekiben-model" / f"{version}-{run_id[:8]}"
        copy_lunchbox(tiny_lunchbox_path, to, version=version, run_id=run_id)
    return tmp_path


def folder(home: Path, version: str) -> Path:
    return home / "models" / "ekiben-model" / f"{version}-{RUN[version][:8]}"


def point(home: Path, version: str) -> Pointer:
    return point_at(read_manifest(folder(home, version)))


@pytest.mark.parametrize("reference", ["2", "v2", "2-22222222", "ekiben:2-22222222", "2" * 32, "champion"])
def test_a_version_has_many_names(home: Path, reference: str) -> None:
    source = LocalSource(home, "ekiben")
    write_alias(home, "ekiben", "champion", point(home, "2"))
    found = source.find(reference)
    assert found == point(home, "2")
    assert source.fetch(found) == source.find_here(found) == folder(home, "2")


@pytest.mark.parametrize("reference", ["3", "2-2222", "2-33333333", "", "..", "../2-22222222", "222222", "other:2"])
def test_what_is_no_version_is_refused_with_those_there_are(home: Path, reference: str) -> None:
    with pytest.raises(UnknownVersionError, match="there are: 1-11111111, 2-22222222"):
        LocalSource(home, "ekiben").find(reference)


def test_an_empty_home_has_no_versions(tmp_path: Path) -> None:
    source = LocalSource(tmp_path, "ekiben")
    assert source.look("champion") is None
    with pytest.raises(UnknownVersionError, match="there are: none"):
        source.find("1")


def test_a_number_of_two_versions_must_be_made_clear(home: Path, tiny_lunchbox_path: Path) -> None:
    twin = home / "models" / "ekiben-model" / "2-33333333"
    copy_lunchbox(tiny_lunchbox_path, twin, version="2", run_id="3" * 32)
    with pytest.raises(UnknownVersionError, match="2-22222222 or 2-33333333: name one"):
        LocalSource(home, "ekiben").find("v2")
    assert LocalSource(home, "ekiben").find("2-33333333").run_id == "3" * 32


def test_the_bentos_own_version_need_not_be_in_the_store(home: Path, tmp_path: Path, tiny_lunchbox_path: Path) -> None:
    own = copy_lunchbox(tiny_lunchbox_path, tmp_path / "own", version="7", run_id="7" * 32)
    source = LocalSource(home, "ekiben", own=own)
    assert source.find("7") == point_at(read_manifest(own))
    assert source.find_here(source.find("7")) == own
    assert LocalSource(home, "ekiben", own=tmp_path / "nothing").find("1").version == "1"


def test_an_alias_that_names_what_is_not_here_says_so(home: Path) -> None:
    gone = point(home, "1").model_copy(update={"bento_version": "9-99999999"})
    write_alias(home, "ekiben", "champion", gone)
    source = LocalSource(home, "ekiben")
    assert source.look("champion") == gone
    assert source.find_here(gone) is None
    with pytest.raises(RegistryError, match="9-99999999, which is not in the model store"):
        source.fetch(gone)


@pytest.mark.parametrize("field", ["version", "run_id", "space_id"])
def test_a_folder_that_holds_another_version_is_refused(home: Path, field: str) -> None:
    wrong = point(home, "1").model_copy(update={field: "x"})
    with pytest.raises(LunchboxError, match=f"its {field} is"):
        LocalSource(home, "ekiben").fetch(wrong)


def test_hashes_are_compared_on_demand(home: Path) -> None:
    path = folder(home, "1") / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b" ")
    check_box(folder(home, "1"), point(home, "1"))
    with pytest.raises(LunchboxError, match=r"tokenizer\.json .* was altered"):
        check_box(folder(home, "1"), point(home, "1"), hashes=True)


def test_the_fingerprint_changes_with_pointer_and_files(home: Path) -> None:
    source = LocalSource(home, "ekiben")
    one = point(home, "1")
    first = source.fingerprint(one)
    assert source.fingerprint(one) == first
    assert source.fingerprint(one.model_copy(update={"space_id": "x"})) != first
    path = folder(home, "1") / "canary.json"
    path.write_bytes(path.read_bytes())
    assert source.fingerprint(one) != first
    shutil.rmtree(folder(home, "1"))
    assert source.fingerprint(one) != first
