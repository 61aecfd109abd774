"""Every kind of bad input, from the parameters on: one line that says what was found and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.core.dataset import prepare_dataset, read_data
from flows.errors import DataError
from flows.params import DataParams

Files = dict[str, str | bytes]
HEADER = "text_a,text_b,score\n"
GOOD = HEADER + "".join(f"one {i},other {i},{i % 5 / 4}\n" for i in range(120))
HELD_OUT = HEADER + "".join(f"new {i},newer {i},{i % 5 / 4}\n" for i in range(20))
PROFILES = "id,title\n" + "".join(f"{i},person {i}\n" for i in range(60))
JUDGEMENTS = "query,profile_id,relevance\n" + "".join(f"role {i},{i},{i % 5 / 4}\n" for i in range(60))
CORPUS = "".join(f'{{"_id": "d{i}", "text": "document {i}"}}\n' for i in range(60))
QUERIES = "".join(f'{{"_id": "q{i}", "text": "query {i}"}}\n' for i in range(60))
QRELS = "query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(60))
BEIR: Files = {"beir/corpus.jsonl": CORPUS, "beir/queries.jsonl": QUERIES, "beir/qrels/train.tsv": QRELS}

BAD: list[tuple[str, Files, dict[str, Any], list[str]]] = [
    # what was asked for
    ("nothing is given", {}, {}, ["nothing to train on", "--pairs FILE", "--retrieval FOLDER"]),
    ("test alone", {"t.csv": GOOD}, {"test": "t.csv"}, ["--test alone is not enough", "--pairs FILE"]),
    ("dev with retrieval only", BEIR | {"d.csv": GOOD}, {"retrieval": "beir", "dev": "d.csv"}, ["--dev holds pairs"]),
    ("profiles alone", {"p.csv": PROFILES}, {"profiles": "p.csv"}, ["--profiles needs --judgements"]),
    ("judgements alone", {"j.csv": JUDGEMENTS}, {"judgements": "j.csv"}, ["--judgements needs --profiles"]),
    ("an unknown key", {"x.csv": GOOD}, {"pairs": "x.csv", "columns": {"label": "score"}}, ["unknown key 'label'"]),
    # files
    ("a missing file", {}, {"pairs": "none.csv"}, ["there is no file", "none.csv", "check the path"]),
    ("a folder", {"x.csv/a.csv": GOOD}, {"pairs": "x.csv"}, ["is a folder", "give one file in it"]),
    ("an unknown format", {"x.xlsx": GOOD}, {"pairs": "x.xlsx"}, ["'.xlsx'", "known are .csv", "save it as"]),
    ("an empty file", {"x.csv": ""}, {"pairs": "x.csv"}, ["x.csv is empty"]),
    ("a header alone", {"x.csv": HEADER}, {"pairs": "x.csv"}, ["x.csv has no rows below its header"]),
    (
        "another encoding",
        {"x.csv": GOOD.replace("one", "ünö").encode("latin-1")},
        {"pairs": "x.csv"},
        ["not UTF-8", "iconv"],
    ),
    ("a broken JSON line", {"x.jsonl": '{"text_a": "a"}\n{"text_a":\n'}, {"pairs": "x.jsonl"}, ["line 2 is not JSON"]),
    ("broken Parquet", {"x.parquet": "PAR1"}, {"pairs": "x.parquet"}, ["not a readable Parquet file"]),
    ("a row with a cell too many", {"x.csv": GOOD + "a,b,1,2\n"}, {"pairs": "x.csv"}, ["line 122", "found 4 cells"]),
    ("an unknown protocol", {}, {"pairs": "nope://x.csv"}, ["no known kind of address", "s3://"]),
    ("a missing package", {}, {"pairs": "gs://bucket/x.csv"}, ["pip install gcsfs"]),
    (
        "a revision of a remote file",
        {},
        {"pairs": "memory://x.csv", "data_rev": "v1"},
        ["not a local path", "--data-rev"],
    ),
    ("a revision outside DVC", {"x.csv": GOOD}, {"pairs": "x.csv", "data_rev": "v1"}, ["not in a DVC repository"]),
    # cells
    (
        "a missing column",
        {"x.csv": GOOD.replace("text_a", "s1")},
        {"pairs": "x.csv"},
        ["no column 'text_a'", "found: s1, text_b"],
    ),
    ("an empty text", {"x.csv": GOOD + ",b,1\n"}, {"pairs": "x.csv"}, ["text_a is empty in row 121"]),
    ("a null byte", {"x.csv": GOOD + "a\0,b,1\n"}, {"pairs": "x.csv"}, ["contains a null byte in row 121"]),
    (
        "a lone surrogate",
        {"x.jsonl": '{"text_a": "\\ud800", "text_b": "b", "score": 1}\n'},
        {"pairs": "x.jsonl"},
        ["lone surrogate", "row 1"],
    ),
    (
        "a score in words",
        {"x.csv": GOOD + "a,b,high\n"},
        {"pairs": "x.csv"},
        ["score is no number but 'high' in row 121"],
    ),
    ("a score that is not finite", {"x.csv": GOOD + "a,b,inf\n"}, {"pairs": "x.csv"}, ["score is inf"]),
    ("no score", {"x.csv": GOOD + "a,b,\n"}, {"pairs": "x.csv"}, ["score is empty in row 121"]),
    (
        "another scale",
        {"x.csv": GOOD + "a,b,5\n"},
        {"pairs": "x.csv"},
        ["score runs from 0 to 5, allowed is 0 to 1", "--set data.score_min=0 --set data.score_max=5"],
    ),
    (
        "a bad test file",
        {"x.csv": GOOD, "t.csv": HEADER + "a,b,2\n"},
        {"pairs": "x.csv", "test": "t.csv"},
        ["t.csv: score"],
    ),
    # profiles
    (
        "a profile twice",
        {"p.csv": PROFILES + "7,again\n", "j.csv": JUDGEMENTS},
        {},
        ["1 ids that stand there already", "'7'"],
    ),
    (
        "an unknown profile",
        {"p.csv": PROFILES, "j.csv": JUDGEMENTS + "q,99,1\n"},
        {},
        ["lacks, for instance '99' (row 61)"],
    ),
    ("an empty profile", {"p.csv": PROFILES + "99,\n", "j.csv": JUDGEMENTS}, {}, ["profile_text is empty in row 61"]),
    (
        "an unknown placeholder",
        {"p.csv": PROFILES, "j.csv": JUDGEMENTS},
        {"profile_template": "{title} {skills}"},
        ["asks for {skills}, which p.csv lacks; found: id, title"],
    ),
    # retrieval
    (
        "an incomplete folder",
        {"beir/corpus.jsonl": CORPUS},
        {"retrieval": "beir"},
        ["queries.jsonl", "qrels/train.tsv"],
    ),
    (
        "a query in two splits",
        BEIR | {"beir/qrels/test.tsv": QRELS},
        {"retrieval": "beir"},
        ["60 queries stand in qrels/train.tsv and in qrels/test.tsv"],
    ),
    (
        "an unknown document",
        BEIR | {"beir/qrels/train.tsv": QRELS + "q1\tx\t1\n"},
        {"retrieval": "beir"},
        ["corpus-id 'x'"],
    ),
    ("too few queries", BEIR, {"retrieval": "beir"}, ["dev has 9 queries, at least 16", "--set data.min_eval_rows=9"]),
    # the whole
    (
        "duplicates",
        {"x.csv": GOOD + "other 1,one 1,0\n"},
        {"pairs": "x.csv", "duplicates": "refuse"},
        ["data.duplicates=merge"],
    ),
    (
        "a shared text",
        {"x.csv": GOOD, "t.csv": HELD_OUT + "one 7,new,1\n"},
        {"pairs": "x.csv", "test": "t.csv", "leaks": "refuse"},
        ["x.csv shares 1 texts with t.csv, for instance 'one 7'", "data.leaks=drop"],
    ),
    (
        "test data out of train",
        {"x.csv": GOOD, "t.csv": HELD_OUT + "one 7,other 7,1\none 8,other 8,1\n"},
        {"pairs": "x.csv", "test": "t.csv"},
        ["2 of the 22 pairs in t.csv stand in x.csv too; at most 5% may", "new to the model"],
    ),
    ("the same file twice", {"x.csv": GOOD}, {"pairs": "x.csv", "dev": "x.csv"}, ["120 of the 120 pairs in x.csv"]),
    (
        "too few rows",
        {"x.csv": "\n".join(GOOD.splitlines()[:31])},
        {"pairs": "x.csv"},
        ["train has 20 pairs, at least 32 are needed", "what happened: Split", "--set data.min_train_rows=20"],
    ),
    (
        "too few rows after leaks",
        {"x.csv": GOOD + "a,b,1\n", "t.csv": HEADER + "".join(f"one {i},x {i},{i % 2}\n" for i in range(100))},
        {"pairs": "x.csv", "test": "t.csv"},
        ["train has", "dropped 100 of 121 rows that share a text with test"],
    ),
    (
        "all scores equal",
        {"x.csv": GOOD, "t.csv": HEADER + "".join(f"new {i},newer {i},1\n" for i in range(20))},
        {"pairs": "x.csv", "test": "t.csv"},
        ["all 20 scores of test are 1", "no rank correlation", "different scores"],
    ),
]


@pytest.mark.parametrize(("files", "params", "fragments"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input_is_refused_in_one_line(
    tmp_path: Path, files: Files, params: dict[str, Any], fragments: list[str]
) -> None:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if {"p.csv", "j.csv"} <= set(files):
        params = {"profiles": "p.csv", "judgements": "j.csv"} | params
    data = DataParams(**params)
    with pytest.raises(DataError) as refusal:
        prepare_dataset(read_data(data, root=tmp_path), data)
    message = str(refusal.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
