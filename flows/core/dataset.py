"""From the files that the user names to train, dev and test: read, check, split, version.

Core layer, knows nothing about Prefect. `read_data` does all input and output and may be tried again;
`prepare_dataset` is pure and never gives another answer to the same question. The checks of one kind of data are in
pairs.py, profiles.py and retrieval.py, those between splits in leaks.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pandas as pd

from bentos.manifest import DataVersion
from flows.core.columns import check_mapping, check_slice_columns
from flows.core.files import local_path, md5_of, md5_of_files, modified_at, read_bytes
from flows.core.leaks import refuse_shared_pairs, remove_leaks
from flows.core.pairs import merge_duplicates, prepare_pairs
from flows.core.profiles import ProfileStats, build_profile_texts, join_judgements, measure_profiles
from flows.core.retrieval import RawRetrieval, Retrieval, keep_queries, prepare_retrieval, read_retrieval
from flows.core.revisions import resolve_revision
from flows.core.splits import SPLITS, split_fractions, split_groups
from flows.core.tables import parse_table
from flows.errors import DataError
from flows.params import PAIR_COLUMNS, DataParams


@dataclass(frozen=True)
class Table:
    """A table as read, and where from."""

    address: str
    rows: pd.DataFrame


@dataclass(frozen=True)
class RawData:
    """Everything as read, nothing checked yet, and which version of the data that is."""

    version: DataVersion
    files: dict[str, str]  # role (`pairs`, `test`, `retrieval/corpus.jsonl`, ...) -> MD5, as DVC writes it
    pairs: Table | None = None
    dev: Table | None = None
    test: Table | None = None
    profiles: Table | None = None
    judgements: Table | None = None
    retrieval: RawRetrieval | None = None
    modified_at: datetime | None = None  # UTC: when the newest file was written; None when nobody says


@dataclass(frozen=True)
class Part:
    """Train, dev or test."""

    # text_a, text_b (clean texts), score (float64, 0..1), then the slice columns (text, or missing)
    pairs: pd.DataFrame  # no rows when there are no pairs
    retrieval: Retrieval | None = None

    @property
    def has_pairs(self) -> bool:
        """Whether there are scored pairs."""
        return len(self.pairs) > 0


@dataclass(frozen=True)
class Dataset:
    """What a model is trained, chosen and scored on. No text of pairs or queries is in two parts."""

    train: Part
    dev: Part
    test: Part
    version: DataVersion
    files: dict[str, str]  # role -> MD5 of each file, see `RawData`
    notes: tuple[str, ...]  # what was merged, dropped and split, one sentence each
    profiles: ProfileStats | None = None
    modified_at: datetime | None = None  # see `RawData`


def read_data(params: DataParams, *, root: Path) -> RawData:
    """Read every file that the parameters name.

    Args:
        params: addresses, and the revision to read local ones at.
        root: where relative paths start.

    Raises:
        DataError: nothing was given, or a file is missing, unreadable or of an unknown format.
        OSError: trouble on the network that may pass; trying again can help.
    """
    _check_given(params)
    check_mapping(params.columns)
    check_slice_columns(params.slice_columns)
    md5s: dict[str, str] = {}
    times: list[datetime] = []

    def read(role: str, address: str) -> pd.DataFrame:
        content = read_bytes(address, root=root, revision=params.data_rev)
        md5s[role] = md5_of(content)
        written = modified_at(address, root=root, revision=params.data_rev)
        times.extend([written] if written else [])
        return parse_table(content, address)

    def read_given(role: str) -> Table | None:
        address: str | None = getattr(params, role)
        return None if address is None else Table(address, read(role, address))

    tables = {role: read_given(role) for role in ("pairs", "dev", "test", "profiles", "judgements")}
    retrieval = None if params.retrieval is None else read_retrieval(params.retrieval, read)
    given = [table.address for table in tables.values() if table] + ([retrieval.address] if retrieval else [])
    version = DataVersion(path=" ".join(given), md5=md5_of_files(md5s), revision=_resolve(params, given, root))
    return RawData(version, md5s, **tables, retrieval=retrieval, modified_at=max(times, default=None))


def _check_given(params: DataParams) -> None:
    if not (params.pairs or params.profiles or params.judgements or params.retrieval):
        also = next((f"--{role} alone is not enough: " for role in ("dev", "test") if getattr(params, role)), "")
        raise DataError(
            f"{also}there is nothing to train on; give --pairs FILE, or --profiles FILE with --judgements "
            "FILE, or --retrieval FOLDER"
        )
    if bool(params.profiles) != bool(params.judgements):
        found, lacking = ("profiles", "judgements") if params.profiles else ("judgements", "profiles")
        raise DataError(
            f"--{found} needs --{lacking} as well: profiles are texts, judgements say how well they fit a query"
        )
    for role in ("dev", "test"):
        if getattr(params, role) and not (params.pairs or params.profiles):
            raise DataError(
                f"--{role} holds pairs, but there are no pairs to train on; give --pairs FILE, or leave --{role} out"
            )
    if params.slice_columns and not (params.pairs or params.profiles):
        raise DataError(
            f"data.slice_columns names {', '.join(params.slice_columns)}, columns of pairs, but there are only "
            "retrieval data: leave it out, or give --pairs FILE"
        )


def _resolve(params: DataParams, addresses: list[str], root: Path) -> str | None:
    if params.data_rev is None:
        return None
    paths = [path for address in addresses if (path := local_path(address, root=root)) is not None]
    commits = {resolve_revision(path, params.data_rev, root=root) for path in paths}
    if len(commits) > 1:
        raise DataError(
            f"revision {params.data_rev!r} means {len(commits)} commits, because the files are in different "
            "repositories; give files of one repository, or leave out --data-rev"
        )
    return commits.pop()


def prepare_dataset(raw: RawData, params: DataParams) -> Dataset:
    """Check, map, merge and split what was read.

    Raises:
        DataError: anything about the data that would make training or its figures worthless.
    """
    check_mapping(params.columns)
    notes: list[str] = []
    names = {split: table.address if (table := getattr(raw, split, None)) else split for split in SPLITS}
    names["train"] = " and ".join(table.address for table in (raw.pairs, raw.judgements) if table) or "train"

    gathered, profiles = _gather_pairs(raw, params, notes)
    pairs: dict[str, pd.DataFrame] = {}
    for split in SPLITS:
        if split == "train":
            frame = gathered
        else:
            held_out: Table | None = getattr(raw, split)
            frame = _no_pairs(params) if held_out is None else prepare_pairs(held_out.rows, params, held_out.address)
        pairs[split], merged = merge_duplicates(frame, params.duplicates, names[split])
        notes += merged
    refuse_shared_pairs(pairs, names, params)
    retrieval, found = prepare_retrieval(raw.retrieval, params) if raw.retrieval else ({}, [])
    queries: Mapping[str, Mapping[str, str]] = {split: part.queries for split, part in retrieval.items()}
    pairs, queries, dropped = remove_leaks(pairs, queries, names, params.leaks)
    notes += found + dropped
    pairs = _split_off(pairs, [split for split in ("dev", "test") if getattr(raw, split) is None], params, notes)
    # Pairs cannot leak among themselves any more, but those just split off may hold a training query: our own doing.
    pairs, queries, dropped = remove_leaks(pairs, queries, names, "drop")
    notes += dropped
    retrieval = {split: keep_queries(part, queries[split]) for split, part in retrieval.items()}

    parts = {split: Part(pairs[split], retrieval.get(split)) for split in SPLITS}
    for split, part in parts.items():
        _check_size(split, part, params, given_pairs=len(gathered) > 0, notes=notes)
        _check_scores(split, part, notes)
    return Dataset(
        **parts,
        version=raw.version,
        files=raw.files,
        notes=tuple(notes),
        profiles=profiles,
        modified_at=raw.modified_at,
    )


def _no_pairs(params: DataParams) -> pd.DataFrame:
    names = (*PAIR_COLUMNS, *params.slice_columns)
    return pd.DataFrame({name: pd.Series([], dtype=float if name == "score" else object) for name in names})


def _gather_pairs(raw: RawData, params: DataParams, notes: list[str]) -> tuple[pd.DataFrame, ProfileStats | None]:
    """Training pairs from the pairs table, from judged profiles, or from both."""
    frames: list[pd.DataFrame] = []
    stats: ProfileStats | None = None
    if raw.pairs is not None:
        frames.append(prepare_pairs(raw.pairs.rows, params, raw.pairs.address))
    if raw.profiles is not None and raw.judgements is not None:
        texts = build_profile_texts(raw.profiles.rows, params, raw.profiles.address)
        frame, found = join_judgements(raw.judgements.rows, texts, params, raw.judgements.address)
        notes += found
        frames.append(frame)
        stats = measure_profiles(texts)
    return pd.concat(frames, ignore_index=True) if frames else _no_pairs(params), stats


def _split_off(
    pairs: Mapping[str, pd.DataFrame], missing: list[str], params: DataParams, notes: list[str]
) -> dict[str, pd.DataFrame]:
    """Give the splits that have no file of their own a share of train."""
    train = pairs["train"]
    if not missing or train.empty:
        return dict(pairs)
    split = split_groups(
        train["text_a"].tolist(), train["text_b"].tolist(), split_fractions(missing, params), seed=params.split_seed
    )
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in split.rows.items())
    notes.append(
        f"Split {' and '.join(missing)} off by groups of shared texts ({split.groups} groups, seed "
        f"{params.split_seed}): {counts}."
    )
    if split.dropped:
        notes.append(
            "A group of connected texts is too big to stay on one side: its texts were dealt out, and "
            f"{split.dropped} of {len(train)} rows between the sides were left out."
        )
    return {**pairs, **{name: train.iloc[rows].reset_index(drop=True) for name, rows in split.rows.items()}}


def _check_size(split: str, part: Part, params: DataParams, *, given_pairs: bool, notes: list[str]) -> None:
    key = "min_train_rows" if split == "train" else "min_eval_rows"
    least: int = getattr(params, key)
    counts: dict[str, int] = {"pairs": len(part.pairs)} if given_pairs else {}
    if part.retrieval is not None:
        judged = sum(map(len, part.retrieval.qrels.values()))
        counts |= {"judged documents": judged} if split == "train" else {"queries": len(part.retrieval.queries)}
    for kind, count in counts.items():
        if count < least:
            history = f" (what happened: {' '.join(notes)})" if notes else ""
            lower = f", or lower the bound with --set data.{key}={count}" if count > 1 else ""
            raise DataError(f"{split} has {count} {kind}, at least {least} are needed{history}; give more data{lower}")


def _check_scores(split: str, part: Part, notes: list[str]) -> None:
    if not part.has_pairs or part.pairs["score"].nunique() > 1:
        return
    score = part.pairs["score"].iloc[0]
    if split != "train":
        raise DataError(
            f"all {len(part.pairs)} scores of {split} are {score:g}, so no rank correlation can be computed; "
            "give pairs with different scores"
        )
    notes.append(f"All training scores are {score:g}: there is little to learn from pairs that all say the same.")
