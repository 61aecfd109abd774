"""Copy the buckets of the stack into a folder, or back: every object, checked by its SHA-256.

    python deployments/buckets.py save FOLDER
    python deployments/buckets.py restore FOLDER [--force]

Address and keys come from AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. An object is a file of the
same name below `FOLDER/BUCKET`; `FOLDER/buckets.json` lists them and is written last. What a second `save` into the
same folder finds there unchanged is not copied again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

INDEX = "buckets.json"
HEALTH_KEY = ".health"  # of the health check
BUCKETS = ("ekiben", os.environ.get("S3_MLFLOW_BUCKET", "mlflow"))


class BucketsError(Exception):
    """What keeps the copy from being made, as one line for the user."""


def save(client: Any, folder: Path) -> int:
    """Copy all objects into the folder; returns how many there are."""
    before = _read_index(folder) if (folder / INDEX).exists() else {}
    (folder / INDEX).unlink(missing_ok=True)
    index: dict[str, dict[str, str]] = {}
    for bucket in BUCKETS:
        for key, etag in list_objects(client, bucket):
            name, path = f"{bucket}/{key}", locate(folder, bucket, key)
            known = before.get(name)
            if known and known["etag"] == etag and path.is_file() and _digest(path) == known["sha256"]:
                index[name] = known
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(bucket, key, str(path))
            index[name] = {"etag": etag, "sha256": _digest(path)}
    part = folder / f"{INDEX}.part"
    part.write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")
    part.replace(folder / INDEX)
    return len(index)


def restore(client: Any, folder: Path, *, force: bool = False) -> int:
    """Copy all objects back into the buckets; returns how many there are.

    Raises:
        BucketsError: the copy is not whole, or a bucket is not empty and `force` is not given; nothing was written.
    """
    index = _read_index(folder)
    damaged = [name for name, entry in index.items() if not _is_whole(folder, name, entry["sha256"])]
    if damaged:
        raise BucketsError(f"{len(damaged)} objects in {folder} are missing or altered, such as {damaged[0]}")
    filled = [bucket for bucket in BUCKETS if next(list_objects(client, bucket), None) is not None]
    if filled and not force:
        raise BucketsError(f"the bucket {filled[0]} is not empty: restore into a new one, or give --force to overwrite")
    for name in index:
        bucket, _, key = name.partition("/")
        client.upload_file(str(locate(folder, bucket, key)), bucket, key)
    return len(index)


def list_objects(client: Any, bucket: str) -> Iterator[tuple[str, str]]:
    """Key and ETag of every object, but for that of the health check."""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for found in page.get("Contents", []):
            if found["Key"] != HEALTH_KEY and not found["Key"].endswith("/"):
                yield found["Key"], found["ETag"]


def locate(folder: Path, bucket: str, key: str) -> Path:
    """The file of an object.

    Raises:
        BucketsError: the key leads out of the folder.
    """
    path = folder / bucket / key
    if ".." in Path(key).parts or key.startswith("/"):
        raise BucketsError(f"the object {bucket}/{key} cannot be a file of that name")
    return path


def open_client() -> Any:
    """A client of the server that the environment names, by path and not by host."""
    return boto3.client("s3", config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 5}))


def _read_index(folder: Path) -> dict[str, dict[str, str]]:
    try:
        content: dict[str, dict[str, str]] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BucketsError(f"{folder} holds no whole copy: {INDEX} is missing") from None
    return content


def _is_whole(folder: Path, name: str, sha256: str) -> bool:
    bucket, _, key = name.partition("/")
    path = locate(folder, bucket, key)
    return path.is_file() and _digest(path) == sha256


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Read the command line and copy."""
    parser = argparse.ArgumentParser(description="Copy the buckets of the stack into a folder, or back.")
    parser.add_argument("what", choices=["save", "restore"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--force", action="store_true", help="overwrite what is in the buckets")
    given = parser.parse_args()
    try:
        if given.what == "save":
            given.folder.mkdir(parents=True, exist_ok=True)
            count = save(open_client(), given.folder)
        else:
            count = restore(open_client(), given.folder, force=given.force)
    except BucketsError as error:
        sys.exit(f"buckets: {error}")
    sys.stdout.write(f"buckets: {count} objects {given.what}d\n")


if __name__ == "__main__":
    main()
