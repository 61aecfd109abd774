"""Where a run happens: folders and addresses. The only module of `flows` that reads the environment."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from bentos.settings import ServeSettings
from flows.errors import ParamsError, hide_password

PROJECT_ROOT = Path(__file__).resolve().parent.parent
DEFAULT_HOME = Path(".ekiben")


class FlowSettings(BaseSettings):
    """Settings of the flows and of the `ekiben` command, prefix `EKIBEN_` unless a tool's own name is given."""

    model_config = SettingsConfigDict(
        env_prefix="EKIBEN_", env_ignore_empty=True, extra="ignore", frozen=True, populate_by_name=True
    )

    home: Path = Field(DEFAULT_HOME, description="Folder of all local state: MLflow, studies, Prefect, models, logs.")
    model_name: str = Field(
        "ekiben", pattern=r"^[a-z0-9][a-z0-9_.-]*$", description="Name in the model registry and of the Bento."
    )
    experiment: str = Field("ekiben", min_length=1, description="MLflow experiment that holds the runs.")
    tracking_uri: str | None = Field(
        None,
        validation_alias="MLFLOW_TRACKING_URI",
        description="MLflow server or database; default: SQLite in the home folder.",
    )
    study_storage: str | None = Field(
        None,
        description="Optuna storage URL (any RDB), e.g. `postgresql+psycopg2://...`; default: a journal file at home.",
    )
    anchor_box: Path | None = Field(
        None,
        description="Folder of the lunchbox that `train.anchor_weight` keeps a model near to; default: the champion's.",
    )
    admin_key: SecretStr | None = Field(
        None, description="Key that `ekiben rollback --server` shows: one of the server's EKIBEN_ADMIN_KEYS."
    )
    bentoml_home: Path | None = Field(
        None,
        validation_alias="BENTOML_HOME",
        description="Bento store. Default: BentoML's own (`~/bentoml`), so that plain `bentoml serve ekiben:latest` "
        "works from any folder; with `--home DIR` or `EKIBEN_HOME` it is `DIR/bentoml`.",
    )

    @field_validator("home", "bentoml_home", "anchor_box")
    @classmethod
    def _expand_user(cls, path: Path | None) -> Path | None:
        try:
            return path and path.expanduser()
        except RuntimeError as error:  # `~somebody` who is no user here
            raise ValueError(str(error)) from None

    @cached_property
    def home_path(self) -> Path:
        """The home folder as an absolute path."""
        return self.home.resolve()

    @property
    def mlflow_uri(self) -> str:
        """Address of MLflow's tracking store and registry."""
        return self.tracking_uri or f"sqlite:///{self.home_path / 'mlflow.db'}"

    @property
    def shown_mlflow_uri(self) -> str:
        """`mlflow_uri` as it may be printed: without a password."""
        return hide_password(self.mlflow_uri)

    @property
    def artifact_root(self) -> Path:
        """Where MLflow keeps artifacts when it is the local SQLite one."""
        return self.home_path / "mlartifacts"

    @property
    def runs_path(self) -> Path:
        """Scratch space of runs: models of trials until the best one is logged."""
        return self.home_path / "runs"

    @property
    def lunchboxes_path(self) -> Path:
        """Where packed lunchboxes wait for the Bento store, one folder a version."""
        return self.home_path / "lunchboxes"

    @property
    def staging_path(self) -> Path:
        """Where a release builds and tests, out of the way of what is served."""
        return self.home_path / "staging"

    @property
    def journal_path(self) -> Path:
        """Optuna's journal, used when no `study_storage` is set."""
        return self.home_path / "studies" / "journal.log"

    @property
    def bento_store_path(self) -> Path:
        """The folder that BentoML uses as its home."""
        if self.bentoml_home is not None:
            return self.bentoml_home.resolve()
        if "home" in self.model_fields_set:
            return self.home_path / "bentoml"
        return Path.home() / "bentoml"

    def tool_environment(self) -> dict[str, str]:
        """What the other tools read from the environment, for this process and its children."""
        return {
            "MLFLOW_TRACKING_URI": self.mlflow_uri,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "BENTOML_HOME": str(self.bento_store_path),
            "BENTOML_DO_NOT_TRACK": "true",
            "PREFECT_HOME": str(self.home_path / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            # A first start on a busy laptop runs all of Prefect's migrations: the default of 20 s is too short.
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
            "DO_NOT_TRACK": "1",
            "DVC_NO_ANALYTICS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # Read when torch is imported. Threads that spin while they wait make a fit several times slower on cores
            # that are shared; the workspace makes the same seed give the same vectors on a GPU, too.
            "OMP_WAIT_POLICY": "PASSIVE",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }


class LineSettings(BaseSettings):
    """Whom the exporter of the line asks: the variables that Prefect and MLflow themselves read."""

    model_config = SettingsConfigDict(
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        populate_by_name=True,
        hide_input_in_errors=True,  # it may hold passwords
    )

    prefect_url: str = Field("", validation_alias="PREFECT_API_URL", description="The API of the Prefect server.")
    prefect_auth: SecretStr = Field(
        SecretStr(""), validation_alias="PREFECT_API_AUTH_STRING", description="`user:password` of that server."
    )
    prefect_key: SecretStr = Field(
        SecretStr(""), validation_alias="PREFECT_API_KEY", description="Key of Prefect Cloud."
    )
    mlflow_url: str = Field("", validation_alias="MLFLOW_TRACKING_URI", description="The MLflow server.")
    mlflow_username: str = Field("", validation_alias="MLFLOW_TRACKING_USERNAME", description="User at that server.")
    mlflow_password: SecretStr = Field(
        SecretStr(""), validation_alias="MLFLOW_TRACKING_PASSWORD", description="The user's password."
    )
    mlflow_token: SecretStr = Field(
        SecretStr(""), validation_alias="MLFLOW_TRACKING_TOKEN", description="Token to show, in place of both."
    )
    model_name: str = Field("ekiben", validation_alias="EKIBEN_MODEL_NAME", description="Name in the model registry.")


# On a terminal the `ekiben` command speaks for the flows; Prefect's own lines still reach its API and UI.
TERMINAL_ENVIRONMENT = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}

# What a process that works apart must not inherit: our addresses and folders, and a calling git's or make's own.
STACK_PREFIXES = ("EKIBEN_", "MLFLOW_", "PREFECT_", "BENTOML_")
CALLERS_OWN = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_PREFIX",
    "MAKEFLAGS",
    "MAKELEVEL",
    "MFLAGS",
    "VIRTUAL_ENV",
)


def load_settings(home: Path | None = None) -> FlowSettings:
    """Read the settings; `home`, when given, wins over `EKIBEN_HOME`.

    Raises:
        ParamsError: a setting cannot be used.
    """
    try:
        return FlowSettings() if home is None else FlowSettings(home=home)
    except ValidationError as error:
        raise ParamsError(
            "; ".join(
                f"the setting {'.'.join(map(str, item['loc']))} is {item['input']!r}: {item['msg']}"
                for item in error.errors()
            )
            + "; docs/configuration.md lists the settings"
        ) from None


def export_environment(settings: FlowSettings, *, terminal: bool = False) -> None:
    """Create the home folder and tell MLflow, Prefect, BentoML and DVC about it; what the user has set himself stays.

    Call it before those packages are imported: most of them read the environment once. `terminal` silences Prefect's
    own console lines.

    Raises:
        ParamsError: the home folder cannot be used.
    """
    _make_home(settings.home_path)
    if "home" in settings.model_fields_set:
        os.environ["EKIBEN_HOME"] = str(settings.home_path)
    for name, value in (settings.tool_environment() | (TERMINAL_ENVIRONMENT if terminal else {})).items():
        os.environ[name] = os.environ.get(name) or value


def apart_environment(home: Path, code: Path, *, anchor_box: Path | None = None) -> dict[str, str]:
    """Environment for a process that runs the packages in `code` in the home folder `home`, and reaches nothing else.

    It has this process's environment without what leads to our stack (a rebuilt model must not be registered beside
    the one that it is compared with), and without what a calling `git` or `make` leaves for its own children.
    """
    ours = {name: value for name, value in os.environ.items() if not _leads_to_our_stack(name)}
    # model_construct reads no environment: whatever is set here for our own stack must not come through.
    apart = FlowSettings.model_construct(home=home, tracking_uri=None, bentoml_home=home / "bentoml").tool_environment()
    anchor = {} if anchor_box is None else {"EKIBEN_ANCHOR_BOX": str(anchor_box)}
    return ours | apart | anchor | {"EKIBEN_HOME": str(home), "PYTHONPATH": str(code)}


def _leads_to_our_stack(name: str) -> bool:
    if name == "EKIBEN_OWNER":  # the mark by which the watchdog finds what it must end
        return False
    return name.startswith(STACK_PREFIXES) or name in CALLERS_OWN


def child_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child process: that of this one, with `changes`."""
    return {**os.environ, **changes}


def default_serving_environment() -> dict[str, str]:
    """This environment without the settings of a server, for one that is tested and measured.

    One that follows an alias would soon serve another version, one with keys would not answer, one with a cache would
    be measured at remembering. Where it computes, and with how many threads, stays as it was set for this machine.
    """
    dropped = {f"EKIBEN_{name.upper()}" for name in ServeSettings.model_fields} - {"EKIBEN_DEVICE", "EKIBEN_THREADS"}
    return {name: value for name, value in os.environ.items() if name not in dropped}


def hand_on(name: str, value: str) -> None:
    """Set a variable for every process that is started from now on."""
    os.environ[name] = value


def _make_home(home: Path) -> None:
    cure = "choose another folder with --home or EKIBEN_HOME"
    if "?" in str(home):  # in an address of SQLite it ends the path
        raise ParamsError(f"the home folder {home} must not have a '?' in its name: {cure}")
    try:
        home.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=home).close()
    except (OSError, ValueError) as error:
        raise ParamsError(f"the home folder {str(home)!r} cannot be written ({error}): {cure}") from None
