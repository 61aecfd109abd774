"""The shipped sample is what its generator writes, DVC knows it, and nothing in it is secret or real."""

from __future__ import annotations

import configparser
import csv
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.core.files import md5_of

PROJECT = Path(__file__).parents[2]
DATA = PROJECT / "data"
FILES = ("judgements.csv", "profiles.csv")


def read(name: str) -> list[dict[str, str]]:
    with (DATA / "sample" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_generator_writes_the_shipped_bytes_with_the_standard_library_alone(tmp_path: Path) -> None:
    # -I -S: no site-packages, no environment, as a plain python3 would run it.
    subprocess.run([sys.executable, "-I", "-S", "-B", str(DATA / "generate_sample.py"), str(tmp_path)], check=True)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (DATA / "sample" / name).read_bytes()


def test_the_lock_file_is_current() -> None:
    lock: dict[str, Any] = yaml.safe_load((DATA / "dvc.lock").read_text(encoding="utf-8"))
    stage = lock["stages"]["sample"]
    for entry in [*stage["deps"], *stage["outs"]]:
        assert entry["md5"] == md5_of((DATA / entry["path"]).read_bytes()), f"{entry['path']}: dvc repro data/dvc.yaml"


def test_profiles_and_judgements_fit_together() -> None:
    profiles, judgements = read("profiles.csv"), read("judgements.csv")
    assert list(profiles[0]) == ["id", "title", "summary", "skills", "years", "location"]
    assert list(judgements[0]) == ["query", "profile_id", "relevance"]
    assert len({row["id"] for row in profiles}) == len(profiles) == 396
    assert len(judgements) == 3168
    assert {row["profile_id"] for row in judgements} == {row["id"] for row in profiles}
    assert all(cell.strip() for row in profiles for cell in row.values())


def test_relevance_is_graded_in_steps() -> None:
    relevances = [row["relevance"] for row in read("judgements.csv")]
    assert set(relevances) <= {f"{step * 0.05:.2f}" for step in range(21)}
    assert len(set(relevances)) >= 15
    assert sum(float(relevance) >= 0.5 for relevance in relevances) >= len(relevances) / 10


def test_every_brief_of_a_pool_is_judged_against_every_profile_of_it() -> None:
    judged = defaultdict(set)
    for row in read("judgements.csv"):
        judged[row["query"]].add(row["profile_id"])
    pools = {frozenset(profile_ids) for profile_ids in judged.values()}
    assert len(pools) == 33
    assert sum(map(len, pools)) == len(frozenset.union(*pools)) == 396, "no profile is in two pools"


def test_the_remote_has_neither_endpoint_nor_credentials() -> None:
    config = configparser.ConfigParser()
    config.read(PROJECT / ".dvc" / "config")
    assert dict(config["core"]) == {"remote": "store", "analytics": "false", "autostage": "false"}
    assert dict(config["'remote \"store\"'"]) == {"url": "s3://ekiben/dvc"}


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_fresh_clone_is_up_to_date_without_a_remote(tmp_path: Path) -> None:
    environment = os.environ | {"DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": os.devnull}
    shutil.copytree(DATA, tmp_path / "data", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / ".dvc").mkdir()
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore"):
        shutil.copy(PROJECT / name, tmp_path / name)
    (tmp_path / "data" / "mine.csv").touch()

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
        return done.stdout

    run("git", "init", "--quiet")
    run("git", "add", "--all")
    tracked = run("git", "ls-files").split()
    assert {"data/sample/profiles.csv", "data/sample/judgements.csv", "data/dvc.lock"} <= set(tracked)
    assert "data/mine.csv" not in tracked, "other data stays out of git"
    assert "up to date" in run(sys.executable, "-m", "dvc", "status")
    assert "didn't change, skipping" in run(sys.executable, "-m", "dvc", "repro", "data/dvc.yaml")
    run(sys.executable, "-m", "dvc", "add", "data/mine.csv")
    run("git", "add", "--all")
    assert "data/mine.csv.dvc" in run("git", "ls-files").split()


def test_the_readme_says_that_it_is_synthetic() -> None:
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    assert "SYNTHETIC" in readme
    assert "python3 generate_sample.py" in readme
