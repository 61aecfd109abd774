"""A folder is there whole, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.core.folders import replaced_folder


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
