"""A folder is there whole, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.core.folders import replace_files, replaced_folder


def test_a_folder_takes_the_place_of_the_old_one_only_when_it_is_complete(tmp_path: Path) -> None:
    box = tmp_path / "boxes" / "box"
    with replaced_folder(box) as new:
        (new / "a").write_text("1")
        assert not box.exists()
    with pytest.raises(FileNotFoundError), replaced_folder(box) as new:
        (new / "none").rename(new / "a")
    assert (box / "a").read_text() == "1"
    with replaced_folder(box) as new:
        (new / "b").touch()
    assert [path.name for path in box.iterdir()] == ["b"]
    assert [path.name for path in box.parent.iterdir()] == ["box"]


def test_what_a_killed_process_left_behind_is_removed_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    boxes = tmp_path / "boxes"
    box = boxes / "box"
    code = (
        "import os, sys, pathlib; from flows.core.folders import replaced_folder\n"
        f"with replaced_folder(pathlib.Path({str(box)!r})) as new: (new / 'a').touch(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    (left,) = boxes.iterdir()
    living, other = boxes / f".box-{os.getpid()}-x", boxes / ".box2-1-x"
    living.mkdir()
    other.mkdir()
    with replaced_folder(box):
        assert not left.exists()
    assert {path.name for path in boxes.iterdir()} == {"box", living.name, other.name}


def test_files_are_replaced_whole_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = tmp_path / "boxes" / "box"
    box.mkdir(parents=True)
    (box / "a").write_text("old")
    replace_files(box, {"a": b"new", "b": b"2"})
    assert {path.name: path.read_text() for path in box.iterdir()} == {"a": "new", "b": "2"}
    assert [path.name for path in box.parent.iterdir()] == ["box"]

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        replace_files(box, {"a": b"newer", "c": b"3"})
    assert {path.name: path.read_text() for path in box.iterdir()} == {"a": "new", "b": "2"}
    assert [path.name for path in box.parent.iterdir()] == ["box"]
