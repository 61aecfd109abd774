"""The whole line as a user drives it: the command in a process of its own, real servers, the README's requests."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

from tests.bentos.traffic import Traffic, find_wrong
from tests.flows.support import write_pairs
from tests.processes import family_of, find_free_port
from tests.serving import serve

ROOT = Path(__file__).parents[1]
EKIBEN = str(Path(sys.executable).with_name("ekiben"))
UP_TIMEOUT_S = 1800.0
# Gates that let a second, worse version pass, as two versions are all that a test of the way back needs.
LOOSE = {"min_gain": -2, "champion_margin": -2, "slice_max_drop": 2, "max_calibration_error": 1, "max_slowdown": 1e6}
LENIENT = [part for name, value in LOOSE.items() for part in ("--set", f"release.{name}={value}")]
SAMPLE = ["--profiles", "data/sample/profiles.csv", "--judgements", "data/sample/judgements.csv"]
TOLERANCE = 0.02  # int8 rounds anew with each batch; the two versions are further apart

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def environment(home: Path) -> dict[str, str]:
    theirs = ("EKIBEN_", "BENTOML_", "MLFLOW_", "PREFECT_")
    own = {key: value for key, value in os.environ.items() if not key.startswith(theirs)}
    return own | {"EKIBEN_HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def ekiben(home: Path, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [EKIBEN, *arguments],
        cwd=cwd,
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=UP_TIMEOUT_S,
        check=False,
    )


def last_json(text: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    return content


@dataclass(frozen=True)
class Up:
    """A running `ekiben up`."""

    url: str
    home: Path
    process: subprocess.Popen[str]
    facts: dict[str, Any]  # its JSON


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """What `make up` runs, on a port of its own."""
    home = tmp_path_factory.mktemp("up")
    port = find_free_port()
    with (home / "stderr").open("w") as errors:
        process = subprocess.Popen(
            [EKIBEN, "up", "--port", str(port), "--json"],
            cwd=ROOT,
            env=environment(home),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, (home / "stderr").read_text()
            wait_until_ready(f"http://127.0.0.1:{port}", process)
            wait_for_closing_screen(home / "stderr")
            yield Up(f"http://127.0.0.1:{port}", home, process, json.loads(line))
        finally:
            process.terminate()
            process.wait(60)


def wait_until_ready(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    pytest.fail("the API did not get ready")


def wait_for_closing_screen(stderr: Path) -> None:
    """`up` asks whether the API is ready just as this test does, and prints its last lines after that."""
    deadline = time.monotonic() + 60
    while "Ready: " not in stderr.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)


def test_up_gains_on_the_base_model_and_shows_progress_all_the_way(up: Up) -> None:
    assert up.facts["score"] > up.facts["base_score"] + 0.01
    said = (up.home / "stderr").read_text()
    for stage in (
        "[load]",
        "[preprocess]",
        "[fit]",
        "step 30 of 30",
        "[tune]",
        "[evaluate]",
        "[record]",
        "[gates]",
        "[pack]",
    ):
        assert stage in said
    for hint in ("curl", "mlflow ui", "prefect server start", "--pairs"):
        assert hint in said
    assert "Traceback" not in said


def test_the_requests_of_the_readme_answer_as_it_says(up: Up) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(curl .*?)```\n```json\n(.*?)```", readme, re.DOTALL)
    assert blocks
    for command, shown in blocks:
        arguments = shlex.split(command.replace("\\\n", " ").replace("http://127.0.0.1:3000", up.url))
        answer = json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
        expected = json.loads(shown)
        assert answer.keys() == expected.keys()
        assert np.shape(answer["similarity"]) == np.shape(expected["similarity"])
        assert answer["usage"] == expected["usage"]
        assert answer["similarity"][0][0] > answer["similarity"][0][1]


def test_the_snippet_of_the_quickstart_runs(up: Up) -> None:
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    run = subprocess.run(
        [sys.executable, "-c", code.replace("http://127.0.0.1:3000", up.url)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split()[:2] == ["(2,", "384)"]
    assert run.stdout.split()[2] == up.facts["bento_tag"]


def test_an_answers_headers_lead_to_version_run_data_and_commit(up: Up) -> None:
    headers = httpx.post(f"{up.url}/encode", json={"texts": ["hello"]}).headers
    found = ekiben(up.home, "status", "--version", headers["X-Ekiben-Model"], "--json")
    lineage = last_json(found.stdout)
    assert lineage["version"] == "1"
    assert lineage["run_id"] == up.facts["run_id"]
    assert lineage["space_id"] == headers["X-Ekiben-Space"]
    assert len(lineage["data_md5"]) == 32
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", lineage["git_commit"])
    for value in (lineage["run_id"], lineage["data_md5"], lineage["git_commit"]):
        assert value in found.stdout.replace("\n", "")


def test_served_vectors_are_those_of_sentence_transformers(up: Up, tmp_path: Path) -> None:
    import pandas as pd
    from sentence_transformers import SentenceTransformer

    from flows.core.tracking import Tracker

    tracker = Tracker(f"sqlite:///{up.home / 'mlflow.db'}", experiment="ekiben", model_name="ekiben")
    model = SentenceTransformer(str(tracker.download_model(up.facts["run_id"], tmp_path)))
    texts = [str(text) for text in pd.read_csv(ROOT / "data" / "sample" / "profiles.csv")["summary"].unique()[:60]]
    texts += ["x", "word " * 500, "日本語のテキスト", "emoji 😀"]
    expected = np.asarray(model.encode(texts, batch_size=1))

    def encode(url: str, batch: list[str]) -> Any:
        return np.asarray(httpx.post(f"{url}/encode", json={"texts": batch}, timeout=60).json()["embeddings"])

    def measure(url: str) -> tuple[Any, Any]:
        """Cosines of the vectors made together, with the reference and with those made alone."""
        together = encode(url, texts)
        alone = np.concatenate([encode(url, [text]) for text in texts])
        return (together * expected).sum(axis=1), (together * alone).sum(axis=1)

    certified = httpx.get(f"{up.url}/health").json()["precision"]
    to_reference, to_alone = measure(up.url)
    assert to_alone.min() >= 0.9999
    if certified == "int8":  # unless this machine is no faster with it
        assert to_reference.min() >= 0.95
        assert to_reference.mean() >= 0.99
    full = {"EKIBEN_PRECISION": "fp32"}
    with serve(up.facts["bento_tag"], up.home / "bentoml", tmp_path / "fp32", full) as server:
        to_reference, to_alone = measure(server.url)
    assert to_reference.min() >= 0.9999
    assert to_alone.min() >= 0.9999


def test_up_again_serves_what_is_released_and_trains_nothing(up: Up) -> None:
    again = ekiben(up.home, "up", "--no-serve", "--json")
    assert again.returncode == 0, again.stderr
    assert last_json(again.stdout)["bento_tag"] == up.facts["bento_tag"]
    assert "already released" in again.stderr
    assert "[fit]" not in again.stderr


def test_plain_bentoml_knows_the_bento(up: Up, tmp_path: Path) -> None:
    own = environment(up.home) | {"BENTOML_HOME": str(up.home / "bentoml"), "BENTOML_DO_NOT_TRACK": "true"}
    bentoml = str(Path(sys.executable).with_name("bentoml"))
    listed = subprocess.run(
        [bentoml, "get", "ekiben:latest"], cwd=tmp_path, env=own, capture_output=True, text=True, check=True
    )
    assert up.facts["run_id"] in listed.stdout
    assert up.facts["data_md5"] in listed.stdout


def test_a_refused_release_ends_with_3_and_keeps_the_champion(up: Up) -> None:
    refused = ekiben(up.home, "release", "--run", "1", "--set", "release.min_gain=0.9", "--json")
    assert refused.returncode == 3
    assert last_json(refused.stdout)["error"]["type"] == "ReleaseRefusedError"
    assert "release.min_gain" in refused.stderr.splitlines()[-1]
    assert last_json(ekiben(up.home, "status", "--version", "champion", "--json").stdout)["version"] == "1"


def test_rollback_returns_a_loaded_server_to_the_exact_vectors_in_one_command(up: Up, tmp_path: Path) -> None:
    """A plain `bentoml serve` follows the champion; a second version comes, and goes, under the eyes of its callers."""
    words = (ROOT / "data" / "sample" / "profiles.csv").read_text().split()
    texts = [" ".join(words[start : start + 9]) for start in range(0, 900, 9)]
    settings = {"EKIBEN_FOLLOW": "champion", "EKIBEN_FOLLOW_EVERY_S": "0.5", "EKIBEN_CACHE_MB": "0"}

    def embed() -> Any:
        return np.asarray(httpx.post(f"{server.url}/encode", json={"texts": texts}, timeout=60).json()["embeddings"])

    def wait_for(version: str) -> str:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            info = httpx.get(f"{server.url}/models/info", timeout=30).json()
            if info["live"].startswith(f"ekiben:{version}-") and len(info["models"]) == 1:
                return str(info["live"])
            time.sleep(0.2)
        raise AssertionError(info)

    with serve("ekiben:latest", up.home / "bentoml", tmp_path / "served", settings) as server:
        first = wait_for("1")
        before = embed()
        trained = ekiben(up.home, "train", *SAMPLE, "--set", "train.steps=8", "--set", "train.seed=7", "--json")
        assert trained.returncode == 0, trained.stderr
        with Traffic(server.url, texts, connections=4, models=(None, "champion")) as traffic:
            released = ekiben(up.home, "release", "--run", "2", *LENIENT, "--json")
            assert released.returncode == 0, released.stderr
            second = wait_for("2")
            other = embed()
            rolled_back = ekiben(up.home, "rollback", "--reason", "a test of the way back", "--json")
            assert rolled_back.returncode == 0, rolled_back.stderr
            wait_for("1")
            after = embed()
    assert (np.abs(other - before).max(axis=1) > 1e-3).any(), "the second version has other vectors"
    np.testing.assert_allclose(after, before, atol=1e-6)
    assert {shot.model for shot in traffic.shots} == {first, second}
    assert find_wrong(traffic.shots, {first: before, second: other}, atol=TOLERANCE) == []
    assert last_json(ekiben(up.home, "status", "--version", "champion", "--json").stdout)["version"] == "1"
    acts = last_json(ekiben(up.home, "history", "--json").stdout)
    assert "a test of the way back" in json.dumps(acts)


def is_server(process: psutil.Process) -> bool:
    """Whether this is a server of a Bento; a process that has just ended is none."""
    with contextlib.suppress(psutil.NoSuchProcess):
        command = process.cmdline()
        return "serve" in command and "bentoml" in " ".join(command)
    return False


def is_alive(process: psutil.Process) -> bool:
    """Whether this still runs; what has ended and waits to be taken note of does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def test_a_release_that_is_killed_while_it_measures_leaves_no_server_and_goes_on(up: Up, tmp_path: Path) -> None:
    trained = ekiben(up.home, "train", *SAMPLE, "--set", "train.steps=2", "--set", "train.seed=9", "--json")
    assert trained.returncode == 0, trained.stderr
    version = last_json(trained.stdout)["version"]
    command = ["release", "--run", version, *LENIENT, "--json"]
    with (tmp_path / "stderr").open("w") as errors:
        process = subprocess.Popen(
            [EKIBEN, *command], cwd=ROOT, env=environment(up.home), stdout=subprocess.DEVNULL, stderr=errors
        )
        served: list[psutil.Process] = []
        deadline = time.monotonic() + 300
        while not served and process.poll() is None and time.monotonic() < deadline:
            served = [child for child in family_of(process.pid)[1:] if is_server(child)]
            time.sleep(0.1)
        assert served, (tmp_path / "stderr").read_text()
        time.sleep(2)
        served += [grandchild for child in served for grandchild in family_of(child.pid)[1:]]
        assert process.poll() is None, f"it has ended before it was killed: {(tmp_path / 'stderr').read_text()}"
        process.kill()
        process.wait()
    assert not psutil.wait_procs(served, 60)[1], "a server has outlived the release that started it"
    assert last_json(ekiben(up.home, "status", "--version", "champion", "--json").stdout)["version"] == "1"
    again = ekiben(up.home, *command)
    assert again.returncode == 0, again.stderr
    assert last_json(ekiben(up.home, "status", "--version", "champion", "--json").stdout)["version"] == version


def test_a_killed_study_goes_on_where_it_was(tmp_path: Path, tiny_model_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.csv")
    arguments = ["tune", "--pairs", str(pairs), "--json"]
    for assignment in (
        f"train.base_model={tiny_model_path}",
        f"tune.space.base_model=[{tiny_model_path}]",
        "train.steps=150",
        "train.max_tokens=32",
        "tune.space.steps=[150, 151, 152, 153]",
        "tune.space.max_tokens=[32]",
        "tune.trials=3",
    ):
        arguments += ["--set", assignment]
    errors = tmp_path / "stderr"
    with errors.open("w") as output:
        process = subprocess.Popen(
            [EKIBEN, *arguments], cwd=ROOT, env=environment(tmp_path), stderr=output, stdout=output
        )
        deadline = time.monotonic() + 300
        while "trial 1: step" not in errors.read_text() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert "trial 0: dev spearman" in errors.read_text(), errors.read_text()

    again = ekiben(tmp_path, *arguments)

    assert again.returncode == 0, again.stderr
    assert "going on with study" in again.stderr
    assert "1 trials are done" in again.stderr
    assert "[fit] trial 0" not in again.stderr
    assert last_json(again.stdout)["finished_trials"] == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_fit_leaves_no_process_and_says_how_to_go_on(
    number: signal.Signals, tmp_path: Path, tiny_model_path: Path
) -> None:
    pairs = write_pairs(tmp_path / "pairs.csv")
    arguments = ["train", "--pairs", str(pairs), "--json", "--set", f"train.base_model={tiny_model_path}"]
    arguments += ["--set", "train.steps=50000", "--set", "train.max_tokens=32"]
    errors, output = tmp_path / "stderr", tmp_path / "stdout"
    with errors.open("w") as error_file, output.open("w") as output_file:
        process = subprocess.Popen(
            [EKIBEN, *arguments],
            cwd=ROOT,
            env=environment(tmp_path),
            stderr=error_file,
            stdout=output_file,
            start_new_session=True,
        )
        deadline = time.monotonic() + 300
        while "[fit]" not in errors.read_text() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        started = family_of(process.pid)[1:]
        assert process.poll() is None, f"it has ended before it was interrupted: {errors.read_text()}"
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does: the whole group, Prefect's server included
        else:
            process.send_signal(number)
        code = process.wait(120)
    assert len(started) >= 2  # Prefect's server, and who watches over it
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not [child for child in alive if is_alive(child)]
    if number == signal.SIGINT:
        assert code == 130
        assert errors.read_text().splitlines()[-1].startswith("error: interrupted; run the same command again")
        assert last_json(output.read_text())["exit_code"] == 130
        assert "Traceback" not in errors.read_text()
