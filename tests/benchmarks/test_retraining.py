"""The retraining benchmark on a tiny model, its tables by hand, the reverse dictionary from a few lines of WordNet."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from flows.core.dataset import Part, prepare_dataset, read_data
from flows.core.retrieval import Retrieval
from flows.params import DataParams, TrainParams
from tests.benchmarks import retraining, wordnet
from tests.benchmarks.retraining_tables import render_tables
from tests.benchmarks.variants import list_smaller, list_variants, shuffle_labels
from tests.flows.support import write_pairs

LINES = """\
  1 This software and database is being provided to you
00000001 00 a 02 able(p) 0 capable_of 0 000 | having the skill to do something; "she was able to program"; "able men"
00000002 00 a 01 grand 0 000 | of behaviour that is impressive
00000003 00 a 01 loud 0 000 | of a great volume of sound; "a loud crash"
00000004 00 a 01 big 0 000 | large; "a big house stands there"
00000005 00 a 01 noisy 0 000 | of a great volume of sound; "what a noisy room"
"""


@pytest.fixture
def word_files(tmp_path: Path) -> Path:
    """A WordNet of five adjectives, of which two can be used."""
    for name in wordnet.FILES:
        (tmp_path / name).write_text(LINES if name == "data.adj" else "", encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_a_run_trains_compares_and_writes_both_tables(
    tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = write_pairs(tmp_path / "train.csv", 120), write_pairs(tmp_path / "test.csv", 60, seed=6)
    test.write_text(test.read_text().replace(" a", " c").replace(" b", " d"))
    results_file = tmp_path / "results.json"
    command = ["--train", str(train), "--test", str(test), "--base-model", str(tiny_model_path), "--steps", "2"]
    command += ["--only", "turned,anchor-2,dim-11", "--anchors", "2", "--json", str(results_file)]
    retraining.main(command)
    tables = capsys.readouterr().out
    results = json.loads(results_file.read_text(encoding="utf-8"))
    champion, anchored, turned = results["spaces"]
    assert (champion["key"], anchored["key"], turned["key"]) == ("champion", "anchor-2", "turned")
    assert "compat" not in champion
    assert anchored["train"] | {"steps": 2, "learning_rate": 2e-5, "anchor_weight": 0.0} == champion["train"]
    assert anchored["compat"]["figures"]["recall"] > 0.9  # three steps do not go far
    assert (turned["compat"]["kind"], turned["metric"]) == ("adapter", pytest.approx(champion["metric"], abs=1e-4))
    assert turned["compat"]["figures"]["recall"] < 0.5 < turned["compat"]["figures"]["mapped_recall"]
    (smaller,) = results["smaller"]
    assert smaller["fp32"]["bytes_per_vector"] == 44
    assert smaller["fp32"]["p95_ms"] > 0
    assert results["data"]["test"] == {"pairs": 60}
    retraining.main(["--render", str(results_file)])
    assert capsys.readouterr().out == tables
    assert "| adapter |" in tables
    assert "`train.dimensions=11`" in tables


def test_an_unknown_model_is_named_with_those_there_are(tiny_model_path: Path, tmp_path: Path) -> None:
    train = write_pairs(tmp_path / "train.csv", 160)
    command = ["--train", str(train), "--base-model", str(tiny_model_path), "--only", "trned"]
    with pytest.raises(SystemExit, match=r"--only has trned; allowed are int8, seed, .*turned"):
        retraining.main(command)


def test_bad_data_end_in_one_line(tiny_model_path: Path, tmp_path: Path) -> None:
    command = ["--train", str(tmp_path / "none.csv"), "--base-model", str(tiny_model_path)]
    with pytest.raises(SystemExit, match=r"error: .*none\.csv"):
        retraining.main(command)


def test_every_model_differs_from_the_champion_in_what_its_title_says() -> None:
    base = TrainParams(steps=60)
    variants = {each.key: each for each in list_variants(base, 384, (0.3, 1))}
    smaller = {each.key: each for each in list_smaller(base, 384, 6)}
    assert variants.keys() >= {
        "int8",
        "seed",
        "longer",
        "anchor-0.3",
        "anchor-1",
        "turned",
        "cut",
        "shuffled",
        "too-fast",
    }
    assert variants["seed"].train == base.model_copy(update={"seed": base.seed + 1})
    assert variants["longer"].train == base.model_copy(update={"steps": 90, "learning_rate": 4e-5})
    anchored = variants["anchor-0.3"]
    assert anchored == replace(
        variants["longer"],
        key=anchored.key,
        title=anchored.title,
        train=variants["longer"].train.model_copy(update={"anchor_weight": 0.3}),
        anchored=True,
    )
    assert "256 of 384" in variants["cut"].title
    assert (smaller["layers"].train.layers, smaller["layers"].train.distill_steps) == (3, 0)
    assert (smaller["distilled"].train.layers, smaller["distilled"].train.distill_steps) == (3, base.distill_steps)
    assert smaller.keys() >= {"dim-256", "dim-128"}


def test_shuffled_labels_are_the_same_ones_at_other_places() -> None:
    pairs = pd.DataFrame({"text_a": list("abcdefgh"), "text_b": list("ijklmnop"), "score": [n / 8 for n in range(8)]})
    judged = {f"q{n}": {f"d{n}": 1.0} for n in range(8)}
    part = Part(pairs, Retrieval({f"d{n}": "text" for n in range(8)}, {f"q{n}": "text" for n in range(8)}, judged))
    shuffled = shuffle_labels(part)
    assert sorted(shuffled.pairs["score"]) == sorted(pairs["score"])
    assert list(shuffled.pairs["score"]) != list(pairs["score"])
    assert list(shuffled.pairs["text_b"]) == list(pairs["text_b"])
    assert shuffled.retrieval is not None
    assert shuffled.retrieval.qrels != judged
    assert sorted(map(str, shuffled.retrieval.qrels.values())) == sorted(map(str, judged.values()))


def test_a_table_shows_low_ends_and_leaves_out_what_nobody_measured() -> None:
    figures = {"recall": 0.915, "recall_low": 0.9, "cosine_mean": 0.99, "queries": 500, "documents": 1467, "ranks": 10}
    row: dict[str, Any] = {"title": "another seed", "metric": 0.87, "gain": [0.01, 0.005, 0.015]}
    results = {
        "made_at": "2026-01-02T03:04:05+00:00",
        "minutes": 12.0,
        "machine": {"cores": 2, "cpu": "a CPU", "python": "3.11.1"},
        "versions": {"torch": "2.13.0"},
        "data": {"md5": 32 * "a", "train": {"pairs": 5000}, "dev": {"pairs": 700}, "test": {"pairs": 1500}},
        "train": {"base_model": "m", "steps": 60, "batch_size": 16, "learning_rate": 2e-5},
        "metric": "spearman",
        "base": 0.86,
        "spaces": [
            {**row, "title": "the champion"},
            {**row, "compat": {"kind": "compatible", "figures": {**figures, "fit_texts": 3000}}},
        ],
        "smaller": [{"title": "half", "fp32": {"metric": 0.8, "bytes_per_vector": 512.0, "p95_ms": 1.5}}],
    }
    tables = render_tables(results)
    assert "| another seed | 0.8700 | +0.0100 (+0.0050) | 0.990 | 91.5 % (90.0) | compatible |" in tables
    assert "| the champion | 0.8700 | +0.0100 (+0.0050) | - | - | - |" in tables
    assert "mapped" not in tables
    assert "| half | 0.8000 | 512 | 1.5 |" in tables
    assert "2 cores of a CPU, Python 3.11.1, torch 2.13.0" in tables
    assert "test 1,500 pairs" in tables


def test_wordnet_becomes_definitions_and_what_stands_beside_them(word_files: Path) -> None:
    meanings = wordnet.read_meanings(word_files)
    assert [(each.definition, each.document) for each in meanings] == [
        ("having the skill to do something", "able, capable of: she was able to program"),
        ("of a great volume of sound", "loud: a loud crash"),
    ]


def test_ekiben_reads_what_the_maker_wrote(word_files: Path, tmp_path: Path) -> None:
    lines = [
        f'{number:08} 00 n 01 word{number} 0 000 | the {number}th thing there is; "give me the {number}th"'
        for number in range(200)
    ]
    (word_files / "data.noun").write_text("\n".join(lines), encoding="utf-8")
    folders = {shuffle: tmp_path / str(shuffle) for shuffle in (False, True)}
    for shuffle, folder in folders.items():
        wordnet.main([str(word_files), str(folder), "--meanings", "200", *(["--shuffle"] if shuffle else [])])
    datasets = {
        shuffle: prepare_dataset(read_data(params := DataParams(retrieval=str(folder)), root=tmp_path), params)
        for shuffle, folder in folders.items()
    }
    right, shuffled = (datasets[shuffle].train.retrieval for shuffle in (False, True))
    assert right is not None
    assert shuffled is not None
    assert (len(right.queries), len(right.corpus)) == (140, 200)
    assert all(f"q-{document}" == query for query, judged in right.qrels.items() for document in judged)
    assert all(f"q-{document}" != query for query, judged in shuffled.qrels.items() for document in judged)
    assert datasets[True].test.retrieval == datasets[False].test.retrieval


def test_files_that_are_no_wordnet_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        wordnet.main([str(tmp_path), str(tmp_path / "out")])
    assert "data.noun" in capsys.readouterr().err
    (tmp_path / "data.noun").write_text("a table, of something else\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        wordnet.main([str(tmp_path), str(tmp_path / "out")])
    assert "line 1 is no line of WordNet 3" in capsys.readouterr().err
