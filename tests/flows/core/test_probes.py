"""Which texts spaces are compared by: held out from the fit, within bounds, always the same."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bentos.manifest import DataVersion
from flows.core import probes
from flows.core.dataset import Dataset, Part
from flows.core.probes import Probe, choose_probe_texts, read_probe
from flows.core.retrieval import Retrieval
from flows.errors import DataError


def make_pairs(rows: list[tuple[str, str, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["text_a", "text_b", "score"])


def make_dataset(train: Part, dev: Part, test: Part) -> Dataset:
    return Dataset(train, dev, test, DataVersion(path="p", md5="0"), files={}, notes=())


def make_split(name: str, rows: int) -> Part:
    return Part(make_pairs([(f"{name} asks {n}", f"{name} tells {n}", n / max(1, rows - 1)) for n in range(rows)]))


def make_corpus(documents: int, judged: dict[str, int]) -> Part:
    """Queries of which each has one relevant document, its row in the corpus."""
    corpus = {f"d{n}": f"document {n}" for n in range(documents)}
    return Part(
        make_pairs([]),
        Retrieval(
            corpus, {f"q{q}": f"query {q}" for q in judged}, {f"q{q}": {f"d{d}": 1.0} for q, d in judged.items()}
        ),
    )


def choose(dataset: Dataset) -> Probe:
    chosen = choose_probe_texts(dataset)
    assert json.loads(json.dumps(chosen)) == chosen | {"judgements": [list(each) for each in chosen["judgements"]]}
    return Probe.model_validate(chosen)


def test_pairs_ask_with_the_first_text_and_find_the_second() -> None:
    probe = choose(make_dataset(make_split("train", 40), make_split("dev", 20), make_split("test", 30)))
    assert sorted(probe.queries) == sorted(f"test asks {n}" for n in range(30))
    assert sorted(probe.documents) == sorted(f"test tells {n}" for n in range(30))
    assert {text.split()[0] for text in probe.fit_queries} == {"train", "dev"}
    assert len(probe.fit_queries) == len(probe.fit_documents) == 60
    found = {(probe.queries[query], probe.documents[document]): score for query, document, score in probe.judgements}
    assert found == {(f"test asks {n}", f"test tells {n}"): n / 29 for n in range(30) if n / 29 >= 0.5}


def test_the_choice_does_not_change_and_ignores_other_randomness() -> None:
    dataset = make_dataset(make_split("train", 400), make_split("dev", 20), make_split("test", 700))
    assert choose_probe_texts(dataset) == choose_probe_texts(dataset)


def test_retrieval_data_give_real_queries_and_the_documents_judged_for_them() -> None:
    judged = {str(n): n for n in range(30)}
    train, dev, test = (make_corpus(200, {f"{part}{q}": d for q, d in judged.items()}) for part in ("a", "b", "c"))
    probe = choose(make_dataset(train, dev, test))
    assert sorted(probe.queries) == sorted(f"query c{n}" for n in range(30))
    assert {(probe.queries[q], probe.documents[d]) for q, d, _ in probe.judgements} == {
        (f"query c{n}", f"document {n}") for n in range(30)
    }
    assert len(probe.documents) == 30 + 85  # those judged, and half of the others
    assert len(probe.fit_documents) == 85
    assert len(probe.fit_queries) == 60


@settings(max_examples=20, deadline=None)
@given(
    words=st.lists(st.sampled_from(["a", "A ", " a", "b", "c  d", "C d", "e", "f", "g"]), min_size=6, max_size=60),
    cut=st.integers(1, 5),
)
def test_no_text_of_the_fit_is_held_out_but_for_case_and_space(words: list[str], cut: int) -> None:
    rows = [(one, other, 1.0) for one, other in zip(words, reversed(words), strict=True)]
    third = len(rows) // 3
    parts = [Part(make_pairs(part)) for part in (rows[:third], rows[third : 2 * third], rows[2 * third :])]
    probe = choose(make_dataset(*parts))

    def fold(texts: list[str]) -> set[str]:
        return {" ".join(text.casefold().split()) for text in texts}

    fit = fold(probe.fit_queries) | fold(probe.fit_documents)
    assert not fit & (fold(probe.queries) | fold(probe.documents))
    assert len(set(probe.queries)) == len(probe.queries)
    assert len(set(probe.documents)) == len(probe.documents)


def test_bounds_hold_for_many_and_for_long_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "MAX_CHARACTERS", 5000)
    long = Part(make_pairs([(f"asks {n} " + "x" * 3000, f"tells {n} " + "y" * 3000, 1.0) for n in range(40)]))
    probe = choose(make_dataset(make_split("train", 5000), make_split("dev", 2000), long))
    assert max(map(len, [*probe.queries, *probe.documents])) == probes.MAX_TEXT_CHARACTERS
    assert len(probe.documents) == 5
    assert sum(map(len, probe.fit_documents)) <= 5000
    assert {query for query, _, _ in probe.judgements} <= set(range(len(probe.queries)))
    assert {document for _, document, _ in probe.judgements} <= set(range(5))


def test_a_missing_file_is_no_probe_and_a_broken_one_an_error(tmp_path: Path) -> None:
    path = tmp_path / "probe_texts.json"
    assert read_probe(path) is None
    dataset = make_dataset(make_split("train", 40), make_split("dev", 20), make_split("test", 30))
    path.write_text(json.dumps(choose_probe_texts(dataset)), encoding="utf-8")
    assert read_probe(path) == choose(dataset)
    for content in ("{", "[]", '{"layout": 2}', '{"layout": 1, "queries": []}'):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=r"probe_texts.json of the run cannot be used: .*train again"):
            read_probe(path)
    wrong = json.loads(json.dumps(choose_probe_texts(dataset)))
    path.write_text(json.dumps(wrong | {"judgements": [[99, 0, 1.0]]}), encoding="utf-8")
    with pytest.raises(DataError, match="judgements"):
        read_probe(path)
