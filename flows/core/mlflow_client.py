"""How MLflow is opened: quietly, with a bounded first try, and with its errors turned into ours. Core layer.

Only this module, registry.py, tracking.py and flavour.py import mlflow, inside functions: importing them is cheap.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar
from urllib.parse import urlsplit

from flows.errors import EkibenError, NothingReleasedError, ParamsError, hide_password, one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql")
SERVER_SCHEMES = ("http", "https")
FIRST_TRY_RETRIES = 1  # MLflow's own default waits for minutes
FIRST_TRY_TIMEOUT_S = 10

P = ParamSpec("P")
R = TypeVar("R")


def is_server(uri: str) -> bool:
    """Whether `uri` is a tracking server, which decides by itself where artifacts go."""
    return urlsplit(uri).scheme in SERVER_SCHEMES


def open_client(uri: str) -> MlflowClient:
    """Connect to the tracking store and registry at `uri`; a database is created and migrated on its first use.

    Raises:
        ParamsError: the address is of an unknown kind, or nothing answers there within about half a minute.
    """
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme not in (*DATABASE_SCHEMES, *SERVER_SCHEMES):
        raise ParamsError(
            f"MLFLOW_TRACKING_URI is {hide_password(uri)!r}; allowed are a server (http://host:5000) or a database "
            "(sqlite:///folder/mlflow.db, postgresql+psycopg2://...). MLflow 3 refuses plain folders: unset it to use "
            "the SQLite file in Ekiben's home"
        )
    _quiet_mlflow()
    if scheme in DATABASE_SCHEMES:
        _probe_database(uri)

    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        with _short_patience():
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)
    except MlflowException as error:
        raise _unreachable(uri, error) from error
    return client


def plain_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Let `function` raise our errors where MLflow raises its own."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        from mlflow.exceptions import MlflowException

        try:
            return function(*args, **kwargs)
        except MlflowException as error:
            missing = error.error_code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")
            kind = NothingReleasedError if missing else EkibenError
            raise kind(f"MLflow, {function.__name__}: {one_line(error)}") from error

    return wrapper


def _quiet_mlflow() -> None:
    import mlflow  # noqa: F401  (configures its loggers when it is imported)
    from mlflow import environment_variables as variables

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not variables.MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.is_set():
        variables.MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)


def _probe_database(uri: str) -> None:
    # MLflow tries ten times with growing pauses, for minutes, whatever is wrong. Once is enough to know.
    import sqlalchemy

    try:
        url = sqlalchemy.make_url(uri)
        if url.get_backend_name() == "sqlite" and url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        engine = sqlalchemy.create_engine(url)
        try:
            sqlalchemy.inspect(engine).get_table_names()
        finally:
            engine.dispose()
    except ModuleNotFoundError as error:
        raise ParamsError(
            f"MLFLOW_TRACKING_URI {hide_password(uri)} needs the Python package {error.name!r}: install it"
        ) from error
    except (sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        raise _unreachable(uri, error) from error


@contextmanager
def _short_patience() -> Iterator[None]:
    # MLflow reads these from the environment at each request, and nowhere else.
    from mlflow import environment_variables as variables

    limits = {
        variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES: FIRST_TRY_RETRIES,
        variables.MLFLOW_HTTP_REQUEST_TIMEOUT: FIRST_TRY_TIMEOUT_S,
    }
    before = {variable: variable.get_raw() for variable in limits}
    try:
        for variable, limit in limits.items():
            variable.set(limit)
        yield
    finally:
        for variable, value in before.items():
            if value is None:
                variable.unset()
            else:
                variable.set(value)


def _unreachable(uri: str, error: BaseException) -> ParamsError:
    shown = hide_password(uri)
    if is_server(uri):
        cure = (
            f"start it (`mlflow server --port {urlsplit(uri).port or 5000}`), correct MLFLOW_TRACKING_URI, or unset it "
            "to use the SQLite file in Ekiben's home; after a 403 add this host to the server's "
            "MLFLOW_SERVER_ALLOWED_HOSTS"
        )
    else:
        cure = "check MLFLOW_TRACKING_URI, that the folder can be written and that the file is an MLflow database"
    return ParamsError(f"no MLflow at {shown} ({one_line(error)}): {cure}")
