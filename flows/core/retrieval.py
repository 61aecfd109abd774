"""Retrieval data in BEIR's layout: a corpus, queries, and which documents are relevant to which query.

    corpus.jsonl             {"_id": "d1", "title": "...", "text": "..."}     title may be missing or empty
    queries.jsonl            {"_id": "q1", "text": "..."}
    qrels/train.tsv          query-id, corpus-id, score (tab separated, with this header); so dev.tsv and test.tsv

Core layer. Reading is the only I/O; the rest is pure. The names are fixed: compressed or otherwise named files are not
looked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from flows.core.columns import clean_column, clean_ids, clean_unique_ids
from flows.core.files import MissingFileError
from flows.core.splits import SPLITS, split_fractions, split_groups
from flows.core.tables import is_missing, row_numbers
from flows.errors import DataError
from flows.params import DataParams

QRELS_COLUMNS = ("query-id", "corpus-id", "score")
Qrels = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Retrieval:
    """One split's queries against the whole corpus, which all splits share."""

    corpus: dict[str, str]  # document id -> text, the title before it when there is one
    queries: dict[str, str]  # query id -> text, only the queries of this split
    qrels: Qrels  # query id -> document id -> relevance > 0


@dataclass(frozen=True)
class RawRetrieval:
    """The tables as read."""

    address: str
    corpus: pd.DataFrame
    queries: pd.DataFrame
    qrels: dict[str, pd.DataFrame]  # split -> table; dev and test may be missing


def read_retrieval(address: str, read: Callable[[str, str], pd.DataFrame]) -> RawRetrieval:
    """Read a BEIR folder.

    Args:
        address: the folder, at any address.
        read: reads one table: (role, address) -> table.

    Raises:
        DataError: a file is missing (all but qrels/dev.tsv and qrels/test.tsv must be there) or unreadable.
    """
    folder = address.rstrip("/")
    try:
        corpus = read("retrieval/corpus.jsonl", f"{folder}/corpus.jsonl")
        queries = read("retrieval/queries.jsonl", f"{folder}/queries.jsonl")
        qrels = {"train": read("retrieval/qrels/train.tsv", f"{folder}/qrels/train.tsv")}
    except MissingFileError as error:
        raise MissingFileError(
            f"{error}; retrieval data is a folder with corpus.jsonl, queries.jsonl and qrels/train.tsv (and "
            "dev.tsv, test.tsv)"
        ) from None
    for split in SPLITS[1:]:
        try:
            qrels[split] = read(f"retrieval/qrels/{split}.tsv", f"{folder}/qrels/{split}.tsv")
        except MissingFileError:
            continue  # its queries are split off train
    return RawRetrieval(address, corpus, queries, qrels)


def prepare_retrieval(raw: RawRetrieval, params: DataParams) -> tuple[dict[str, Retrieval], list[str]]:
    """Check everything and give each split its queries; and notes.

    Raises:
        DataError: missing columns, unusable texts, ids twice or unknown, bad scores, or a query in two splits.
    """
    corpus = _read_texts(raw.corpus, f"{raw.address}/corpus.jsonl", titled=True)
    queries = _read_texts(raw.queries, f"{raw.address}/queries.jsonl", titled=False)
    notes: list[str] = []
    qrels: dict[str, Qrels] = {}
    for split, table in raw.qrels.items():
        name = f"{raw.address}/qrels/{split}.tsv"
        qrels[split], ignored = _read_qrels(table, corpus, queries, params, name)
        if ignored:
            notes.append(f"{name}: ignored {ignored} rows with a relevance of 0 or less.")
    _refuse_shared_queries(qrels, raw.address)
    missing = [split for split in SPLITS if split not in qrels]
    if missing:
        qrels = _split_off(qrels, queries, missing, params)
        counts = ", ".join(f"{len(qrels[split])} {split}" for split in SPLITS)
        notes.append(
            f"{raw.address}: split {' and '.join(missing)} off the training queries (seed "
            f"{params.split_seed}): {counts}."
        )
    parts = {
        split: Retrieval(corpus, {query: queries[query] for query in qrels[split]}, qrels[split]) for split in SPLITS
    }
    return parts, notes


def keep_queries(part: Retrieval, queries: Mapping[str, str]) -> Retrieval:
    """The part with only those of its queries."""
    return replace(part, queries=dict(queries), qrels={query: part.qrels[query] for query in queries})


def _read_texts(table: pd.DataFrame, address: str, *, titled: bool) -> dict[str, str]:
    for column in ("_id", "text"):
        if column not in table.columns:
            raise DataError(
                f"{address} has no field {column!r}; found: {', '.join(table.columns)}; BEIR's names are _id and text"
            )
    ids = clean_unique_ids(table["_id"].tolist(), "_id", address)
    texts = table["text"].tolist()
    if titled and "title" in table.columns:
        titles = ["" if is_missing(title) else title for title in table["title"].tolist()]
        texts = [
            f"{title} {'' if is_missing(text) else text}".strip() if isinstance(title, str) and title else text
            for title, text in zip(titles, texts, strict=True)
        ]
    return dict(zip(ids, clean_column(texts, "text", address), strict=True))


def _read_qrels(
    table: pd.DataFrame, corpus: dict[str, str], queries: dict[str, str], params: DataParams, address: str
) -> tuple[Qrels, int]:
    for column in QRELS_COLUMNS:
        if column not in table.columns:
            found = ", ".join(table.columns)
            raise DataError(
                f"{address} has no column {column!r}; found: {found}; write the header "
                f"{' '.join(QRELS_COLUMNS)!r}, tab separated"
            )
    query_ids = clean_ids(table["query-id"].tolist(), "query-id", address)
    document_ids = clean_ids(table["corpus-id"].tolist(), "corpus-id", address)
    for ids, known, column, file in (
        (query_ids, queries, "query-id", "queries"),
        (document_ids, corpus, "corpus-id", "corpus"),
    ):
        unknown = [position for position, one in enumerate(ids) if one not in known]
        if unknown:
            raise DataError(
                f"{address}: {column} {ids[unknown[0]]!r} is not in {file}.jsonl ({row_numbers(unknown)}); add "
                "it, or leave those rows out"
            )
    found_scores: dict[tuple[str, str], list[float]] = {}
    ignored = 0
    for position, (query, document, cell) in enumerate(
        zip(query_ids, document_ids, table["score"].tolist(), strict=True)
    ):
        try:
            score = float(cell)
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):
            raise DataError(
                f"{address}: score is {cell!r} in row {position + 1}; give a number, 1 or more for a relevant document"
            )
        if score > 0:
            found_scores.setdefault((query, document), []).append(score)
        else:
            ignored += 1
    twice = sum(len(scores) > 1 for scores in found_scores.values())
    if twice and params.duplicates == "refuse":
        raise DataError(
            f"{address} judges {twice} documents twice for the same query; remove one, or --set data.duplicates=merge"
        )
    qrels: Qrels = {}
    for (query, document), scores in found_scores.items():
        qrels.setdefault(query, {})[document] = sum(scores) / len(scores)
    return qrels, ignored


def _refuse_shared_queries(qrels: dict[str, Qrels], address: str) -> None:
    splits = list(qrels)
    for index, one in enumerate(splits):
        for other in splits[index + 1 :]:
            shared = sorted(qrels[one].keys() & qrels[other].keys())
            if shared:
                raise DataError(
                    f"{address}: {len(shared)} queries stand in qrels/{one}.tsv and in qrels/{other}.tsv, for "
                    f"instance {shared[0]!r}; held-out queries must be new to the model: take them out of one"
                )


def _split_off(
    qrels: dict[str, Qrels], queries: dict[str, str], missing: list[str], params: DataParams
) -> dict[str, Qrels]:
    ids = list(qrels["train"])
    texts = [queries[query] for query in ids]
    split = split_groups(texts, texts, split_fractions(missing, params), seed=params.split_seed)
    parts = {name: {ids[i]: qrels["train"][ids[i]] for i in rows} for name, rows in split.rows.items()}
    return {**qrels, **parts}


def pool_retrieval(retrieval: Retrieval, rankings: Sequence[Mapping[str, Sequence[str]]], *, queries: int) -> Retrieval:
    """Return a small part that is as hard as the whole: the judged documents and those that models rank highest.

    Args:
        retrieval: The whole.
        rankings: For each model, query id -> the ids of its nearest documents.
        queries: Most queries to keep, the first ones.
    """
    kept = [query for query in retrieval.queries if any(query in ranking for ranking in rankings)][:queries]
    judged = {query: retrieval.qrels[query] for query in kept}
    near = [document for query in kept for ranking in rankings for document in ranking.get(query, ())]
    documents = dict.fromkeys([*near, *(document for found in judged.values() for document in found)])
    return Retrieval(
        corpus={document: retrieval.corpus[document] for document in documents if document in retrieval.corpus},
        queries={query: retrieval.queries[query] for query in kept},
        qrels=judged,
    )
