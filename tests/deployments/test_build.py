"""How images are built: the engine that is found, its command line, the versions that go in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deployments.images import build
from tests.deployments.conftest import ROOT

DOCKERFILES = sorted((ROOT / "deployments" / "images").glob("*.Dockerfile"))


def put_engine(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_the_first_engine_that_answers_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_engine(tmp_path, "docker", "echo 'no daemon' >&2; exit 1")
    put_engine(tmp_path, "podman", "exit 0")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert build.find_engine(None) == "podman"


def test_without_an_engine_it_says_what_was_looked_for_and_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_engine(tmp_path, "docker", "echo 'no daemon' >&2; exit 1")
    monkeypatch.setattr(build.shutil, "which", lambda name: str(tmp_path / name) if name == "docker" else None)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(SystemExit) as ended:
        build.find_engine(None)
    assert ended.value.code == 1
    said = capsys.readouterr().err
    for part in (
        "docker does not work: no daemon",
        "podman is not installed",
        "nerdctl is not",
        "apt-get install podman",
    ):
        assert part in said


def test_a_bento_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build.export_bento("ekiben:77-00000000", tmp_path / "bento")
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no Bento ekiben:77-00000000" in said
    assert "ekiben up" in said


def test_the_command_line_is_the_engines(tmp_path: Path) -> None:
    recipe = build.Recipe("ekiben-x", "3-1f2e3d4c", tmp_path / "x.Dockerfile", tmp_path, {"VERSION": "3"})
    docker = build.build_command("docker", recipe, ["--network=host"])
    assert docker[:2] == ["docker", "build"]
    assert docker[-2:] == ["--network=host", str(tmp_path)]
    assert [docker[n + 1] for n, word in enumerate(docker) if word == "--tag"] == [
        "ekiben-x:3-1f2e3d4c",
        "ekiben-x:latest",
    ]
    assert "--format" not in docker
    podman = build.build_command("podman", recipe, [])
    assert podman[podman.index("--format") + 1] == "docker"  # else HEALTHCHECK is left out


def test_options_after_two_dashes_go_to_the_engine() -> None:
    arguments, options = build.read_command_line(["line", "mlflow", "--engine", "podman", "--", "--build-arg", "A=b"])
    assert arguments.images == ["line", "mlflow"]
    assert options == ["--build-arg", "A=b"]
    with pytest.raises(SystemExit):
        build.read_command_line(["lime"])


def test_the_bentos_own_versions_go_before_the_locks() -> None:
    lock = "# made\nnumpy==2.4.6\n    # via x\norjson==3.13.0 ; python_version < '4'\nPyYAML==6.0\n--hash=x\n"
    constraints = build.constrain(lock, "numpy==2.0.0\n").splitlines()
    assert [line.split("==")[0] for line in constraints] == ["orjson", "PyYAML"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_every_image_is_built_apart_and_runs_as_a_number(dockerfile: Path) -> None:
    lines = dockerfile.read_text().splitlines()
    assert sum(line.startswith("FROM ") for line in lines) >= 2
    assert "USER 10001:10001" in lines
    uv = (ROOT / "Makefile").read_text()
    assert f"ARG UV_VERSION={re.search(r'^UV_VERSION := (.+)$', uv, re.MULTILINE)[1]}" in lines  # type: ignore[index]
    assert "://" not in "".join(line for line in lines if "127.0.0.1" not in line)  # addresses are the builder's
    for line in lines:
        if line.startswith(("ENTRYPOINT", "CMD")):
            assert re.match(r"(ENTRYPOINT|CMD) \[", line), "a shell would keep the signals"
