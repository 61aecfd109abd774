"""The proof that the exported model is the trained one: same texts, two ways, any batch mates, hardly a difference.

Core layer. The reference is sentence-transformers' own `encode`, one text at a time; the candidate is the engine that
serves. Texts come cleaned, as training and the service see them. Nothing ships without this certificate.
"""

from __future__ import annotations

import math
import os
import platform
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bentos.engine import Engine
from bentos.errors import LunchboxError, NotReadyError
from bentos.manifest import Manifest
from bentos.text import apply_prompt, clean_text, text_problem
from bentos.vectors import EPSILON, Vectors, cosine_pairs
from flows.core.edge_texts import CANARY_TEXTS, EDGE_TEXTS, make_length_texts
from flows.core.models import load_saved_model
from flows.errors import CertificationError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MATES = 7  # texts that share a batch with the longest one
GROUP_SIZES = (2, 5)  # of the random batches
QUOTED_CHARACTERS = 60
LIBRARIES = ("sentence-transformers", "transformers", "tokenizers", "torch", "onnx", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Comparison:
    """How close some vectors came to their references, text by text."""

    name: str
    texts: npt.NDArray[np.int64]  # (n,) which text
    cosines: npt.NDArray[np.float64]  # (n,)
    errors: npt.NDArray[np.float64]  # (n,) |difference| / |reference|: sees the length of a vector too

    @classmethod
    def between(cls, name: str, texts: npt.NDArray[np.int64], found: Vectors, expected: Vectors) -> Comparison:
        """Compare the rows of `found` (n, dim) with those of `expected` (n, dim) in double precision."""
        a, b = found.astype(np.float64), expected.astype(np.float64)
        lengths = np.maximum(np.linalg.norm(b, axis=1), EPSILON)
        return cls(name, texts, cosine_pairs(a, b).astype(np.float64), np.linalg.norm(a - b, axis=1) / lengths)

    def summarise(self) -> dict[str, Any]:
        """Return the figures for the certificate."""
        worst = int(np.argmin(self.cosines))
        return {
            "comparisons": len(self.cosines),
            "min_cosine": float(self.cosines.min()),
            "mean_cosine": float(self.cosines.mean()),
            "max_error": float(self.errors.max()),
            "worst_text": int(self.texts[worst]),
        }


def certify(
    model_path: Path, box: Path, manifest: Manifest, *, min_cosine: float, extra_texts: Sequence[str] = ()
) -> dict[str, Any]:
    """Compare the exported files in `box` with the model at `model_path`, and return the certificate.

    Over edge texts, texts around the token limit and `extra_texts`, it compares
    - the engine, one text at a time, with sentence-transformers: scaled to length 1, raw, and under every prompt;
    - every text in batches (with the shortest, with the longest, with random mates, as the engine groups them) with
      the same text alone.

    Args:
        model_path: The sentence-transformers folder that was exported.
        box: The folder with the exported files.
        manifest: What the box says of itself; its `files` are not read.
        min_cosine: Every comparison must reach it. Vectors that are not scaled must also keep their length: their
            relative error may be what `min_cosine` allows for unit vectors, sqrt(2 - 2 cos).
        extra_texts: Texts of the user's own domain. They are compared, but never quoted.

    Returns:
        What can be written as JSON: figures, thresholds, library versions, the machine.

    Raises:
        CertificationError: when the files cannot be used, a vector is not finite, or a comparison fails; the message
            has the figures and the worst text.
    """
    started = time.perf_counter()
    try:
        engine = Engine(box, manifest)
    except LunchboxError as error:
        raise CertificationError(f"the exported model cannot be used: {error}; export it again") from error
    shipped = gather_texts(engine)
    texts = gather_texts(engine, extra_texts)
    model = load_saved_model(model_path).to("cpu")
    try:
        comparisons = [
            Comparison.between(name, np.arange(len(texts)), _embed_alone(engine, prompted, unit), reference)
            for name, prompted, unit, reference in _references(model, manifest, texts)
        ]
        comparisons.append(compare_batches(engine, texts))
    except NotReadyError:
        raise CertificationError(
            "the exported model gives vectors that are not finite: train again with a lower learning rate"
        ) from None
    for comparison in comparisons:
        _check(comparison, texts, len(shipped), min_cosine)
    parity = [comparison.summarise() | {"name": comparison.name} for comparison in comparisons[:-1]]
    return {
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 1),
        "thresholds": {"min_cosine": min_cosine, "max_error": allowed_error(min_cosine)},
        "texts": {"shipped": len(shipped), "own": len(texts) - len(shipped), "max_tokens": manifest.max_tokens},
        "min_cosine": min(part["min_cosine"] for part in parity),
        "batch_min_cosine": float(comparisons[-1].cosines.min()),
        "parity": parity,
        "batch_invariance": comparisons[-1].summarise(),
        "versions": {name: version(name) for name in LIBRARIES},
        "machine": {"cpu": _cpu_name(), "cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"},
    }


def allowed_error(min_cosine: float) -> float:
    """Return the relative error of a vector that two unit vectors with cosine `min_cosine` have."""
    return math.sqrt(2 - 2 * min_cosine)


def gather_texts(engine: Engine, extra_texts: Sequence[str] = ()) -> list[str]:
    """Return the texts that every comparison is made over: edge texts, texts around the token limit, then the extra."""
    lengths = make_length_texts(lambda text: engine.tokenize([text])[0].tokens_total, engine.manifest.max_tokens)
    return _usable([*EDGE_TEXTS, *CANARY_TEXTS, *lengths, *extra_texts])


def _usable(texts: Sequence[str]) -> list[str]:
    """Clean the texts and keep those that the service would take, each once."""
    return list(dict.fromkeys(clean_text(text) for text in texts if text_problem(text) is None))


def _references(
    model: SentenceTransformer, manifest: Manifest, texts: list[str]
) -> Iterator[tuple[str, list[str], bool, Vectors]]:
    """Yield name, texts for the engine, whether scaled, and sentence-transformers' own vectors of the texts."""
    for name, prompt in {"": "", **manifest.prompts}.items():
        if name and not prompt:
            continue
        prompted = [apply_prompt(text, prompt) for text in texts]
        unit, raw = _encode_reference(model, manifest, texts, prompt)
        yield f"unit {name}".strip(), prompted, True, unit
        yield f"raw {name}".strip(), prompted, False, raw


def _encode_reference(
    model: SentenceTransformer, manifest: Manifest, texts: list[str], prompt: str
) -> tuple[Vectors, Vectors]:
    """Encode by sentence-transformers, a text at a time: unit vectors, and what they were before Normalize.

    The empty prompt keeps a default one out.
    """
    raw: list[Vectors] = []
    last = list(model)[-2 if manifest.normalize else -1]
    hook = last.register_forward_hook(lambda _, __, features: raw.append(features["sentence_embedding"].numpy()))
    try:
        unit = [model.encode([text], prompt=prompt, normalize_embeddings=True, device="cpu") for text in texts]
    finally:
        hook.remove()
    return np.vstack(unit).astype(np.float32), np.vstack(raw).astype(np.float32)


def _embed_alone(engine: Engine, texts: Sequence[str], unit: bool) -> Vectors:
    return np.vstack([engine.infer([text.ids], normalize=unit) for text in engine.tokenize(texts)])


def compare_batches(engine: Engine, texts: list[str]) -> Comparison:
    """Compare raw vectors made in batches of many kinds with those of the same texts alone."""
    alone = _embed_alone(engine, texts, unit=False)
    ids = [text.ids for text in engine.tokenize(texts)]
    by_length = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    shortest, longest = by_length[0], by_length[-1]
    rng = random.Random(0)
    batches = [[row, shortest] for row in by_length]
    batches += [[*rows, longest] for rows in _cut(by_length, MATES)]
    for size in GROUP_SIZES:
        batches += _cut(rng.sample(by_length, len(by_length)), size)
    rows = np.asarray([row for batch in batches for row in batch] + list(range(len(texts))))
    found = [engine.infer([ids[row] for row in batch], normalize=False) for batch in batches]
    found.append(engine.embed(texts, normalize=False))
    return Comparison.between("batch invariance", rows, np.vstack(found), alone[rows])


def _cut(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _check(comparison: Comparison, texts: list[str], shipped: int, min_cosine: float) -> None:
    """Refuse a comparison that fails.

    Raises:
        CertificationError: with the figures and the worst text.
    """
    error_limit = allowed_error(min_cosine)
    good = (comparison.cosines >= min_cosine) & (comparison.errors <= error_limit)  # NaN is never good
    if good.all():
        return
    badness = np.where(np.isfinite(comparison.errors), comparison.errors, np.inf)
    worst = int(np.argmax(badness))
    text = int(comparison.texts[worst])
    quoted = repr(texts[text][:QUOTED_CHARACTERS]) if text < shipped else "one of your own"
    raise CertificationError(
        f"certification failed ({comparison.name}): {int((~good).sum())} of {len(good)} comparisons with cosine below "
        f"{min_cosine} or relative error above {error_limit:.4f}; worst: cosine {comparison.cosines[worst]:.6f}, "
        f"error {comparison.errors[worst]:.6f}, text {text} ({quoted}): the exported model is not the trained one; "
        "export it again, and if it stays so, choose another base model"
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
