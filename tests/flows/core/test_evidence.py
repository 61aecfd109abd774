"""What is gathered about a candidate: from its run, its own lunchbox and the champion's, all of them real."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bentos.errors import LunchboxError
from bentos.manifest import Calibration, Compat, DataVersion
from flows.core.dataset import Dataset, Part
from flows.core.evaluation import Evaluation, evaluate_model
from flows.core.evidence import Champion, Evidence, gather_evidence
from flows.core.gates import run_gates
from flows.core.heldout import TEST_QUERIES_FILE, TEST_ROWS_FILE, keep_test
from flows.core.measuring import Serving
from flows.core.retrieval import Retrieval
from flows.core.rivals import open_box
from flows.core.tracking import RunRecord
from flows.params import EvaluateParams, ReleaseParams
from tests.flows.support import TOPICS, write_pairs

NOW = datetime(2026, 6, 1, tzinfo=UTC)
WORDS = [word for words in TOPICS.values() for word in words]


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Part:
    """Pairs whose label is what the tiny model itself says of them, with a little noise: the better is known."""
    pairs = pd.read_csv(write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.csv"))
    return Part(pairs.assign(region=["north", "south"] * 80))


@pytest.fixture(scope="module")
def labelled(part: Part, tiny_lunchbox_path: Path) -> Part:
    _, encode = open_box(tiny_lunchbox_path)
    cosines = np.einsum("ij,ij->i", encode(part.pairs["text_a"]), encode(part.pairs["text_b"]))
    noise = np.random.default_rng(0).normal(size=len(cosines)) * cosines.std() / 4
    rank = (cosines + noise).argsort().argsort()
    return Part(part.pairs.assign(score=rank / rank.max()))


@pytest.fixture(scope="module")
def evaluated(labelled: Part, tiny_lunchbox_path: Path, variants: dict[str, Path]) -> Evaluation:
    """The tiny model as the tuned one, and one of other weights as its base."""
    dataset = Dataset(labelled, labelled, labelled, DataVersion(path="x", md5="a" * 32), {}, ())
    _, tuned = open_box(tiny_lunchbox_path)
    _, base = open_box(variants["other weights"])
    return evaluate_model(dataset, base, tuned, EvaluateParams(bootstrap_samples=200))


@pytest.fixture
def evaluation(evaluated: Evaluation, labelled: Part, tmp_path: Path) -> Path:
    folder = tmp_path / "evaluation"
    folder.mkdir()
    keep_test(labelled, evaluated, folder)
    assert evaluated.calibration is not None
    (folder / "calibration.json").write_text(evaluated.calibration.model_dump_json())
    return folder


@pytest.fixture
def make_run(evaluated: Evaluation) -> Callable[..., RunRecord]:
    def make(**changed: Any) -> RunRecord:
        tags = {"data_md5": "a" * 32, "data_time": (NOW - timedelta(days=3)).isoformat()}
        metrics = evaluated.flat_metrics() | {"data/leaked_share": 0.004}
        params = {"train.base_model": "no such model at all", "evaluate.bootstrap_samples": "200"}
        fields = {"params": params, "metrics": metrics, "tags": tags} | changed
        return RunRecord(run_id="0" * 32, name="x", status="FINISHED", **fields)

    return make


def gather(run: RunRecord, evaluation: Path, params: ReleaseParams | None = None, **more: Any) -> Evidence:
    return gather_evidence(run, params or ReleaseParams(slice_min_rows=20), evaluation=evaluation, now=NOW, **more)


def test_without_a_box_the_figures_of_the_training_count(
    make_run: Callable[..., RunRecord], evaluation: Path, evaluated: Evaluation
) -> None:
    found = gather(make_run(), evaluation)
    assert found.versus_base is not None
    assert found.versus_base.gain == evaluated.gain
    assert (found.versus_champion, found.certificate, found.serving, found.problem) == (None, None, None, "")
    assert found.leaked_share == 0.004
    assert found.data_age_days == pytest.approx(3)
    assert found.licence is None
    assert found.reference == "base model"
    assert [item.name for item in found.slices] == ["length=short", "length=medium", "length=long"]
    assert sum(item.units for item in found.slices) == 160
    assert found.calibration_error == pytest.approx(0.0, abs=0.1)
    report = run_gates(found, candidate="x")
    assert report.passed, report.refusal


def test_the_box_and_what_is_learned_later_join(
    make_run: Callable[..., RunRecord], evaluation: Path, tiny_lunchbox_path: Path, variants: dict[str, Path]
) -> None:
    champion = Champion("ekiben:2-01234567", "2", variants["other weights"])
    first = gather(make_run(), evaluation, champion=champion)
    assert first.versus_champion is not None
    assert first.versus_champion.gain.low > 0
    assert first.reference == "champion"
    assert first.certificate is None
    compat = Compat(kind="breaking", version="2", tag=champion.tag, space_id="0" * 16)
    serving = Serving(5.0, 400.0, 4.0, 300.0, 128.0)
    found = first.add(box=tiny_lunchbox_path).add(compat=compat, serving=serving, champion_serving=serving)
    assert found.certificate is not None
    assert (found.compat, found.serving, found.champion_serving) == (compat, serving, serving)
    assert found.versus_champion is not None
    assert found.versus_champion.theirs == first.versus_champion.theirs
    assert found.versus_champion.gain.value == pytest.approx(first.versus_champion.gain.value, abs=0.01)  # as served
    report = run_gates(found, candidate="x")
    assert report.passed, report.refusal
    gates = {verdict.gate for verdict in report.verdicts}
    assert {"champion", "parity", "compat", "latency", "latency_ratio", "slice length=long"} <= gates


def test_a_worse_candidate_is_refused_by_every_gate_of_quality(
    make_run: Callable[..., RunRecord], evaluation: Path, tiny_lunchbox_path: Path, variants: dict[str, Path]
) -> None:
    champion = Champion("ekiben:2-01234567", "2", tiny_lunchbox_path)
    found = gather(
        make_run(), evaluation, ReleaseParams(slice_min_rows=20, slices=["length", "region"], min_gain=0.001),
        champion=champion,
    ).add(box=variants["other weights"])  # fmt: skip
    assert found.versus_base is not None
    assert found.versus_base.gain.value == pytest.approx(0.0, abs=1e-6)  # it is its own base model here
    refused = [verdict.gate for verdict in run_gates(found, candidate="x").verdicts if not verdict.passed]
    assert {"quality", "champion", "calibration", "slice region=north", "slice region=south"} <= set(refused)


def test_a_champion_of_other_data_is_doubted(
    make_run: Callable[..., RunRecord], evaluation: Path, tiny_lunchbox_path: Path
) -> None:
    split = {"data.test": "null", "data.split_seed": "13", "data.dev_fraction": "0.15", "data.columns": "{}"}
    champion = Champion("ekiben:2-01234567", "2", tiny_lunchbox_path, params=split)
    found = gather(make_run(), evaluation, champion=champion).versus_champion
    assert found is not None
    assert "other data" in found.doubt  # that of the tests' lunchbox
    tags = {"data_md5": "d41d8cd98f00b204e9800998ecf8427e"}

    def doubt(**changed: str) -> str:
        params = split | {f"data.{name}": value for name, value in changed.items()}
        same = gather(make_run(tags=tags, params=params), evaluation, champion=champion).versus_champion
        assert same is not None
        assert same.gain.value == pytest.approx(0.0, abs=0.005)  # the candidate is its own champion here
        return same.doubt

    assert doubt() == doubt(slice_columns='["region"]') == ""
    assert "split otherwise (data.split_seed)" in doubt(split_seed="14")
    assert "(data.columns, data.dev_fraction)" in doubt(dev_fraction="0.1", columns='{"score": "label"}')
    assert doubt(split_seed="14", test="test.csv") == ""  # the file says which they are
    champion = replace(champion, params=None)
    assert "its run is gone" in doubt()


def test_a_champion_whose_box_is_broken_is_a_problem_and_no_error(
    make_run: Callable[..., RunRecord], evaluation: Path, tiny_lunchbox_path: Path, tmp_path: Path
) -> None:
    box = shutil.copytree(tiny_lunchbox_path, tmp_path / "box")
    (box / "model.fp32.onnx").write_bytes(b"half")
    found = gather(make_run(), evaluation, champion=Champion("ekiben:2-01234567", "2", box))
    assert found.versus_champion is None
    assert found.problem.startswith("the lunchbox of ekiben:2-01234567 cannot be used: model.fp32.onnx")
    assert found.reference == "base model"
    report = run_gates(found, candidate="x")
    assert [verdict.gate for verdict in report.verdicts if not verdict.passed] == ["champion"]
    with pytest.raises(LunchboxError, match=r"model\.fp32\.onnx"):
        found.add(box=box)  # the candidate's own is an error


def test_an_older_run_without_test_rows_is_judged_by_what_it_has(
    make_run: Callable[..., RunRecord], evaluation: Path, tiny_lunchbox_path: Path
) -> None:
    (evaluation / TEST_ROWS_FILE).unlink()
    metrics = {name: value for name, value in make_run().metrics.items() if not name.startswith("data/")}
    run = make_run(metrics=metrics, tags={})
    found = gather(run, evaluation).add(box=tiny_lunchbox_path)
    assert found.versus_base is not None
    assert (found.slices, found.leaked_share, found.data_age_days) == ((), None, None)
    assert run_gates(found, candidate="x").passed
    champion = Champion("ekiben:2-01234567", "2", tiny_lunchbox_path)
    refusal = run_gates(gather(run, evaluation, champion=champion), candidate="x").refusal
    assert "champion: unknown: the run kept no test rows" in refusal
    named = run_gates(gather(run, evaluation, ReleaseParams(slices=["length", "region"])), candidate="x")
    assert [item.gate for item in named.verdicts if not item.passed] == ["slice length", "slice region"]
    assert "take 'region' out of release.slices" in named.refusal
    assert "train it again" in refusal


def test_a_run_without_a_recorded_interval_gets_one_from_its_test_rows(
    make_run: Callable[..., RunRecord], evaluation: Path, evaluated: Evaluation
) -> None:
    metrics = {name: value for name, value in make_run().metrics.items() if not name.startswith("gain/")}
    found = gather(make_run(metrics=metrics), evaluation)
    assert found.versus_base is not None
    assert found.versus_base.gain == evaluated.gain


def test_an_altered_champion_is_no_champion_to_compare_with(
    make_run: Callable[..., RunRecord], evaluation: Path, tiny_lunchbox_path: Path, tmp_path: Path
) -> None:
    box = shutil.copytree(tiny_lunchbox_path, tmp_path / "box")
    (box / "canary.json").write_text("{}")
    found = gather(make_run(), evaluation, champion=Champion("ekiben:2-01234567", "2", box))
    assert found.versus_champion is None
    assert "canary.json" in found.problem


def test_retrieval_data_are_compared_by_their_queries(
    make_run: Callable[..., RunRecord], tiny_lunchbox_path: Path, variants: dict[str, Path], tmp_path: Path
) -> None:
    corpus = {f"d{n}": " ".join(words[k] for k in range(4)) for n, words in enumerate(TOPICS.values())}
    corpus |= {f"w{n}": word for n, word in enumerate(WORDS)}
    queries = {f"q{n}": f"{word} {'and more ' * (n % 3)}" for n, word in enumerate(WORDS)}
    retrieval = Retrieval(corpus, queries, {f"q{n}": {f"w{n}": 1.0} for n in range(len(WORDS))})
    held = Part(pd.DataFrame({"text_a": [], "text_b": [], "score": pd.Series(dtype=float)}), retrieval)
    _, tuned = open_box(tiny_lunchbox_path)
    _, base = open_box(variants["other weights"])
    dataset = Dataset(held, held, held, DataVersion(path="x", md5="a" * 32), {}, ())
    evaluated = evaluate_model(dataset, base, tuned, EvaluateParams(bootstrap_samples=200))
    keep_test(held, evaluated, tmp_path)
    run = make_run(metrics=evaluated.flat_metrics())
    champion = Champion("ekiben:2-01234567", "2", variants["other weights"])
    first = gather(run, tmp_path, ReleaseParams(slice_min_rows=5), champion=champion)
    assert first.versus_champion is not None
    assert first.versus_champion.metric == "ndcg_at_10"
    assert first.versus_champion.theirs == pytest.approx(evaluated.base.metrics["ndcg_at_10"])  # it is the base here
    assert [item.name for item in first.slices] == ["length=short", "length=medium", "length=long"]
    assert first.calibration_error is None
    (tmp_path / TEST_QUERIES_FILE).unlink()  # as in older runs: the candidate is known once there is its lunchbox
    older = gather(run, tmp_path, ReleaseParams(slice_min_rows=5), champion=champion)
    assert (older.versus_champion, older.problem, older.slices) == (None, "", ())
    assert "champion" not in [verdict.gate for verdict in run_gates(older, candidate="x").verdicts]
    later = older.add(box=tiny_lunchbox_path)
    assert later.versus_champion is not None
    assert later.versus_champion.gain.value == pytest.approx(first.versus_champion.gain.value)
    assert later.versus_base == older.versus_base  # the recorded one: the base model's queries were not kept


def test_undefined_metrics_of_the_run_are_no_numbers(make_run: Callable[..., RunRecord], evaluation: Path) -> None:
    found = gather(make_run(tags={"undefined_metrics": "eval/mae, dev/mae"}), evaluation)
    assert math.isnan(found.metrics["eval/mae"])
    assert math.isnan(found.metrics["dev/mae"])
    assert "finite" in run_gates(found, candidate="x").refusal


@pytest.mark.parametrize(
    ("written", "days"),
    [("2026-05-30T00:00:00Z", 2), ("2026-05-31T12:00:00", 0.5), ("2026-07-01", 0), ("yesterday", None), ("", None)],
)
def test_the_age_of_the_data_is_read_from_its_tag(
    make_run: Callable[..., RunRecord], evaluation: Path, written: str, days: float | None
) -> None:
    assert gather(make_run(tags={"data_time": written}), evaluation).data_age_days == days


@pytest.mark.parametrize(
    ("release", "train", "asked"), [("auto", "int8", "int8"), ("fp32", "int8", "fp32"), ("auto", None, "auto")]
)
def test_the_release_says_which_precision_is_asked_and_else_the_run(
    make_run: Callable[..., RunRecord], evaluation: Path, release: Any, train: str | None, asked: str
) -> None:
    params = {"train.precision": train} if train else {}
    assert gather(make_run(params=params), evaluation, ReleaseParams(precision=release)).precision == asked


def test_the_licence_is_that_of_the_base_model(make_run: Callable[..., RunRecord], evaluation: Path) -> None:
    params = {"train.base_model": "sentence-transformers/all-MiniLM-L6-v2"}
    assert gather(make_run(params=params), evaluation).licence == "apache-2.0"


def test_a_wrong_calibration_shows(make_run: Callable[..., RunRecord], evaluation: Path) -> None:
    wrong = Calibration(cosines=[0.0, 1.0], scores=[1.0, 1.0])
    (evaluation / "calibration.json").write_text(wrong.model_dump_json())
    found = gather(make_run(), evaluation)
    assert found.calibration_error == pytest.approx(0.5, abs=0.02)
    assert "calibration" in run_gates(found, candidate="x").refusal
    (evaluation / "calibration.json").write_text("null")
    assert gather(make_run(), evaluation).calibration_error is None
