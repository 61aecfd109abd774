"""Make MLflow's users `line` (the flows: may create and change) and `encoder` (may read), or set their passwords.

    MLFLOW_TRACKING_URI=... MLFLOW_ADMIN_USERNAME=admin MLFLOW_ADMIN_PASSWORD=... python deployments/mlflow_users.py

Run again after a password was changed in .env. Every user may read everything (`default_permission = READ`); only the
one who made an experiment or a model, and the admin, may change it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping

import httpx

PASSWORDS = {"line": "MLFLOW_TRACKING_PASSWORD", "encoder": "MLFLOW_ENCODER_PASSWORD"}
ADMIN = ("MLFLOW_ADMIN_USERNAME", "MLFLOW_ADMIN_PASSWORD")
WAIT_S = 300.0


def wait_for(client: httpx.Client, admin: str) -> None:
    """Wait until the server answers this admin.

    Raises:
        SystemExit: it does not in time, or does not know the password.
    """
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            answer = client.get("/api/2.0/mlflow/users/get", params={"username": admin})
            if answer.status_code == 401:
                raise SystemExit(
                    f"MLflow at {client.base_url} does not take the admin's password. It keeps the one that it was "
                    "first started with: give that one, or change it there first (docs/operations.md, 'Changing keys')"
                )
            if answer.status_code in (200, 404):
                return
            problem = f"status {answer.status_code}"
        except httpx.TransportError as error:
            problem = str(error)
        if time.monotonic() > deadline:
            raise SystemExit(f"MLflow at {client.base_url} did not answer within {WAIT_S:.0f} s: {problem}")
        time.sleep(2)


def set_user(client: httpx.Client, name: str, password: str) -> str:
    """Make the user, or set its password; returns what was done.

    Raises:
        SystemExit: the server refused.
    """
    known = client.get("/api/2.0/mlflow/users/get", params={"username": name})
    user = {"username": name, "password": password}
    if known.status_code == 404:
        _check(client.post("/api/2.0/mlflow/users/create", json=user), name)
        return "made"
    _check(known, name)
    own = httpx.Client(base_url=client.base_url, auth=(name, password), timeout=client.timeout)
    with own:
        if own.get("/api/2.0/mlflow/users/get", params={"username": name}).status_code == 200:
            return "as it should be"
    _check(client.patch("/api/2.0/mlflow/users/update-password", json=user), name)
    return "given its new password"


def _check(answer: httpx.Response, name: str) -> None:
    if answer.is_error:
        raise SystemExit(f"MLflow refused its user {name}: {answer.status_code} {answer.text[:200]}")


def main(environment: Mapping[str, str]) -> None:
    """Wait for the server and set both users."""
    if missing := [name for name in ("MLFLOW_TRACKING_URI", *ADMIN, *PASSWORDS.values()) if not environment.get(name)]:
        raise SystemExit(f"{', '.join(missing)} must be set: `make stack-env` makes them for docker-compose.yml")
    admin = (environment[ADMIN[0]], environment[ADMIN[1]])
    with httpx.Client(base_url=environment["MLFLOW_TRACKING_URI"], auth=admin, timeout=30) as client:
        wait_for(client, admin[0])
        for name, variable in PASSWORDS.items():
            sys.stdout.write(f"[setup] MLflow's user {name}: {set_user(client, name, environment[variable])}\n")


if __name__ == "__main__":
    main(os.environ)
