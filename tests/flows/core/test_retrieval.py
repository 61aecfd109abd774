"""BEIR folders: read, checked, split by queries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from flows.core.files import MissingFileError, read_bytes
from flows.core.retrieval import Retrieval, pool_retrieval, prepare_retrieval, read_retrieval
from flows.core.tables import parse_table
from flows.errors import DataError
from flows.params import DataParams

CORPUS = [{"_id": f"d{i}", "title": f"Title {i}" if i % 2 else "", "text": f"text {i}"} for i in range(20)]
QUERIES = [{"_id": f"q{i}", "text": f"query {i}"} for i in range(20)]


def write_beir(
    folder: Path, *, corpus: Any = CORPUS, queries: Any = QUERIES, **qrels: list[tuple[Any, Any, Any]]
) -> str:
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for split, judged in qrels.items():
        lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in judged)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


def read(_: str, address: str) -> pd.DataFrame:
    return parse_table(read_bytes(address, root=Path()), address)


def relevant(*queries: int, score: Any = 1) -> list[tuple[Any, Any, Any]]:
    return [(f"q{i}", f"d{i}", score) for i in queries]


def test_each_split_has_its_queries_and_all_share_the_corpus(tmp_path: Path) -> None:
    address = write_beir(tmp_path / "beir", train=[*relevant(0, 1), ("q1", "d5", 2)], dev=relevant(2), test=relevant(3))
    parts, notes = prepare_retrieval(read_retrieval(address, read), DataParams())
    assert notes == []
    assert parts["train"].queries == {"q0": "query 0", "q1": "query 1"}
    assert parts["train"].qrels == {"q0": {"d0": 1.0}, "q1": {"d1": 1.0, "d5": 2.0}}
    assert parts["dev"].queries == {"q2": "query 2"}
    assert parts["test"].corpus is parts["train"].corpus
    assert parts["test"].corpus["d0"] == "text 0"
    assert parts["test"].corpus["d1"] == "Title 1 text 1"


def test_missing_dev_and_test_are_split_off_the_training_queries(tmp_path: Path) -> None:
    address = write_beir(tmp_path / "beir", train=relevant(*range(20)))
    parts, notes = prepare_retrieval(read_retrieval(address, read), DataParams())
    assert {split: len(part.queries) for split, part in parts.items()} == {"train": 14, "dev": 3, "test": 3}
    assert notes == [f"{address}: split dev and test off the training queries (seed 13): 14 train, 3 dev, 3 test."]
    again, _ = prepare_retrieval(read_retrieval(address, read), DataParams())
    assert again == parts


def test_queries_with_the_same_text_stay_together(tmp_path: Path) -> None:
    queries = [{"_id": f"q{i}", "text": f"query {i // 2}"} for i in range(20)]
    address = write_beir(tmp_path / "beir", queries=queries, train=relevant(*range(20)))
    parts, _ = prepare_retrieval(read_retrieval(address, read), DataParams())
    texts = [set(part.queries.values()) for part in parts.values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 10


def test_what_is_not_relevant_is_ignored_and_duplicates_are_merged(tmp_path: Path) -> None:
    judged = [*relevant(0), ("q0", "d0", 2), ("q0", "d1", 0), ("q1", "d1", -1)]
    address = write_beir(tmp_path / "beir", train=judged, dev=relevant(2), test=relevant(3))
    raw = read_retrieval(address, read)
    parts, notes = prepare_retrieval(raw, DataParams())
    assert parts["train"].qrels == {"q0": {"d0": 1.5}}
    assert notes == [f"{address}/qrels/train.tsv: ignored 2 rows with a relevance of 0 or less."]
    with pytest.raises(DataError, match="judges 1 documents twice"):
        prepare_retrieval(raw, DataParams(duplicates="refuse"))


@pytest.mark.parametrize(
    ("files", "fragments"),
    [
        ({"corpus": [*CORPUS, {"_id": "d0", "text": "again"}]}, ["corpus.jsonl has 1 ids", "'d0'", "unique"]),
        ({"corpus": [*CORPUS, {"_id": "d99", "text": " "}]}, ["corpus.jsonl: text is empty in row 21"]),
        ({"corpus": [{"id": "d0", "text": "x"}]}, ["no field '_id'; found: id, text"]),
        ({"queries": [*QUERIES, {"_id": "q99", "text": "\0"}]}, ["queries.jsonl: text contains a null byte in row 21"]),
        ({"queries": [{"_id": "q0", "query": "x"}]}, ["no field 'text'; found: _id, query"]),
        ({"train": [("q0", "d99", 1)]}, ["train.tsv: corpus-id 'd99' is not in corpus.jsonl (row 1)"]),
        ({"train": [("q99", "d0", 1)]}, ["train.tsv: query-id 'q99' is not in queries.jsonl (row 1)"]),
        ({"train": relevant(0, score="high")}, ["train.tsv: score is 'high' in row 1"]),
        ({"train": relevant(0, score="inf")}, ["score is 'inf' in row 1"]),
        (
            {"test": relevant(0, 3)},
            ["1 queries stand in qrels/train.tsv and in qrels/test.tsv", "'q0'", "new to the model"],
        ),
    ],
)
def test_bad_retrieval_data_is_refused(tmp_path: Path, files: Any, fragments: list[str]) -> None:
    whole = {"train": relevant(0, 1), "dev": relevant(2), "test": relevant(3)} | files
    raw = read_retrieval(write_beir(tmp_path / "beir", **whole), read)
    with pytest.raises(DataError) as refusal:
        prepare_retrieval(raw, DataParams())
    assert "\n" not in str(refusal.value)
    for fragment in fragments:
        assert fragment in str(refusal.value)


def test_judgements_without_a_header_are_refused(tmp_path: Path) -> None:
    address = write_beir(tmp_path / "beir", train=relevant(0))
    (tmp_path / "beir" / "qrels" / "train.tsv").write_text("q0\td0\t1\nq1\td1\t1\n")
    with pytest.raises(DataError, match=r"no column 'query-id'; found: q0, d0, 1; write the header"):
        prepare_retrieval(read_retrieval(address, read), DataParams())


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv"])
def test_a_folder_without_a_needed_file_is_refused(tmp_path: Path, name: str) -> None:
    address = write_beir(tmp_path / "beir", train=relevant(0))
    (tmp_path / "beir" / name).unlink()
    with pytest.raises(MissingFileError, match=rf"{name}.*retrieval data is a folder with corpus.jsonl"):
        read_retrieval(address, read)


def test_a_pool_holds_what_is_judged_and_what_is_ranked_high() -> None:
    corpus = {f"d{number}": f"document {number}" for number in range(20)}
    queries = {"q0": "first", "q1": "second", "q2": "never ranked", "q3": "third"}
    qrels = {"q0": {"d0": 1.0}, "q1": {"d1": 2.0, "d2": 0.5}, "q2": {}, "q3": {"d3": 1.0}}
    rankings = [{"q0": ["d9", "d0"], "q1": ["d8"], "q3": ["d7"]}, {"q0": ["d10"], "q1": ["d1"], "q3": ["d3"]}]
    pool = pool_retrieval(Retrieval(corpus, queries, qrels), rankings, queries=2)
    assert pool.queries == {"q0": "first", "q1": "second"}
    assert pool.qrels == {"q0": {"d0": 1.0}, "q1": {"d1": 2.0, "d2": 0.5}}
    assert pool.corpus == {name: corpus[name] for name in ("d9", "d0", "d10", "d8", "d1", "d2")}
