"""From profiles and judgements to scored pairs."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from flows.core.profiles import ProfileStats, build_profile_texts, join_judgements, measure_profiles
from flows.errors import DataError
from flows.params import DataParams


def profiles(**columns: list[Any]) -> pd.DataFrame:
    whole = {"id": ["007", "8"], "title": ["Agent", "Cook"], "skills": ["driving", ""], "years": ["12", "3"]} | columns
    return pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in whole.items()})


def judgements(*rows: tuple[Any, Any, Any]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=["query", "profile_id", "relevance"], dtype=object)


def test_a_template_makes_the_profile_text() -> None:
    params = DataParams(profile_template="{title} ({years} years).  Skills: {skills}")
    assert build_profile_texts(profiles(), params, "p.csv") == {
        "007": "Agent (12 years). Skills: driving",
        "8": "Cook (3 years). Skills:",
    }


def test_without_a_template_all_text_columns_are_joined_and_numbers_left_out() -> None:
    assert build_profile_texts(profiles(), DataParams(), "p.csv") == {"007": "Agent. driving.", "8": "Cook."}


def test_numbers_lists_and_missing_cells_of_other_formats_read_the_same() -> None:
    table = profiles(id=[7, 8.0], skills=[["driving", "skiing"], None], years=[12, 3])
    assert build_profile_texts(table, DataParams(), "p.parquet") == {"7": "Agent. driving, skiing.", "8": "Cook."}


def test_text_that_looks_like_a_missing_value_is_text() -> None:
    assert build_profile_texts(profiles(skills=["None", "NA"]), DataParams(), "p.csv") == {
        "007": "Agent. None.",
        "8": "Cook. NA.",
    }


def test_the_id_column_may_have_another_name() -> None:
    table = profiles().rename(columns={"id": "handle"})
    assert list(build_profile_texts(table, DataParams(columns={"id": "handle"}), "p.csv")) == ["007", "8"]


@pytest.mark.parametrize(
    ("table", "template", "fragments"),
    [
        ({"id": ["1", "1"]}, None, ["p.csv has 1 ids that stand there already, for instance '1'"]),
        ({"id": ["1", ""]}, None, ["id is empty in row 2"]),
        ({"id": ["1", 1.5]}, None, ["id is no text but float in row 2"]),
        ({"title": ["Agent", ""]}, None, ["profile_text is empty in row 2"]),
        ({"title": ["Agent", "\0"]}, None, ["profile_text contains a null byte in row 2"]),
        ({"title": ["1", "2"], "skills": ["3", ""]}, None, ["no text column besides 'id'; found: id, title, skills"]),
        ({}, "{title} {summary}", ["asks for {summary}, which p.csv lacks; found: id, title, skills, years"]),
        ({}, "{title.upper}", ["asks for {title.upper}"]),
        ({}, "{title!r}", ["formats {title}"]),
        ({}, "{title:>10}", ["formats {title}"]),
        ({}, "{title", ["is not valid", "column names in braces"]),
        ({}, "{}", ["asks for {}"]),
        ({}, "Skills", ["names no column, all profiles would be equal"]),
    ],
)
def test_bad_profiles_and_templates_are_refused(table: Any, template: str | None, fragments: list[str]) -> None:
    with pytest.raises(DataError) as refusal:
        build_profile_texts(profiles(**table), DataParams(profile_template=template), "p.csv")
    assert "\n" not in str(refusal.value)
    for fragment in fragments:
        assert fragment in str(refusal.value)


def test_judgements_become_pairs_of_query_and_profile_text() -> None:
    texts = {"007": "Agent.", "8": "Cook.", "9": "Nobody asks."}
    rows = judgements((" a spy ", "007", "5"), ("a meal", 8, 0))
    pairs, notes = join_judgements(rows, texts, DataParams(score_max=5), "j.csv")
    assert pairs.to_dict("list") == {"text_a": ["a spy", "a meal"], "text_b": ["Agent.", "Cook."], "score": [1.0, 0.0]}
    assert notes == ["1 of 3 profiles have no judgement and are in no pair."]


@pytest.mark.parametrize(
    ("row", "fragments"),
    [
        (("q", "7", 1), ["j.csv judges 1 profiles that the profiles table lacks, for instance '7' (row 2)"]),
        (("", "007", 1), ["query is empty in row 2"]),
        (("q", None, 1), ["profile_id is empty in row 2"]),
        (("q", "007", "good"), ["relevance is no number but 'good'"]),
        (("q", "007", 3), ["relevance runs from 0.5 to 3, allowed is 0 to 1"]),
    ],
)
def test_bad_judgements_are_refused(row: tuple[Any, Any, Any], fragments: list[str]) -> None:
    with pytest.raises(DataError) as refusal:
        join_judgements(judgements(("q", "007", 0.5), row), {"007": "Agent."}, DataParams(), "j.csv")
    for fragment in fragments:
        assert fragment in str(refusal.value)


def test_missing_columns_of_either_table_are_refused() -> None:
    with pytest.raises(DataError, match=r"p.csv has no column 'id'; found: title, skills, years"):
        build_profile_texts(profiles().drop(columns="id"), DataParams(), "p.csv")
    with pytest.raises(
        DataError, match=r"j.csv has no column 'relevance'; found: query, profile_id. .*columns.relevance="
    ):
        join_judgements(judgements(("q", "1", 1)).drop(columns="relevance"), {"1": "x"}, DataParams(), "j.csv")


def test_stats_count_characters() -> None:
    assert measure_profiles({"1": "ab", "2": "abcd"}) == ProfileStats(num_profiles=2, avg_profile_length=3.0)
