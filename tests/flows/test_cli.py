"""The command as a user meets it: exit codes, one line on standard error, JSON on the last line of standard output."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from bentos.errors import LunchboxError, NotReadyError, RegistryError
from flows import cli
from flows.core.history import Act, begin_act, read_history
from flows.core.promotion import carry_out
from flows.core.release_lock import ReleaseLock
from flows.core.tracking import open_tracker
from flows.errors import EkibenError
from flows.params import DATA_ADDRESSES
from flows.settings import load_settings
from tests.flows.core.test_registry import register_run


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
    for command in ("up", "train", "tune", "release", "rollback", "pipeline", "status", "history", "serve"):
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
        (["rollback"], "a rollback needs a reason: --reason"),
        (["rollback", "--reason", "x", "--admin-key-file"], "--admin-key-file"),
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


@pytest.mark.parametrize("error", [LunchboxError, RegistryError, NotReadyError])
def test_a_broken_box_or_alias_file_is_one_line_and_nothing_unexpected(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error("tokenizer.json was altered")

    monkeypatch.setattr("flows.cli_releases.trace_all", fail)
    assert run(monkeypatch, "status", "--json") == 1
    captured = capsys.readouterr()
    assert captured.err == "error: tokenizer.json was altered\n"
    assert json.loads(captured.out)["error"]["type"] == error.__name__


@pytest.mark.parametrize("error", [EkibenError, OSError, ValueError])
def test_no_error_shows_a_password(
    error: type[Exception], own_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error("no answer from postgresql://me:secret@host/db")

    monkeypatch.setattr("flows.cli_releases.trace_all", fail)
    assert run(monkeypatch, "status", "--json", "--home", str(own_folder / "home")) == 1
    captured = capsys.readouterr()
    assert "postgresql://***@host/db" in captured.err
    logs = "".join(log.read_text() for log in own_folder.rglob("crash.log"))
    assert "secret" not in captured.err + captured.out + logs


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


def test_the_history_of_an_empty_registry_is_empty(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "history", "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "nothing was released yet" in " ".join(lines)
    assert json.loads(lines[-1])["history"] == []


def test_status_and_history_show_versions_acts_who_is_at_work_and_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    settings = load_settings()
    tracker = open_tracker(settings)
    for _ in range(2):
        register_run(tracker)
    acts = [
        Act(at="", kind="release", version="1"),
        Act(at="", kind="release", version="2", replaces="1", compat="adapter"),
        Act(at="", kind="rollback", version="1", replaces="2", reason="slow on short queries"),
    ]
    with ReleaseLock(tracker, "release of version 7"):
        for act in acts:
            tags = {"bento_tag": f"ekiben:{act.version}", "space_id": f"s{act.version}", "verdict": "passed"}
            with_lock = ReleaseLock(tracker, "a test")
            monkeypatch.setattr(with_lock, "check", lambda: None)
            carry_out(tracker, with_lock, act, tags=tags, previous="", home=settings.bento_store_path)
        begin_act(tracker, Act(at="", kind="release", version="2", replaces="1"))  # and killed
        tracker.set_alias("previous", "2")  # by hand
        assert run(monkeypatch, "status", "--json") == 0
        out = capsys.readouterr().out
    content = json.loads(out.splitlines()[-1])
    assert content["aliases"] == {"champion": "1", "previous": "2"}
    assert [item["replaces"] for item in content["versions"]] == ["1", ""]
    back = read_history(tracker)[2]
    one, two = content["versions"][1], content["versions"][0]
    assert (one["champion_by"], one["champion_since"], one["left_at"]) == ("rollback", back.time, "")
    assert (two["champion_by"], two["champion_since"], two["left_at"]) == ("", "", back.time)
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()[:2] in ("1 ", "2 ")}
    assert f"{back.time[:16].replace('T', ' ')}, by a rollback" in rows["1"]
    assert f"left by a rollback {back.time[:16].replace('T', ' ')}" in rows["2"]
    assert content["at_work"][0].startswith("release of version 7 by ")
    assert any("previous is nothing there and version 2 in the registry" in item for item in content["warnings"])
    assert any("ekiben:1 is not in the Bento store" in item for item in content["warnings"])
    for shown in ("champion", "passed", "at work: release of version 7", "not as it should be on this machine"):
        assert shown in out
    assert run(monkeypatch, "history", "--json") == 0
    out = capsys.readouterr().out
    history = json.loads(out.splitlines()[-1])["history"]
    assert [(act["kind"], act["version"], act["done"]) for act in history] == [
        ("release", "2", False),
        ("rollback", "1", True),
        ("release", "2", True),
        ("release", "1", True),
    ]
    for shown in ("release, not carried through", "slow on short queries", "adapter"):
        assert shown in out


def test_status_says_that_a_champion_was_moved_by_hand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = open_tracker(load_settings())
    register_run(tracker)
    tracker.set_alias("champion", "1")
    assert run(monkeypatch, "status", "--json") == 0
    out = capsys.readouterr().out
    assert "moved by hand" in out
    (one,) = json.loads(out.splitlines()[-1])["versions"]
    assert (one["champion_by"], one["champion_since"]) == ("hand", "")
    assert run(monkeypatch, "status", "--version", "1") == 0
    assert "moved by hand" in capsys.readouterr().out


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
    home = own_folder / "home"
    home.mkdir()
    (home / "mlflow.db").write_text("precious")
    cli._move_aside(load_settings(home))
    kept = list(own_folder.glob("home.*"))
    assert [(path / "mlflow.db").read_text() for path in kept] == ["precious"]
    assert list(home.iterdir()) == []
