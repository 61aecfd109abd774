"""The code of a commit, checked out and run apart: it is that commit's code, and nothing of it leaks out."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from flows.core.checkout import check_out, choose_interpreter, last_line, prove_code, run_apart
from flows.core.provenance import LOCK_FILE, lock_sha256
from flows.errors import EkibenError, InputError
from flows.settings import PROJECT_ROOT, apart_environment
from tests.flows.core.test_provenance import git

COMMAND = "import sys, json; print('noise'); print('said', file=sys.stderr); "


def commit_file(repository: Path, name: str, content: str) -> str:
    (repository / name).parent.mkdir(parents=True, exist_ok=True)
    (repository / name).write_text(content)
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "-m", f"{name}: {content}")
    return git(repository, "rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet")
    commit_file(folder, "flows/__init__.py", "")
    commit_file(folder, "bentos/__init__.py", "")
    return folder


@pytest.fixture
def variables(tmp_path: Path, repository: Path) -> dict[str, str]:
    return apart_environment(tmp_path / "home", repository)


def test_an_old_commit_is_checked_out_and_the_repository_stays_as_it_is(repository: Path, tmp_path: Path) -> None:
    old = commit_file(repository, "code.py", "old")
    commit_file(repository, "code.py", "new")
    (repository / "code.py").write_text("being edited")
    before = sorted(str(path) for path in repository.rglob("*"))

    code = check_out(repository, old, tmp_path / "checkout")

    assert (code / "code.py").read_text() == "old"
    assert git(code, "status", "--porcelain") == ""
    assert (repository / "code.py").read_text() == "being edited"
    assert sorted(str(path) for path in repository.rglob("*")) == before


def test_a_commit_that_no_branch_leads_to_is_still_there(repository: Path, tmp_path: Path) -> None:
    lost = commit_file(repository, "code.py", "lost")
    git(repository, "reset", "--hard", "--quiet", "HEAD~1")
    assert (check_out(repository, lost, tmp_path / "checkout") / "code.py").read_text() == "lost"


def test_a_project_in_a_folder_of_its_repository_is_found_in_the_clone(repository: Path, tmp_path: Path) -> None:
    commit = commit_file(repository, "project/code.py", "x")
    code = check_out(repository / "project", commit, tmp_path / "checkout")
    assert code == tmp_path / "checkout" / "project"
    assert (code / "code.py").is_file()


def test_no_repository_and_no_commit_are_told(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(InputError, match="no git working tree"):
        check_out(tmp_path, "a" * 40, tmp_path / "one")
    with pytest.raises(EkibenError, match="cannot be checked out"):
        check_out(repository, "a" * 40, tmp_path / "two")


def test_the_code_that_would_run_is_that_of_the_checkout(
    repository: Path, tmp_path: Path, variables: dict[str, str]
) -> None:
    python = Path(sys.executable)
    prove_code(python, repository, variables)
    shutil.rmtree(repository / "flows")  # now this project's own is found: it is installed here
    with pytest.raises(EkibenError, match="not the code in"):
        prove_code(python, repository, variables)
    (repository / "flows.py").write_text("import nothing_of_that_name")
    with pytest.raises(EkibenError, match=r"cannot be imported: .*nothing_of_that_name"):
        prove_code(python, repository, variables)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print(json.dumps({'run_id': 'a'}))", (0, {"run_id": "a"}, "said")),
        ("print(json.dumps({'error': {'message': 'bad  data'}})); sys.exit(2)", (2, None, "bad data")),
        ("print(json.dumps([1])); sys.exit(3)", (3, {}, "said")),
        ("raise ValueError('at ://user:secret@host')", (1, {}, "ValueError: at ://***@host")),
    ],
)
def test_what_a_process_says_is_handed_on_and_how_it_ended(
    code: str, expected: tuple[int, dict[str, str] | None, str], tmp_path: Path
) -> None:
    lines: list[str] = []
    answer = run_apart(
        [sys.executable, "-c", COMMAND + code], variables=dict(os.environ), scratch=tmp_path, say=lines.append
    )
    assert lines[0] == "  said"
    assert (answer.code, answer.last_words) == (expected[0], expected[2])
    assert expected[1] is None or answer.result == expected[1]


def test_a_process_works_apart_from_our_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "EKIBEN_MODEL_NAME", "PREFECT_API_URL", "GIT_DIR", "MAKEFLAGS"):
        monkeypatch.setenv(name, "http://ours")
    monkeypatch.setenv("EKIBEN_OWNER", "mark")
    found = apart_environment(tmp_path / "home", tmp_path / "code", anchor_box=tmp_path / "box")
    assert "http://ours" not in found.values()
    assert found["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path / 'home' / 'mlflow.db'}"
    assert found["EKIBEN_OWNER"] == "mark", "the watchdog must find it"
    assert {found["EKIBEN_HOME"], found["BENTOML_HOME"], found["PREFECT_HOME"]} == {
        str(tmp_path / "home"),
        str(tmp_path / "home" / "bentoml"),
        str(tmp_path / "home" / "prefect"),
    }
    assert (found["PYTHONPATH"], found["EKIBEN_ANCHOR_BOX"]) == (str(tmp_path / "code"), str(tmp_path / "box"))
    assert found["PATH"] == os.environ["PATH"]


MAKEFILE = "setup:\n\tmkdir -p .venv/bin\n\tln -s {python} .venv/bin/python\n\t@echo made it >&2\n"


def write_lock(code: Path, *lines: str) -> str | None:
    (code / LOCK_FILE).parent.mkdir(exist_ok=True)
    (code / LOCK_FILE).write_text("\n".join(lines))
    return lock_sha256(code)


def test_the_same_lock_means_this_interpreter(repository: Path, variables: dict[str, str]) -> None:
    own = (PROJECT_ROOT / LOCK_FILE).read_text()
    recorded = write_lock(repository, own)
    kind, python, notes = choose_interpreter(repository, str(recorded), "auto", variables, print)
    assert (kind, python, notes) == ("here", Path(sys.executable), [])


def test_another_lock_means_the_set_up_of_that_commit(repository: Path, variables: dict[str, str]) -> None:
    recorded = write_lock(repository, "numpy==1.0")
    with pytest.raises(InputError, match="no Makefile"):
        choose_interpreter(repository, str(recorded), "auto", variables, print)
    (repository / "Makefile").write_text(MAKEFILE.format(python=sys.executable))
    lines: list[str] = []
    kind, python, notes = choose_interpreter(repository, str(recorded), "auto", variables, lines.append)
    assert (kind, python, notes) == ("fresh", repository / ".venv" / "bin" / "python", [])
    assert "  made it" in lines
    (repository / "Makefile").write_text("setup:\n\t@echo no network >&2; false\n")
    with pytest.raises(EkibenError, match="make setup"):
        choose_interpreter(repository, str(recorded), "fresh", variables, print)


def test_this_interpreter_for_another_lock_is_told_with_the_packages(
    repository: Path, variables: dict[str, str]
) -> None:
    write_lock(repository, "numpy==1.0", "nothing-of-that-name==1.0")
    kind, _, (other, packages) = choose_interpreter(repository, "0" * 64, "here", variables, print)
    assert kind == "here"
    assert "is not the one that the run recorded" in other
    assert packages.startswith("the packages here may not be those of the run: numpy ")
    assert "nothing" not in packages


def test_the_last_line_is_fit_to_be_quoted() -> None:
    assert last_line("a\n  b   c \n\n") == "b c"
    assert last_line("") == "it said nothing"
    assert len(last_line("x" * 10_000)) <= 400
