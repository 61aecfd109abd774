"""Small parts of the data that stand for the whole where the whole would take too long. Core layer, pure."""

from __future__ import annotations

from itertools import islice

import numpy as np

from bentos.text import clean_text
from flows.core.dataset import Part
from flows.core.retrieval import Retrieval

SEED = 11


def spread_texts(part: Part, count: int) -> list[str]:
    """Choose up to `count` different texts, evenly from the shortest to the longest, so that they are as long as all.

    Args:
        part: Its pairs give both texts, its retrieval data queries and documents.
        count: Most texts to choose, at least 1.
    """
    found = [*part.pairs["text_a"], *part.pairs["text_b"]] if part.has_pairs else []
    if part.retrieval is not None:
        found += [*part.retrieval.queries.values(), *part.retrieval.corpus.values()]
    ordered = sorted({clean_text(str(text)) for text in found}, key=lambda text: (len(text), text))
    rows = np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int)
    return [ordered[row] for row in rows]


def thin_out(part: Part, *, pairs: int, queries: int, documents: int) -> Part:
    """Keep so many rows at most; the same ones each time, so that models can be compared on them.

    Args:
        part: The whole.
        pairs: Scored pairs to keep, drawn by a fixed seed.
        queries: Queries with a relevant document to keep, the first ones.
        documents: Documents to keep: all that are judged for these queries, then the first others. A smaller corpus
            is easier to rank, so scores on it are no scores on the whole.
    """
    few = part.pairs if len(part.pairs) <= pairs else part.pairs.sample(pairs, random_state=SEED)
    if part.retrieval is None:
        return Part(few, None)
    whole = part.retrieval
    answered = (query for query in whole.queries if any(found > 0 for found in whole.qrels.get(query, {}).values()))
    kept = list(islice(answered, queries))
    judged = dict.fromkeys(document for query in kept for document in whole.qrels[query] if document in whole.corpus)
    others = (document for document in whole.corpus if document not in judged)
    chosen = [*judged, *islice(others, max(0, documents - len(judged)))]
    return Part(
        few,
        Retrieval(
            corpus={document: whole.corpus[document] for document in chosen},
            queries={query: whole.queries[query] for query in kept},
            qrels={query: whole.qrels[query] for query in kept},
        ),
    )
