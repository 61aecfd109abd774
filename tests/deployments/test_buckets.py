"""The copy of the buckets, of a server that is a stand-in: tests/stack has a real one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from boto3.exceptions import S3UploadFailedError

from deployments.buckets import INDEX, BucketsError, check, restore, save

BUCKETS = {"data": "ours", "mlflow": "theirs"}


class Server:
    """Buckets in memory; takes only so many objects."""

    def __init__(self, room: int = 100, **objects: bytes) -> None:
        self.objects = {name.replace("__", "/"): content for name, content in objects.items()}
        self.room = room

    def get_paginator(self, _: str) -> Server:
        return self

    def paginate(self, **query: str) -> Iterator[dict[str, Any]]:
        bucket = query["Bucket"] + "/"
        yield {"Contents": [{"Key": name.removeprefix(bucket)} for name in self.objects if name.startswith(bucket)]}

    def download_file(self, bucket: str, key: str, path: str) -> None:
        Path(path).write_bytes(self.objects[f"{bucket}/{key}"])

    def upload_file(self, path: str, bucket: str, key: str) -> None:
        if len(self.objects) == self.room:
            raise S3UploadFailedError(f"Failed to upload {path}: AccessDenied")
        self.objects[f"{bucket}/{key}"] = Path(path).read_bytes()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    assert save(Server(ours__a=b"1", ours__b=b"2", theirs__model=b"3"), BUCKETS, tmp_path) == 3
    return tmp_path


def test_a_copy_goes_into_buckets_of_other_names(copy: Path) -> None:
    server = Server()
    assert restore(server, {"data": "x", "mlflow": "y"}, copy) == 3
    assert server.objects == {"x/a": b"1", "x/b": b"2", "y/model": b"3"}


def test_what_is_in_use_is_overwritten_by_force_alone(copy: Path) -> None:
    server = Server(ours__a=b"new", ours__other=b"stays")
    with pytest.raises(BucketsError, match=r"ours is not empty.*--force"):
        restore(server, BUCKETS, copy)
    assert server.objects["ours/a"] == b"new"
    restore(server, BUCKETS, copy, force=True)
    assert (server.objects["ours/a"], server.objects["ours/other"]) == (b"1", b"stays")


def test_a_restore_that_breaks_off_says_how_far_it_came_and_can_be_given_again(copy: Path) -> None:
    server = Server(room=2)
    with pytest.raises(BucketsError, match=r"half restored \(2 of 3 objects.*AccessDenied.*--force"):
        restore(server, BUCKETS, copy)
    server.room = 100
    assert restore(server, BUCKETS, copy, force=True) == 3


def test_a_copy_that_is_not_whole_is_refused(copy: Path) -> None:
    index = (copy / INDEX).read_text()
    (copy / "data" / "a").write_bytes(b"altered")
    with pytest.raises(BucketsError, match=r"1 objects .* missing or altered, such as data/a"):
        check(copy)
    for damaged in ("{", "7"):
        (copy / INDEX).write_text(damaged)
        with pytest.raises(BucketsError, match="damaged"):
            check(copy)
    (copy / INDEX).write_text(json.dumps({"data/../../x": "0"} | json.loads(index)))
    with pytest.raises(BucketsError, match="cannot be a file"):
        check(copy)
