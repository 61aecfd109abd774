"""The folder of the workers: nothing written is lost, nothing of the dead counts."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bentos.crew import Coming, Crew, Item, Plan, Report, open_crew
from bentos.siblings import name_process

ITEM = Item(tag="ekiben:1-12345678", path=Path("/box"))


def test_the_first_worker_finds_no_plan(tmp_path: Path) -> None:
    assert Crew(tmp_path).read_plan() is None


def test_a_plan_is_read_by_all_and_has_a_new_serial_when_it_changes(tmp_path: Path) -> None:
    ours, theirs = Crew(tmp_path), Crew(tmp_path)
    first = ours.change_plan(lambda plan: plan.model_copy(update={"live": ITEM, "at": 5.0}))
    assert (first.serial, first.live) == (1, ITEM)
    assert theirs.read_plan() == first
    coming = Coming(item=ITEM, attempt=2, by="1-1")
    second = theirs.change_plan(lambda plan: plan.model_copy(update={"coming": coming, "beside": (ITEM,)}))
    assert ours.read_plan() == second
    assert second.serial == 2
    assert second.items() == [ITEM, ITEM]
    assert theirs.change_plan(lambda plan: plan).serial == 2, "nothing changed"


def test_changes_at_the_same_time_are_all_there(tmp_path: Path) -> None:
    def change(crew: Crew, name: str) -> None:
        for number in range(20):
            crew.change_plan(
                lambda plan, n=number: plan.model_copy(update={"aliases": plan.aliases | {f"{name}{n}": ""}})
            )

    threads = [threading.Thread(target=change, args=(Crew(tmp_path), name)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plan = Crew(tmp_path).read_plan()
    assert plan is not None
    assert (plan.serial, len(plan.aliases)) == (80, 80)


def test_a_plan_that_was_swept_away_is_still_known_to_those_who_read_it(tmp_path: Path) -> None:
    crew = Crew(tmp_path)
    plan = crew.change_plan(lambda plan: plan.model_copy(update={"live": ITEM}))
    (tmp_path / "plan.json").unlink()
    assert crew.read_plan() == plan


def test_reports_are_those_of_the_living(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        name = name_process(child.pid)
        assert name is not None
        ours, theirs = Crew(tmp_path), Crew(tmp_path, me=name)
        for crew in (ours, theirs):
            crew.report(Report(pid=crew.pid))
        assert {report.pid for report in ours.reports()} == {ours.pid, child.pid}
        assert ours.is_alive(name)
        child.kill()
        child.wait()
        assert {report.pid for report in ours.reports()} == {ours.pid}
        assert not ours.is_alive(name)
        assert len(list(tmp_path.glob("worker-*.json"))) == 1
    ours.leave()
    assert ours.reports() == []


def test_a_report_that_says_nothing_new_is_not_written_again(tmp_path: Path) -> None:
    crew = Crew(tmp_path)
    crew.report(Report(pid=crew.pid))
    (path,) = tmp_path.glob("worker-*.json")
    before = path.stat()
    crew.report(Report(pid=crew.pid))
    assert path.stat().st_ino == before.st_ino
    crew.report(Report(pid=crew.pid, live="ekiben:1-01234567"))
    assert path.stat().st_ino != before.st_ino


def test_a_role_is_one_workers_until_it_ends(tmp_path: Path) -> None:
    crew = Crew(tmp_path)
    held = crew.take("follow")
    assert held is not None
    assert Crew(tmp_path).take("follow") is None
    assert Crew(tmp_path).take("swap") is not None
    held.close()
    assert Crew(tmp_path).take("follow") is not None


def test_state_of_another_version_of_the_program_is_not_read(tmp_path: Path) -> None:
    crew = Crew(tmp_path)
    assert crew.recall("state", Plan) is None
    crew.keep("state", Plan(serial=3))
    assert crew.recall("state", Plan) == Plan(serial=3)
    (tmp_path / "state.json").write_text('{"serial": "many"}')
    assert crew.recall("state", Plan) is None


def test_a_worker_of_its_own_has_a_folder_of_its_own() -> None:
    ours, other = open_crew(shared=False), open_crew(shared=False)
    assert ours.folder != other.folder
    folder = other.folder
    assert folder.is_dir()
    del other
    deadline = time.monotonic() + 10
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not folder.exists()


def test_what_is_in_use_is_kept_from_the_sweeper(tmp_path: Path) -> None:
    import os

    crew = Crew(tmp_path)
    crew.change_plan(lambda plan: plan.model_copy(update={"live": ITEM}))
    os.utime(tmp_path / "plan.json", (1, 1))
    crew.stay()
    assert (tmp_path / "plan.json").stat().st_mtime == pytest.approx(time.time(), abs=60)
    assert crew.read_plan() == Plan(serial=1, live=ITEM)
