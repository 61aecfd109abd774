"""From a table as read to scored pairs that can be trained on, each pair once.

Core layer, pure: tables in, tables or a `DataError` out.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from flows.core.columns import clean_column, scale_scores, select_columns, select_slices
from flows.errors import DataError
from flows.params import PAIR_COLUMNS, DataParams


def prepare_pairs(table: pd.DataFrame, params: DataParams, address: str) -> pd.DataFrame:
    """Scored pairs from one table: columns `text_a`, `text_b` (clean texts), `score` (0..1) and the slice columns.

    Raises:
        DataError: missing columns, unusable texts or scores.
    """
    selected = select_columns(table, PAIR_COLUMNS, params.columns, address)
    return pd.DataFrame(
        {
            "text_a": clean_column(selected["text_a"].tolist(), "text_a", address),
            "text_b": clean_column(selected["text_b"].tolist(), "text_b", address),
            "score": scale_scores(selected["score"].tolist(), "score", address, params),
            **select_slices(table, params.slice_columns, address),
        }
    )


def pair_keys(pairs: pd.DataFrame) -> pd.MultiIndex:
    """Each row's two texts in alphabetical order: (a, b) and (b, a) are the same pair, as the cosine sees it."""
    first = pairs["text_a"].to_numpy(dtype=object)
    second = pairs["text_b"].to_numpy(dtype=object)
    swap = first > second
    return pd.MultiIndex.from_arrays([np.where(swap, second, first), np.where(swap, first, second)])


def merge_duplicates(pairs: pd.DataFrame, policy: str, address: str) -> tuple[pd.DataFrame, list[str]]:
    """One row for each pair of texts, the first one with the mean score; and what was done, as notes.

    Raises:
        DataError: there are duplicates and the policy is `refuse`.
    """
    if pairs.empty:
        return pairs, []
    groups, _ = pd.factorize(pair_keys(pairs))
    first = ~pd.Series(groups).duplicated().to_numpy()
    surplus = int((~first).sum())
    if surplus == 0:
        return pairs, []
    if policy == "refuse":
        example = pairs.loc[~first].iloc[0]
        raise DataError(
            f"{address} has {surplus} rows whose pair stands there already, for instance "
            f"{example['text_a'][:60]!r} with {example['text_b'][:60]!r}; remove them, or let them be merged: "
            "--set data.duplicates=merge"
        )
    scores = pairs["score"].groupby(groups)
    conflicting = int((scores.max() > scores.min()).sum())
    merged = pairs[first].assign(score=scores.mean().to_numpy()).reset_index(drop=True)
    note = f"{address}: merged {surplus} duplicate rows"
    if conflicting:
        note += f" ({conflicting} pairs had different scores, the mean was taken)"
    return merged, [note + "."]
