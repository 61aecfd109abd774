"""`ekiben explain` and `ekiben reproduce` as a user meets them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bentos.manifest import read_manifest
from flows import cli
from flows.cli_lineage import render_chain, render_comparison
from flows.core.explain import Chain, Link
from flows.core.reproduce import Comparison
from flows.settings import PROJECT_ROOT, FlowSettings
from tests.flows.core.test_provenance import git
from tests.flows.support import write_pairs

COMPARISON = Comparison(
    run_id="r" * 32,
    commit="c" * 40,
    data="pairs.csv",
    environment="here",
    code="/scratch/checkout",
    seconds=12.0,
    vectors_of="the model in MLflow",
    texts=38,
    min_cosine=1.0,
    mean_cosine=1.0,
    max_difference=0.0,
    wanted_cosine=0.999,
    metrics={"eval/spearman": (0.5, 0.5), "eval/mae": (0.25, 0.125)},
    notes=("a doubt",),
)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the command: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run_command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ekiben", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run_command


@pytest.mark.parametrize("command", ["explain", "reproduce"])
def test_what_is_not_known_is_one_line_and_exit_code_2(run: Callable[..., tuple[int, str, str]], command: str) -> None:
    code, out, err = run(command, "ekiben:7-01234567", "--json")
    assert code == 2
    assert err.startswith("error: nothing is known of 'ekiben:7-01234567'")
    assert json.loads(out)["exit_code"] == 2


def test_explain_prints_the_chain_and_its_commands_from_the_box_alone(
    run: Callable[..., tuple[int, str, str]], isolated_environment: Path, tiny_lunchbox_path: Path, tmp_path: Path
) -> None:
    manifest = read_manifest(tiny_lunchbox_path)
    store = isolated_environment / "bentoml"
    shutil.copytree(tiny_lunchbox_path, store / "models" / "ekiben-model" / manifest.bento_version)
    code, out, err = run("explain", manifest.tag, "--json")
    assert (code, err) == (0, "")
    chain = json.loads(out.splitlines()[-1])["chains"][0]
    assert chain["source"] == "box"
    assert chain["bento"]["facts"]["verified"] is True
    assert f"Where {manifest.tag} comes from (from the lunchbox on this machine alone)" in out
    for name in ("vectors", "bento", "version", "space", "run", "gates", "base model", "data", "commit", "lock"):
        assert f"\n  {name}" in out
    assert chain["look"]["space"] == [f"cat {Path(chain['bento']['facts']['lunchbox']) / 'manifest.json'}"]


def test_an_unreachable_registry_is_no_end(
    run: Callable[..., tuple[int, str, str]],
    isolated_environment: Path,
    tiny_lunchbox_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest = read_manifest(tiny_lunchbox_path)
    shutil.copytree(tiny_lunchbox_path, isolated_environment / "lunchboxes" / manifest.bento_version)
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")
    code, out, err = run("explain", manifest.space_id)
    assert code == 0
    assert "without the registry" in err
    assert "unknown  1 by its lunchbox; the registry cannot be asked" in out
    code, _, err = run("reproduce", manifest.tag)
    assert code == 2, "only the registry has the parameters"


def test_a_chain_names_what_changed_and_how_to_look(tmp_path: Path) -> None:
    links = (
        Link("bento", "ok", "ekiben:1-aa is there", {"tag": "ekiben:1-aa", "store": "/a store", "built": True}),
        Link("run", "missing", "gone"),
        Link("data", "changed", "other bytes", {"looked_at": [{"place": "/d/pairs.csv"}]}),
        Link("commit", "ok", "a commit", {"git_commit": "c" * 40, "repository": "/code", "subject": "s"}),
    )
    text = render_chain(Chain("3", "registry", links, ("one says this, one that",)), FlowSettings(home=tmp_path)).plain
    assert "  data        CHANGED  other bytes\n" in text
    assert "$ md5sum /d/pairs.csv" in text
    assert "$ BENTOML_HOME='/a store'" in text
    assert f"$ git -C /code show {'c' * 40}" in text
    assert "  run         MISSING  gone\n  data" in text, "what is missing has no command"
    assert "contradiction: one says this, one that" in text


def test_a_rebuild_is_shown_with_what_moved() -> None:
    text = render_comparison(COMPARISON).plain
    assert "is reproduced" in text
    assert "the same numbers" in text
    assert "1 of 2 are the same, these are not" in text
    assert "eval/mae" in text
    assert "eval/spearman" not in text
    assert "note: a doubt" in text
    far = render_comparison(replace(COMPARISON, min_cosine=0.5, max_difference=0.25, metrics={})).plain
    assert "is NOT reproduced" in far
    assert "0.5000000 at least" in far
    none = replace(COMPARISON, min_cosine=None, mean_cosine=None, max_difference=None)
    assert "is NOT reproduced" in render_comparison(none).plain
    assert "is NOT reproduced" in render_comparison(replace(COMPARISON, min_cosine=float("nan"))).plain


# --- the project itself, in a repository of its own


def ekiben(code: Path, home: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("EKIBEN_", "BENTOML_"))}
    return subprocess.run(
        [sys.executable, "-P", "-m", "flows", *arguments, "--home", str(home), "--json"],
        env=keep | {"PYTHONPATH": str(code)},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def last_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return content


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_trials_of_a_study_are_made_again_from_a_clean_checkout(tmp_path: Path, tiny_model_path: Path) -> None:
    code, home, work = tmp_path / "code", tmp_path / "home", tmp_path / "work"
    for name in ("flows", "bentos", "deployments"):
        shutil.copytree(PROJECT_ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "bentofile.yaml", "Makefile"):
        shutil.copy(PROJECT_ROOT / name, code)
    (code / ".gitignore").write_text("__pycache__/\n")
    git(code, "init", "--quiet")
    git(code, "add", "--all")
    git(code, "commit", "--quiet", "-m", "the project as it is")
    commit = git(code, "rev-parse", "HEAD")
    work.mkdir()
    write_pairs(work / "pairs.csv")
    space = {"base_model": [str(tiny_model_path)], "steps": [2, 6], "batch_size": [8], "max_tokens": [32]}
    params = {
        "train": {"base_model": str(tiny_model_path), "learning_rate": 1e-3},
        "tune": {"trials": 2, "space": space},
    }
    (work / "params.json").write_text(json.dumps(params))
    tuned = ekiben(code, home, "tune", "--pairs", "pairs.csv", "--params", "params.json", cwd=work)
    assert tuned.returncode == 0, tuned.stderr
    (code / "flows" / "train.py").write_text("raise SystemExit('the code of now, which must not run')")

    chain = last_json(ekiben(code, home, "explain", last_json(tuned)["version"], cwd=tmp_path))["chains"][0]
    assert {name: chain[name]["state"] for name in ("run", "data", "commit", "lock")} == dict.fromkeys(
        ("run", "data", "commit", "lock"), "ok"
    )

    winner = ekiben(code, home, "reproduce", last_json(tuned)["run_id"], "--min-cosine", "0.99999", cwd=tmp_path)
    assert winner.returncode == 0, winner.stderr
    result = last_json(winner)
    assert (result["commit"], result["environment"], result["vectors_of"]) == (commit, "here", "the model in MLflow")
    assert result["texts"] > 6
    assert all(abs(old - new) < 1e-4 for old, new in result["metrics"].values())
    assert not Path(result["code"]).exists(), "the scratch folder is gone"

    study = last_json(tuned)["study_run_id"]
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    (experiment,) = [item for item in client.search_experiments() if item.name == "ekiben"]
    trials = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{study}'")
    (loser,) = [run.info.run_id for run in trials if run.info.run_id != last_json(tuned)["run_id"]]
    trial = ekiben(code, home, "reproduce", loser[:8], cwd=tmp_path)
    assert trial.returncode == 0, trial.stderr
    assert last_json(trial)["vectors_of"] == "canary_vectors.json"

    write_pairs(work / "pairs.csv", seed=6)
    changed = ekiben(code, home, "reproduce", loser, cwd=tmp_path)
    assert changed.returncode == 2
    assert "found md5" in changed.stderr
