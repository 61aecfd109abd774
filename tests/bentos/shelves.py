"""Versions side by side, for tests: a second one with a map into the space of the first; shelves of real encoders."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bentos.encoder import Encoder
from bentos.lunchbox import Lunchbox, open_lunchbox
from bentos.manifest import Compat, Manifest, read_manifest
from bentos.shelf import Shelf
from bentos.vectors import Vectors
from tests.factories import TINY_DIM, make_tiny_lunchbox

SUCCESSOR_RUN_ID = "fedcba9876543210fedcba9876543210"
NESTED_DIM = 8


def make_shelf(*encoders: Encoder, aliases: Mapping[str, str] | None = None) -> Shelf:
    """A shelf of started encoders; the first one is live, `aliases` name tags."""
    shelf = Shelf()
    for encoder in encoders:
        shelf.add(encoder)
        shelf.show(encoder.manifest.tag)
    if encoders:
        shelf.flip(encoders[0].manifest.tag, time.monotonic())
    shelf.aliases = dict(aliases or {})
    return shelf


def open_shared(path: Path) -> Lunchbox:
    """Open a lunchbox for several tests: its engine goes on when a version of it has left a shelf."""
    box = open_lunchbox(path)
    box.engine.close = lambda: None  # type: ignore[method-assign]
    return box


def make_map(seed: int = 0, dim: int = TINY_DIM, old_dim: int = TINY_DIM) -> Vectors:
    """A matrix that turns vectors, as a lunchbox may hold it for the way into an older space."""
    turned, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))
    return np.ascontiguousarray(turned[:, :old_dim], dtype=np.float32)


def relate(box: Path, older: Manifest, matrix: Vectors | None, kind: str) -> Manifest:
    """Write into a lunchbox how its space relates to that of an older version."""
    from flows.core.lunchbox import attach_compat

    known = {"version": older.version, "tag": older.tag, "space_id": older.space_id, "dim": older.dim}
    return attach_compat(box, read_manifest(box), Compat.model_validate({"kind": kind, **known}), matrix)


def make_successor(to: Path, older: Manifest) -> Path:
    """Pack version 2: other weights, a map into the space of version 1, and a smaller number of dimensions."""
    from bentos.manifest import write_manifest

    make_tiny_lunchbox(to, version="2", run_id=SUCCESSOR_RUN_ID, seed=1)
    write_manifest(to, read_manifest(to).model_copy(update={"nested_dims": [NESTED_DIM]}))
    relate(to, older, make_map(), "adapter")
    return to
