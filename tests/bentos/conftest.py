"""One Bento, built once a session from a tiny lunchbox; and one server of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bentos.manifest import Manifest, read_manifest
from tests.bentos.shelves import make_successor
from tests.serving import Server, bento_home, copy_lunchbox, serve

ROOT = Path(__file__).parents[2]
LIMITS = {"EKIBEN_MAX_TEXTS": "8", "EKIBEN_MAX_CHARS": "2000", "EKIBEN_MAX_BODY_BYTES": "20000"}


@pytest.fixture(scope="session")
def built_home(tmp_path_factory: pytest.TempPathFactory, tiny_lunchbox_path: Path) -> Path:
    """A BentoML home that holds the Bento of the tiny lunchbox, and a newer model in its store."""
    from flows.core.packing import build_bento, store_model

    folder = tmp_path_factory.mktemp("bentoml")
    newer = copy_lunchbox(tiny_lunchbox_path, folder / "newer", version="2", run_id="f" * 32)
    with bento_home(folder / "home") as home:
        manifest = read_manifest(tiny_lunchbox_path)
        store_model(tiny_lunchbox_path, manifest)
        build_bento(manifest, root=ROOT)
        store_model(newer, read_manifest(newer))
    return home


@pytest.fixture(scope="session")
def manifest(tiny_lunchbox_path: Path) -> Manifest:
    return read_manifest(tiny_lunchbox_path)


@pytest.fixture(scope="session")
def successor_path(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> Path:
    """The lunchbox of version 2, which has a map into the space of `tiny_lunchbox_path`. Do not write into it."""
    return make_successor(tmp_path_factory.mktemp("successor") / "lunchbox", manifest)


@pytest.fixture(scope="session")
def server(built_home: Path, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The Bento, served from another folder, with small limits."""
    with serve(manifest.tag, built_home, tmp_path_factory.mktemp("elsewhere"), LIMITS) as server:
        yield server
