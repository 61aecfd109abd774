"""A plain BentoML service with BentoML's own adaptive batching, on the same ONNX file, as its docs show it."""

from __future__ import annotations

import os
from pathlib import Path

import bentoml
import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

MAX_TOKENS = 256
BATCH_TEXTS = 32


@bentoml.service(name="batchable", workers=1)
class Embedder:
    """Texts in, vectors out."""

    def __init__(self) -> None:
        box = Path(os.environ["MODEL_PATH"])
        self.tokenizer = Tokenizer.from_file(str(box / "tokenizer.json"))
        self.tokenizer.enable_truncation(MAX_TOKENS)
        self.tokenizer.enable_padding()
        self.session = ort.InferenceSession(box / "model.fp32.onnx", providers=["CPUExecutionProvider"])

    @bentoml.api(batchable=True, max_batch_size=BATCH_TEXTS)
    def encode(self, texts: list[str]) -> np.ndarray:
        """Embed texts, padded to the longest of the batch."""
        encodings = self.tokenizer.encode_batch(texts)
        inputs = {
            "input_ids": np.array([encoding.ids for encoding in encodings], dtype=np.int64),
            "attention_mask": np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64),
        }
        return self.session.run(["unit_vectors"], inputs)[0]
