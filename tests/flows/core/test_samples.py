from __future__ import annotations

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from flows.core.dataset import Part
from flows.core.retrieval import Retrieval
from flows.core.samples import spread_texts, thin_out


def make_part(rows: int, queries: int = 0, documents: int = 0) -> Part:
    texts = [f"text {'x' * row} {row}" for row in range(2 * rows)]
    pairs = pd.DataFrame({"text_a": texts[:rows], "text_b": texts[rows:], "score": [0.5] * rows})
    if not queries:
        return Part(pairs)
    corpus = {f"d{number}": f"document {number}" for number in range(documents)}
    asked = {f"q{number}": f"query {number}" for number in range(queries)}
    qrels = {f"q{number}": {f"d{(7 * number) % documents}": 1.0} for number in range(1, queries)}  # q0 has no answer
    return Part(pairs, Retrieval(corpus, asked, qrels))


@given(rows=st.integers(1, 60), count=st.integers(1, 40))
def test_texts_reach_from_the_shortest_to_the_longest(rows: int, count: int) -> None:
    part = make_part(rows)
    texts = spread_texts(part, count)
    lengths = [len(text) for text in texts]
    assert len(texts) == len(set(texts)) == min(count, 2 * rows)
    assert lengths == sorted(lengths)
    everything = [len(text) for column in ("text_a", "text_b") for text in part.pairs[column]]
    assert lengths[0] == min(everything)
    if count > 1:
        assert lengths[-1] == max(everything)


def test_queries_and_documents_are_texts_too() -> None:
    assert set(spread_texts(make_part(0, queries=2, documents=3), 99)) == {
        "query 0", "query 1", "document 0", "document 1", "document 2",
    }  # fmt: skip


def test_a_thinned_part_is_the_same_each_time_and_whole_when_it_is_small() -> None:
    part = make_part(100)
    few = thin_out(part, pairs=10, queries=5, documents=20)
    assert len(few.pairs) == 10
    assert few.pairs.equals(thin_out(part, pairs=10, queries=5, documents=20).pairs)
    assert thin_out(part, pairs=100, queries=5, documents=20).pairs is part.pairs
    assert few.retrieval is None


@given(queries=st.integers(1, 20), documents=st.integers(1, 40), kept=st.integers(1, 25), most=st.integers(1, 50))
def test_thinned_retrieval_keeps_answered_queries_with_their_documents(
    queries: int, documents: int, kept: int, most: int
) -> None:
    part = make_part(4, queries=queries, documents=documents)
    assert part.retrieval is not None
    few = thin_out(part, pairs=10, queries=kept, documents=most).retrieval
    assert few is not None
    assert len(few.queries) == min(kept, queries - 1)
    assert few.queries.items() <= part.retrieval.queries.items()
    assert few.corpus.items() <= part.retrieval.corpus.items()
    judged = {document for found in few.qrels.values() for document in found}
    assert few.qrels.keys() == few.queries.keys()
    assert judged <= few.corpus.keys()
    assert len(few.corpus) == max(len(judged), min(most, documents))
