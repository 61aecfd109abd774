"""The command as a user meets it: exit codes, one line on standard error, JSON on the last line of standard output."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from flows import cli
from flows.params import DATA_ADDRESSES


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ekiben", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_lists_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    for command in ("up", "train", "tune", "release", "pipeline", "status", "serve"):
        assert f" {command} " in text


@pytest.mark.parametrize("command", ["up", "train", "tune", "release", "pipeline"])
def test_every_training_command_takes_the_common_options(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, command, "--help") == 0
    text = capsys.readouterr().out
    for option in [*(name.replace("_", "-") for name in DATA_ADDRESSES), "params", "set", "home", "json"]:
        assert f"--{option}" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "no data given: use --pairs FILE"),
        (["train", "--pairs", "x.csv", "--set", "train.steps=-1"], "train.steps"),
        (["train", "--pairs", "x.csv", "--set", "train.stepps=1"], "did you mean train.steps?"),
        (["train", "--pairs", "x.csv", "--params", "none.yaml"], "no params file none.yaml"),
        (["train", "--paris", "x.csv"], "--paris"),
        (["fly"], "No such command 'fly'"),
        (["status", "--version", "7"], "7"),
        (["serve"], "champion"),
        (["serve", "--port", "0"], "--port"),
        (["release", "--run", "nope"], "nope"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(monkeypatch, *arguments)
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.strip()]
    assert code == 2, captured.err
    assert errors[-1].startswith("error: ")
    assert said in errors[-1]
    assert "Traceback" not in captured.err


@pytest.mark.usefixtures("prefect_server")
def test_bad_data_inside_a_flow_is_one_line_and_exit_code_2(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_folder / "pairs.csv").write_text("left,right,score\na,b,0.5\n")
    assert run(monkeypatch, "train", "--pairs", "pairs.csv", "--json") == 2
    captured = capsys.readouterr()
    assert "text_a" in [line for line in captured.err.splitlines() if line.startswith("error: ")][-1]
    assert json.loads(captured.out.splitlines()[-1])["error"]["type"] == "DataError"


def test_no_argument_shows_the_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch) == 0
    assert "pipeline" in capsys.readouterr().out


def test_an_error_is_json_too_when_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "train", "--json") == 2
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["exit_code"] == 2
    assert answer["error"]["type"] == "ParamsError"


def test_up_refuses_a_taken_port_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run(monkeypatch, "up", "--port", str(port)) == 2
    assert "--port" in capsys.readouterr().err


def test_status_of_an_empty_registry_says_how_to_begin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "status", "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "ekiben up" in " ".join(lines)
    assert json.loads(lines[-1])["versions"] == []


@pytest.mark.parametrize("home", [".", ".."])
def test_fresh_never_moves_the_current_folder(
    home: str, own_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "up", "--fresh", "--no-serve", "--home", home) == 2
    assert "would move" in capsys.readouterr().err
    assert Path.cwd() == own_folder
    assert own_folder.exists()


def test_a_setting_or_home_that_cannot_be_used_is_bad_input(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_folder / "file").touch()
    assert run(monkeypatch, "status", "--home", "file", "--json") == 2
    monkeypatch.setenv("EKIBEN_MODEL_NAME", "My Model")
    assert run(monkeypatch, "status", "--json") == 2
    captured = capsys.readouterr()
    assert [line.startswith("error: ") for line in captured.err.splitlines()] == [True, True]
    assert [json.loads(line)["exit_code"] for line in captured.out.splitlines()] == [2, 2]


def test_fresh_moves_the_old_state_aside(own_folder: Path) -> None:
    from flows.settings import load_settings

    home = own_folder / "home"
    home.mkdir()
    (home / "mlflow.db").write_text("precious")
    cli._move_aside(load_settings(home))
    kept = list(own_folder.glob("home.*"))
    assert [(path / "mlflow.db").read_text() for path in kept] == ["precious"]
    assert list(home.iterdir()) == []
