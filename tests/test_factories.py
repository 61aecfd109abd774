import hashlib
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

from tests.factories import TINY_DIM, TINY_MAX_TOKENS, make_tiny_model


def weights_of(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_the_tiny_model_is_the_same_in_every_call_and_differs_by_seed(tiny_model_path: Path, tmp_path: Path) -> None:
    assert weights_of(make_tiny_model(tmp_path / "again")) == weights_of(tiny_model_path)
    assert weights_of(make_tiny_model(tmp_path / "other", seed=1)) != weights_of(tiny_model_path)


def test_the_tiny_model_tells_sentences_apart(tiny_model_path: Path) -> None:
    model = SentenceTransformer(str(tiny_model_path), device="cpu")
    assert model.max_seq_length == TINY_MAX_TOKENS
    vectors = model.encode(
        ["A man plays the guitar.", "a woman runs home", "senior python engineer", "日本語", "xyzzy"]
    )
    assert vectors.shape == (5, TINY_DIM)
    cosines = vectors @ vectors.T - np.eye(5)
    assert cosines.max() < 0.98
