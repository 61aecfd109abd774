"""The lunchbox: the one thing that passes from the flows to the server, and how it is read and checked.

```
manifest.json      this module's `Manifest`
tokenizer.json     the Hugging Face `tokenizers` file, truncation and padding off
model.fp32.onnx    inputs `input_ids`, `attention_mask` (batch, tokens) int64; outputs `vectors`, `unit_vectors`
model.int8.onnx    the same in int8: there when it was certified, and then the default
certificate.json   what the export was compared with, and how close it came
canary.json        `{"texts": [...], "vectors": [[...]], "other_precisions": {"fp32": [[...]]}}`: readiness embeds the
                   texts and compares; `vectors` are those of the default precision
adapter.<id>.npy   the map into the older space <id> (bentos/adapter.py), where one proved itself
MODEL_CARD.md      the same for people
```
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from bentos.errors import LunchboxError

MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
CERTIFICATE_FILE = "certificate.json"
CANARY_FILE = "canary.json"
MODEL_CARD_FILE = "MODEL_CARD.md"
LAYOUT: Literal[2] = 2
SUPPORTED_LAYOUTS = (1, 2)


class Calibration(BaseModel):
    """A monotone piecewise linear map from cosine to score, fitted on dev: `scores[i]` at `cosines[i]`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cosines: list[float]
    scores: list[float]

    def apply(self, cosines: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Map cosines to scores in 0..1; beyond the outermost points the score stays what it is there."""
        scores: npt.NDArray[np.float64] = np.interp(np.asarray(cosines, dtype=np.float64), self.cosines, self.scores)
        return scores


class DataVersion(BaseModel):
    """Which data a model was trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(description="Where the data was read from; several addresses are joined by a space.")
    md5: str = Field(description="MD5 of the file, or of the list of files with their MD5s.")
    revision: str | None = Field(None, description="Git revision of the DVC repository, when one was asked for.")


CompatClass = Literal["identical", "compatible", "adapter", "breaking"]


class Compat(BaseModel):
    """How the space of a model relates to that of a champion before it, by figures on texts that fitted nothing.

    `identical`: one model, whose vectors differ by rounding or by what int8 may change. `compatible`: an index of the
    old vectors may be asked with new ones as they are, and both may stand in it. `adapter`: with new ones that went
    through the map. `breaking`: not at all, it must be built anew.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: CompatClass
    version: str = Field(description="Registry version of that champion.")
    tag: str = Field(description="Its tag, e.g. `ekiben:2-9c1d3b5f`.")
    space_id: str = Field(description="Its space.")
    dim: int | None = Field(None, description="Dimensions of its space.")
    adapter: str | None = Field(None, description="File with the map into its space, when the map passed its gate.")
    figures: dict[str, float] = Field(
        default_factory=dict, description="What was measured; `flows/core/compat.py` says what each name means."
    )
    reason: str = Field("", description="Why it is of this class and not of a better one, in a sentence.")


class Manifest(BaseModel):
    """What is in the box, where it comes from, and how to check it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout: Literal[1, 2] = LAYOUT
    name: str = Field(description="Registered model name, `ekiben`.")
    version: str = Field(description="Version in the model registry, `1`, `2`, ...")
    run_id: str = Field(description="MLflow run that trained it.")
    data: DataVersion
    git_commit: str | None = None
    lock_sha256: str | None = None
    base_model: str
    dim: int
    max_tokens: int
    pooling: str = Field(description="`mean`, `cls`, `max` or `lasttoken`.")
    normalize: bool = Field(description="Whether vectors have length 1 unless a request says otherwise.")
    prompts: dict[str, str] = Field(default_factory=dict, description="Prompt name -> text put before each input.")
    default_prompt: str | None = None
    precisions: dict[str, str] = Field(description="Precision -> file name, e.g. `fp32: model.fp32.onnx`.")
    default_precision: str = "fp32"
    space_id: str = Field(description="Two vectors may be compared only when it is equal.")
    nested_dims: list[int] = Field(
        default_factory=list,
        description="Smaller numbers of dimensions that the model was trained for (Matryoshka): requests may ask for "
        "them.",
    )
    compat: Compat | None = Field(
        None, description="Relation to the space of the champion at its release; None for the first."
    )
    earlier: list[Compat] = Field(
        default_factory=list,
        description="Relations to champions before that one, whose indexes may still be in use; measured, not derived.",
    )
    licence: str | None = Field(None, description="Licence of the base model, as its card declares it.")
    params: dict[str, JsonValue] = Field(default_factory=dict, description="Parameters of the training, flat.")
    calibration: Calibration | None = None
    decision_threshold: float | None = Field(None, description="Cosine at or above which two texts count as similar.")
    metrics: dict[str, float] = Field(default_factory=dict)
    created_at: str = Field(description="ISO 8601, UTC.")
    files: dict[str, str] = Field(description="File name -> SHA-256 of every other file in the box.")

    @property
    def relations(self) -> list[Compat]:
        """Everything that is known about older spaces, the newest first."""
        return [*([self.compat] if self.compat else []), *self.earlier]

    @property
    def tag(self) -> str:
        """The name in headers, Bento and model store: registry version and run, e.g. `ekiben:3-1f2e3d4c`."""
        return f"{self.name}:{self.bento_version}"

    @property
    def bento_version(self) -> str:
        """The name without the model's, e.g. `3-1f2e3d4c`."""
        return name_release(self.version, self.run_id)


def name_release(version: str, run_id: str) -> str:
    """Registry version and the first 8 digits of the run: unique even when two registries share a Bento store."""
    return f"{version}-{run_id[:8]}"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_bytes(content: bytes) -> str:
    """SHA-256 of what a file will contain, in hex."""
    return hashlib.sha256(content).hexdigest()


def compute_space_id(
    *, weights_sha256: str, tokenizer_sha256: str, pooling: str, normalize: bool, prompts: dict[str, str], dim: int
) -> str:
    """Short hash (16 hex digits) of everything that decides where a text lands in space."""
    parts: dict[str, Any] = {
        "weights": weights_sha256,
        "tokenizer": tokenizer_sha256,
        "pooling": pooling,
        "normalize": normalize,
        "prompts": prompts,
        "dim": dim,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def write_manifest(box: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into the folder `box`."""
    (box / MANIFEST_FILE).write_bytes(dump_manifest(manifest))


def dump_manifest(manifest: Manifest) -> bytes:
    """The content of `manifest.json`."""
    return (manifest.model_dump_json(indent=2) + "\n").encode()


def read_manifest(box: Path) -> Manifest:
    """Read `manifest.json` from the folder `box`.

    Raises:
        LunchboxError: when it is missing, not JSON, of an unknown layout, or lacks a field.
    """
    path = box / MANIFEST_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LunchboxError(f"no {MANIFEST_FILE} in {box}: this is not a lunchbox") from None
    except OSError as error:
        raise LunchboxError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise LunchboxError(f"{path} is not JSON: {error}") from None
    layout = raw.get("layout") if isinstance(raw, dict) else None
    if layout not in SUPPORTED_LAYOUTS:
        known = " and ".join(map(str, SUPPORTED_LAYOUTS))
        raise LunchboxError(
            f"{path} has layout {layout!r}; this server reads {known}: update the server, or release the model again"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise LunchboxError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def verify_files(box: Path, manifest: Manifest) -> None:
    """Compare every file of the box with the hash in its manifest.

    Raises:
        LunchboxError: names the file that is missing, altered, or used without a hash.
    """
    if without := {TOKENIZER_FILE, CANARY_FILE, *manifest.precisions.values()} - manifest.files.keys():
        raise LunchboxError(f"the manifest of {box} has no hash for {', '.join(sorted(without))}: release it again")
    for name, expected in manifest.files.items():
        path = box / name
        if not path.is_file():
            raise LunchboxError(f"{name} is missing from {box}")
        found = sha256_file(path)
        if found != expected:
            raise LunchboxError(
                f"{name} in {box} was altered: SHA-256 {found[:12]}..., the manifest says {expected[:12]}..."
            )
