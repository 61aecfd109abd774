from __future__ import annotations

from pathlib import Path

import pytest

from flows.workspace import enter_project


def test_a_run_works_in_the_folder_of_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    entered = enter_project()
    assert Path.cwd() == Path(entered["directory"])
    assert (Path.cwd() / "prefect.yaml").is_file()
