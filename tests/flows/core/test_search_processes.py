"""Two real processes work on one study: no trial is lost, none is done twice, and each architecture has one cost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.core.search import Search
from flows.core.studies import study_name
from flows.params import SearchSpace, TrainParams, TuneParams

SPACE = SearchSpace(base_model=["small"], layers=[None, 1, 2], precision=["fp32", "int8"])
BASE = TrainParams(base_model="small", steps=60, precision="fp32")
TRIALS = 12
# Each line that a worker writes is one event: `measured ...`, `trained NUMBER ...`, `finished NUMBER`.
WORKER = """
import json, random, sys, time
from pathlib import Path
from flows.core.search import Search
from flows.core.studies import study_name
from flows.params import SearchSpace, TrainParams, TuneParams

storage, name, events, start = sys.argv[1:5]
log = Path(events).open("a", buffering=1)
base = TrainParams.model_validate_json(sys.argv[5])
params = TuneParams.model_validate_json(sys.argv[6])

def measure(candidate):
    log.write(f"measured {candidate.layers} {candidate.precision} {candidate.max_tokens}\\n")
    time.sleep(0.1)
    return {"p95_ms": random.uniform(1, 2), "bytes_per_vector": 1536.0}  # a second measurement never agrees

import optuna  # what takes seconds is done before the start
Path(events + ".ready").touch()
while not Path(start).exists():
    time.sleep(0.01)
search = Search(storage if "://" in storage else Path(storage), name=name, base=base, params=params, measure=measure)
while True:
    candidate = search.next_candidate(1e6)
    if candidate is None:
        if search.others_at_work:
            time.sleep(0.1)
            continue
        break
    time.sleep(random.uniform(0.05, 0.2))
    log.write(f"trained {candidate.number} {json.dumps(candidate.costs)}\\n")
    search.report(candidate, 0.8 + candidate.params.learning_rate, seconds=0.1, run_id=f"run{candidate.number}")
with search.alone("finish"):
    best = search.best()
    if f"finished {best.number}\\n" not in Path(events).read_text():
        time.sleep(0.3)
        log.write(f"finished {best.number}\\n")
"""


@pytest.fixture
def postgresql() -> Iterator[str]:
    """Start a database server of its own, give the folder of its socket; skip where PostgreSQL is not installed."""
    initdb = shutil.which("initdb") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), None)
    if initdb is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="ekiben-pg-"))
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    if user is not None:
        shutil.chown(folder, user)
    try:
        command = [initdb, "-D", str(folder / "data"), "-U", "ekiben", "--auth=trust"]
        subprocess.run(command, user=user, cwd=folder, check=True, capture_output=True)
        command = [
            str(Path(initdb).resolve().with_name("postgres")), "-D", str(folder / "data"), "-k", str(folder), "-h", "",
            "-c", "fsync=off",
        ]  # fmt: skip
        with (folder.with_suffix(".log")).open("w") as log:
            server = subprocess.Popen(command, user=user, cwd=folder, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while not takes_connections(folder):  # the file of its socket is there before that
                said = folder.with_suffix(".log")
                assert server.poll() is None, said.read_text()
                assert time.monotonic() < deadline, said.read_text()
                time.sleep(0.1)
            yield str(folder)
        finally:
            server.send_signal(signal.SIGINT)  # at once, whoever is still connected
            server.wait(60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".log").unlink(missing_ok=True)


def takes_connections(folder: Path) -> bool:
    command = ["psql", "-q", "-h", str(folder), "-U", "ekiben", "postgres", "-c", "SELECT 1"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def open_gate(workers: list[subprocess.Popen[str]], ready: list[Path], start: Path) -> None:
    """Let all begin at once, when each has imported what it needs: the first would be done before the last begins."""
    deadline = time.monotonic() + 240
    while not all(path.exists() for path in ready):
        for worker in workers:
            assert worker.poll() is None, worker.communicate()[1]
        assert time.monotonic() < deadline, [path.name for path in ready if not path.exists()]
        time.sleep(0.05)
    start.touch()


def work_together(storage: str, folder: Path) -> None:
    params = TuneParams(trials=TRIALS, space=SPACE)
    name = study_name(SPACE, ["spearman", *params.costs], "d" * 32, BASE)
    events, start = folder / "events", folder / "start"
    arguments = [storage, name, str(events), str(start), BASE.model_dump_json(), params.model_dump_json()]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, *arguments[:2], f"{events}.{number}", *arguments[3:]],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        open_gate(workers, [Path(f"{events}.{number}.ready") for number in range(2)], start)
        for worker in workers:
            _, said = worker.communicate(timeout=300)
            assert worker.returncode == 0, said
    finally:
        for worker in workers:  # one that waits at the gate would wait for ever
            worker.kill()
            worker.wait()
    done = [Path(f"{events}.{number}").read_text().splitlines() for number in range(2)]
    trained = [[line for line in lines if line.startswith("trained")] for lines in done]
    assert all(trained), "both have trained something"
    numbers = [int(line.split()[1]) for lines in trained for line in lines]
    assert len(numbers) == len(set(numbers)) == TRIALS

    search = Search(storage if "://" in storage else Path(storage), name=name, base=BASE, params=params)
    rows = search.rows()
    assert sorted(row["trial"] for row in rows if row["state"] == "complete") == sorted(numbers)
    assert {row["state"] for row in rows} <= {"complete", "infeasible"}
    assert sum(row["note"] == "the base" for row in rows) == 1
    drawn = [tuple(row[name] for name in type(SPACE).model_fields) for row in rows]
    assert len(drawn) == len(set(drawn))
    measured = Counter(line for lines in done for line in lines if line.startswith("measured"))
    assert set(measured.values()) == {1}
    architectures = {(row["layers"], row["precision"], row["max_tokens"]): row["p95_ms"] for row in rows}
    assert len(architectures) == len(measured)
    assert all(row["p95_ms"] == architectures[row["layers"], row["precision"], row["max_tokens"]] for row in rows)
    finished = {line for lines in done for line in lines if line.startswith("finished")}
    assert finished == {f"finished {search.best().number}"}


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("journal", marks=pytest.mark.slow)])
def test_two_processes_share_one_study(tmp_path: Path, kind: str) -> None:
    storage = f"sqlite:///{tmp_path}/studies.db" if kind == "sqlite" else str(tmp_path / "journal.log")
    work_together(storage, tmp_path)


@pytest.mark.slow
def test_two_processes_share_one_study_in_postgresql(tmp_path: Path, postgresql: str) -> None:
    for attempt in ("one", "two", "three"):  # in a new database each time: both make the tables at the same moment
        command = ["psql", "-q", "-h", postgresql, "-U", "ekiben", "postgres", "-c", f"CREATE DATABASE {attempt}"]
        subprocess.run(command, check=True)
        (tmp_path / attempt).mkdir()
        work_together(f"postgresql+psycopg2://ekiben@/{attempt}?host={postgresql}", tmp_path / attempt)
