#!/usr/bin/env python3
"""Start MLflow's tracking server for known users only: `mlflow-entrypoint.py OPTIONS-OF-MLFLOW-SERVER`.

MLflow's basic-auth application reads a file; containers are given variables. This writes the one from the others,
readable by its own user alone, and becomes `mlflow server`. Variables:

- MLFLOW_ADMIN_USERNAME, MLFLOW_ADMIN_PASSWORD: the first user, made when the database of users is empty;
- MLFLOW_AUTH_DATABASE_URI: that database, such as postgresql+psycopg2://...;
- MLFLOW_AUTH_DEFAULT_PERMISSION: what any other user may do with what nobody gave them rights on; default READ;
- MLFLOW_FLASK_SERVER_SECRET_KEY: signs forms, the same in all replicas.

A missing or weak value ends it with exit code 2, before anything listens.
"""

from __future__ import annotations

import configparser
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

MIN_PASSWORD_CHARS = 12  # MLflow's own limit
MIN_SECRET_CHARS = 16
AUTH_CACHE_S = "60"
PERMISSIONS = ("READ", "USE", "EDIT", "MANAGE", "NO_PERMISSIONS")
# In the file, or MLflow's own names for the same, which would go before it: the server itself needs none of them.
CONSUMED = (
    "MLFLOW_ADMIN_USERNAME",
    "MLFLOW_ADMIN_PASSWORD",
    "MLFLOW_AUTH_ADMIN_USERNAME",
    "MLFLOW_AUTH_ADMIN_PASSWORD",
    "MLFLOW_AUTH_DATABASE_URI",
    "MLFLOW_AUTH_DEFAULT_PERMISSION",
)


def find_faults(environment: Mapping[str, str]) -> list[str]:
    """What keeps the server from starting, one line each; never quotes a value."""
    faults = [
        f"{name} is not set"
        for name in ("MLFLOW_ADMIN_USERNAME", "MLFLOW_AUTH_DATABASE_URI")
        if not environment.get(name, "").strip()
    ]
    for name, least in (
        ("MLFLOW_ADMIN_PASSWORD", MIN_PASSWORD_CHARS),
        ("MLFLOW_FLASK_SERVER_SECRET_KEY", MIN_SECRET_CHARS),
    ):
        length = len(environment.get(name, ""))
        if length < least:
            found = f"has {length} characters" if length else "is not set"
            faults.append(f"{name} {found}: it needs {least} or more")
    if environment.get("MLFLOW_AUTH_DEFAULT_PERMISSION", "READ") not in PERMISSIONS:
        faults.append(f"MLFLOW_AUTH_DEFAULT_PERMISSION is none of {', '.join(PERMISSIONS)}")
    return faults


def write_configuration(environment: Mapping[str, str]) -> Path:
    """Write basic_auth.ini into a new folder that only this user may enter."""
    configuration = configparser.ConfigParser()
    values = {
        "default_permission": environment.get("MLFLOW_AUTH_DEFAULT_PERMISSION", "READ"),
        "database_uri": environment["MLFLOW_AUTH_DATABASE_URI"],
        "admin_username": environment["MLFLOW_ADMIN_USERNAME"],
        "admin_password": environment["MLFLOW_ADMIN_PASSWORD"],
        # A password is hashed some hundred thousand times at each request, which is slow on purpose: a release asks a
        # hundred times. A password that was changed elsewhere is thus good for so long in the other processes.
        "auth_cache_ttl_seconds": AUTH_CACHE_S,
    }
    configuration["mlflow"] = {name: value.replace("%", "%%") for name, value in values.items()}
    path = Path(tempfile.mkdtemp(prefix="mlflow-auth-")) / "basic_auth.ini"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        configuration.write(file)
    return path


def find_command() -> list[str]:
    """`mlflow` of this interpreter's environment, else that of the search path."""
    beside = Path(sys.executable).with_name("mlflow")
    return [str(beside)] if beside.is_file() else [shutil.which("mlflow") or "mlflow"]


def main() -> None:
    """Check, write, and become the server."""
    if faults := find_faults(os.environ):
        sys.stderr.writelines(f"mlflow-entrypoint: {fault}\n" for fault in faults)
        sys.exit(2)
    path = write_configuration(os.environ)
    environment = {name: value for name, value in os.environ.items() if name not in CONSUMED}
    environment["MLFLOW_AUTH_CONFIG_PATH"] = str(path)
    command = [*find_command(), "server", "--app-name", "basic-auth", *sys.argv[1:]]
    os.execvpe(command[0], command, environment)


if __name__ == "__main__":
    main()
