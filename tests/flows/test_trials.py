"""What is kept of the trials of a study, and which failures are their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.core.processes import identify_process
from flows.core.search import Search
from flows.core.studies import OWNER
from flows.params import SearchSpace, TrainParams, TuneParams
from flows.settings import FlowSettings, load_settings
from flows.trials import drop_weights, finish_name, is_out_of_memory

BASE = TrainParams(base_model="small")


def open_search(folder: Path) -> Search:
    params = TuneParams(trials=9, space=SearchSpace(base_model=["small"]), costs=[])
    return Search(folder / "journal.log", name="one", base=BASE, params=params)


def finish(search: Search, settings: FlowSettings, value: float) -> Path:
    """Report a trial that leaves weights; return where they lie."""
    candidate = search.next_candidate(1e6)
    assert candidate is not None
    folder = settings.runs_path / f"run{candidate.number}"
    (folder / "model").mkdir(parents=True)
    search.report(candidate, value, seconds=1.0, run_id=folder.name)
    return folder


def test_only_weights_that_may_still_be_taken_are_kept(tmp_path: Path) -> None:
    search, settings = open_search(tmp_path), load_settings()
    base, worse, better = (finish(search, settings, value) for value in (0.7, 0.6, 0.8))
    drop_weights(search, settings)
    assert [folder.exists() for folder in (base, worse, better)] == [False, False, True]
    drop_weights(search, settings, at_end=True)
    assert not better.exists()


def test_a_trial_that_ends_while_weights_are_dropped_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, settings = open_search(tmp_path), load_settings()
    finish(search, settings, 0.7)
    front, late = search.front, []

    def look_then_another_ends() -> object:
        found = front()
        late.append(finish(open_search(tmp_path), settings, 0.9))
        return found

    monkeypatch.setattr(search, "front", look_then_another_ends)
    drop_weights(search, settings)
    assert late[0].exists()


def test_weights_that_another_process_is_finishing_are_left_to_it(tmp_path: Path) -> None:
    search, settings = open_search(tmp_path), load_settings()
    base, better = (finish(search, settings, value) for value in (0.7, 0.8))
    with open_search(tmp_path).alone(finish_name(base.name)):
        drop_weights(search, settings)
        drop_weights(search, settings, at_end=True)
        assert base.exists()
        assert not better.exists()
    drop_weights(search, settings, at_end=True)
    assert not base.exists()


def test_at_the_end_weights_of_others_that_live_are_left_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.core.studies.identify_process", lambda: identify_process() | {"host": "elsewhere"})
    search, settings = open_search(tmp_path), load_settings()
    theirs = finish(search, settings, 0.7)
    assert search._study.trials[0].user_attrs[OWNER]["host"] == "elsewhere"
    drop_weights(search, settings, at_end=True)
    assert theirs.exists()


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_want_of_memory_is_told_from_other_failures(error: Exception, is_it: bool) -> None:
    assert is_out_of_memory(error) == is_it
