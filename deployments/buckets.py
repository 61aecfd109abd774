"""Copy the buckets of the stack into a folder, or back: every object, checked by its SHA-256.

    python deployments/buckets.py save FOLDER
    python deployments/buckets.py restore FOLDER [--force]

Address and keys come from AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the names of the buckets
from S3_DATA_BUCKET and S3_MLFLOW_BUCKET; a restore may go into buckets of other names. An object is a file of its name
below `FOLDER/data` or `FOLDER/mlflow`. `FOLDER/buckets.json` lists them and is written last.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

INDEX = "buckets.json"
HEALTH_KEY = ".health"  # of the health check
REFUSALS = (Boto3Error, ClientError, BotoCoreError)  # what boto3 raises; a transfer has classes of its own


class BucketsError(Exception):
    """What keeps the copy from being made, as one line for the user."""


def name_buckets(environment: Mapping[str, str]) -> dict[str, str]:
    """What each bucket is for, and its name."""
    return {
        "data": environment.get("S3_DATA_BUCKET") or "ekiben",
        "mlflow": environment.get("S3_MLFLOW_BUCKET") or "mlflow",
    }


def save(client: Any, buckets: Mapping[str, str], folder: Path) -> int:
    """Copy all objects into a new folder; returns how many there are. What vanishes meanwhile is left out."""
    index: dict[str, str] = {}
    for role, bucket in buckets.items():
        for key in list_objects(client, bucket):
            path = locate(folder, f"{role}/{key}")
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                client.download_file(bucket, key, str(path))
            except ClientError as error:
                if error.response["Error"]["Code"] in ("404", "NoSuchKey"):
                    continue
                raise
            index[f"{role}/{key}"] = _digest(path)
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")
    return len(index)


def restore(client: Any, buckets: Mapping[str, str], folder: Path, *, force: bool = False) -> int:
    """Copy all objects back into the buckets; returns how many there are.

    Args:
        client: of the server.
        buckets: what each is for, and its name.
        folder: that `save` has filled.
        force: overwrite objects of the same name; others stay.

    Raises:
        BucketsError: the copy is not whole, or a bucket is not empty and `force` is not given (nothing was written
            then); or an object could not be written, and how many were.
    """
    index = check(folder)
    filled = [bucket for bucket in buckets.values() if next(list_objects(client, bucket), None) is not None]
    if filled and not force:
        raise BucketsError(f"the bucket {filled[0]} is not empty: restore into a new one, or give --force to overwrite")
    for done, name in enumerate(index):
        role, _, key = name.partition("/")
        try:
            client.upload_file(str(locate(folder, name)), buckets[role], key)
        except REFUSALS as error:
            raise BucketsError(
                f"half restored ({done} of {len(index)} objects, no database): {error}. Start no service; give the "
                "command again with --force when the reason is gone"
            ) from None
    return len(index)


def check(folder: Path) -> dict[str, str]:
    """Read the list of a copy and compare every file with it.

    Raises:
        BucketsError: the copy is not whole.
    """
    try:
        index: dict[str, str] = dict(json.loads((folder / INDEX).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise BucketsError(f"{folder} holds no whole copy: {INDEX} is missing") from None
    except (ValueError, TypeError):
        raise BucketsError(f"{folder} holds no whole copy: {INDEX} is damaged") from None
    paths = {name: locate(folder, name) for name in index}
    damaged = [name for name, path in paths.items() if not path.is_file() or _digest(path) != index[name]]
    if damaged:
        raise BucketsError(f"{len(damaged)} objects in {folder} are missing or altered, such as {damaged[0]}")
    return index


def list_objects(client: Any, bucket: str) -> Iterator[str]:
    """Key of every object, but for that of the health check."""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for found in page.get("Contents", []):
            if found["Key"] != HEALTH_KEY and not found["Key"].endswith("/"):
                yield found["Key"]


def locate(folder: Path, name: str) -> Path:
    """The file of an object.

    Raises:
        BucketsError: the name leads out of the folder.
    """
    if ".." in name.split("/") or "//" in name:
        raise BucketsError(f"the object {name} cannot be a file of that name")
    return folder / name


def open_client() -> Any:
    """A client of the server that the environment names, by path and not by host."""
    return boto3.client("s3", config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 5}))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Read the command line and copy."""
    parser = argparse.ArgumentParser(description="Copy the buckets of the stack into a folder, or back.")
    parser.add_argument("what", choices=["save", "restore"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--force", action="store_true", help="overwrite objects of the same name")
    given = parser.parse_args()
    os.umask(0o077)
    try:
        client, buckets = open_client(), name_buckets(os.environ)
        if given.what == "save":
            count = save(client, buckets, given.folder)
        else:
            count = restore(client, buckets, given.folder, force=given.force)
    except (BucketsError, *REFUSALS, OSError) as error:
        sys.exit(f"buckets: {error}")
    sys.stdout.write(f"buckets: {count} objects {given.what}d\n")


if __name__ == "__main__":
    main()
