"""What stands on both sides of a split: dropped from the earlier side, or refused.

Core layer, pure. Later splits win: test keeps every row, dev loses those that share a text with test, train those
that share one with dev or test. Texts are compared as they go to the tokenizer. Documents of a retrieval corpus are
in every split by design and are not looked at; queries are.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import pandas as pd

from flows.core.pairs import pair_keys
from flows.core.splits import SPLITS
from flows.errors import DataError
from flows.params import DataParams

if TYPE_CHECKING:
    from flows.core.dataset import Part


def refuse_shared_pairs(pairs: Mapping[str, pd.DataFrame], names: Mapping[str, str], params: DataParams) -> None:
    """Refuse held-out files that are, for a good part, copies of an earlier split's file.

    Args:
        pairs: split -> scored pairs.
        names: split -> what messages call it.
        params: for `max_shared_pairs`.

    Raises:
        DataError: more than `max_shared_pairs` of a held-out file's pairs stand in an earlier one too.
    """
    keys = {split: pair_keys(frame) for split, frame in pairs.items() if len(frame)}
    for held_out, earlier in (("test", "train"), ("dev", "train"), ("test", "dev")):
        if held_out not in keys or earlier not in keys:
            continue
        shared = int(keys[held_out].isin(keys[earlier]).sum())
        total = len(keys[held_out])
        if shared > params.max_shared_pairs * total:
            raise DataError(
                f"{shared} of the {total} pairs in {names[held_out]} stand in {names[earlier]} too; at most "
                f"{params.max_shared_pairs:.0%} may, because held-out data must be new to the model: give "
                "another file, leave it out to have one split off, or raise --set data.max_shared_pairs"
            )


def remove_leaks(
    pairs: Mapping[str, pd.DataFrame],
    queries: Mapping[str, Mapping[str, str]],
    names: Mapping[str, str],
    policy: str,
) -> tuple[dict[str, pd.DataFrame], dict[str, dict[str, str]], list[str]]:
    """Rows and queries without those that share a text with a later split, and what was dropped, as notes.

    Args:
        pairs: split -> scored pairs.
        queries: split -> query id -> text, of the retrieval data.
        names: split -> what messages call it.
        policy: `drop` or `refuse`.

    Raises:
        DataError: there is a shared text and the policy is `refuse`.
    """
    held_out: dict[str, str] = {}  # text -> the later split that has it
    kept_pairs: dict[str, pd.DataFrame] = {}
    kept_queries: dict[str, dict[str, str]] = {}
    notes: list[str] = []
    for split in reversed(SPLITS):  # later ones first
        frame, asked = pairs[split], queries.get(split, {})
        leaks = frame["text_a"].isin(held_out) | frame["text_b"].isin(held_out)
        leaking_ids = [query_id for query_id, text in asked.items() if text in held_out]
        shared = [text for row in frame.loc[leaks, ["text_a", "text_b"]].to_numpy() for text in row if text in held_out]
        shared += [asked[query_id] for query_id in leaking_ids]
        if shared and policy == "refuse":
            others = sorted({names[held_out[text]] for text in shared})
            raise DataError(
                f"{names[split]} shares {len(set(shared))} texts with {' and '.join(others)}, for instance "
                f"{shared[0][:60]!r}; no text may stand on both sides: remove them, or have "
                "those rows dropped with --set data.leaks=drop"
            )
        if leaks.any():
            others = sorted({held_out[text] for text in shared})
            notes.append(
                f"{names[split]}: dropped {int(leaks.sum())} of {len(frame)} rows that share a text with "
                f"{' or '.join(others)}."
            )
        if leaking_ids:
            notes.append(
                f"{names[split]}: dropped {len(leaking_ids)} of {len(asked)} queries that stand in a later "
                "split as well."
            )
        kept_pairs[split] = frame[~leaks].reset_index(drop=True)
        kept_queries[split] = {query_id: text for query_id, text in asked.items() if text not in held_out}
        for column in ("text_a", "text_b"):
            held_out.update(dict.fromkeys(kept_pairs[split][column], split))
        held_out.update(dict.fromkeys(kept_queries[split].values(), split))
    return kept_pairs, kept_queries, notes


def find_leaked_share(train: Part, test: Part) -> float:
    """Return the share of the distinct test texts that stand in train but for case, accents' encoding and punctuation.

    `remove_leaks` has dropped exact copies; these are as good as copies to a model. Texts are those of the pairs, and
    the queries; documents are in every split by design.
    """
    seen = {_essence(text) for text in _texts(train)}
    asked = set(_texts(test))
    return sum(_essence(text) in seen for text in asked) / len(asked) if asked else 0.0


def _texts(part: Part) -> Iterator[str]:
    yield from part.pairs["text_a"]
    yield from part.pairs["text_b"]
    if part.retrieval is not None:
        yield from part.retrieval.queries.values()


def _essence(text: str) -> str:
    """The words of a text, in one case; the text itself when it has none."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(words) or text
