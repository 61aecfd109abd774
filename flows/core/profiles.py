"""Profiles become texts, and judgements of profiles become scored pairs.

Core layer, pure. A template such as `{title}. {summary} Skills: {skills}` makes one `profile_text` of the columns of a
profile; each judgement (query, profile id, relevance) then is the pair (query, profile_text) with that relevance as
score.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

import pandas as pd

from flows.core.columns import (
    JUDGEMENT_COLUMNS,
    PROFILE_COLUMNS,
    clean_column,
    clean_ids,
    clean_unique_ids,
    scale_scores,
    select_columns,
    select_slices,
)
from flows.core.tables import is_missing, row_numbers
from flows.errors import DataError
from flows.params import DataParams


@dataclass(frozen=True)
class ProfileStats:
    """What MLflow shows of the profiles."""

    num_profiles: int
    avg_profile_length: float  # characters of `profile_text`


def build_profile_texts(table: pd.DataFrame, params: DataParams, address: str) -> dict[str, str]:
    """Profile id -> `profile_text`, in file order.

    Raises:
        DataError: no id column, ids missing or twice, a bad template, or a profile without text.
    """
    ids = clean_unique_ids(
        select_columns(table, PROFILE_COLUMNS, params.columns, address)["id"].tolist(), "id", address
    )
    id_column = params.columns.get("id", "id")
    if params.profile_template is None:
        names = [name for name in table.columns if name != id_column and _is_textual(table[name].tolist())]
        if not names:
            raise DataError(
                f"{address} has no text column besides {id_column!r}; found: {', '.join(table.columns)}; add one"
            )
        columns = [[_to_text(value) for value in table[name].tolist()] for name in names]
        texts = [_join_sentences(cells) for cells in zip(*columns, strict=True)]
    else:
        names = read_template(params.profile_template, list(table.columns), address)
        cells = {name: [_to_text(value) for value in table[name].tolist()] for name in names}
        texts = [
            _fill_template(params.profile_template, {name: cells[name][row] for name in names})
            for row in range(len(ids))
        ]
    texts = clean_column(texts, "profile_text", address)
    return dict(zip(ids, texts, strict=True))


def read_template(template: str, columns: Sequence[str], address: str) -> list[str]:
    """The column names in a template.

    Raises:
        DataError: no valid template, nothing to fill in, or a name that is no column.
    """
    cure = "write column names in braces, as in --set data.profile_template='{title}. {summary}'"
    try:
        fields = [field for field in Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise DataError(
            f"data.profile_template {template!r} is not valid ({error}); {cure}, and {{{{ for a brace"
        ) from None
    for _, name, form, conversion in fields:
        if form or conversion:
            raise DataError(f"data.profile_template formats {{{name}}} with ':' or '!', which is not allowed; {cure}")
        if name not in columns:
            raise DataError(
                f"data.profile_template asks for {{{name}}}, which {address} lacks; found: {', '.join(columns)}"
            )
    if not fields:
        raise DataError(f"data.profile_template {template!r} names no column, all profiles would be equal; {cure}")
    return list(dict.fromkeys(str(name) for _, name, _, _ in fields))


def join_judgements(
    judgements: pd.DataFrame, profiles: dict[str, str], params: DataParams, address: str
) -> tuple[pd.DataFrame, list[str]]:
    """Scored pairs: `text_a` is the query, `text_b` the `profile_text`; and notes.

    Raises:
        DataError: missing columns, unusable cells, or a judgement of a profile that does not exist.
    """
    selected = select_columns(judgements, JUDGEMENT_COLUMNS, params.columns, address)
    queries = clean_column(selected["query"].tolist(), "query", address)
    ids = clean_ids(selected["profile_id"].tolist(), "profile_id", address)
    unknown = [position for position, profile_id in enumerate(ids) if profile_id not in profiles]
    if unknown:
        raise DataError(
            f"{address} judges {len({ids[i] for i in unknown})} profiles that the profiles table lacks, for instance "
            f"{ids[unknown[0]]!r} ({row_numbers(unknown)}); add them, or leave those rows out"
        )
    pairs = pd.DataFrame(
        {
            "text_a": queries,
            "text_b": [profiles[profile_id] for profile_id in ids],
            "score": scale_scores(selected["relevance"].tolist(), "relevance", address, params),
            **select_slices(judgements, params.slice_columns, address),
        }
    )
    unused = len(profiles.keys() - set(ids))
    notes = [f"{unused} of {len(profiles)} profiles have no judgement and are in no pair."] if unused else []
    return pairs, notes


def measure_profiles(profiles: dict[str, str]) -> ProfileStats:
    """Count and mean length of the profile texts."""
    return ProfileStats(len(profiles), sum(map(len, profiles.values())) / len(profiles))


def _is_textual(values: Sequence[Any]) -> bool:
    """Whether a column says something in words: not empty, and not numbers only."""
    return any(not _is_number(value) for value in values if not is_missing(value))


def _is_number(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return False
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _to_text(value: Any) -> str:
    """A cell as words: lists are joined by commas, an empty cell is an empty text."""
    if isinstance(value, (list, tuple)):
        return ", ".join(_to_text(item) for item in value if not is_missing(item))
    return "" if is_missing(value) else str(value).strip()


def _join_sentences(cells: Sequence[str]) -> str:
    ended = [cell if cell[-1] in ".!?:;" else cell + "." for cell in cells if cell]
    return " ".join(ended)


def _fill_template(template: str, cells: dict[str, str]) -> str:
    parts = [before + ("" if name is None else cells[name]) for before, name, _, _ in Formatter().parse(template)]
    return re.sub(r" {2,}", " ", "".join(parts)).strip()
