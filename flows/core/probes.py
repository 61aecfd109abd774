"""The texts by which two models' spaces are compared: some to fit a map on, others to see whether it holds.

Core layer, pure. A run keeps them as `evaluation/probe_texts.json`: they are the user's own texts, in clear, as the
test rows beside them in MLflow are. They never get into a lunchbox, a log or a model card.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bentos.text import clean_text
from flows.errors import DataError, one_line

if TYPE_CHECKING:
    from flows.core.dataset import Dataset, Part

PROBE_FILE = "probe_texts.json"
MAX_FIT_TEXTS = 3000  # of queries and documents together: some times the dimensions of common models
MAX_QUERIES = 500  # the share of them that finds its neighbours is then known to two percent
MAX_DOCUMENTS = 2000
MAX_TEXT_CHARACTERS = 1000  # a longer text is cut: for both models alike
MAX_CHARACTERS = 600_000  # of the texts for the fit, and of the documents: some minutes for a large model on two cores
POSITIVE_SCORE = 0.5  # a pair scored at or above it makes its second text relevant for its first
SEED = 17

Item = TypeVar("Item")


class Probe(BaseModel):
    """The content of `probe_texts.json`. No text of the first two lists is in the other two."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout: Literal[1] = 1
    fit_queries: list[str] = Field(description="Texts of train and dev as they are asked: the map is fitted on them.")
    fit_documents: list[str] = Field(description="Texts of train and dev as they are stored: the same.")
    queries: list[str] = Field(description="Held-out texts of test, each once, that ask.")
    documents: list[str] = Field(description="Held-out texts of test, each once, that are found.")
    judgements: list[tuple[int, int, float]] = Field(
        description="Row of a query, row of a document, relevance above 0: what should be found."
    )

    @model_validator(mode="after")
    def _judgements_are_of_texts_that_are_there(self) -> Probe:
        for query, document, relevance in self.judgements:
            if not (0 <= query < len(self.queries) and 0 <= document < len(self.documents) and relevance > 0):
                raise ValueError(f"judgements has {query, document, relevance}, which names no query or no document")
        return self


def choose_probe_texts(dataset: Dataset) -> dict[str, Any]:
    """Choose the texts that later releases compare this model's space with others by.

    Held out are texts of test: for pairs `text_a` asks and `text_b` is found (pairs scored `POSITIVE_SCORE` or more
    say what should be), for retrieval data it is the queries, and the documents judged for them among others of the
    corpus. The map is fitted on texts of train and of dev, which no model was trained on, and on documents of the
    corpus that are not held out. The choice is a sample that does not change from call to call.

    Returns:
        What can be written as JSON: `Probe`. **These are the user's own texts**: they stay with the run.
    """
    sample = random.Random(SEED)
    queries, documents, judgements = _hold_out(dataset.test, sample)
    taken = {_fold(text) for text in [*queries, *documents]}
    corpus = dataset.test.retrieval.corpus.values() if dataset.test.retrieval else ()
    asked = [_list_queries(part) for part in (dataset.dev, dataset.train)]
    stored = [_list_documents(part) for part in (dataset.dev, dataset.train)]
    stored[1] = [*stored[1], *corpus]
    half = MAX_FIT_TEXTS // 2
    fit_documents = _draw(stored, half, sample, taken)
    fit_queries = _draw(asked, half, sample, taken | {_fold(text) for text in fit_documents})
    return Probe(
        fit_queries=fit_queries,
        fit_documents=fit_documents,
        queries=queries,
        documents=documents,
        judgements=judgements,
    ).model_dump()


def read_probe(path: Path) -> Probe | None:
    """Read `probe_texts.json`; None when there is none, as in runs of older versions of Ekiben.

    Raises:
        DataError: when it is malformed.
    """
    try:
        return Probe.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError) as error:
        raise DataError(f"{path.name} of the run cannot be used: {one_line(error)}; train again") from None


class _Texts:
    """Texts that each have a row, up to a number of texts and characters."""

    def __init__(self, most: int) -> None:
        self.rows: dict[str, int] = {}
        self._most = most
        self._characters = 0

    def add(self, text: str) -> int | None:
        """The row of a text, or None when there is no room for it."""
        text = _cut(text)
        if text not in self.rows:
            if len(self.rows) >= self._most or self._characters + len(text) > MAX_CHARACTERS:
                return None
            self.rows[text] = len(self.rows)
            self._characters += len(text)
        return self.rows[text]


def _hold_out(test: Part, sample: random.Random) -> tuple[list[str], list[str], list[tuple[int, int, float]]]:
    """Queries, documents, and which should find which; of both kinds of data when there are both."""
    queries, documents = _Texts(MAX_QUERIES), _Texts(MAX_DOCUMENTS)
    judged: dict[tuple[int, int], float] = {}

    def judge(query: int | None, text: str, relevance: float) -> None:
        document = documents.add(text)
        if query is not None and document is not None and relevance > 0:
            judged[query, document] = max(relevance, judged.get((query, document), 0.0))

    retrieval = test.retrieval
    if retrieval is not None:
        for key in _shuffle(retrieval.queries, sample)[: MAX_QUERIES // (2 if test.has_pairs else 1)]:
            query = queries.add(retrieval.queries[key])
            for document in retrieval.qrels.get(key, {}).keys() & retrieval.corpus.keys():
                judge(query, retrieval.corpus[document], retrieval.qrels[key][document])
    columns = (test.pairs[name].tolist() for name in ("text_a", "text_b", "score"))
    for text_a, text_b, score in _shuffle(zip(*columns, strict=True), sample):
        judge(queries.add(str(text_a)), str(text_b), float(score) if score >= POSITIVE_SCORE else 0.0)
    if retrieval is not None:  # the rest of the corpus is what a query must not find; half of it is left to the fit
        others = [text for text in retrieval.corpus.values() if _cut(text) not in documents.rows]
        for text in _shuffle(others, sample)[: len(others) // 2]:
            documents.add(text)
    return list(queries.rows), list(documents.rows), [(*key, judged[key]) for key in sorted(judged)]


def _list_queries(part: Part) -> list[str]:
    return [*map(str, part.pairs["text_a"]), *(part.retrieval.queries.values() if part.retrieval else ())]


def _list_documents(part: Part) -> list[str]:
    return [*map(str, part.pairs["text_b"])]


def _draw(sources: Sequence[Sequence[str]], most: int, sample: random.Random, taken: set[str]) -> list[str]:
    """Draw texts that are not taken, each once; half of them from the first source, when it has so many."""
    drawn = _Texts(most)
    seen = set(taken)
    for number, texts in enumerate(sources, 1):
        for text in _shuffle(texts, sample):
            if len(drawn.rows) >= most * number // len(sources):
                break
            if _fold(text) not in seen:
                seen.add(_fold(text))
                drawn.add(text)
    return list(drawn.rows)


def _shuffle(items: Iterable[Item], sample: random.Random) -> list[Item]:
    shuffled = list(items)
    sample.shuffle(shuffled)
    return shuffled


def _cut(text: str) -> str:
    return clean_text(clean_text(text)[:MAX_TEXT_CHARACTERS])


def _fold(text: str) -> str:
    """What two texts have in common that differ in case, white space or what comes after the cut."""
    return " ".join(_cut(text).casefold().split())
