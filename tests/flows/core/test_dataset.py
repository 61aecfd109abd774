"""From parameters to train, dev and test."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pytest

from flows.core.dataset import Dataset, prepare_dataset, read_data
from flows.core.files import md5_of
from flows.errors import DataError
from flows.params import DataParams
from tests.flows.core.test_retrieval import relevant, write_beir

SAMPLE = {"profiles": "data/sample/profiles.csv", "judgements": "data/sample/judgements.csv"}
PROJECT = Path(__file__).parents[3]


def write_pairs(path: Path, count: int = 120, *, prefix: str = "", extra: str = "") -> str:
    rows = [f"{prefix}one {i},{prefix}other {i},{i % 5 / 4}" for i in range(count)]
    path.write_text("text_a,text_b,score\n" + "\n".join(rows) + "\n" + extra, encoding="utf-8")
    return path.name


def load(root: Path, **params: Any) -> Dataset:
    data = DataParams(**params)
    return prepare_dataset(read_data(data, root=root), data)


def texts_of(dataset: Dataset) -> list[set[str]]:
    parts = (dataset.train, dataset.dev, dataset.test)
    return [set(part.pairs["text_a"]) | set(part.pairs["text_b"]) for part in parts]


def test_one_file_is_split_into_three(tmp_path: Path) -> None:
    name = write_pairs(tmp_path / "x.csv")
    dataset = load(tmp_path, pairs=name)
    assert [len(part.pairs) for part in (dataset.train, dataset.dev, dataset.test)] == [84, 18, 18]
    assert list(dataset.train.pairs.columns) == ["text_a", "text_b", "score"]
    assert dataset.train.has_pairs
    assert dataset.train.retrieval is None
    assert dataset.profiles is None
    assert dataset.version.model_dump() == {
        "path": "x.csv",
        "md5": md5_of((tmp_path / "x.csv").read_bytes()),
        "revision": None,
    }
    assert dataset.notes == (
        "Split dev and test off by groups of shared texts (120 groups, seed 13): 84 train, 18 dev, 18 test.",
    )


def test_given_files_stay_whole_and_leaks_leave_train(tmp_path: Path) -> None:
    train = write_pairs(tmp_path / "train.csv", extra="dev one 3,new,0.5\n")
    dev = write_pairs(tmp_path / "dev.csv", 20, prefix="dev ")
    test = write_pairs(tmp_path / "test.csv", 30, prefix="test ")
    dataset = load(tmp_path, pairs=train, dev=dev, test=test)
    assert [len(part.pairs) for part in (dataset.train, dataset.dev, dataset.test)] == [120, 20, 30]
    assert dataset.notes == ("train.csv: dropped 1 of 121 rows that share a text with dev.",)
    assert dataset.version.path == "train.csv dev.csv test.csv"


@pytest.mark.parametrize("given", ["dev", "test"])
def test_the_split_without_a_file_is_split_off_train(tmp_path: Path, given: str) -> None:
    train = write_pairs(tmp_path / "train.csv")
    dataset = load(tmp_path, pairs=train, **{given: write_pairs(tmp_path / "held.csv", 20, prefix="held ")})
    assert len(getattr(dataset, given).pairs) == 20
    assert len(dataset.train.pairs) == 102
    other = dataset.test if given == "dev" else dataset.dev
    assert len(other.pairs) == 18


def test_pairs_and_profiles_together_are_put_in_one_set(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "x.csv")
    profiles = [{"id": i, "title": f"person {i}"} for i in range(40)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, profiles)))
    (tmp_path / "j.csv").write_text("query,profile_id,relevance\n" + "".join(f"role {i},{i},0.5\n" for i in range(40)))
    dataset = load(tmp_path, pairs=pairs, profiles="p.jsonl", judgements="j.csv")
    assert sum(len(part.pairs) for part in (dataset.train, dataset.dev, dataset.test)) == 160
    assert dataset.profiles is not None
    assert dataset.profiles.num_profiles == 40
    assert "person 39." in set.union(*texts_of(dataset))


def test_retrieval_alone_has_no_pairs(tmp_path: Path) -> None:
    write_beir(tmp_path / "beir", train=relevant(*range(20)))
    dataset = load(tmp_path, retrieval="beir/", min_train_rows=10, min_eval_rows=3)
    assert not dataset.train.has_pairs
    assert list(dataset.train.pairs.columns) == ["text_a", "text_b", "score"]
    assert dataset.test.retrieval is not None
    assert len(dataset.test.retrieval.queries) == 3


def test_a_training_pair_with_a_held_out_query_is_dropped(tmp_path: Path) -> None:
    held_out = "".join(f"query {i},something {i},0.5\n" for i in range(20))
    pairs = write_pairs(tmp_path / "x.csv", extra=held_out)
    write_beir(tmp_path / "beir", train=relevant(*range(14)), dev=relevant(14, 15, 16), test=relevant(17, 18, 19))
    dataset = load(tmp_path, pairs=pairs, retrieval="beir", min_train_rows=5, min_eval_rows=2)
    train, dev, test = texts_of(dataset)
    assert dataset.test.retrieval is not None
    assert dataset.dev.retrieval is not None
    assert not (train | dev) & set(dataset.test.retrieval.queries.values())
    assert not train & set(dataset.dev.retrieval.queries.values())
    assert dataset.train.retrieval is not None
    assert not set(dataset.train.retrieval.queries.values()) & (dev | test)
    assert [len(part.retrieval.queries) for part in (dataset.dev, dataset.test) if part.retrieval] == [3, 3]
    assert "x.csv: dropped 6 of 140 rows that share a text with dev or test." in dataset.notes


def test_the_version_covers_every_file_and_not_where_it_lies(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_pairs(tmp_path / folder / "train.csv")
        write_pairs(tmp_path / folder / "test.csv", 30, prefix="test ")
    one = load(tmp_path / "a", pairs="train.csv", test="test.csv").version
    same = load(tmp_path, pairs="b/train.csv", test="b/test.csv").version
    assert one.md5 == same.md5
    write_pairs(tmp_path / "b" / "test.csv", 31, prefix="test ")
    assert load(tmp_path, pairs="b/train.csv", test="b/test.csv").version.md5 != one.md5


def test_any_fsspec_address_will_do(tmp_path: Path) -> None:
    write_pairs(tmp_path / "x.csv")
    with fsspec.open("memory://bucket/x.csv", "wb") as file:
        file.write((tmp_path / "x.csv").read_bytes())
    remote, local = load(tmp_path, pairs="memory://bucket/x.csv"), load(tmp_path, pairs="x.csv")
    assert remote.train.pairs.equals(local.train.pairs)
    assert remote.version.md5 == local.version.md5


def test_training_scores_that_are_all_equal_are_only_noted(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text_a,text_b,score\n" + "".join(f"a{i},b{i},1\n" for i in range(40)))
    held_out = {name: write_pairs(tmp_path / f"{name}.csv", 20, prefix=name) for name in ("dev", "test")}
    dataset = load(tmp_path, pairs="x.csv", **held_out)
    assert dataset.notes == ("All training scores are 1: there is little to learn from pairs that all say the same.",)


def test_the_shipped_sample_is_split_by_pools_without_losing_a_row() -> None:
    dataset = load(PROJECT, **SAMPLE)
    sizes = [len(part.pairs) for part in (dataset.train, dataset.dev, dataset.test)]
    assert sizes == [2208, 480, 480]
    train, dev, test = texts_of(dataset)
    assert not train & dev | train & test | dev & test
    assert dataset.profiles is not None
    assert dataset.profiles.num_profiles == 396


def test_reading_alone_checks_nothing_twice_and_preparing_is_repeatable(tmp_path: Path) -> None:
    params = DataParams(pairs=write_pairs(tmp_path / "x.csv"))
    raw = read_data(params, root=tmp_path)
    one, other = prepare_dataset(raw, params), prepare_dataset(raw, params)
    assert one.test.pairs.equals(other.test.pairs)
    assert one.notes == other.notes
    with pytest.raises(DataError):
        prepare_dataset(raw, DataParams(pairs="x.csv", min_train_rows=1000))


def test_refusing_leaks_does_not_refuse_what_our_own_split_did(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "x.csv", extra="".join(f"query {i},answer {i},0.5\n" for i in range(14)))
    write_beir(tmp_path / "beir", train=relevant(*range(14)), dev=relevant(14, 15, 16), test=relevant(17, 18, 19))
    given = {"pairs": pairs, "retrieval": "beir", "min_train_rows": 5, "min_eval_rows": 2}
    dataset = load(tmp_path, **given, leaks="refuse")
    assert dataset.train.retrieval is not None
    assert 5 <= len(dataset.train.retrieval.queries) < 14
    write_pairs(tmp_path / "x.csv", extra="query 17,answer,1\n")
    with pytest.raises(DataError, match=r"x.csv shares 1 texts with test, for instance 'query 17'"):
        load(tmp_path, **given, leaks="refuse")


def write_sliced(path: Path, count: int = 120, *, prefix: str = "") -> str:
    rows = [f"{prefix}one {i},{prefix}other {i},{i % 5 / 4},{'de' if i % 3 else ''},{i % 2}" for i in range(count)]
    path.write_text("text_a,text_b,score,language,source\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path.name


def test_slice_columns_stay_with_their_rows_in_every_split(tmp_path: Path) -> None:
    pairs = write_sliced(tmp_path / "x.csv")
    test = write_sliced(tmp_path / "test.csv", 20, prefix="held ")
    dataset = load(tmp_path, pairs=pairs, test=test, slice_columns=["language", "source"])
    for part in (dataset.train, dataset.dev, dataset.test):
        assert list(part.pairs.columns) == ["text_a", "text_b", "score", "language", "source"]
        for row in part.pairs.itertuples():
            number = int(row.text_a.split()[-1])
            assert row.source == str(number % 2)
            assert row.language == "de" if number % 3 else pd.isna(row.language)
    assert list(load(tmp_path, pairs=pairs).train.pairs.columns) == ["text_a", "text_b", "score"]


def test_judgements_bring_slice_columns_too(tmp_path: Path) -> None:
    profiles = [{"id": i, "title": f"person {i}"} for i in range(60)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, profiles)))
    rows = "".join(f"role {i},{i},{i % 5 / 4},{i % 2}\n" for i in range(60))
    (tmp_path / "j.csv").write_text("query,profile_id,relevance,region\n" + rows)
    dataset = load(tmp_path, profiles="p.jsonl", judgements="j.csv", slice_columns=["region"], min_eval_rows=5)
    assert set(dataset.test.pairs["region"]) == {"0", "1"}


@pytest.mark.parametrize("lacking", ["pairs", "test"])
def test_a_missing_slice_column_is_refused_before_training(tmp_path: Path, lacking: str) -> None:
    files = {"pairs": write_sliced(tmp_path / "x.csv"), "test": write_sliced(tmp_path / "t.csv", 20, prefix="held ")}
    files[lacking] = write_pairs(tmp_path / "plain.csv", prefix="plain ")
    with pytest.raises(DataError) as caught:
        load(tmp_path, **files, slice_columns=["language"])
    message = str(caught.value)
    for part in ("plain.csv has no column 'language'", "found: text_a, text_b, score", "data.slice_columns"):
        assert part in message


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["score"], "fills itself"),
        (["tuned_cosine"], "fills itself"),
        (["language", "language"], "twice"),
        ([" "], "empty name"),
    ],
)
def test_slice_columns_that_cannot_be_are_refused_before_any_file_is_read(
    tmp_path: Path, names: list[str], found: str
) -> None:
    with pytest.raises(DataError, match=found):
        load(tmp_path, pairs="not there.csv", slice_columns=names)


def test_slice_columns_need_pairs(tmp_path: Path) -> None:
    write_beir(tmp_path / "beir", train=relevant(*range(20)))
    with pytest.raises(DataError, match="columns of pairs, but there are only retrieval data"):
        load(tmp_path, retrieval="beir", slice_columns=["language"])


def test_the_data_are_as_old_as_their_newest_file(tmp_path: Path) -> None:
    train, test = write_pairs(tmp_path / "train.csv"), write_pairs(tmp_path / "test.csv", 20, prefix="held ")
    os.utime(tmp_path / train, (1_700_000_000, 1_700_000_000))
    os.utime(tmp_path / test, (1_600_000_000, 1_600_000_000))
    assert load(tmp_path, pairs=train, test=test).modified_at == datetime.fromtimestamp(1_700_000_000, tz=UTC)
