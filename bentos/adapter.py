"""Maps from a model's space into the space of an earlier one, so that an index built with that one can still be asked.

A map is one matrix W (dim of the new space, dim of the old space) that turns and mirrors, and neither stretches nor
bends: angles between the vectors that it maps stay what they were. Where the old space has fewer dimensions, it leaves
some out. `flows.core.procrustes` fits it; here it is read, checked and applied.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bentos.errors import LunchboxError
from bentos.manifest import Compat, Manifest
from bentos.vectors import FloatArray, Vectors, normalize

ADAPTER_PREFIX = "adapter."
MAX_SKEW = 1e-3  # of W's smaller Gram matrix from the identity, in any entry; what float32 rounding makes is below 1e-5


@dataclass(frozen=True)
class Adapter:
    """The way from this box's space into an older one."""

    space_id: str  # of the older space
    matrix: Vectors  # float32 (dim of this space, dim of the older one), read-only

    @property
    def dim(self) -> int:
        """Dimensions of the older space."""
        return int(self.matrix.shape[1])

    def apply(self, vectors: FloatArray) -> Vectors:
        """Map vectors of this space (n, dim of this space), of any length, to unit vectors of the older one.

        A vector that the map leaves nothing of, such as a zero vector, becomes zero.
        """
        mapped: Vectors = normalize(normalize(vectors) @ self.matrix).astype(np.float32, copy=False)
        return mapped


def name_adapter(space_id: str) -> str:
    """The file name of the map into the space `space_id`."""
    return f"{ADAPTER_PREFIX}{space_id}.npy"


def read_adapter(path: Path, space_id: str, dim: int) -> Adapter:
    """Read and check the map in the file `path`, from a space of `dim` dimensions into the space `space_id`.

    Raises:
        LunchboxError: when the file is missing or is no such map.
    """
    try:
        matrix = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise LunchboxError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(matrix, np.ndarray):  # an archive of several arrays
        matrix.close()
        raise LunchboxError(f"{path.name} is no single array")
    if problem := find_problem(matrix, dim):
        raise LunchboxError(f"{path.name} {problem}: it is no map between spaces")
    matrix.setflags(write=False)
    return Adapter(space_id, matrix)


def find_problem(matrix: np.ndarray, dim: int) -> str | None:
    """Say what keeps `matrix` from being a map out of a space of `dim` dimensions, or None."""
    if matrix.dtype != np.float32 or matrix.ndim != 2 or matrix.shape[0] != dim or matrix.shape[1] < 1:
        return f"has shape {matrix.shape} of {matrix.dtype}, expected ({dim}, dimensions of the older space) of float32"
    if not np.isfinite(matrix).all():
        return "has numbers that are not finite"
    wide = matrix.astype(np.float64)
    gram = wide @ wide.T if matrix.shape[0] <= matrix.shape[1] else wide.T @ wide
    skew = float(np.abs(gram - np.eye(len(gram))).max())
    if skew > MAX_SKEW:
        return f"stretches vectors: it is {skew:.2g} from orthogonal, at most {MAX_SKEW:g} is allowed"
    return None


def read_adapters(box: Path, manifest: Manifest) -> dict[str, Adapter]:
    """Read every map of the lunchbox at `box`: id of the older space -> map.

    An identical or compatible space without a file is reached by the map that changes nothing: new vectors may stand in
    for its own as they are.

    Raises:
        LunchboxError: when a map cannot be used, leads nowhere that the manifest knows, or has no hash there.
    """
    adapters = {}
    for relation in manifest.relations:
        adapter = _read_one(box, manifest, relation)
        if adapter is not None:
            adapters[relation.space_id] = adapter
    return adapters


def _read_one(box: Path, manifest: Manifest, relation: Compat) -> Adapter | None:
    if relation.space_id == manifest.space_id:
        return None
    if relation.adapter is None:
        stands_in = relation.kind in ("identical", "compatible")
        return Adapter(relation.space_id, np.eye(manifest.dim, dtype=np.float32)) if stands_in else None
    if relation.adapter not in manifest.files:
        raise LunchboxError(f"{relation.adapter} is named in the manifest, but has no hash there")
    adapter = read_adapter(box / relation.adapter, relation.space_id, manifest.dim)
    if relation.dim is not None and adapter.dim != relation.dim:
        raise LunchboxError(
            f"{relation.adapter} leads to {adapter.dim} dimensions, the space {relation.space_id} has {relation.dim}"
        )
    return adapter
