"""From the bytes of one CSV, Parquet or JSON Lines file to a table, without guessing what a text means.

Core layer, knows nothing about Prefect. Every column has dtype `object` and holds the values as they stand in the
file: the texts "007", "NA" and "None" stay texts, and only an empty cell is missing (an empty text in CSV, None in
the other formats). Row numbers in messages count from 1 without the header; line numbers count from 1 with it, as
editors do.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pandas as pd

from flows.errors import DataError, one_line

EXTENSIONS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
TEXT_EXTENSIONS = (".csv", ".tsv", ".jsonl", ".ndjson")  # each may also end in .gz


def parse_table(content: bytes, address: str) -> pd.DataFrame:
    """Read one table; the format follows from the extension of `address`.

    Args:
        content: the bytes of the file.
        address: where they come from: its extension decides, and messages name it.

    Raises:
        DataError: unknown extension, empty file, wrong encoding, a broken line, or no rows.
    """
    extension, zipped = _extension(address)
    if not content:
        raise DataError(f"{address} is empty: it needs a header and rows")
    if extension == ".parquet":
        table = _parse_parquet(content, address)
    else:
        text = _decode(_unzip(content, address) if zipped else content, address)
        table = _parse_json_lines(text, address) if "json" in extension else _parse_csv(text, address, extension)
    if table.empty:
        raise DataError(f"{address} has no rows" + ("" if "json" in extension else " below its header"))
    return table


def _extension(address: str) -> tuple[str, bool]:
    first = address.split("::", 1)[0]  # fsspec chains addresses, the file's name comes first
    path = urlsplit(first).path if first.startswith(("http://", "https://")) else first
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes]
    zipped = suffixes[-1:] == [".gz"]
    if zipped:
        suffixes.pop()
    extension = suffixes[-1] if suffixes else ""
    if extension not in (TEXT_EXTENSIONS if zipped else EXTENSIONS):
        found = f"the extension {extension + ('.gz' if zipped else '')!r}" if extension else "no extension"
        raise DataError(
            f"{address} has {found}; known are {', '.join(EXTENSIONS)} (all but .parquet also with .gz): save "
            "it as one of these"
        )
    return extension, zipped


def _unzip(content: bytes, address: str) -> bytes:
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{address} is not a complete gzip file ({error}): compress it again or fetch it again"
        ) from None


def _decode(content: bytes, address: str) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{address} is not UTF-8: byte 0x{content[error.start]:02x} in line {line}; save it as UTF-8, "
            "for instance with `iconv -f latin1 -t utf-8`"
        ) from None
    if not text.strip():
        raise DataError(f"{address} is empty: it needs a header and rows")
    return text


def _parse_csv(text: str, address: str, extension: str) -> pd.DataFrame:
    delimiter = "\t" if extension == ".tsv" else ","
    csv.field_size_limit(2**31 - 1)  # the default would refuse texts above 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    try:
        header = next((row for row in reader if row), [])
        _check_header(header, address, delimiter)
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{address} line {reader.line_num}: found {len(row)} cells, the header has {len(header)}; "
                    'put a text that holds the separator or a line break in "double quotes"'
                )
            rows.append(row)
    except csv.Error as error:
        raise DataError(
            f"{address} line {reader.line_num}: {error}; close every quote, and write a quote inside a quoted "
            "text twice"
        ) from None
    return pd.DataFrame(rows, columns=pd.Index(header, dtype=object), dtype=object)


def _check_header(header: list[str], address: str, delimiter: str) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{address} has two columns named {twice[0]!r}: rename one")
    other = next((mark for mark in ";\t,|" if mark != delimiter and mark in header[0]), None)
    if len(header) == 1 and other:
        raise DataError(
            f"{address} seems to be separated by {other!r}, found the one column {header[0]!r}: save it with "
            f"{delimiter!r} between the cells" + (", or name it .tsv" if other == "\t" else "")
        )


def _parse_json_lines(text: str, address: str) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise DataError(f"{address} line {number} is not JSON ({reason}): write one object a line") from None
        if not isinstance(row, dict):
            raise DataError(
                f"{address} line {number} is a JSON {type(row).__name__}, not an object: write one "
                f'{{"text_a": ...}} a line'
            )
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return pd.DataFrame({name: pd.Series([row.get(name) for row in rows], dtype=object) for name in names})


def _parse_parquet(content: bytes, address: str) -> pd.DataFrame:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(content))
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise DataError(
            f"{address} is not a readable Parquet file ({one_line(error)}): write it again or fetch it again"
        ) from None
    return pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()})


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: None, a text without characters, or not a number (NaN)."""
    return value is None or value == "" or (isinstance(value, float) and value != value)


def row_numbers(positions: list[int], *, most: int = 5) -> str:
    """Positions of rows (from 0) as people count them: `row 3`, `rows 3, 7 and 12 more`."""
    shown = [str(position + 1) for position in positions[:most]]
    more = f" and {len(positions) - most} more" if len(positions) > most else ""
    return f"row{'s' if len(positions) > 1 else ''} {', '.join(shown)}{more}"
