"""The code of a commit in a folder of its own: checked out, given an interpreter, run apart from everything else.

Core layer, knows nothing about Prefect.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flows.core.provenance import LOCK_FILE, ask_git, differing_packages, lock_sha256
from flows.core.serving import passing_signals
from flows.core.watchdog import end_children_with_this_process
from flows.errors import MAX_MESSAGE_LENGTH, EkibenError, InputError, hide_password
from flows.settings import PROJECT_ROOT

Choice = Literal["auto", "here", "fresh"]
POLL_S = 0.2
PROBE = "import json, bentos, flows; print(json.dumps([flows.__file__, bentos.__file__]))"
REBUILD_LOG = "rebuild.log"


@dataclass(frozen=True)
class Answer:
    """What a process said and how it ended."""

    code: int  # exit code
    result: dict[str, Any]  # the JSON object on its last line of standard output, if there is one
    last_words: str  # its error, in one line


def check_out(repository: Path, commit: str, to: Path) -> Path:
    """Clone `repository` at `commit` into the folder `to`, and return the project's folder in it.

    The clone borrows the objects of the repository, so that it also has commits that no branch leads to any more, and
    nothing is written into the repository.

    Args:
        repository: A folder of the repository; if it is not the topmost one, its counterpart in the clone is returned.
        commit: Full hash.
        to: Does not exist yet.

    Raises:
        InputError: there is no git working tree.
        EkibenError: git refused; quotes its last line.
    """
    top = ask_git(repository, "rev-parse", "--show-toplevel")
    prefix = ask_git(repository, "rev-parse", "--show-prefix")
    if top is None or prefix is None:
        raise InputError(f"{repository} is no git working tree: name a clone of the code with --repository")
    clone = ["clone", "--quiet", "--shared", "--no-checkout", "--config", "core.hooksPath=/dev/null", top, str(to)]
    for arguments in (clone, ["-C", str(to), "checkout", "--quiet", "--detach", commit]):
        git = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        if git.returncode != 0:
            raise EkibenError(f"commit {commit} cannot be checked out: {last_line(git.stderr)}")
    return to / prefix


def choose_interpreter(
    code: Path, recorded_lock: str, choice: Choice, variables: Mapping[str, str], say: Callable[[str], None]
) -> tuple[Literal["here", "fresh"], Path, list[str]]:
    """Find the Python to run the code of a checkout with.

    Args:
        code: The checkout.
        recorded_lock: SHA-256 of the package lock that a run recorded, or nothing.
        choice: `here`: this interpreter; `fresh`: that of `make setup` in the checkout; `auto`: here when the lock is
            the same as here and no installed package disagrees with it, else fresh.
        variables: Environment of the set-up.
        say: Takes each line of progress.

    Returns:
        Where it is from, its path, and what is to be said about it.

    Raises:
        InputError: the commit has nothing to set up an environment with.
        EkibenError: `make setup` failed; quotes its last line.
    """
    notes = []
    lock = lock_sha256(code)
    if recorded_lock and lock != recorded_lock:
        notes.append(f"the commit's {LOCK_FILE} is not the one that the run recorded (sha256 {recorded_lock[:12]})")
    differing = differing_packages(code / LOCK_FILE) if lock else {}
    same = lock is not None and lock == lock_sha256(PROJECT_ROOT) and not differing
    if choice == "here" or (choice == "auto" and same):
        if not same:
            shown = ", ".join(f"{name} {here} for {there}" for name, (there, here) in sorted(differing.items()))
            known = "another lock, but no package differs" if lock else "the commit has no lock"
            notes.append(f"the packages here may not be those of the run: {shown or known}")
        return "here", Path(sys.executable), notes
    if not (code / "Makefile").is_file():
        raise InputError(f"the commit in {code} has no Makefile to set up an environment with: take --env here")
    say(f"[reproduce] `make setup` in the checkout, {'as asked' if same else 'because its lock is another one'}")
    setup = {name: value for name, value in variables.items() if name != "PYTHONPATH"}
    answer = run_apart(["make", "-C", str(code), "setup"], variables=setup, scratch=code.parent, say=say)
    python = code / ".venv" / "bin" / "python"
    if answer.code != 0 or not python.is_file():
        raise EkibenError(f"`make setup` in the checkout failed: {answer.last_words}")
    return "fresh", python, notes


def prove_code(python: Path, code: Path, variables: Mapping[str, str]) -> None:
    """Ask the interpreter where it finds `flows` and `bentos`: it must be in the checkout.

    Raises:
        EkibenError: it is somewhere else, or they cannot be imported.
    """
    probe = subprocess.run(
        [str(python), "-P", "-c", PROBE],
        env=dict(variables), cwd=code.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if probe.returncode != 0:
        raise EkibenError(f"the code in {code} cannot be imported: {last_line(probe.stderr)}")
    for found in json.loads(probe.stdout.splitlines()[-1]):
        if not found or not Path(found).resolve().is_relative_to(code.resolve()):
            raise EkibenError(f"{python} would run {found}, not the code in {code}: this environment cannot rebuild it")


def run_apart(command: list[str], *, variables: Mapping[str, str], scratch: Path, say: Callable[[str], None]) -> Answer:
    """Run a command in the folder `scratch` to its end; what it tells on standard error is handed on line by line.

    Its output goes to files, not pipes: a server that outlives it for a moment cannot keep us waiting.

    Raises:
        KeyboardInterrupt: the user ended it.
    """
    end_children_with_this_process()
    out, log = scratch / "out.log", scratch / REBUILD_LOG
    with out.open("wb") as output, log.open("wb") as errors, log.open(encoding="utf-8", errors="replace") as lines:
        process = subprocess.Popen(
            command, cwd=scratch, env=dict(variables), stdout=output, stderr=errors, start_new_session=True
        )
        with passing_signals(process) as passed:
            ended = False
            while not ended:
                ended = process.poll() is not None  # asked before reading: what was said last is not lost
                for line in lines:
                    say(f"  {line.rstrip()}")
                if not ended:
                    time.sleep(POLL_S)
        if passed:
            raise KeyboardInterrupt
    result: dict[str, Any] = {}
    with suppress(ValueError, IndexError):
        last = json.loads(out.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1])
        result = last if isinstance(last, dict) else {}
    error = result.get("error")
    said = error.get("message") if isinstance(error, dict) else None
    return Answer(process.returncode, result, last_line(str(said or log.read_text(encoding="utf-8", errors="replace"))))


def last_line(text: str) -> str:
    """The last line that a program wrote, fit to be quoted."""
    lines = text.strip().splitlines() or ["it said nothing"]
    return hide_password(" ".join(lines[-1].split()))[:MAX_MESSAGE_LENGTH]
