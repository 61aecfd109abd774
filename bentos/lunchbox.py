"""An opened lunchbox: its manifest, its engine, and the checks that say whether its vectors may be trusted."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from bentos.adapter import Adapter, read_adapters
from bentos.engine import Engine, Runner, run_here
from bentos.errors import LunchboxError
from bentos.manifest import CANARY_FILE, MANIFEST_FILE, Manifest, read_manifest, sha256_file, verify_files
from bentos.vectors import Vectors, cosine_pairs

MIN_CANARY_COSINE = 0.9999


@dataclass(frozen=True)
class Canary:
    """A few texts and the vectors that they must have."""

    texts: list[str]
    vectors: Vectors  # (texts, dim)


@dataclass
class Lunchbox:
    """A lunchbox whose files were verified and loaded."""

    path: Path
    manifest: Manifest
    engine: Engine
    canary: Canary
    stamps: dict[str, tuple[int, ...]]  # file name -> what its status was when it was last found good
    adapters: dict[str, Adapter] = field(default_factory=dict)  # id of an older space -> the map into it

    def find_alteration(self) -> str | None:
        """Say which file on disk is missing or differs from the manifest, or None.

        A file is hashed again only when its size, time or inode changed since it was last found good.
        """
        for name in self.stamps:
            try:
                stamp = _stamp(self.path / name)
                if stamp == self.stamps[name]:
                    continue
                if not self._is_as_loaded(name):
                    return f"{name} was altered on disk after it was loaded"
            except (OSError, LunchboxError) as error:
                return f"{name} cannot be read any more: {error}"
            self.stamps[name] = stamp
        return None

    def _is_as_loaded(self, name: str) -> bool:
        if name == MANIFEST_FILE:
            return read_manifest(self.path) == self.manifest
        return sha256_file(self.path / name) == self.manifest.files[name]

    def find_deviation(self, vectors: Vectors) -> str | None:
        """Say how far the canary texts' `vectors` (texts, dim), just computed, are from what they must be, or None."""
        if vectors.shape != self.canary.vectors.shape:
            return f"the canary vectors have shape {vectors.shape}, expected {self.canary.vectors.shape}"
        cosines = cosine_pairs(vectors, self.canary.vectors)
        if not np.isfinite(cosines).all():
            return "the canary vectors are not finite"
        if cosines.min() < MIN_CANARY_COSINE:
            return f"the canary vectors are wrong: cosine {cosines.min():.6f}, at least {MIN_CANARY_COSINE} is needed"
        return None


def open_lunchbox(
    path: Path,
    *,
    threads: int = 1,
    precision: str | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    run_aside: Runner = run_here,
) -> Lunchbox:
    """Verify every file of the lunchbox at `path` and load it; the arguments are those of `Engine`.

    Raises:
        LunchboxError: when a file is missing, altered or unusable; the message names it.
    """
    manifest = read_manifest(path)
    # Before the hashes: a file that changes meanwhile is then looked at again. What is missing, `verify_files` names.
    stamps = {name: _stamp(path / name) for name in (MANIFEST_FILE, *manifest.files) if (path / name).is_file()}
    run_aside(lambda: verify_files(path, manifest))
    adapters = read_adapters(path, manifest)
    engine = Engine(path, manifest, threads=threads, precision=precision, device=device, run_aside=run_aside)
    return Lunchbox(path, manifest, engine, read_canary(path, manifest, engine.precision), stamps, adapters)


def read_canary(path: Path, manifest: Manifest, precision: str | None = None) -> Canary:
    """Read the canary texts of the lunchbox at `path` and their vectors in a precision; None takes the default one.

    Raises:
        LunchboxError: when the file is missing or malformed, or knows nothing of the precision.
    """
    try:
        raw = json.loads((path / CANARY_FILE).read_text(encoding="utf-8"))
        is_default = precision in (None, manifest.default_precision)
        vectors = raw["vectors"] if is_default else raw["other_precisions"][precision]
        canary = Canary(list(raw["texts"]), np.asarray(vectors, dtype=np.float32))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LunchboxError(f"{CANARY_FILE} cannot be used: {error!r}") from None
    if not canary.texts or canary.vectors.shape != (len(canary.texts), manifest.dim):
        raise LunchboxError(
            f"{CANARY_FILE} has {len(canary.texts)} texts and vectors of shape {canary.vectors.shape}; "
            f"expected one vector of {manifest.dim} dimensions a text, and at least one"
        )
    return canary


def _stamp(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return (status.st_size, status.st_mtime_ns, status.st_ino)
