"""What stands on both sides is dropped from the earlier side, or refused."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.core.dataset import Part
from flows.core.leaks import find_leaked_share, refuse_shared_pairs, remove_leaks
from flows.core.retrieval import Retrieval
from flows.errors import DataError
from flows.params import DataParams

NAMES = {"train": "train.csv", "dev": "dev.csv", "test": "test.csv"}
ROWS = st.lists(st.tuples(st.sampled_from("abcdefghij"), st.sampled_from("abcdefghij")), max_size=12)


def frames(train: Any = (), dev: Any = (), test: Any = ()) -> dict[str, pd.DataFrame]:
    def frame(rows: Any) -> pd.DataFrame:
        return pd.DataFrame([(*row, 0.5) for row in rows], columns=["text_a", "text_b", "score"])

    return {"train": frame(train), "dev": frame(dev), "test": frame(test)}


def rows_of(frame: pd.DataFrame) -> list[tuple[str, str]]:
    return list(zip(frame["text_a"], frame["text_b"], strict=True))


def test_test_wins_over_dev_and_dev_over_train() -> None:
    pairs = frames(train=["ab", "cd", "ef", "gh"], dev=["ci", "bj"], test=["bk"])
    kept, _, notes = remove_leaks(pairs, {}, NAMES, "drop")
    assert rows_of(kept["test"]) == [("b", "k")]
    assert rows_of(kept["dev"]) == [("c", "i")]
    assert rows_of(kept["train"]) == [("e", "f"), ("g", "h")]
    assert notes == [
        "dev.csv: dropped 1 of 2 rows that share a text with test.",
        "train.csv: dropped 2 of 4 rows that share a text with dev or test.",
    ]


def test_a_dropped_dev_row_holds_nothing_out_of_train() -> None:
    kept, _, _ = remove_leaks(frames(train=["jx"], dev=["bj"], test=["bk"]), {}, NAMES, "drop")
    assert rows_of(kept["train"]) == [("j", "x")]


@given(ROWS, ROWS, ROWS)
def test_afterwards_no_text_is_shared_and_test_is_whole(train: Any, dev: Any, test: Any) -> None:
    kept, _, _ = remove_leaks(frames(train, dev, test), {}, NAMES, "drop")
    texts = [{text for row in rows_of(kept[split]) for text in row} for split in ("train", "dev", "test")]
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]
    assert not texts[1] & texts[2]
    assert rows_of(kept["test"]) == test


def test_queries_hold_pairs_out_and_pairs_hold_queries_out() -> None:
    queries = {"train": {"1": "a", "2": "x"}, "dev": {"3": "b"}, "test": {"4": "c"}}
    pairs = frames(train=["by", "zz"], dev=["cy"], test=["ak"])
    kept, asked, notes = remove_leaks(pairs, queries, NAMES, "drop")
    assert rows_of(kept["train"]) == [("z", "z")]
    assert kept["dev"].empty
    assert asked == {"test": {"4": "c"}, "dev": {"3": "b"}, "train": {"2": "x"}}
    assert "train.csv: dropped 1 of 2 queries that stand in a later split as well." in notes


def test_a_shared_text_is_refused_when_asked() -> None:
    with pytest.raises(DataError) as refusal:
        remove_leaks(frames(train=["ab", "cb"], test=["bk"]), {}, NAMES, "refuse")
    message = str(refusal.value)
    assert message.startswith("train.csv shares 1 texts with test.csv, for instance 'b'")
    assert "--set data.leaks=drop" in message
    clean = frames(train=["ab"], dev=["cd"], test=["ef"])
    assert remove_leaks(clean, {}, NAMES, "refuse")[2] == []


def test_a_held_out_file_with_pairs_of_the_training_file_is_refused() -> None:
    train = [("a", str(i)) for i in range(20)]
    test = [(str(i), "a") for i in range(2)] + [("z", str(i)) for i in range(8)]
    with pytest.raises(DataError) as refusal:
        refuse_shared_pairs(frames(train=train, test=test), NAMES, DataParams())
    message = str(refusal.value)
    assert message.startswith("2 of the 10 pairs in test.csv stand in train.csv too; at most 5% may")
    assert "held-out data must be new to the model" in message
    refuse_shared_pairs(frames(train=train, test=test), NAMES, DataParams(max_shared_pairs=0.2))


def test_the_same_file_for_dev_and_test_is_refused() -> None:
    with pytest.raises(DataError, match=r"1 of the 1 pairs in test.csv stand in dev.csv too"):
        refuse_shared_pairs(frames(train=["ab"], dev=["xy"], test=["xy"]), NAMES, DataParams())


def part_of(*rows: tuple[str, str], queries: dict[str, str] | None = None) -> Part:
    retrieval = None if queries is None else Retrieval({"d": "a shared document"}, queries, {})
    return Part(frames(train=rows)["train"], retrieval)


def test_texts_that_differ_in_case_and_punctuation_only_are_leaks() -> None:
    train = part_of(("A man plays the guitar.", "x"), ("caf\u00e9", "y"), queries={"1": "How  old, is it?"})
    test = part_of(
        ("a man plays -- the GUITAR", "z"), ("cafe\u0301", "new"), queries={"2": "how old is it", "3": "why"}
    )
    assert find_leaked_share(train, test) == 3 / 6
    assert find_leaked_share(test, part_of(("a man plays a guitar", "!"))) == 0.0  # another word is another text


def test_documents_and_texts_without_a_word_are_no_leaks_by_themselves() -> None:
    train, test = part_of(("...", "a b"), queries={"1": "q"}), part_of(("!!", "c"), queries={"2": "r"})
    assert find_leaked_share(train, test) == 0.0
    assert find_leaked_share(train, part_of()) == 0.0


@given(ROWS, ROWS)
def test_the_leaked_share_is_a_share_and_all_of_it_when_train_has_all(train: Any, test: Any) -> None:
    both = part_of(*train, *test)
    if test:
        assert (
            0.0 <= find_leaked_share(part_of(*train), part_of(*test)) <= find_leaked_share(both, part_of(*test)) == 1.0
        )
