"""What stands in a file is what stands in the table."""

from __future__ import annotations

import gzip
import io
import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.core.tables import is_missing, parse_table, row_numbers
from flows.errors import DataError

TRICKY = [
    "007",
    "NA",
    "null",
    "None",
    "nan",
    "1e5",
    "TRUE",
    " padded ",
    'a "quoted", text',
    "two\nlines",
    "naïve café ☕",
]


def parquet(columns: dict[str, list[object]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def csv_bytes(rows: list[dict[str, object]], separator: str = ",") -> bytes:
    return pd.DataFrame(rows).to_csv(index=False, sep=separator).encode()


@pytest.mark.parametrize(
    "name", ["x.csv", "x.tsv", "x.jsonl", "x.ndjson", "x.parquet", "x.csv.gz", "x.jsonl.gz", "X.CSV"]
)
def test_texts_survive_every_format_unchanged(name: str) -> None:
    rows: list[dict[str, object]] = [{"id": text, "n": "1"} for text in TRICKY]
    kind = name.lower().removesuffix(".gz")
    if kind.endswith(("jsonl", "ndjson")):
        content = "\n".join(json.dumps(row) for row in rows).encode()
    elif kind.endswith("parquet"):
        content = parquet({"id": list(TRICKY), "n": ["1"] * len(TRICKY)})
    else:
        content = csv_bytes(rows, "\t" if kind.endswith("tsv") else ",")
    table = parse_table(gzip.compress(content, mtime=0) if name.endswith(".gz") else content, name)
    assert table["id"].tolist() == TRICKY
    assert list(table.columns) == ["id", "n"]


def test_only_an_empty_cell_is_missing() -> None:
    table = parse_table(b'a,b\n"",NA\nNone,x\n', "x.csv")
    assert [is_missing(cell) for cell in table["a"]] == [True, False]
    assert not any(is_missing(cell) for cell in table["b"])
    assert is_missing(parse_table(b'{"a": null, "b": 1}\n{"b": 2}', "x.jsonl")["a"][1])
    assert is_missing(parse_table(parquet({"a": [None, "x"]}), "x.parquet")["a"][0])


def test_numbers_of_parquet_and_json_stay_exact_next_to_missing_ones() -> None:
    assert parse_table(parquet({"id": [2**53 + 1, None]}), "x.parquet")["id"].tolist() == [2**53 + 1, None]
    assert parse_table(b'{"id": 9007199254740993}\n{"id": null}', "x.jsonl")["id"].tolist() == [2**53 + 1, None]


def test_byte_order_mark_windows_line_ends_and_blank_lines_are_fine() -> None:
    table = parse_table("\ufeffa,b\r\n1,2\r\n\r\n3,4\r\n".encode(), "x.csv")
    assert table.to_dict("list") == {"a": ["1", "3"], "b": ["2", "4"]}
    assert len(parse_table(b'\n{"a": 1}\r\n\n{"a": 2}\n', "x.jsonl")) == 2


def test_query_strings_and_chained_addresses_do_not_hide_the_extension() -> None:
    for address in ("https://host/x.csv?token=1.zip", "zip://x.csv::s3://bucket/all.zip", "memory://a.b/c.v2.csv"):
        assert len(parse_table(b"a\n1\n", address)) == 1


def test_a_cell_may_be_longer_than_the_default_limit_of_the_csv_module() -> None:
    assert len(parse_table(b"a\n" + b"x" * 200_000 + b"\n", "x.csv")["a"][0]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "fragments"),
    [
        ("x.xlsx", b"1", ["'.xlsx'", ".csv, .tsv, .jsonl, .ndjson, .parquet", "save it as"]),
        ("x.parquet.gz", b"1", ["'.parquet.gz'"]),
        ("x", b"1", ["no extension"]),
        ("x.csv", b"", ["x.csv is empty"]),
        ("x.csv", b" \n\n", ["x.csv is empty"]),
        ("x.csv", b"a,b\n", ["no rows below its header"]),
        ("x.jsonl", b"\n \n", ["x.jsonl is empty"]),
        ("x.csv", "a,b\nä,ö\n".encode("latin-1"), ["not UTF-8", "byte 0xe4 in line 2", "iconv"]),
        ("x.csv", "a,b\n1,2\n".encode("utf-16"), ["not UTF-8", "line 1"]),
        ("x.csv", b"a,b\n1,2\n1,2,3\n", ["line 3", "found 3 cells, the header has 2", '"double quotes"']),
        ("x.csv", b"a,b\n1\n", ["line 2", "found 1 cells"]),
        ("x.csv", b'a,b\n1,"open\n2,3\n', ["unexpected end of data", "close every quote"]),
        ("x.csv", b"a,b,a\n1,2,3\n", ["two columns named 'a'", "rename"]),
        ("x.csv", b"a;b\n1;2\n", ["separated by ';'", "'a;b'", "with ','"]),
        ("x.csv", b"a\tb\n1\t2\n", ["separated by '\\t'", ".tsv"]),
        ("x.jsonl", b'{"a": 1}\n{"a": 2\n{"a": 3}\n', ["line 2 is not JSON", "column 8", "one object a line"]),
        ("x.jsonl", b'[{"a": 1}]', ["line 1 is a JSON list"]),
        ("x.jsonl", b"[" * 100_000, ["line 1 is not JSON"]),
        ("x.parquet", b"PAR1 no", ["not a readable Parquet file"]),
        ("x.parquet", parquet({"a": []}), ["no rows"]),
        ("x.csv.gz", b"a,b\n", ["not a complete gzip file"]),
        ("x.csv.gz", gzip.compress(b"a,b\n1,2\n", mtime=0)[:-4], ["not a complete gzip file"]),
    ],
)
def test_a_broken_file_is_refused_in_one_line(name: str, content: bytes, fragments: list[str]) -> None:
    with pytest.raises(DataError) as refusal:
        parse_table(content, name)
    message = str(refusal.value)
    assert message.startswith(name)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_row_numbers_count_from_one_and_stop_after_a_few() -> None:
    assert row_numbers([0]) == "row 1"
    assert row_numbers([0, 4]) == "rows 1, 5"
    assert row_numbers(list(range(9))) == "rows 1, 2, 3, 4, 5 and 4 more"
