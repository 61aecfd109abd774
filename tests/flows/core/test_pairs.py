"""Columns, texts, scores and duplicates of scored pairs."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from flows.core.columns import check_mapping
from flows.core.pairs import merge_duplicates, prepare_pairs
from flows.errors import DataError
from flows.params import DataParams


def table(*rows: tuple[Any, Any, Any], columns: tuple[str, ...] = ("text_a", "text_b", "score")) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=list(columns), dtype=object)


def test_texts_are_cleaned_and_scores_mapped_to_one() -> None:
    params = DataParams(score_min=1, score_max=5)
    pairs = prepare_pairs(table((" a ", "NA", "1"), ("b", "c\n", 5), ("d", "e", 3.0)), params, "x.csv")
    assert pairs.to_dict("list") == {"text_a": ["a", "b", "d"], "text_b": ["NA", "c", "e"], "score": [0.0, 1.0, 0.5]}
    assert pairs["score"].dtype == float


def test_columns_are_found_under_the_names_that_are_given() -> None:
    params = DataParams(columns={"text_a": "sentence1", "score": "label"})
    rows = table(("a", "b", "1", "x"), columns=("sentence1", "text_b", "label", "score"))
    assert prepare_pairs(rows, params, "x.csv").iloc[0].tolist() == ["a", "b", 1.0]


@pytest.mark.parametrize(
    ("row", "params", "fragments"),
    [
        (("", "b", 1), {}, ["x.csv: text_a is empty in row 2", "leave those rows out"]),
        (("  ", "b", 1), {}, ["text_a is empty in row 2"]),
        (("a", None, 1), {}, ["text_b is empty in row 2"]),
        (("a\0", "b", 1), {}, ["text_a contains a null byte in row 2"]),
        (("\ud800", "b", 1), {}, ["text_a contains a lone surrogate"]),
        ((5, "b", 1), {}, ["text_a is no text but int"]),
        (("a", ["b"], 1), {}, ["text_b is no text but list"]),
        (("a", "b", ""), {}, ["score is empty in row 2"]),
        (("a", "b", "high"), {}, ["score is no number but 'high' in row 2", "decimal point"]),
        (("a", "b", "0,5"), {}, ["score is no number but '0,5'"]),
        (("a", "b", True), {}, ["score is no number but 'True'"]),
        (("a", "b", "nan"), {}, ["score is nan, which is not finite"]),
        (("a", "b", "-inf"), {}, ["score is -inf, which is not finite"]),
        (
            ("a", "b", "4.2"),
            {},
            ["score runs from 0.5 to 4.2, allowed is 0 to 1 (row 2)", "--set data.score_min=0 --set data.score_max=5"],
        ),
        (("a", "b", "-1"), {}, ["runs from -1 to 0.5", "--set data.score_min=-1 --set data.score_max=1"]),
        (("a", "b", "7"), {"score_max": 5}, ["allowed is 0 to 5", "data.score_max=7"]),
    ],
)
def test_a_bad_cell_is_refused_with_its_row(row: tuple[Any, Any, Any], params: Any, fragments: list[str]) -> None:
    with pytest.raises(DataError) as refusal:
        prepare_pairs(table(("good", "fine", 0.5), row), DataParams(**params), "x.csv")
    assert "\n" not in str(refusal.value)
    for fragment in fragments:
        assert fragment in str(refusal.value)


def test_a_missing_column_is_refused_with_those_that_are_there() -> None:
    rows = table(("a", "b", 1), columns=("sentence1", "sentence2", "score"))
    with pytest.raises(DataError) as refusal:
        prepare_pairs(rows, DataParams(), "x.csv")
    assert str(refusal.value) == (
        "x.csv has no column 'text_a'; found: sentence1, sentence2, score. "
        "Say which one it is: --set data.columns.text_a=NAME"
    )
    with pytest.raises(DataError, match=r"no column 's1' \(given for 'text_a' in data.columns\); found: sentence1"):
        prepare_pairs(rows, DataParams(columns={"text_a": "s1"}), "x.csv")


@pytest.mark.parametrize(
    ("columns", "fragment"),
    [
        ({"sentence1": "text_a"}, "unknown key 'sentence1'; keys are our names (text_a, text_b, score, id, query"),
        ({"text_a": ""}, "data.columns.text_a is empty"),
        ({"text_a": "t", "text_b": "t"}, "gives 't' to two of text_a, text_b, score"),
        ({"text_a": "text_b"}, "gives 'text_b' to two of"),
        ({"query": "relevance"}, "gives 'relevance' to two of query, profile_id, relevance"),
    ],
)
def test_a_bad_mapping_is_refused(columns: dict[str, str], fragment: str) -> None:
    with pytest.raises(DataError) as refusal:
        check_mapping(columns)
    assert fragment in str(refusal.value)


def test_a_pair_and_its_reverse_are_merged_with_the_mean_score() -> None:
    rows = table(("a", "b", 0.2), ("x", "y", 1), ("b", "a", 0.6), ("x", "y", 1), ("a", "a", 0))
    pairs, notes = merge_duplicates(prepare_pairs(rows, DataParams(), "x.csv"), "merge", "x.csv")
    assert pairs["text_a"].tolist() == ["a", "x", "a"]
    assert pairs["text_b"].tolist() == ["b", "y", "a"]
    assert pairs["score"].tolist() == pytest.approx([0.4, 1.0, 0.0])
    assert notes == ["x.csv: merged 2 duplicate rows (1 pairs had different scores, the mean was taken)."]


def test_duplicates_are_refused_when_asked() -> None:
    pairs = prepare_pairs(table(("a", "b", 0), ("b ", "a", 1)), DataParams(), "x.csv")
    with pytest.raises(DataError, match=r"x.csv has 1 rows whose pair stands there already, for instance 'b' with 'a'"):
        merge_duplicates(pairs, "refuse", "x.csv")


def test_pairs_without_duplicates_stay_as_they_are() -> None:
    pairs = prepare_pairs(table(("a", "b", 0), ("a", "c", 1)), DataParams(), "x.csv")
    merged, notes = merge_duplicates(pairs, "refuse", "x.csv")
    assert merged is pairs
    assert notes == []
