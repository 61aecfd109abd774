"""What a step of a fit minimises: the loss of the labels, on several numbers of dimensions, near another model's space.

Core layer, heavy: imports torch and the losses at the top. flows/core/training.py loads it when a fit starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    AnglELoss,
    CoSENTLoss,
    CosineSimilarityLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn

from bentos.vectors import FloatArray

Features = dict[str, Tensor]

LOSS_CLASSES = {
    "cosine_similarity": CosineSimilarityLoss,
    "cosent": CoSENTLoss,
    "angle": AnglELoss,
    "multiple_negatives_ranking": MultipleNegativesRankingLoss,
}
COLUMNS = 2  # of text in a row, whatever the kind of data


class Targets:
    """The vectors that another model gives the texts; each is asked for once, and only when a batch holds it."""

    def __init__(self, texts: Sequence[str], encode: Callable[[Sequence[str]], FloatArray]) -> None:
        self._texts = texts
        self._encode = encode
        self._vectors: dict[int, Tensor] = {}

    def take(self, rows: Sequence[int]) -> Tensor:
        """The vectors (rows, dim) of the texts with these numbers."""
        missing = [row for row in dict.fromkeys(rows) if row not in self._vectors]
        if missing:
            vectors = torch.from_numpy(self._encode([self._texts[row] for row in missing]))
            self._vectors.update(zip(missing, vectors, strict=True))
        return torch.stack([self._vectors[row] for row in rows])


@dataclass(frozen=True)
class Pull:
    """A term that draws each text to its target."""

    weight: float
    targets: Targets


def make_loss(name: str, model: SentenceTransformer, dims: Sequence[int] = (), pull: Pull | None = None) -> nn.Module:
    """Return the loss of a kind of data.

    Args:
        name: Key of `LOSS_CLASSES`.
        model: What is trained.
        dims: Numbers of dimensions that are to be good at once, the model's own among them; empty: only that one.
        pull: With it, the labels that a batch brings end with the numbers of its texts in `pull.targets`.
    """
    loss = LOSS_CLASSES[name](model)
    return loss if pull is None and len(dims) < 2 else JointLoss(model, loss, dims, pull)


class JointLoss(nn.Module):  # type: ignore[misc] # torch is not followed by mypy
    """The mean of a loss over nested numbers of dimensions, plus the mean of 1 - cosine to the targets by its weight.

    The first is the Matryoshka loss (Kusupati et al., 2022, "Matryoshka Representation Learning") with equal weights;
    a mean where theirs is a sum, so that a weight beside it means the same for every number of dimensions. The second
    is the embedding matching of EmbedDistill (Kim et al., 2023) with the cosine as distance. Each batch is embedded
    once for all of them.
    """

    def __init__(self, model: SentenceTransformer, loss: nn.Module, dims: Sequence[int], pull: Pull | None) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self._dims = tuple(dims) or (None,)
        self._pull = pull

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None) -> Tensor:
        """Return the loss of one batch.

        Args:
            sentence_features: Token ids and masks of each column of texts.
            labels: (batch,) or None; with a pull (batch, labels + columns), the texts' numbers last.
        """
        vectors = [self.model(features)["sentence_embedding"] for features in sentence_features]
        total = torch.zeros((), device=vectors[0].device)
        if self._pull is not None and labels is not None:
            rows = labels[:, -COLUMNS:].long()
            labels = labels[:, :-COLUMNS]
            total = total + self._pull.weight * self._distance(vectors, rows)
        for dim in self._dims:
            cut = [column[:, :dim] for column in vectors]
            total = total + self.loss.compute_loss_from_embeddings(cut, labels) / len(self._dims)
        return total

    def _distance(self, vectors: Sequence[Tensor], rows: Tensor) -> Tensor:
        assert self._pull is not None
        targets = self._pull.targets.take(rows.T.flatten().tolist()).to(vectors[0].device)
        return (1 - torch.cosine_similarity(torch.cat(list(vectors)), targets)).mean()


class DistillLoss(nn.Module):  # type: ignore[misc]
    """The mean of 1 - cosine to the vectors that a teacher with the same tokenizer gives the batch."""

    def __init__(self, model: SentenceTransformer, teacher: SentenceTransformer) -> None:
        super().__init__()
        self.model = model
        self._teach = (teacher.eval(),)  # in a tuple torch does not see it: it is not trained

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None) -> Tensor:
        """Return the loss of one batch; there are no labels."""
        (features,) = sentence_features
        with torch.no_grad():
            targets = self._teach[0](dict(features))["sentence_embedding"]
        return (1 - torch.cosine_similarity(self.model(dict(features))["sentence_embedding"], targets)).mean()
