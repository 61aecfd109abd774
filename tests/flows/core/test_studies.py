"""How a study is kept: its name, its storage, and what happens to trials whose process is gone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import sqlalchemy
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

from flows.core import studies
from flows.core.claims import CLAIM_LASTS_S, _drop_stale_claim, claim
from flows.core.studies import (
    GRACE_S,
    OWNER,
    close_stale_trials,
    heartbeat,
    make_sampler,
    name_architecture,
    open_study,
    quiet_optuna,
    sign_trial,
    study_name,
    to_distributions,
    values_inside,
)
from flows.errors import ParamsError
from flows.params import DataParams, FloatRange, SearchSpace, TrainParams

SPACE = SearchSpace(base_model=["a"])


def test_everything_that_makes_values_comparable_is_in_the_name() -> None:
    base = TrainParams()
    names = [
        study_name(SPACE, ["spearman"], "d" * 32, base),
        study_name(SPACE.model_copy(update={"steps": [30]}), ["spearman"], "d" * 32, base),
        study_name(
            SPACE.model_copy(update={"learning_rate": FloatRange(low=1e-5, high=1e-4)}), ["spearman"], "d" * 32, base
        ),
        study_name(SPACE, ["ndcg_at_10"], "d" * 32, base),
        study_name(SPACE, ["spearman"], "e" * 32, base),
        study_name(SPACE, ["spearman"], "d" * 32, TrainParams(seed=1)),
        study_name(SPACE, ["spearman"], "d" * 32, base, DataParams(split_seed=1)),
        study_name(SPACE, ["spearman", "p95_ms"], "d" * 32, base),
        study_name(SPACE, ["spearman", "p95_ms", "memory_mb"], "d" * 32, base),
        study_name(SPACE, ["spearman", "memory_mb", "p95_ms"], "d" * 32, base),
        study_name(SPACE, ["spearman"], "d" * 32, base, conditions=["a machine"]),
    ]
    assert len(set(names)) == len(names)
    elsewhere = DataParams(pairs="s3://bucket/pairs.csv")
    assert study_name(SearchSpace(base_model=["a"]), ["spearman"], "d" * 32, TrainParams(), elsewhere) == names[0]
    assert names[0].startswith("spearman-dddddddd-")
    assert names[8].startswith("spearman+p95_ms+memory_mb-dddddddd-")


@given(
    steps=st.integers(1, 200),
    choices=st.lists(st.integers(1, 200), min_size=1),
    rate=st.floats(1e-6, 1e-2),
    ends=st.tuples(st.floats(1e-6, 1e-2), st.floats(1e-6, 1e-2)),
)
def test_only_what_the_space_could_draw_counts_as_inside(
    steps: int, choices: list[int], rate: float, ends: tuple[float, float]
) -> None:
    space = SearchSpace(steps=choices, learning_rate=FloatRange(low=min(ends), high=max(ends), log=True))
    inside = values_inside(TrainParams(steps=steps, learning_rate=rate), to_distributions(space))
    assert ("steps" in inside) == (steps in choices)
    assert ("learning_rate" in inside) == (min(ends) <= rate <= max(ends))


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_a_study_is_found_again(tmp_path: Path, kind: str) -> None:
    storage: Any = tmp_path / "new" / "journal.log" if kind == "journal" else f"sqlite:///{tmp_path}/new/studies.db"
    with quiet_optuna():
        open_study(storage, name="one").ask()
    assert len(open_study(storage, name="one").trials) == 1
    assert open_study(storage, name="two").trials == []
    assert open_study(storage, name="one").direction == optuna.study.StudyDirection.MAXIMIZE


@pytest.mark.parametrize(
    ("storage", "problem"),
    [
        ("nonsense://host/db", "nonsense"),
        ("sqlite:////proc/nowhere/studies.db", "nowhere"),
        ("mssql+pymssql://user:secret@host/db", "import DB access module"),
        ("://", "cannot be opened"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_refused(storage: str, problem: str) -> None:
    with pytest.raises(ParamsError, match=problem) as caught:
        open_study(storage, name="one")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rest", [b"", b'{"op_code":4,"worker_id":"x', b"{}x"])
def test_a_journal_whose_last_line_was_cut_goes_on(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "journal.log"
    open_study(path, name="one").ask()
    with path.open("ab") as file:
        file.write(rest)
    study = open_study(path, name="one")
    study.ask()
    assert len(open_study(path, name="one").trials) == 2


def test_a_damaged_journal_is_refused_with_a_cure(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    path.write_text("not a journal\n" * 3)
    with pytest.raises(ParamsError, match="move a damaged one away"):
        open_study(path, name="one")


def own_start() -> float:
    return float(psutil.Process().create_time())


def gone_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.parametrize(
    ("owner", "is_stale"),
    [
        (lambda: {"host": socket.gethostname(), "pid": os.getpid(), "started": own_start()}, False),
        (lambda: {"host": socket.gethostname(), "pid": os.getpid(), "started": own_start() - 3600}, True),
        (lambda: {"host": socket.gethostname(), "pid": gone_pid(), "started": own_start()}, True),
        (lambda: {"host": "elsewhere", "pid": gone_pid(), "started": 0.0}, False),
        (lambda: None, False),
    ],
    ids=["this process", "same number, other process", "gone", "other host", "unsigned"],
)
def test_only_trials_of_processes_that_are_gone_are_closed(tmp_path: Path, owner: Any, is_stale: bool) -> None:
    study = open_study(tmp_path / "journal.log", name="one")
    done, trial = study.ask(), study.ask()
    study.tell(done, 0.5)
    trial.set_user_attr(OWNER, owner())
    assert close_stale_trials(study) == int(is_stale)
    expected = TrialState.FAIL if is_stale else TrialState.RUNNING
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, expected]
    assert close_stale_trials(study) == 0


def test_in_a_database_a_trial_of_another_host_is_closed_when_its_heartbeat_stops(tmp_path: Path) -> None:
    study = open_study(f"sqlite:///{tmp_path}/studies.db", name="one")
    with quiet_optuna():
        trial = study.ask()
    trial.set_user_attr(OWNER, {"host": "elsewhere", "pid": 1, "started": 0.0})
    with heartbeat(study, trial):
        pass
    assert close_stale_trials(study) == 0
    with sqlalchemy.create_engine(f"sqlite:///{tmp_path}/studies.db").begin() as connection:
        moved = sqlalchemy.text(
            f"UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, '-{GRACE_S + 60} seconds')"
        )
        assert connection.execute(moved).rowcount == 1
    assert close_stale_trials(study) == 1


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_a_trial_of_a_process_that_was_killed_before_it_signed_is_closed_in_time(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage: Any = tmp_path / "journal.log" if kind == "journal" else f"sqlite:///{tmp_path}/studies.db"
    study = open_study(storage, name="one")
    with quiet_optuna():
        study.ask()
    assert close_stale_trials(study) == 0  # it may be signed in a moment

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(seconds=GRACE_S + 60)

    monkeypatch.setattr(studies, "datetime", Later)
    assert close_stale_trials(study) == 1
    assert study.trials[0].state == TrialState.FAIL


def test_a_signed_trial_is_of_this_process(tmp_path: Path) -> None:
    study = open_study(tmp_path / "journal.log", name="one")
    sign_trial(study.ask())
    assert study.trials[0].user_attrs[OWNER]["pid"] == os.getpid()
    assert close_stale_trials(study) == 0


@given(
    first=st.fixed_dictionaries({"layers": st.sampled_from([None, 1, 2]), "steps": st.integers(1, 9)}),
    second=st.fixed_dictionaries({"layers": st.sampled_from([None, 1, 2]), "steps": st.integers(1, 9)}),
)
def test_an_architecture_is_named_by_what_makes_it_alone(first: dict[str, Any], second: dict[str, Any]) -> None:
    names = [name_architecture(TrainParams(**values)) for values in (first, second)]
    assert (names[0] == names[1]) == (first["layers"] == second["layers"])


def test_an_architecture_of_a_long_path_has_a_short_name() -> None:
    names = {name_architecture(TrainParams(base_model=f"/{'x' * 600}/{number}")) for number in range(2)}
    assert len(names) == 2
    assert max(map(len, names)) < 512  # what a database's column holds


def test_processes_that_draw_at_the_same_moment_draw_different_trials(tmp_path: Path) -> None:
    """Both have seen the same trials: without the number of the trial in the seed both would draw the same."""
    draws = []
    studies = [open_study(tmp_path / "journal.log", name="one") for _ in range(2)]
    for study in studies:
        study.sampler = make_sampler(42, 4)
        draws.append(study.ask().suggest_float("rate", 0, 1))
    assert draws[0] != draws[1]


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_a_claim_is_held_by_one_at_a_time_and_given_back(tmp_path: Path, kind: str) -> None:
    storage: Any = tmp_path / "journal.log" if kind == "journal" else f"sqlite:///{tmp_path}/studies.db"
    with quiet_optuna():
        studies = [open_study(storage, name="one") for _ in range(2)]
    inside, most = 0, 0
    done = []

    def work(study: Any) -> None:
        nonlocal inside, most
        with claim(study, "one: work"):
            inside += 1
            most = max(most, inside)
            time.sleep(0.2)
            inside -= 1
        done.append(study)

    threads = [threading.Thread(target=work, args=[study]) for study in studies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(done), most) == (2, 1)
    assert optuna.get_all_study_names(studies[0]._storage) == ["one"]  # nothing is left behind


def test_whoever_does_not_wait_for_a_claim_is_told_that_it_is_held(tmp_path: Path) -> None:
    study = open_study(tmp_path / "journal.log", name="one")
    with claim(study, "one: work") as first, claim(study, "one: work", wait=False) as second:
        assert (first, second) == (True, False)
    with claim(study, "one: work", wait=False) as third:
        assert third
    assert optuna.get_all_study_names(study._storage) == ["one"]


def test_a_claim_is_given_back_by_an_error_and_taken_over_from_a_process_that_is_gone(tmp_path: Path) -> None:
    study = open_study(tmp_path / "journal.log", name="one")
    with pytest.raises(RuntimeError, match="broken"), claim(study, "one: work"):
        raise RuntimeError("broken")
    token = optuna.create_study(storage=study._storage, study_name="one: work")
    token.set_user_attr(OWNER, {"host": socket.gethostname(), "pid": gone_pid(), "started": 0.0})
    with claim(study, "one: work"):
        assert study._storage.get_study_name_from_id(token._study_id + 1) == "one: work"


def test_a_claim_of_another_host_lasts_until_it_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study(tmp_path / "journal.log", name="one")
    token = optuna.create_study(storage=study._storage, study_name="one: work")
    token.set_user_attr(OWNER, {"host": "elsewhere", "pid": 1, "started": 0.0})
    assert not _drop_stale_claim(study._storage, "one: work")  # notes since when somebody waits
    assert not _drop_stale_claim(study._storage, "one: work")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + CLAIM_LASTS_S + 60)
    assert _drop_stale_claim(study._storage, "one: work")
    assert _drop_stale_claim(study._storage, "one: work")  # it is gone: try again
    assert optuna.get_all_study_names(study._storage) == ["one"]
