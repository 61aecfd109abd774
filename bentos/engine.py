"""The engine: one lunchbox's tokenizer and ONNX session. It knows nothing of HTTP, queues or settings.

Both halves are thread-safe and release the interpreter lock while they work, so the batcher may tokenize in one
thread and infer in another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import onnxruntime as ort

from bentos.errors import LunchboxError, NotReadyError
from bentos.manifest import TOKENIZER_FILE, Manifest
from bentos.vectors import Vectors
from bentos.vocabulary import TokenizerPair, read_tokenizer

DEFAULT_BATCH_TOKENS = 256  # padded tokens a batch: larger ones gain nothing on CPU, and take more memory and time
PAD_TOKENS = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>")  # as the common tokenizer families name it
# ONNX Runtime's fused kernel is slower on CPU than the additions and the normalisation that it replaces: 8 to 12 % of
# all texts a second with all-MiniLM-L6-v2 and ONNX Runtime 1.32.
SLOW_OPTIMIZERS = ["SkipLayerNormFusion"]
RAW_OUTPUT, UNIT_OUTPUT = "vectors", "unit_vectors"
T = TypeVar("T")


class Runner(Protocol):
    """Where work that takes long and leaves the interpreter lock alone is done; see loading.py."""

    def __call__(self, work: Callable[[], T], /) -> T:
        """Do the work, wait for it, and return or raise what it does."""


def run_here(work: Callable[[], T]) -> T:
    """Do the work in the calling thread."""
    return work()


class TokenCount(NamedTuple):
    """How long one text is, and whether the model sees all of it."""

    tokens_total: int  # before any cut, special tokens included
    truncated: bool  # whether the end of the text was cut off


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """One text as the model sees it."""

    ids: Sequence[int]  # at most `max_tokens`, special tokens included
    tokens_total: int  # before the cut, special tokens included

    @property
    def truncated(self) -> bool:
        """Whether the end of the text was cut off."""
        return self.tokens_total > len(self.ids)

    @property
    def count(self) -> TokenCount:
        """What is told to the caller."""
        return TokenCount(self.tokens_total, self.truncated)


class Engine:
    """One lunchbox, loaded: texts to token ids, token ids to vectors."""

    def __init__(
        self,
        box: Path,
        manifest: Manifest,
        *,
        threads: int = 0,
        precision: str | None = None,
        device: Literal["cpu", "cuda"] = "cpu",
        run_aside: Runner = run_here,
    ) -> None:
        """Load the tokenizer and one precision's model from the folder `box`.

        Args:
            box: folder of the lunchbox.
            manifest: its manifest.
            threads: threads inside one inference; 0 lets ONNX Runtime take one per physical core.
            precision: `fp32`, `int8`, ...; None takes the manifest's default.
            device: where to compute; `cuda` needs the package onnxruntime-gpu.
            run_aside: where the model is loaded. The tokenizer holds the interpreter lock while it loads, so it does
                that here: a thread that stands back must not keep all others from the lock.

        Raises:
            LunchboxError: when a file cannot be loaded, or the precision or the device is not there.
        """
        self.manifest = manifest
        self.precision = manifest.default_precision if precision is None else precision
        file_name = manifest.precisions.get(self.precision)
        if file_name is None:
            raise LunchboxError(
                f"the precision {self.precision!r} is not in this lunchbox, which has "
                f"{', '.join(manifest.precisions)}: a smaller one ships only when it was certified"
            )
        provider = _find_provider(device)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Idle threads sleep instead of spinning: spinning takes the cores from tokenizing and HTTP.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # A plan of memory is kept for every shape that ever came, and every batch has another: 30 MB for nothing.
        options.enable_mem_pattern = False
        # tokenizers and onnxruntime raise bare Exceptions of their own
        try:
            tokenizers = read_tokenizer(box / TOKENIZER_FILE, manifest.max_tokens)
        except Exception as error:
            raise LunchboxError(f"{TOKENIZER_FILE} cannot be loaded: {error}") from error
        try:
            session = run_aside(
                lambda: ort.InferenceSession(
                    box / file_name,
                    options,
                    providers=[provider],
                    disabled_optimizers=SLOW_OPTIMIZERS if device == "cpu" else [],
                )
            )
        except Exception as error:
            raise LunchboxError(f"{file_name} cannot be loaded: {error}") from error
        if provider not in session.get_providers():  # ONNX Runtime falls back to the CPU with a line in its log
            raise LunchboxError(
                f"the device {device!r} cannot be used: {provider} did not start (are the driver, CUDA and cuDNN that "
                "onnxruntime-gpu asks for installed?); set EKIBEN_DEVICE=cpu to serve from the CPU"
            )
        # All of the memory; None once the engine is closed.
        self._tokenizers: TokenizerPair | None = tokenizers
        self._session: ort.InferenceSession | None = session
        tokenizer = tokenizers.full
        pads = (tokenizer.token_to_id(name) for name in PAD_TOKENS)
        self.vocabulary_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self._pad_id: int = next((pad for pad in pads if pad is not None), 0)

    def tokenize(self, texts: Sequence[str]) -> list[TokenizedText]:
        """Turn texts into token ids, cut to the model's `max_tokens` as sentence-transformers cuts them.

        Only texts that are too long are encoded a second time, by a tokenizer that truncates; the first encoding
        gives their full length.

        Raises:
            NotReadyError: when the engine was closed.
        """
        if (tokenizers := self._tokenizers) is None:
            raise self._closed()
        full = [encoding.ids for encoding in tokenizers.full.encode_batch_fast(list(texts))]
        long = [row for row, ids in enumerate(full) if len(ids) > self.manifest.max_tokens]
        cut = tokenizers.cutting.encode_batch_fast([texts[row] for row in long]) if long else []
        kept = dict(zip(long, (encoding.ids for encoding in cut), strict=True))
        return [TokenizedText(kept.get(row, ids), len(ids)) for row, ids in enumerate(full)]

    def infer(self, token_ids: Sequence[Sequence[int]], *, normalize: bool | None = None) -> Vectors:
        """Embed one batch, padded to its longest text.

        Args:
            token_ids: (n texts) lists of ids, as `tokenize` gives them.
            normalize: whether the vectors have length 1; None leaves it to the manifest.

        Returns:
            float32 (n, dim).

        Raises:
            NotReadyError: when a vector is not finite (such a vector must never leave the server), or the engine was
                closed.
        """
        if not token_ids:
            return np.empty((0, self.manifest.dim), dtype=np.float32)
        lengths = np.fromiter((len(ids) for ids in token_ids), dtype=np.int64, count=len(token_ids))
        input_ids = np.full((len(token_ids), int(lengths.max())), self._pad_id, dtype=np.int64)
        for row, ids in enumerate(token_ids):
            input_ids[row, : len(ids)] = ids
        attention_mask = (np.arange(input_ids.shape[1]) < lengths[:, None]).astype(np.int64)
        wants_unit = self.manifest.normalize if normalize is None else normalize
        if (session := self._session) is None:
            raise self._closed()
        (vectors,) = session.run(
            [UNIT_OUTPUT if wants_unit else RAW_OUTPUT], {"input_ids": input_ids, "attention_mask": attention_mask}
        )
        if not np.isfinite(vectors).all():
            raise NotReadyError("the model gave a vector that is not finite; the vector was withheld")
        result: Vectors = np.asarray(vectors, dtype=np.float32)
        return result

    def close(self) -> None:
        """Give all memory back now, whoever still knows this engine; it computes nothing any more."""
        self._tokenizers = self._session = None

    def _closed(self) -> NotReadyError:
        return NotReadyError(f"{self.manifest.tag} has left this server; send the request again")

    def embed(
        self, texts: Sequence[str], *, normalize: bool | None = None, batch_tokens: int = DEFAULT_BATCH_TOKENS
    ) -> Vectors:
        """Embed any number of texts without a batcher: in small batches of similar length, in the given order."""
        token_ids = [text.ids for text in self.tokenize(texts)]
        vectors = np.empty((len(texts), self.manifest.dim), dtype=np.float32)
        for rows in group_by_length([len(ids) for ids in token_ids], batch_tokens):
            vectors[rows] = self.infer([token_ids[row] for row in rows], normalize=normalize)
        return vectors


def _find_provider(device: str) -> str:
    """The name that ONNX Runtime has for a device.

    Raises:
        LunchboxError: when the installed ONNX Runtime cannot compute there.
    """
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    if provider not in (available := ort.get_available_providers()):
        raise LunchboxError(
            f"the device {device!r} needs {provider}, and the installed ONNX Runtime {ort.__version__} has only "
            f"{', '.join(available)}: install onnxruntime-gpu in place of onnxruntime, or set EKIBEN_DEVICE=cpu"
        )
    return provider


def group_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group row numbers, shortest texts first, so that a group padded to its longest text fits the budget.

    A text longer than the budget makes a group of its own.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and lengths[row] * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
