"""Texts, and what the server must say of them: computed in this process by the engine alone, one text at a time."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bentos.engine import Engine
from bentos.manifest import Manifest, read_manifest
from bentos.vectors import Vectors, normalize
from tests.factories import tiny_vocabulary

MIN_COSINE = 0.9999
TEXTS = 600
ODD_TEXTS = ("東京 🍱 Größe", "a", "!", "…", "ﬁ ﬀ", "a\tb\nc", "İstanbul", "\u200bword", "x" * 300, "e\u0301" * 20)


@dataclass(frozen=True)
class Reference:
    """A stock of texts with their true vectors."""

    manifest: Manifest
    texts: list[str]
    ids: list[list[int]]
    tokens: list[int]
    truncated: list[bool]
    vectors: Vectors  # (n, dim), length 1
    slack: float  # how far a cosine of two texts may be off, when each vector may be off as far as MIN_COSINE allows

    def find_wrong_vectors(self, rows: list[int], vectors: Vectors, min_cosine: float = MIN_COSINE) -> str | None:
        """Compare an answer's `vectors` with those of the texts `rows`, in this order."""
        expected = self.vectors[rows]
        if vectors.shape != expected.shape:
            return f"vectors of shape {vectors.shape}, expected {expected.shape}"
        cosines = np.einsum("ij,ij->i", normalize(vectors.astype(np.float32)), expected)
        if not cosines.min() >= min_cosine:  # also when it is no number
            row = int(np.argmin(cosines))
            return f"vector {row} has cosine {cosines[row]:.6f} with its reference (text {self.texts[rows[row]]!r:.80})"
        return None


def make_reference(box: Path, *, seed: int) -> Reference:
    """Make texts of random lengths, and compute each alone."""
    manifest = read_manifest(box)
    engine = Engine(box, manifest, threads=1)
    generator = random.Random(seed)
    words = [word for word in tiny_vocabulary() if word.isalpha() and len(word) > 1]
    made = dict.fromkeys(ODD_TEXTS)
    while len(made) < TEXTS:
        length = min(int(generator.paretovariate(0.9)) + generator.randint(0, 3), 2 * manifest.max_tokens)
        made[" ".join(generator.choices(words, k=max(length, 1)))] = None
    texts = [text for text in made if text.strip()]
    tokenized = engine.tokenize(texts)
    vectors = np.concatenate([engine.infer([text.ids], normalize=True) for text in tokenized])
    return Reference(
        manifest=manifest,
        texts=texts,
        ids=[list(text.ids) for text in tokenized],
        tokens=[text.tokens_total for text in tokenized],
        truncated=[text.truncated for text in tokenized],
        vectors=vectors,
        slack=1e-4 if engine.precision == "fp32" else 0.03,
    )
