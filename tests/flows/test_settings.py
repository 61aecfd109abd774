from __future__ import annotations

import os
from pathlib import Path

import pytest

from flows.errors import ParamsError
from flows.settings import export_environment, load_settings


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("EKIBEN_HOME", "BENTOML_HOME", "PREFECT_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_bentos_go_to_bentomls_own_store_unless_a_home_is_named(
    clean_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert load_settings().bento_store_path == Path.home() / "bentoml"
    assert load_settings(tmp_path).bento_store_path == tmp_path / "bentoml"
    clean_environment.setenv("EKIBEN_HOME", str(tmp_path / "env"))
    assert load_settings().bento_store_path == tmp_path / "env" / "bentoml"
    clean_environment.setenv("BENTOML_HOME", str(tmp_path / "store"))
    assert load_settings(tmp_path).bento_store_path == tmp_path / "store"


def test_all_state_is_below_the_home_folder(clean_environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = load_settings(tmp_path)
    for path in (settings.artifact_root, settings.runs_path, settings.lunchboxes_path, settings.journal_path):
        assert path.is_relative_to(tmp_path)
    assert str(tmp_path) in settings.mlflow_uri
    assert settings.tool_environment()["PREFECT_HOME"].startswith(str(tmp_path))


def test_what_the_user_has_set_stays(clean_environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clean_environment.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5999")
    clean_environment.setattr(os, "environ", dict(os.environ))

    export_environment(load_settings(tmp_path))

    assert os.environ["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5999"
    assert os.environ["BENTOML_HOME"] == str(tmp_path / "bentoml")
    assert os.environ["EKIBEN_HOME"] == str(tmp_path)


def test_a_name_that_bentoml_would_refuse_is_refused(clean_environment: pytest.MonkeyPatch) -> None:
    clean_environment.setenv("EKIBEN_MODEL_NAME", "My Model")
    with pytest.raises(ParamsError, match=r"model_name is 'My Model': .*pattern"):
        load_settings()


@pytest.mark.parametrize("name", ["file", "file/below", "what?/now", "x" * 300, "/proc/nowhere/home"])
def test_a_home_that_cannot_be_used_is_refused(
    name: str, clean_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clean_environment.setattr(os, "environ", dict(os.environ))
    (tmp_path / "file").touch()
    with pytest.raises(ParamsError, match="another folder with --home or EKIBEN_HOME"):
        export_environment(load_settings(tmp_path / name))


def test_a_home_of_somebody_who_is_no_user_here_is_refused(clean_environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(ParamsError, match="home"):
        load_settings(Path("~nobody-of-that-name/ekiben"))


def test_an_empty_variable_counts_as_none(clean_environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clean_environment.setattr(os, "environ", dict(os.environ))
    for name in ("EKIBEN_HOME", "EKIBEN_EXPERIMENT", "BENTOML_HOME", "MLFLOW_TRACKING_URI"):
        os.environ[name] = ""
    assert load_settings().home == Path(".ekiben")
    settings = load_settings(tmp_path)
    export_environment(settings)
    assert settings.experiment == "ekiben"
    assert os.environ["BENTOML_HOME"] == str(tmp_path / "bentoml")
