"""Columns of a table as read: found under the user's names, and their cells as clean texts, ids and scores.

Core layer, pure: tables and cells in, values or a `DataError` out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bentos.text import clean_text, text_problem
from flows.core.tables import is_missing, row_numbers
from flows.errors import DataError
from flows.params import PAIR_COLUMNS, DataParams

PROFILE_COLUMNS = ("id",)
JUDGEMENT_COLUMNS = ("query", "profile_id", "relevance")
RESERVED_COLUMNS = (*PAIR_COLUMNS, "base_cosine", "tuned_cosine")  # of the test rows that a run keeps
KNOWN_COLUMNS = (*PAIR_COLUMNS, *PROFILE_COLUMNS, *JUDGEMENT_COLUMNS)


def check_mapping(columns: Mapping[str, str]) -> None:
    """Check `data.columns` before any file is looked at.

    Raises:
        DataError: a key that is none of our column names, an empty name, or one name for two columns of a table.
    """
    unknown = sorted(set(columns) - set(KNOWN_COLUMNS))
    if unknown:
        raise DataError(
            f"data.columns has the unknown key {unknown[0]!r}; keys are our names "
            f"({', '.join(KNOWN_COLUMNS)}), values those in your files, "
            "as in --set data.columns.text_a=sentence1"
        )
    for ours, theirs in columns.items():
        if not theirs:
            raise DataError(f"data.columns.{ours} is empty; give the column's name in your file, or leave the key out")
    for wanted in (PAIR_COLUMNS, JUDGEMENT_COLUMNS):
        names = [columns.get(name, name) for name in wanted]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise DataError(
                f"data.columns gives {twice[0]!r} to two of {', '.join(wanted)}; each needs a column of its own"
            )


def check_slice_columns(names: Sequence[str]) -> None:
    """Check `data.slice_columns` before any file is looked at.

    Raises:
        DataError: an empty name, a name twice, or one that means something else.
    """
    for name in names:
        if not name.strip():
            raise DataError("data.slice_columns has an empty name; name columns of your pairs, such as language")
        if names.count(name) > 1:
            raise DataError(f"data.slice_columns names {name!r} twice; name each column once")
        if name in RESERVED_COLUMNS:
            raise DataError(
                f"data.slice_columns names {name!r}, which Ekiben fills itself ({', '.join(RESERVED_COLUMNS)}); name "
                "other columns of your pairs, or rename that one"
            )


def select_slices(table: pd.DataFrame, names: Sequence[str], address: str) -> dict[str, list[str | None]]:
    """The columns that rows are looked at apart by, as texts; None for an empty cell. Row order is kept.

    Raises:
        DataError: a column is missing; the message lists those that are there.
    """
    for name in names:
        if name not in table.columns:
            found = ", ".join(map(str, table.columns)) or "none"
            raise DataError(
                f"{address} has no column {name!r}, which data.slice_columns names; found: {found}. Add it to every "
                "file of pairs, or take it out of data.slice_columns"
            )
    return {name: [None if is_missing(cell) else str(cell).strip() for cell in table[name].tolist()] for name in names}


def select_columns(
    table: pd.DataFrame, wanted: Sequence[str], columns: Mapping[str, str], address: str
) -> pd.DataFrame:
    """The wanted columns under our names, in our order.

    Raises:
        DataError: a column is missing; the message lists those that are there.
    """
    for ours in wanted:
        theirs = columns.get(ours, ours)
        if theirs not in table.columns:
            found = ", ".join(map(str, table.columns)) or "none"
            meant = f"{theirs!r} (given for {ours!r} in data.columns)" if ours in columns else repr(ours)
            raise DataError(
                f"{address} has no column {meant}; found: {found}. Say which one it is: --set data.columns.{ours}=NAME"
            )
    return pd.DataFrame({ours: table[columns.get(ours, ours)] for ours in wanted})


def clean_column(values: Sequence[Any], name: str, address: str) -> list[str]:
    """Texts as they go to the tokenizer.

    Raises:
        DataError: a cell that is empty, no text, or unusable text, with its row numbers.
    """
    problems: dict[str, list[int]] = {}
    for position, value in enumerate(values):
        if is_missing(value):
            problem: str | None = "is empty"
        elif not isinstance(value, str):
            problem = f"is no text but {type(value).__name__}"
        else:
            problem = text_problem(value)
        if problem:
            problems.setdefault(problem, []).append(position)
    if problems:
        problem, positions = next(iter(problems.items()))
        raise DataError(
            f"{address}: {name} {problem} in {row_numbers(positions)}; correct the cells or leave those rows out"
        )
    return [clean_text(value) for value in values]


def clean_ids(values: Sequence[Any], name: str, address: str) -> list[str]:
    """Ids as texts: "007" stays, the number 7 is the id "7".

    Raises:
        DataError: an empty cell, or something that is neither text nor whole number.
    """
    texts: list[Any] = []
    for value in values:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        texts.append(str(value) if isinstance(value, int) and not isinstance(value, bool) else value)
    return clean_column(texts, name, address)


def clean_unique_ids(values: Sequence[Any], name: str, address: str) -> list[str]:
    """As `clean_ids`, for a table that has each id once.

    Raises:
        DataError: as `clean_ids`, or an id stands there twice.
    """
    ids = clean_ids(values, name, address)
    twice = pd.Series(ids).duplicated().to_numpy()
    if twice.any():
        raise DataError(
            f"{address} has {int(twice.sum())} ids that stand there already, for instance "
            f"{ids[int(twice.argmax())]!r}; ids are unique: rename or remove them"
        )
    return ids


def scale_scores(values: Sequence[Any], name: str, address: str, params: DataParams) -> list[float]:
    """Scores mapped from `score_min`..`score_max` to 0..1.

    Raises:
        DataError: a cell that is empty, no number, not finite or outside the scale.
    """
    problems: dict[str, list[int]] = {}
    numbers: list[float] = []
    for position, value in enumerate(values):
        number = _to_number(value)
        numbers.append(number)
        if is_missing(value):
            problems.setdefault("is empty", []).append(position)
        elif math.isnan(number) and str(value).strip().lower().lstrip("+-") != "nan":
            problems.setdefault(f"is no number but {str(value)[:40]!r}", []).append(position)
        elif not math.isfinite(number):
            problems.setdefault(f"is {number}, which is not finite", []).append(position)
    if problems:
        problem, positions = next(iter(problems.items()))
        raise DataError(f"{address}: {name} {problem} in {row_numbers(positions)}; give a number with a decimal point")
    low, high = min(numbers), max(numbers)
    if low < params.score_min or high > params.score_max:
        outside = [i for i, number in enumerate(numbers) if not params.score_min <= number <= params.score_max]
        start, end = math.floor(min(low, 0.0)), math.ceil(high)
        raise DataError(
            f"{address}: {name} runs from {low:g} to {high:g}, allowed is {params.score_min:g} to {params.score_max:g} "
            f"({row_numbers(outside)}); say your scale, for instance --set data.score_min={start} --set "
            f"data.score_max={end}"
        )
    return [(number - params.score_min) / (params.score_max - params.score_min) for number in numbers]


def _to_number(value: Any) -> float:
    if isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
