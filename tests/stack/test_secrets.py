"""The secrets of the stack stand in .env, and nowhere in what it makes: databases, buckets, logs, state, metrics."""

from __future__ import annotations

import base64
import contextlib
import os
import subprocess
from pathlib import Path

import boto3
import httpx
import pytest

from deployments.backup import OWNERS
from deployments.stack_env import SECRETS
from tests.stack.conftest import Line
from tests.stack.line import say

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]
# Who the stack's one S3 identity is, is no secret of its own: the key beside it is.
SOUGHT = [name for name in SECRETS if name != "S3_ACCESS_KEY"]
USERS = {
    "admin": "MLFLOW_ADMIN_PASSWORD",
    "line": "MLFLOW_LINE_PASSWORD",
    "encoder": "MLFLOW_ENCODER_PASSWORD",
    "ekiben": "PREFECT_PASSWORD",
}
# What MLflow's server reads its users from, and what Prefect hands a run its environment in (a killed one leaves it
# behind): in a folder of the container's /tmp that only its own user may enter.
OWN_FILES = {"basic_auth.ini", "workspace.json"}
# A database keeps what it must compare passwords with; the files of a server itself are its own business.
OWN_VOLUMES = {"postgres", "s3"}


def test_no_secret_is_in_what_the_stack_makes(line: Line) -> None:
    secrets = {line.secrets[name].encode(): name for name in SOUGHT}
    for user, name in USERS.items():  # as a header shows it
        secrets[base64.b64encode(f"{user}:{line.secrets[name]}".encode())] = f"{name}, encoded"
    looked_at = 0

    def look(where: str, content: bytes) -> None:
        nonlocal looked_at
        looked_at += 1
        found = [name for secret, name in secrets.items() if secret in content]
        assert not found, f"{', '.join(found)} in {where}"

    with pytest.raises(AssertionError, match=SOUGHT[0]):
        look("a planted one", b"x" + next(iter(secrets)) + b"y")
    for name in OWNERS:
        look(f"the database {name}", dump(line, name))
    environment = line.stack["worker"].environment
    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL_S3"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_DEFAULT_REGION"],
    )
    for bucket in ("ekiben", "mlflow"):
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for entry in page.get("Contents", []):
                body = client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
                look(f"the object {bucket}/{entry['Key']}", body)
    for path in files_of(line):
        with contextlib.suppress(FileNotFoundError):  # servers write under another name first: that one is gone by now
            look(str(path), path.read_bytes())
    for name, port in (("encoder", 3000), ("line-exporter", 9105), ("prometheus", 9090)):
        look(f"the metrics of {name}", httpx.get(f"{line.stack.url(name, port)}/metrics", timeout=30).content)
    look("the encoder's account of itself", str(line.encoder.info()).encode())
    assert looked_at > 100
    say(f"secrets: {len(SOUGHT)} looked for in {looked_at} files, objects, dumps and pages: none found")


def dump(line: Line, name: str) -> bytes:
    """A database as SQL."""
    postgres = line.stack["postgres"]
    client = {"PGHOST": line.stack.addresses["postgres"], "PGPASSWORD": postgres.environment["POSTGRES_PASSWORD"]}
    command = ["pg_dump", "--username=postgres", "--dbname", name]
    return subprocess.run(command, env=postgres.environment | client, capture_output=True, check=True).stdout


def files_of(line: Line) -> list[Path]:
    """Everything that the services have written: logs, volumes, homes, the worker's checkout, the Bento."""
    root = line.stack.root
    folders = [path for path in (root / "volumes").iterdir() if path.name not in OWN_VOLUMES]
    folders += [root / "homes", root / "bentoml", line.stack.app, line.stack.project, line.team]
    found = list(root.glob("*.log"))
    for top in folders:
        for folder, _, names in os.walk(top):  # which passes over a folder that vanishes meanwhile
            paths = [Path(folder, name) for name in names]
            found += [path for path in paths if path.is_file() and not path.is_symlink()]
    own = [path for path in found if path.name in OWN_FILES and path.parent.parent.name.endswith("-tmp")]
    for path in own:
        with contextlib.suppress(FileNotFoundError):  # a run has ended, and its folder with it
            assert path.parent.stat().st_mode & 0o077 == 0, path.parent
    found = [path for path in found if path not in own]
    return found
