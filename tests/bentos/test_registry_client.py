"""Versions from an MLflow server: asked over HTTP, fetched whole or not at all. MLflow's answers, over a transport.

tests/bentos/test_swap_registry.py asks a real one.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from bentos.aliases import Pointer
from bentos.errors import LunchboxError, RegistryError
from bentos.manifest import MANIFEST_FILE, read_manifest, verify_files, write_manifest
from bentos.registry_client import MlflowSource
from bentos.settings import ServeSettings
from bentos.sources import LocalSource, UnknownVersionError, point_at

Answer = Callable[[httpx.Request], httpx.Response | None]


class Registry:
    """An MLflow server with one registered model, whose run holds a lunchbox among its artifacts."""

    def __init__(self, box: Path, home: Path) -> None:
        self.box = box
        self.home = home
        self.pointer: Pointer = point_at(read_manifest(box))
        self.aliases = {"champion": "1", "unreleased": "2"}
        self.asked: list[str] = []
        self.headers: httpx.Headers | None = None
        self.interrupt: Answer = lambda _: None
        self.source = self.connect("http://registry:5000/")

    def connect(self, uri: str, **settings: Any) -> MlflowSource:
        configured = ServeSettings(registry_uri=uri, bentoml_home=self.home, **settings)
        local = LocalSource(self.home, "ekiben")
        return MlflowSource(configured, local, transport=httpx.MockTransport(self.answer))

    @property
    def downloads(self) -> list[str]:
        return [path for path in self.asked if path.startswith("lunchbox/")]

    @property
    def place(self) -> Path:
        return self.home / "ekiben" / f"ekiben-{self.pointer.bento_version}"

    def version(self, number: str) -> dict[str, Any]:
        pointer = self.pointer
        tags = {"space_id": pointer.space_id, "bento_tag": f"ekiben:{pointer.bento_version}"} if number == "1" else {}
        listed = [{"key": key, "value": value} for key, value in tags.items()]
        return {"name": "ekiben", "version": number, "run_id": pointer.run_id, "tags": listed}

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.headers = request.headers
        path, query = request.url.path, request.url.params
        self.asked.append(query["path"] if path == "/get-artifact" else path.rpartition("mlflow/")[2])
        if (interrupted := self.interrupt(request)) is not None:
            return interrupted
        missing = httpx.Response(404, json={"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "not found"})
        match path.rpartition("mlflow/")[2]:
            case "registered-models/alias":
                number = self.aliases.get(query["alias"])
                return missing if number is None else httpx.Response(200, json={"model_version": self.version(number)})
            case "registered-models/get":
                aliases = [{"alias": alias, "version": number} for alias, number in self.aliases.items()]
                return httpx.Response(200, json={"registered_model": {"name": "ekiben", "aliases": aliases}})
            case "model-versions/get":
                known = query["version"] in "12"
                found = {"model_version": self.version(query["version"])}
                return httpx.Response(200, json=found) if known else missing
            case "model-versions/search":
                found = [self.version("1")] if self.pointer.run_id in query["filter"] else []
                return httpx.Response(200, json={"model_versions": found})
            case "artifacts/list":
                return httpx.Response(200, json=self.page(int(query.get("page_token", "0"))))
            case "/get-artifact":
                assert query["run_uuid"] == self.pointer.run_id
                return httpx.Response(200, content=(self.box / Path(query["path"]).name).read_bytes())
            case other:
                raise AssertionError(other)

    def page(self, first: int, size: int = 3) -> dict[str, Any]:
        """Some of the artifacts, and where the next ones begin."""
        paths = sorted(self.box.iterdir())
        files = [{"path": f"lunchbox/{path.name}", "file_size": str(path.stat().st_size)} for path in paths]
        more = {"next_page_token": str(first + size)} if first + size < len(files) else {}
        return {"files": [*files[first : first + size], {"path": "lunchbox/plots", "is_dir": True}], **more}


@pytest.fixture
def registry(tiny_lunchbox_path: Path, tmp_path: Path) -> Registry:
    return Registry(Path(shutil.copytree(tiny_lunchbox_path, tmp_path / "box")), tmp_path / "home")


# --- what a name means


def test_an_alias_is_looked_up(registry: Registry) -> None:
    assert registry.source.look("champion") == registry.pointer
    assert registry.source.look("challenger") is None
    assert registry.asked == ["registered-models/alias"] * 2, "one small question a look"
    assert registry.source.list_aliases() == {"champion": registry.pointer}, "the other was never released"


def test_a_version_has_many_names(registry: Registry) -> None:
    tag = f"ekiben:{registry.pointer.bento_version}"
    for reference in ("1", "v1", registry.pointer.bento_version, tag, registry.pointer.run_id, "champion"):
        assert registry.source.find(reference) == registry.pointer
    for unknown in ("3", "v3", "1-99999999", "nobody", "f" * 32):
        with pytest.raises(UnknownVersionError):
            registry.source.find(unknown)


def test_a_version_that_was_not_released_says_so(registry: Registry) -> None:
    with pytest.raises(UnknownVersionError, match=r"version 2 .* was not released\. Run `ekiben release --run 2`"):
        registry.source.look("unreleased")


# --- fetching


def test_a_version_is_fetched_whole_and_once(registry: Registry) -> None:
    assert registry.source.find_here(registry.pointer) is None
    path = registry.source.fetch(registry.pointer)
    assert path == registry.place == registry.source.find_here(registry.pointer)
    verify_files(path, read_manifest(path))
    assert len(registry.downloads) == len(read_manifest(path).files) + 1
    assert registry.source.fetch(registry.pointer) == path
    assert len(registry.downloads) == len(read_manifest(path).files) + 1
    assert not list(registry.home.glob("ekiben/.*.part"))


def test_what_is_in_the_store_of_this_machine_is_not_fetched(registry: Registry) -> None:
    stored = registry.home / "models" / "ekiben-model" / registry.pointer.bento_version
    shutil.copytree(registry.box, stored)
    assert registry.source.fetch(registry.pointer) == stored
    assert registry.downloads == []
    (stored / "tokenizer.json").write_bytes(b"altered")
    assert registry.source.fetch(registry.pointer) == registry.place, "what is here is not whole"


def test_a_fetched_version_that_was_altered_is_fetched_again(registry: Registry) -> None:
    path = registry.source.fetch(registry.pointer)
    (path / "tokenizer.json").write_bytes(b"altered")
    assert registry.source.fetch(registry.pointer) == path
    verify_files(path, read_manifest(path))


def test_an_interrupted_fetch_goes_on_where_it_was(registry: Registry) -> None:
    def break_off(request: httpx.Request) -> httpx.Response | None:
        if request.url.params.get("path", "").endswith("tokenizer.json"):
            raise httpx.ReadError("the connection broke")
        return None

    registry.interrupt = break_off
    with pytest.raises(RegistryError, match="ReadError the connection broke"):
        registry.source.fetch(registry.pointer)
    assert registry.source.find_here(registry.pointer) is None
    registry.interrupt = lambda _: None
    before = len(registry.downloads)
    verify_files(registry.source.fetch(registry.pointer), read_manifest(registry.box))
    assert len(registry.downloads) - before < len(read_manifest(registry.box).files)


def test_a_file_that_comes_with_another_hash_is_refused_and_not_kept(registry: Registry) -> None:
    model = registry.box / "model.fp32.onnx"
    good = model.read_bytes()
    model.write_bytes(good[:-1] + b"\0")
    with pytest.raises(LunchboxError, match=r"model\.fp32\.onnx of .* came from http://registry:5000 with SHA-256"):
        registry.source.fetch(registry.pointer)
    assert registry.source.find_here(registry.pointer) is None
    model.write_bytes(good)
    verify_files(registry.source.fetch(registry.pointer), read_manifest(registry.box))


@pytest.mark.parametrize("layout", [0, 9])
def test_a_manifest_of_another_time_is_refused(registry: Registry, layout: int) -> None:
    path = registry.box / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layout": layout}))
    with pytest.raises(LunchboxError, match=f"has layout {layout}; this server reads 1 and 2"):
        registry.source.fetch(registry.pointer)


def test_another_version_among_the_artifacts_is_refused(registry: Registry) -> None:
    with pytest.raises(LunchboxError, match="its version is '1', not '5'"):
        registry.source.fetch(registry.pointer.model_copy(update={"version": "5"}))


@pytest.mark.parametrize("name", ["../escape", "/etc/escape", ".hidden", "sub/file", "not-there"])
def test_a_manifest_that_lists_what_is_not_its_own_is_refused(registry: Registry, name: str) -> None:
    manifest = read_manifest(registry.box)
    write_manifest(registry.box, manifest.model_copy(update={"files": manifest.files | {name: "0" * 64}}))
    with pytest.raises(LunchboxError, match="is not among the artifacts"):
        registry.source.fetch(registry.pointer)
    assert not list(registry.home.rglob("*escape*"))


def test_a_run_without_a_lunchbox_says_so(registry: Registry) -> None:
    registry.interrupt = lambda request: httpx.Response(200, json={}) if "list" in request.url.path else None
    with pytest.raises(RegistryError, match="was not released, or not to the end"):
        registry.source.fetch(registry.pointer)


def test_too_little_room_is_said_before_anything_large_is_fetched(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("bentos.registry_client.shutil.disk_usage", lambda _: usage._replace(free=20 * 2**20))
    with pytest.raises(RegistryError, match=r"needs 32 MiB in .*, and 20 MiB are free there"):
        registry.source.fetch(registry.pointer)
    assert registry.downloads == [f"lunchbox/{MANIFEST_FILE}"]


def test_a_folder_that_cannot_be_written_is_named(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    source = registry.connect("http://registry:5000", shelf_folder=tmp_path / "file")
    with pytest.raises(RegistryError, match=rf"cannot be kept in {tmp_path}/file"):
        source.fetch(registry.pointer)


def test_fetched_versions_that_nobody_uses_make_room(registry: Registry) -> None:
    import os

    folder = registry.home / "ekiben"
    for number in range(6):
        old = folder / f"ekiben-{number}-0000000{number}"
        old.mkdir(parents=True)
        os.utime(old, (number, number))
    lately = folder / "ekiben-7-00000007"
    lately.mkdir()
    (folder / "other-1-00000001").mkdir()
    registry.source.fetch(registry.pointer)
    left = {path.name for path in folder.iterdir() if path.is_dir()}
    used_last = {"ekiben-4-00000004", "ekiben-5-00000005"}
    assert left == {registry.place.name, lately.name, "other-1-00000001", *used_last}


def test_what_an_alias_named_is_known_to_the_next_source_of_this_machine(registry: Registry) -> None:
    assert registry.source.recall("champion") is None
    registry.source.remember("champion", registry.pointer)
    registry.source.remember("champion", registry.pointer)
    registry.interrupt = lambda _: httpx.Response(503, text="away")
    assert registry.connect("http://registry:5000/").recall("champion") == registry.pointer
    assert registry.source.recall("challenger") is None
    for path in (registry.home / "ekiben" / "last-seen").rglob("*.json"):
        path.write_text("{")
    assert registry.source.recall("champion") is None


def test_the_fingerprint_changes_with_the_artifacts(registry: Registry) -> None:
    pointer = registry.pointer
    first = registry.source.fingerprint(pointer)
    assert registry.source.fingerprint(pointer) == first
    (registry.box / "more").touch()
    assert registry.source.fingerprint(pointer) != first


# --- asking


def test_the_registry_is_shown_who_asks_and_nobody_else(registry: Registry) -> None:
    secret = {"registry_username": "me", "registry_password": "secret"}
    for source, expected in (
        (registry.connect("http://registry:5000"), None),
        (registry.connect("http://you:hush@registry:5000"), "Basic " + base64.b64encode(b"you:hush").decode()),
        (registry.connect("http://registry:5000", **secret), "Basic " + base64.b64encode(b"me:secret").decode()),
        (registry.connect("http://registry:5000", registry_token="token"), "Bearer token"),
    ):
        source.look("champion")
        assert registry.headers is not None
        assert registry.headers.get("authorization") == expected
        assert source.name == "http://registry:5000"


def test_a_registry_under_a_path_is_asked_there(registry: Registry) -> None:
    paths: list[str] = []

    def note(request: httpx.Request) -> None:
        paths.append(request.url.path)

    registry.interrupt = note  # type: ignore[assignment]
    registry.connect("https://host/mlflow/").look("champion")
    assert paths == ["/mlflow/api/2.0/mlflow/registered-models/alias"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (httpx.ConnectError("refused"), "http://registry:5000 cannot be used: ConnectError refused"),
        (httpx.ReadTimeout("slow"), "ReadTimeout"),
        (httpx.Response(500, text="oh no"), "answered 500 to registered-models/alias"),
        (httpx.Response(403, json={"error_code": "PERMISSION_DENIED", "message": "no"}), "403 .* PERMISSION_DENIED no"),
        (httpx.Response(200, text="<html>", headers={"content-type": "text/html"}), "answered 200 .*an MLflow"),
        (httpx.Response(200, content=b"{", headers={"content-type": "application/json"}), "cannot be used"),
    ],
    ids=["refused", "slow", "broken", "forbidden", "a page", "half an answer"],
)
def test_a_registry_that_gives_no_answer_is_named(
    registry: Registry, answer: httpx.Response | Exception, message: str
) -> None:
    def interrupt(_: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    registry.interrupt = interrupt
    with pytest.raises(RegistryError, match=message):
        registry.source.look("champion")
