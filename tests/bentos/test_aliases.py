"""The file of aliases: what one process writes another reads, whole, whoever else writes at the same time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bentos.aliases import Pointer, alias_path, locked, read_aliases, try_lock, write_alias
from bentos.errors import RegistryError


def pointer(version: int) -> Pointer:
    run_id = f"{version:032x}"
    return Pointer(version=str(version), bento_version=f"{version}-{run_id[:8]}", run_id=run_id, space_id="5" * 16)


def test_nothing_was_released_yet(tmp_path: Path) -> None:
    assert read_aliases(tmp_path, "ekiben") == {}


def test_what_is_written_is_read_and_the_others_stay(tmp_path: Path) -> None:
    write_alias(tmp_path, "ekiben", "champion", pointer(1))
    write_alias(tmp_path, "ekiben", "challenger", pointer(2))
    write_alias(tmp_path, "other", "champion", pointer(9))
    assert read_aliases(tmp_path, "ekiben") == {"champion": pointer(1), "challenger": pointer(2)}
    write_alias(tmp_path, "ekiben", "champion", None)
    write_alias(tmp_path, "ekiben", "never-there", None)
    assert read_aliases(tmp_path, "ekiben") == {"challenger": pointer(2)}


def test_the_file_is_the_one_that_is_promised_to_other_programs(tmp_path: Path) -> None:
    write_alias(tmp_path, "ekiben", "champion", pointer(1))
    path = tmp_path / "ekiben" / "ekiben.aliases.json"
    assert json.loads(path.read_text()) == {"layout": 1, "aliases": {"champion": pointer(1).model_dump()}}
    assert path.stat().st_mode & 0o777 == 0o644, "a server may run as another user"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["champion", "challenger", "previous"]), st.none() | st.integers(1, 5))))
def test_any_writes_give_what_the_last_ones_said(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[str, int | None]]
) -> None:
    home = tmp_path_factory.mktemp("home")
    expected: dict[str, Pointer] = {}
    for alias, version in writes:
        write_alias(home, "ekiben", alias, None if version is None else pointer(version))
        expected.pop(alias, None)
        if version is not None:
            expected[alias] = pointer(version)
        assert read_aliases(home, "ekiben") == expected


def test_writers_at_the_same_time_lose_nothing_and_readers_never_see_half_a_file(tmp_path: Path) -> None:
    ended = threading.Event()
    problems: list[Exception] = []

    def write(name: str) -> None:
        for version in range(1, 16):
            write_alias(tmp_path, "ekiben", name, pointer(version))

    def read() -> None:
        while not ended.is_set():
            try:
                read_aliases(tmp_path, "ekiben")
            except RegistryError as error:
                problems.append(error)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(f"alias-{number}",)) for number in range(6)]
    reader.start()
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    ended.set()
    reader.join()
    assert not problems
    assert read_aliases(tmp_path, "ekiben") == {f"alias-{number}": pointer(15) for number in range(6)}


def test_the_lock_of_a_killed_writer_is_free(tmp_path: Path) -> None:
    write_alias(tmp_path, "ekiben", "champion", pointer(1))
    lock = alias_path(tmp_path, "ekiben").with_suffix(".lock")
    code = f"""
import time
from pathlib import Path
from bentos.aliases import locked
with locked(Path({str(lock)!r})):
    print("held", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert try_lock(lock) is None
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    write_alias(tmp_path, "ekiben", "champion", pointer(2))
    assert read_aliases(tmp_path, "ekiben")["champion"] == pointer(2)


def test_a_lock_is_held_by_one_until_it_is_closed(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"):
        assert try_lock(tmp_path / "lock") is None
    first = try_lock(tmp_path / "lock")
    assert first is not None
    assert try_lock(tmp_path / "lock") is None
    first.close()
    assert try_lock(tmp_path / "lock") is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has layout None; this version reads 1"),
        ('{"layout": 2, "aliases": {}}', "has layout 2; this version reads 1"),
        ('{"layout": 1}', "has layout 1"),
        ('{"layout": 1, "aliases": {"champion": {"version": "1"}}}', "bento_version: Field required"),
    ],
)
def test_a_file_that_cannot_be_understood_is_named_and_the_next_write_writes_it_anew(
    tmp_path: Path, content: str, message: str
) -> None:
    path = alias_path(tmp_path, "ekiben")
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(RegistryError, match=message) as caught:
        read_aliases(tmp_path, "ekiben")
    assert str(path) in str(caught.value)
    assert "release or roll back again to write it anew" in str(caught.value)
    write_alias(tmp_path, "ekiben", "challenger", None)
    write_alias(tmp_path, "ekiben", "champion", pointer(1))
    assert read_aliases(tmp_path, "ekiben") == {"champion": pointer(1)}


def test_a_file_of_a_later_version_with_more_fields_is_read(tmp_path: Path) -> None:
    path = alias_path(tmp_path, "ekiben")
    path.parent.mkdir()
    more = {**pointer(1).model_dump(), "promoted_at": "2026-11-23"}
    path.write_text(json.dumps({"layout": 1, "aliases": {"champion": more}, "by": "somebody"}))
    assert read_aliases(tmp_path, "ekiben") == {"champion": pointer(1)}


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_alias(tmp_path, "ekiben", "champion", pointer(1))

    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bentos.aliases.os.fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_alias(tmp_path, "ekiben", "champion", pointer(2))
    assert read_aliases(tmp_path, "ekiben") == {"champion": pointer(1)}
    assert sorted(path.suffix for path in (tmp_path / "ekiben").iterdir()) == [".json", ".lock"]
