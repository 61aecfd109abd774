"""Every kind of address, and what goes wrong on the way."""

from __future__ import annotations

import errno
import http.server
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pytest

from flows.core.files import MissingFileError, md5_of, md5_of_files, modified_at, read_bytes
from flows.errors import DataError


class Shop(http.server.BaseHTTPRequestHandler):
    """`/200.csv` answers 200, `/404.csv` 404, and so on."""

    def do_GET(self) -> None:
        status = int(self.path[1:4])
        body = b"a\n1\n" if status == 200 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if self.path.endswith("dated.csv"):
            self.send_header("Last-Modified", "Tue, 14 Nov 2023 22:13:20 GMT")
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def shop() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Shop)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_local_paths_start_at_the_root_and_other_addresses_go_through_fsspec(tmp_path: Path, shop: str) -> None:
    (tmp_path / "x.csv").write_bytes(b"a\n1\n")
    with fsspec.open("memory://files/x.csv", "wb") as file:
        file.write(b"a\n1\n")
    for address in (
        "x.csv",
        str(tmp_path / "x.csv"),
        f"file://{tmp_path}/x.csv",
        "memory://files/x.csv",
        f"{shop}/200.csv",
    ):
        assert read_bytes(address, root=tmp_path) == b"a\n1\n"


@pytest.mark.parametrize(
    ("address", "fragments"),
    [
        ("none.csv", ["there is no file", "none.csv", "check the path"]),
        ("memory://none.csv", ["there is no file memory://none.csv"]),
        ("data/tracked.csv", ["tracked.csv.dvc", "`dvc pull`"]),
        ("data/folder/inside.csv", ["folder.dvc", "`dvc pull`"]),
        ("~nobody-of-that-name/x.csv", ["there is no file", "~nobody-of-that-name"]),
        ("data/tracked.csv.dvc/x.csv", ["there is no file", "x.csv"]),
    ],
)
def test_a_missing_file_says_how_to_get_it(tmp_path: Path, address: str, fragments: list[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tracked.csv.dvc").touch()
    (tmp_path / "data" / "folder.dvc").touch()
    with pytest.raises(MissingFileError) as refusal:
        read_bytes(address, root=tmp_path)
    for fragment in fragments:
        assert fragment in str(refusal.value)


@pytest.mark.parametrize(
    ("address", "fragment"),
    [
        (".", "is a folder; give one file in it"),
        ("a\0b.csv", "cannot be read"),
        ("x" * 300 + ".csv", "cannot be read"),
        ("nope://x.csv", "no known kind of address"),
        ("gs://bucket/x.csv", "pip install gcsfs"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_cure(tmp_path: Path, address: str, fragment: str) -> None:
    with pytest.raises(DataError, match=fragment):
        read_bytes(address, root=tmp_path)


def test_s3_without_credentials_names_the_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"needs credentials .* AWS_PROFILE or AWS_ACCESS_KEY_ID"):
        read_bytes("s3://bucket/x.csv", root=tmp_path)


def test_a_bucket_that_cannot_be_is_refused_and_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="is not an address that can be read"):
        read_bytes("s3://a bucket/x.csv", root=tmp_path)


def test_http_statuses_that_will_not_pass_are_refused_and_others_may_be_tried_again(tmp_path: Path, shop: str) -> None:
    with pytest.raises(MissingFileError):
        read_bytes(f"{shop}/404.csv", root=tmp_path)
    with pytest.raises(DataError, match="HTTP status 403"):
        read_bytes(f"{shop}/403.csv", root=tmp_path)
    for status in (429, 503):
        with pytest.raises(OSError, match=f"{shop}/{status}.csv could not be read"):
            read_bytes(f"{shop}/{status}.csv", root=tmp_path)


def test_a_server_that_does_not_answer_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"http://127.0.0.1:9/x.csv could not be read"):
        read_bytes("http://127.0.0.1:9/x.csv", root=tmp_path)


TROUBLE = {
    "reset": ConnectionResetError(errno.ECONNRESET, "reset"),
    "vendor": RuntimeError("the vendor's own\nconnection error"),
    "denied": PermissionError("Access Denied"),
}


class TroubleFileSystem(fsspec.AbstractFileSystem):
    """`trouble://<name>` raises the error of that name, as other filesystems would."""

    protocol = "trouble"

    def cat_file(self, path: str, *_: Any, **__: Any) -> bytes:
        raise TROUBLE[path]


def test_errors_of_any_filesystem_become_ours_or_an_oserror(tmp_path: Path) -> None:
    fsspec.register_implementation("trouble", TroubleFileSystem, clobber=True)
    for name in ("reset", "vendor"):
        with pytest.raises(OSError, match=rf"^trouble://{name} could not be read: [^\n]*$"):
            read_bytes(f"trouble://{name}", root=tmp_path)
    with pytest.raises(DataError, match="must not be read with these credentials"):
        read_bytes("trouble://denied", root=tmp_path)


def test_one_file_has_its_own_md5_and_several_have_that_of_their_list() -> None:
    assert md5_of(b"hello\n") == "b1946ac92492d2347c6235b4d2611184"  # echo hello | md5sum
    assert md5_of_files({"pairs": "abc"}) == "abc"
    both = md5_of_files({"pairs": "abc", "test": "def"})
    assert both == md5_of(b'[["pairs", "abc"], ["test", "def"]]') == md5_of_files({"test": "def", "pairs": "abc"})
    assert both != md5_of_files({"pairs": "def", "test": "abc"})


def test_the_time_of_the_last_change_is_told_by_whoever_knows_it(tmp_path: Path, shop: str) -> None:
    (tmp_path / "x.csv").write_bytes(b"a\n1\n")
    os.utime(tmp_path / "x.csv", (1_700_000_000, 1_700_000_000))
    then = datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    assert modified_at("x.csv", root=tmp_path) == then
    assert modified_at(f"{shop}/200-dated.csv", root=tmp_path) == then
    assert modified_at(f"{shop}/200.csv", root=tmp_path) is None
    before = datetime.now(tz=UTC)
    with fsspec.open("memory://times/x.csv", "wb") as file:
        file.write(b"a\n1\n")
    written = modified_at("memory://times/x.csv", root=tmp_path)
    assert written is not None
    assert before <= written <= datetime.now(tz=UTC)


@pytest.mark.parametrize("address", ["missing.csv", "nonsense://x.csv", "http://127.0.0.1:1/x.csv"])
def test_a_time_that_nobody_tells_is_no_error(tmp_path: Path, address: str) -> None:
    assert modified_at(address, root=tmp_path) is None
    assert modified_at(address, root=tmp_path, revision="v1") is None
