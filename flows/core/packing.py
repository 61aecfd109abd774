"""From lunchbox to Bento: BentoML's stores, `bentoml build`, and how both come into the store that is served from.

Core layer; the only module of `flows` that imports bentoml. Every function works on the stores in a BentoML home folder
`home`; without one that is BentoML's own, at `BENTOML_HOME`. A release builds and tests in a home of its own
(`stage_bento`), and `install` brings what has proven itself into the one that is served from: so `latest` never means
an untested Bento, and nothing that is served is touched. What a store has lost comes back by `put_back`.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bentos.aliases import replace_file
from bentos.errors import LunchboxError
from bentos.manifest import MANIFEST_FILE, Manifest, read_manifest, sha256_file, verify_files
from flows.core.folders import put_folder, scratch_folder
from flows.errors import EkibenError, InputError
from flows.settings import child_environment

BENTOFILE = "bentofile.yaml"
BUILD_TIMEOUT_S = 600.0
MAX_REASON_CHARS = 500
BENTOS, MODELS, SCRATCH = "bentos", "models", "tmp"  # folders in BentoML's home; every folder in a store is an item
LATEST = "latest"  # file beside the versions of an item


def model_tag(manifest: Manifest) -> str:
    """The lunchbox's name in the model store, e.g. `ekiben-model:3-1f2e3d4c`."""
    return f"{model_name(manifest.name)}:{manifest.bento_version}"


def model_name(name: str) -> str:
    """The name in the model store of what is registered as `name`."""
    return f"{name}-model"


def store_model(box: Path, manifest: Manifest, *, home: Path | None = None) -> str:
    """Copy the lunchbox at `box` into the model store, unless it is there already, and return its tag.

    The copy appears complete, in place of one that was cut short, altered or packed otherwise.

    Raises:
        LunchboxError: when the lunchbox itself does not verify.
    """
    import bentoml
    from bentoml._internal.models import ModelStore

    verify_files(box, manifest)
    tag = model_tag(manifest)
    if is_stored(manifest, home=home):
        return tag
    root = _model_store(home)._path
    with scratch_folder(root.parent / SCRATCH, "ekiben") as scratch:
        options = {"labels": release_labels(manifest), "metadata": {"metrics": manifest.metrics}}
        with bentoml.models.create(tag, **options, _model_store=ModelStore(scratch)):
            pass  # BentoML's own file; it would copy ours twice
        shutil.copytree(box, _item_path(scratch, tag), dirs_exist_ok=True)
        put_folder(_item_path(scratch, tag), _item_path(root, tag))
    return tag


def is_stored(manifest: Manifest, *, home: Path | None = None) -> bool:
    """Whether the model store holds just this lunchbox, whole."""
    try:
        path = stored_path(manifest, home=home)
        if read_manifest(path) != manifest:
            return False
        verify_files(path, manifest)
    except LunchboxError:
        return False
    return True


def stored_path(manifest: Manifest, *, home: Path | None = None) -> Path:
    """The folder of a stored lunchbox.

    Raises:
        LunchboxError: it is not in the model store.
    """
    return find_model(manifest.name, manifest.bento_version, home=home)


def find_model(name: str, bento_version: str, *, home: Path | None = None) -> Path:
    """The folder of the stored lunchbox of what is registered as `name`, e.g. in the version `3-1f2e3d4c`.

    Raises:
        LunchboxError: it is not in the model store, whole.
    """
    tag = f"{model_name(name)}:{bento_version}"
    stored = _find(_model_store(home), tag)
    if stored is None:
        raise LunchboxError(f"{tag} is not in the model store; release the version again")
    return Path(stored.path)


def build_bento(manifest: Manifest, *, root: Path, home: Path | None = None) -> str:
    """Build the Bento of a stored model from `root`/bentofile.yaml, unless it is there already, and return its tag.

    The build imports the service and sets state that lasts as long as its process, so it runs in one of its own.

    Raises:
        InputError: when there is no bentofile.
        EkibenError: when the build fails, or does not end; the message is the error that it printed, in one line.
    """
    bentofile = root / BENTOFILE
    if not bentofile.is_file():
        raise InputError(f"no {BENTOFILE} in {root}: run from the project's folder, or from a clone that has one")
    store = _bento_store(home)
    if _find(store, manifest.tag) is not None:
        return manifest.tag
    with contextlib.suppress(FileNotFoundError):  # cut short while it was written
        shutil.rmtree(_item_path(store._path, manifest.tag))
    command = [sys.executable, "-m", "bentoml", "build", str(root), "--bentofile", str(bentofile)]
    command += ["--name", manifest.name, "--version", manifest.bento_version]
    for name, value in release_labels(manifest).items():
        command += ["--label", f"{name}={value}"]
    own = {"EKIBEN_MODEL_TAG": model_tag(manifest)} | ({} if home is None else {"BENTOML_HOME": str(home)})
    try:
        build = subprocess.run(
            command,
            env=child_environment(own),
            cwd=root,
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EkibenError(
            f"`bentoml build` of {manifest.tag} did not end within {BUILD_TIMEOUT_S:g} s; give the command again when "
            "the machine is less busy"
        ) from None
    if build.returncode != 0:
        printed = " ".join((build.stdout + build.stderr).split())
        reason = printed[printed.rfind("Error: ") :][:MAX_REASON_CHARS] or f"exit code {build.returncode}"
        raise EkibenError(f"`bentoml build` of {manifest.tag} failed: {reason}")
    return manifest.tag


def bento_exists(tag: str, *, home: Path | None = None) -> bool:
    """Whether the Bento store holds `tag`, whole."""
    return _find(_bento_store(home), tag) is not None


def stage_bento(box: Path, manifest: Manifest, *, root: Path, home: Path) -> str:
    """Store and build in the BentoML home `home`, made when missing; a Bento that was built before is copied there.

    Raises:
        LunchboxError: when the lunchbox does not verify.
        EkibenError: when the build fails.
    """
    for name in (BENTOS, MODELS, SCRATCH):
        (home / name).mkdir(parents=True, exist_ok=True)
    store_model(box, manifest, home=home)
    if bento_exists(manifest.tag):
        _copy_bento(manifest.tag, _bento_store(None), _bento_store(home))
    return build_bento(manifest, root=root, home=home)


def install(box: Path, manifest: Manifest, *, staged: Path) -> None:
    """Bring a lunchbox and its Bento, built in the home `staged`, into BentoML's own stores.

    `latest` stays what it was: `point_latest` moves it. What is there already stays untouched.

    Raises:
        LunchboxError: when the lunchbox does not verify.
    """
    store_model(box, manifest)
    if not bento_exists(manifest.tag):
        _copy_bento(manifest.tag, _bento_store(staged), _bento_store(None))


def put_back(box: Path, manifest: Manifest, *, root: Path, staging: Path) -> bool:
    """Bring a released lunchbox and its Bento into BentoML's own stores, where they are not there whole.

    Args:
        box: The lunchbox as it was released.
        manifest: Its manifest.
        root: Folder of the bentofile.
        staging: BentoML home folder in which a Bento is built when there is none.

    Returns:
        Whether something was missing.

    Raises:
        LunchboxError: when the lunchbox does not verify.
        EkibenError: when the build fails.
    """
    if is_stored(manifest) and bento_exists(manifest.tag):
        return False
    stage_bento(box, manifest, root=root, home=staging)
    install(box, manifest, staged=staging)
    return True


def point_latest(name: str, bento_version: str, home: Path) -> None:
    """Let `latest` of Bento and model mean a version, in the stores that have it."""
    for store, item in ((BENTOS, name), (MODELS, model_name(name))):
        folder = home / store / item
        pointer = folder / LATEST
        if not (folder / bento_version).is_dir():
            continue
        if not pointer.is_file() or pointer.read_text(encoding="utf-8").strip() != bento_version:
            replace_file(pointer, bento_version)


def release_labels(manifest: Manifest) -> dict[str, str]:
    """The way back from a Bento or a stored model to run, data and code."""
    return {
        "run_id": manifest.run_id,
        "version": manifest.version,
        "data_md5": manifest.data.md5,
        "git_commit": manifest.git_commit or "unknown",
        "space_id": manifest.space_id,
    }


def hash_manifest(box: Path) -> str:
    """SHA-256 of the manifest of the lunchbox at `box`, in hex: it vouches for every other file."""
    return sha256_file(box / MANIFEST_FILE)


def _copy_bento(tag: str, source: Any, target: Any) -> None:
    with scratch_folder(target._path.parent / SCRATCH, "ekiben") as scratch:
        copy = scratch / "bento"
        shutil.copytree(_item_path(source._path, tag), copy, symlinks=True)
        put_folder(copy, _item_path(target._path, tag))


def _model_store(home: Path | None) -> Any:
    from bentoml._internal.configuration.containers import BentoMLContainer
    from bentoml._internal.models import ModelStore

    return BentoMLContainer.model_store.get() if home is None else ModelStore(home / MODELS)


def _bento_store(home: Path | None) -> Any:
    from bentoml._internal.bento import BentoStore
    from bentoml._internal.configuration.containers import BentoMLContainer

    return BentoMLContainer.bento_store.get() if home is None else BentoStore(home / BENTOS)


def _item_path(root: Path, tag: str) -> Path:
    """Where an item of a store lies."""
    name, _, version = tag.partition(":")
    return root / name / version


def _find(store: Any, tag: str) -> Any:
    """The item of a BentoML store, or None when it is not there, or was cut short while being written."""
    from bentoml.exceptions import BentoMLException

    try:
        item = store.get(tag)
    except BentoMLException:
        return None
    return item if str(item.tag) == tag else None  # the store also finds tags by their beginning
