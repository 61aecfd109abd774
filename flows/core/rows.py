"""The rows that a fit sees: which loss each kind of data gets, and its rows as columns of texts and labels.

Core layer, pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bentos.text import clean_text
from flows.errors import ParamsError

if TYPE_CHECKING:
    from flows.core.dataset import Part

Columns = Mapping[str, Mapping[str, Sequence[Any]]]  # kind of data -> name -> cells
PAIR_LOSSES = ("cosine_similarity", "cosent", "angle")
RANKING_LOSS = "multiple_negatives_ranking"
SCORE = "score"


def choose_losses(train: Part, loss: str) -> dict[str, str]:
    """Say which loss each kind of data gets: `pairs` and `retrieval` -> name of the loss.

    `auto` is cosine similarity for scored pairs and multiple negatives ranking for retrieval data. The name of a pair
    loss concerns the pairs; retrieval data beside them keep their ranking loss. `multiple_negatives_ranking` trains on
    the retrieval data alone.

    Raises:
        ParamsError: when the data cannot feed the loss.
    """
    if loss == "auto":
        chosen = {"pairs": "cosine_similarity", "retrieval": RANKING_LOSS}
    elif loss in PAIR_LOSSES:
        chosen = {"pairs": loss, "retrieval": RANKING_LOSS}
        if not train.has_pairs:
            raise ParamsError(
                f"train.loss is {loss}, which needs scored pairs, but there are only retrieval data: "
                f"use auto or {RANKING_LOSS}, or give data.pairs"
            )
    else:
        chosen = {"retrieval": RANKING_LOSS}
        if train.retrieval is None:
            raise ParamsError(
                f"train.loss is {loss}, which needs retrieval data, but there are only scored pairs: "
                f"use auto, {', '.join(PAIR_LOSSES)}, or give data.retrieval"
            )
    present = {"pairs": train.has_pairs, "retrieval": train.retrieval is not None}
    losses = {kind: name for kind, name in chosen.items() if present[kind]}
    if not losses:
        raise ParamsError("there is nothing to train on: give data.pairs, data.retrieval or data.profiles")
    return losses


def make_columns(train: Part, kinds: Sequence[str]) -> Columns:
    """The rows of each kind (`pairs`, `retrieval`) as columns.

    Scored pairs have `text_a`, `text_b` and `score`; retrieval data `query` and `document`, a row for every relevance
    above 0.
    """
    return {kind: _MAKERS[kind](train) for kind in kinds}


def _pair_columns(train: Part) -> dict[str, list[Any]]:
    pairs = train.pairs
    return {
        "text_a": [clean_text(text) for text in pairs["text_a"]],
        "text_b": [clean_text(text) for text in pairs["text_b"]],
        "score": [float(score) for score in pairs["score"]],
    }


def _retrieval_columns(train: Part) -> dict[str, list[Any]]:
    if train.retrieval is None:
        return {"query": [], "document": []}
    queries, corpus = train.retrieval.queries, train.retrieval.corpus
    relevant = [
        (clean_text(queries[query]), clean_text(corpus[document]))
        for query, relevances in train.retrieval.qrels.items()
        for document, relevance in relevances.items()
        if relevance > 0
    ]
    return {"query": [query for query, _ in relevant], "document": [document for _, document in relevant]}


_MAKERS = {"pairs": _pair_columns, "retrieval": _retrieval_columns}


def list_texts(columns: Columns) -> list[str]:
    """All texts, each once, in the order of the data."""
    return list(
        dict.fromkeys(
            text for kind in columns.values() for name, column in kind.items() if name != SCORE for text in column
        )
    )


def number_texts(columns: Columns, texts: Sequence[str]) -> Columns:
    """Put the numbers of its texts, in the order of its columns, behind the score of each row: the column `label`."""
    number = {text: row for row, text in enumerate(texts)}
    numbered: dict[str, dict[str, Sequence[Any]]] = {}
    for kind, named in columns.items():
        held = {name: column for name, column in named.items() if name != SCORE}
        labels = [[score] for score in named[SCORE]] if SCORE in named else [[] for _ in next(iter(held.values()))]
        rows = zip(*([float(number[text]) for text in column] for column in held.values()), strict=True)
        numbered[kind] = {**held, "label": [label + list(row) for label, row in zip(labels, rows, strict=True)]}
    return numbered
