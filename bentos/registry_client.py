"""Versions from an MLflow server, by its REST interface alone: MLflow itself would triple what a server loads.

Loaded only when a server follows an MLflow server, or is asked for a version of one. A version is fetched from the
artifacts of its run into a folder beside its final place, file by file, each compared with the hash in the manifest;
the folder gets its name when it is whole. What was fetched before and is whole is not fetched again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import httpx
from pydantic import ValidationError

from bentos.aliases import Pointer, locked, read_aliases, write_alias
from bentos.errors import LunchboxError, RegistryError
from bentos.manifest import MANIFEST_FILE, Manifest, name_release, read_manifest, sha256_file
from bentos.settings import ServeSettings
from bentos.sources import LocalSource, UnknownVersionError, check_box, fingerprint_folder, mark_used

API = "/api/2.0/mlflow/"
NUMBERED = re.compile(r"v?(?P<number>\d+)(?P<run>-[0-9a-f]+)?")  # 3, v3 or 3-1f2e3d4c; anything else is an alias
ARTIFACT_FOLDER = "lunchbox"  # of a run: where a release puts the files of the box
LOOK_TIMEOUT_S = 5.0
FILE_TIMEOUT_S = 30.0  # between two pieces of a file
PIECE_BYTES = 2**20
SPARE_BYTES = 32 * 2**20  # that must stay free on the disk
SEEN_FOLDER = "last-seen"  # beside the fetched versions: what the followed alias named
KEPT = 4  # fetched versions, the ones used last
UNUSED_S = 24 * 3600.0


class MlflowSource:
    """The registered model of an MLflow server, and the versions that were fetched from it."""

    def __init__(
        self, settings: ServeSettings, local: LocalSource, *, transport: httpx.BaseTransport | None = None
    ) -> None:
        """Prepare a source; nothing is asked yet.

        Args:
            settings: address, user, and where fetched versions are kept.
            local: looked into first, as what is here already need not be fetched.
            transport: in place of the network, for tests.
        """
        address = urlsplit(settings.registry_uri)
        self._name = settings.model_name
        self._folder = settings.fetched_folder
        self._local = local
        host = address.netloc.rpartition("@")[2]
        self._url = urlunsplit((address.scheme, host, address.path.rstrip("/"), "", ""))
        auth: tuple[str, str] | None = None
        headers = {}
        if settings.registry_token is not None:
            headers["Authorization"] = f"Bearer {settings.registry_token.get_secret_value()}"
        elif settings.registry_username:
            password = settings.registry_password
            auth = (settings.registry_username, password.get_secret_value() if password else "")
        elif address.username:
            auth = (unquote(address.username), unquote(address.password or ""))
        self._client = httpx.Client(auth=auth, headers=headers, timeout=LOOK_TIMEOUT_S, transport=transport)

    @property
    def name(self) -> str:
        """The server's address, without any password."""
        return self._url

    def look(self, alias: str) -> Pointer | None:
        """The version that an alias names now."""
        query = {"name": self._name, "alias": alias}
        found = self._ask("registered-models/alias", query, part="model_version")
        return None if found is None else self._point(found)

    def list_aliases(self) -> dict[str, Pointer]:
        """Every alias and the version that it names; those that name a version that was never released are left out."""
        found = self._ask("registered-models/get", {"name": self._name}, part="registered_model")
        pointers: dict[str, Pointer] = {}
        for alias in (found or {}).get("aliases", []):
            with contextlib.suppress(LunchboxError, UnknownVersionError):
                pointers[alias["alias"]] = self._version(str(alias["version"]))
        return pointers

    def find(self, reference: str) -> Pointer:
        """The version that a reference means."""
        wanted = reference.removeprefix(f"{self._name}:")
        if (numbered := NUMBERED.fullmatch(wanted)) is not None:
            number = numbered["number"]
            pointer = self._version(number)
            if numbered["run"] is None or wanted == pointer.bento_version:
                return pointer
            raise UnknownVersionError(f"version {number} at {self._url} is {pointer.bento_version}, not {wanted!r}")
        if (pointer_or_none := self.look(wanted)) is not None:
            return pointer_or_none
        if wanted.isalnum():
            query = {"filter": f"name='{self._name}' and run_id='{wanted}'", "max_results": "2"}
            versions = (self._ask("model-versions/search", query) or {}).get("model_versions", [])
            if len(versions) == 1:
                return self._point(versions[0])
        return self._local.find(reference)

    def find_here(self, pointer: Pointer) -> Path | None:
        """The folder of a version that is on this machine already."""
        places = (self._local.find_here(pointer), self._place(pointer))
        return next((folder for folder in places if folder is not None and folder.is_dir()), None)

    def fetch(self, pointer: Pointer) -> Path:
        """The folder of a version, fetched unless it is here, whole."""
        for folder in (self._local.find_here(pointer), self._place(pointer)):
            if folder is not None and folder.is_dir():
                with contextlib.suppress(LunchboxError, OSError):
                    check_box(folder, pointer, hashes=True)
                    mark_used(folder)
                    return folder
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with locked(self._folder / f".{pointer.bento_version}.lock"):  # other servers of this machine fetch too
                return self._fetch(pointer)
        except OSError as error:
            raise RegistryError(
                f"{pointer.bento_version} cannot be kept in {self._folder}: {error.strerror or error}"
            ) from None

    def remember(self, alias: str, pointer: Pointer) -> None:
        """Keep what an alias named, beside the fetched versions."""
        write_alias(self._folder / SEEN_FOLDER, self._name, alias, pointer)

    def recall(self, alias: str) -> Pointer | None:
        """What an alias named when its version was last served with these fetched versions."""
        with contextlib.suppress(RegistryError):
            return read_aliases(self._folder / SEEN_FOLDER, self._name).get(alias)
        return None

    def fingerprint(self, pointer: Pointer) -> str:
        """A hash of the pointer, of what is here of it, and of what the run's artifacts are."""
        listed = json.dumps(self._list_files(pointer), sort_keys=True)
        here = fingerprint_folder(pointer, self.find_here(pointer))
        return hashlib.sha256(f"{listed} {here}".encode()).hexdigest()[:16]

    # --- fetching

    def _place(self, pointer: Pointer) -> Path:
        return self._folder / f"{self._name}-{pointer.bento_version}"

    def _fetch(self, pointer: Pointer) -> Path:
        place = self._place(pointer)
        with contextlib.suppress(LunchboxError):
            check_box(place, pointer, hashes=True)  # another server has fetched it meanwhile
            return place
        sizes = self._list_files(pointer)
        if MANIFEST_FILE not in sizes:
            raise RegistryError(
                f"the run {pointer.run_id} at {self._url} has no {ARTIFACT_FOLDER}/{MANIFEST_FILE}: version "
                f"{pointer.version} was not released, or not to the end. Release it again"
            )
        part = place.with_name(f".{place.name}.part")
        part.mkdir(exist_ok=True)
        self._download(pointer, MANIFEST_FILE, part)
        manifest = read_manifest(part)
        check_box(part, pointer)
        self._check_names(manifest, sizes)
        missing = {name: sizes[name] for name in manifest.files if not _is(part / name, manifest.files[name])}
        free = shutil.disk_usage(self._folder).free
        if (needed := sum(missing.values()) + SPARE_BYTES) > free:
            raise RegistryError(
                f"{pointer.bento_version} needs {needed / 2**20:.0f} MiB in {self._folder}, and {free / 2**20:.0f} MiB "
                "are free there: make room, or set EKIBEN_SHELF_FOLDER"
            )
        for name in missing:
            found = self._download(pointer, name, part)
            if found != (expected := manifest.files[name]):
                (part / name).unlink(missing_ok=True)
                raise LunchboxError(
                    f"{name} of {pointer.bento_version} came from {self._url} with SHA-256 {found[:12]}..., the "
                    f"manifest says {expected[:12]}...: it was altered there or on its way. Release the version again"
                )
        if place.exists():  # it was not whole
            shutil.rmtree(place)
        part.rename(place)
        self._tidy(keep=place)
        return place

    def _check_names(self, manifest: Manifest, sizes: Mapping[str, int]) -> None:
        for name in manifest.files:
            if name not in sizes or name != PurePosixPath(name).name or name.startswith("."):
                raise LunchboxError(
                    f"the manifest of {manifest.tag} lists {name!r}, which is not among the artifacts of its run at "
                    f"{self._url}: release the version again"
                )

    def _list_files(self, pointer: Pointer) -> dict[str, int]:
        """Name and size in bytes of every file of the run's lunchbox."""
        sizes: dict[str, int] = {}
        token: str | None = None
        while True:
            query = {"run_id": pointer.run_id, "path": ARTIFACT_FOLDER, **({"page_token": token} if token else {})}
            page = self._ask("artifacts/list", query) or {}
            for file in page.get("files", []):
                if not file.get("is_dir"):
                    sizes[PurePosixPath(file["path"]).name] = int(file.get("file_size") or 0)
            token = page.get("next_page_token")
            if not token:
                return sizes

    def _download(self, pointer: Pointer, name: str, to: Path) -> str:
        """Fetch one file, and return its SHA-256."""
        digest = hashlib.sha256()
        query = {"run_uuid": pointer.run_id, "path": f"{ARTIFACT_FOLDER}/{name}"}
        stream = self._client.stream("GET", f"{self._url}/get-artifact", params=query, timeout=FILE_TIMEOUT_S)
        with self._plain_errors(), stream as response:
            if response.status_code != httpx.codes.OK:
                response.read()
                raise RegistryError(
                    f"{self._url} answered {response.status_code} when asked for {name}: {response.text[:200]}"
                )
            with (to / name).open("wb") as file:
                for piece in response.iter_bytes(PIECE_BYTES):
                    file.write(piece)
                    digest.update(piece)
                file.flush()
                os.fsync(file.fileno())
        return digest.hexdigest()

    def _tidy(self, keep: Path) -> None:
        """Remove fetched versions that nobody has used for long; `mark_used` says which are in use."""
        long_ago = time.time() - UNUSED_S
        fetched = [folder for folder in self._folder.glob(f"*{self._name}-*-*") if folder.is_dir() and folder != keep]
        fetched.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
        for folder in fetched[KEPT - 1 :]:
            if folder.stat().st_mtime < long_ago:
                shutil.rmtree(folder, ignore_errors=True)

    # --- asking

    def _version(self, version: str) -> Pointer:
        found = self._ask("model-versions/get", {"name": self._name, "version": version}, part="model_version")
        if found is None:
            raise UnknownVersionError(f"the model {self._name!r} at {self._url} has no version {version}")
        return self._point(found)

    def _point(self, version: Mapping[str, Any]) -> Pointer:
        tags = {tag["key"]: tag["value"] for tag in version.get("tags", [])}
        run_id = version.get("run_id") or tags.get("run_id", "")
        number = str(version["version"])
        bento_version = name_release(number, run_id)
        try:
            return Pointer(
                version=number, bento_version=bento_version, run_id=run_id, space_id=tags.get("space_id", "")
            )
        except ValidationError:
            raise UnknownVersionError(
                f"version {number} of {self._name!r} at {self._url} has no `space_id` among its tags: it was not "
                f"released. Run `ekiben release --run {number}`"
            ) from None

    def _ask(self, path: str, query: dict[str, str], *, part: str | None = None) -> dict[str, Any] | None:
        """Ask the REST interface, for one thing (`part` of the answer; None when there is no such thing) or a list."""
        with self._plain_errors():
            response = self._client.get(f"{self._url}{API}{path}", params=query)
            is_json = "json" in response.headers.get("content-type", "")
            content = response.json() if is_json else None
        if response.status_code == httpx.codes.OK and isinstance(content, dict):
            if part is None:
                return content
            if isinstance(found := content.get(part), dict):
                return found
        content = content if isinstance(content, dict) else {}
        code, message = content.get("error_code", ""), content.get("message", response.text)
        if part is not None and code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise RegistryError(
            f"the registry {self._url} answered {response.status_code} to {path}: {code} {message[:200]}. Is this an "
            "MLflow server (MLFLOW_TRACKING_URI), and may this server ask it?"
        )

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise RegistryError(
                f"the registry {self._url} cannot be used: {type(error).__name__} {error}. Is the address right "
                "(MLFLOW_TRACKING_URI), and the server up?"
            ) from None


def _is(path: Path, sha256: str) -> bool:
    """Whether a file is there and has this hash."""
    return path.is_file() and sha256_file(path) == sha256
