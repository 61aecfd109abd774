from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest

from bentos.engine import Engine
from bentos.manifest import read_manifest
from bentos.vectors import cosine_pairs
from flows.core.dataset import Part, prepare_dataset, read_data
from flows.core.edge_texts import EDGE_TEXTS
from flows.core.export import MODEL_FILE
from flows.core.precision import INT8_FILE, MISSING_TEST, Int8Trial, find_failures, find_misses, try_int8
from flows.core.retrieval import Retrieval
from flows.params import DEFAULT_BASE_MODEL, DataParams, ReleaseParams
from tests.factories import VARIANTS
from tests.flows.support import TOPICS, write_pairs

ROOT = Path(__file__).parents[3]
LENIENT = ReleaseParams(int8_max_loss=0.2, int8_mean_cosine=0.95, int8_min_cosine=0.9, int8_min_speedup=0.001)
LIMITS = Int8Trial(ReleaseParams(), None).limits
FIGURES: dict[str, Any] = {
    "quality": [{"metric": "spearman", "fp32": 0.84, "int8": 0.839, "loss": 0.001, "mixed_loss": 0.0005}],
    "mean_cosine": 0.998,
    "min_cosine": 0.98,
    "batch_min_cosine": 0.99999,
    "speed": {"ratio": 2.5},
}


@pytest.fixture
def pairs(tmp_path: Path) -> pd.DataFrame:
    return pd.read_csv(write_pairs(tmp_path / "pairs.csv", rows=60))


@pytest.fixture
def retrieval() -> Retrieval:
    corpus = {
        f"{topic}{number}": f"{word} {topic}" for topic, words in TOPICS.items() for number, word in enumerate(words)
    }
    queries = {topic: " ".join(words[:3]) for topic, words in TOPICS.items()}
    return Retrieval(corpus, queries, {topic: {f"{topic}{number}": 1.0 for number in range(5)} for topic in TOPICS})


@pytest.fixture
def box(tiny_lunchbox_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_lunchbox_path, tmp_path / "box"))


def attempt(box: Path, params: ReleaseParams, test: Part | None, **options: Any) -> dict[str, Any]:
    return try_int8(box, read_manifest(box), Int8Trial(params, test), **options)


def test_a_certified_int8_stays_in_the_box_with_all_its_figures(
    box: Path, pairs: pd.DataFrame, retrieval: Retrieval
) -> None:
    secret = "a secret text of the user"
    section = attempt(box, LENIENT, Part(pairs, retrieval), extra_texts=[secret])
    assert section["certified"]
    assert section["reason"] == ""
    assert (box / INT8_FILE).stat().st_size == section["bytes"][INT8_FILE] < section["bytes"][MODEL_FILE]
    assert [item["metric"] for item in section["quality"]] == ["spearman", "ndcg_at_10"]
    for item in section["quality"]:
        assert item["loss"] == pytest.approx(item["fp32"] - item["int8"])
        assert abs(item["mixed_loss"]) < LENIENT.int8_max_loss
    assert section["quality"][0]["low"] <= section["quality"][0]["loss"] <= section["quality"][0]["high"]
    assert section["min_cosine"] <= section["mean_cosine"] < 1
    assert section["batch_min_cosine"] >= 0.9999
    ratios = [section["speed"][way]["ratio"] for way in ("alone", "in_batches")]
    assert section["speed"]["ratio"] == min(ratios) > 0
    assert section["made"]["products_fixed_scale"] + section["made"]["products_by_row"] == 12
    assert "secret" not in json.dumps(section)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_model_can_be_tried(
    name: str, variants: dict[str, Path], retrieval: Retrieval, pairs: pd.DataFrame, tmp_path: Path
) -> None:
    box = Path(shutil.copytree(variants[name], tmp_path / "box"))
    section = attempt(box, LENIENT, Part(pairs.iloc[:0], retrieval))
    assert [item["metric"] for item in section["quality"]] == ["ndcg_at_10"]
    assert section["mean_cosine"] > 0.98
    assert section["batch_min_cosine"] >= 0.9999


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"int8_min_speedup": 1e6}, r"computes \d+\.\d+ times the texts of fp32.*release\.int8_min_speedup"),
        ({"int8_mean_cosine": 1.0}, r"mean cosine with fp32 is 0\.9.*release\.int8_mean_cosine"),
        ({"int8_min_cosine": 1.0}, r"smallest cosine with fp32 is 0\.9.*release\.int8_min_cosine"),
    ],
)
def test_what_misses_a_limit_is_taken_away_and_the_reason_told(
    asked: dict[str, float], reason: str, box: Path, pairs: pd.DataFrame
) -> None:
    section = attempt(box, LENIENT.model_copy(update=asked), Part(pairs))
    assert not section["certified"]
    assert re.search(reason, section["reason"])
    assert not (box / INT8_FILE).exists()
    assert read_manifest(box).precisions == {"fp32": MODEL_FILE}


def test_a_trial_is_asked_what_a_release_asks_but_for_speed(box: Path, pairs: pd.DataFrame) -> None:
    section = attempt(box, LENIENT, Part(pairs))
    manifest = read_manifest(box).model_copy(update={"precisions": {"fp32": MODEL_FILE, "int8": INT8_FILE}})

    def misses(**changed: float) -> list[str]:
        return find_misses(box, manifest, Int8Trial(LENIENT.model_copy(update=changed), Part(pairs)))

    assert misses(int8_min_speedup=1e6) == []
    (reason,) = misses(int8_mean_cosine=1.0)
    assert reason.startswith(f"the mean cosine with fp32 is {section['mean_cosine']:.5f}, asked 1 ")
    assert find_misses(box, manifest, Int8Trial(LENIENT, None)) == [MISSING_TEST]


def test_without_test_rows_nothing_is_certified(box: Path) -> None:
    section = attempt(box, LENIENT, None)
    assert (section["certified"], section["reason"]) == (False, MISSING_TEST)
    assert not (box / INT8_FILE).exists()


def test_a_model_without_products_to_quantize_says_so(box: Path, pairs: pd.DataFrame) -> None:
    model = onnx.load(box / MODEL_FILE)
    for item in model.graph.initializer:  # weights that are computed, as some exporters write them
        if len(item.dims) == 2:
            model.graph.node.insert(0, onnx.helper.make_node("Identity", [item.name], [f"{item.name}/computed"]))
            for node in model.graph.node:
                if node.op_type == "MatMul":
                    node.input[:] = [f"{name}/computed" if name == item.name else name for name in node.input]
    onnx.save(model, box / MODEL_FILE)
    section = attempt(box, LENIENT, Part(pairs))
    assert (section["certified"], section["reason"]) == (False, "no matrix product of this model can be quantized")
    assert not (box / INT8_FILE).exists()


def test_a_graph_that_cannot_be_rewritten_is_no_reason_to_end(box: Path, pairs: pd.DataFrame) -> None:
    model = onnx.load(box / MODEL_FILE)
    model.graph.input[0].name = "tokens"  # so that its activations cannot be looked at
    for node in model.graph.node:
        node.input[:] = ["tokens" if name == "input_ids" else name for name in node.input]
    onnx.save(model, box / MODEL_FILE)
    section = attempt(box, LENIENT, Part(pairs))
    assert not section["certified"]
    assert section["reason"].startswith("it cannot be made: ")
    assert "input_ids" in section["reason"]


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"quality": [FIGURES["quality"][0] | {"loss": 0.006}]}, "spearman falls by 0.0060, allowed 0.005"),
        ({"quality": [FIGURES["quality"][0] | {"mixed_loss": 0.006}]}, "falls by 0.0060 beside fp32 vectors"),
        ({"quality": [FIGURES["quality"][0] | {"loss": math.nan}]}, "falls by nan"),
        ({"mean_cosine": 0.98}, "mean cosine with fp32 is 0.98000, asked 0.99"),
        ({"min_cosine": 0.9}, "smallest cosine with fp32 is 0.90000, asked 0.95"),
        ({"batch_min_cosine": 0.9998}, "among others with itself alone is 0.99980, asked 0.9999 (release.min_cosine)"),
        ({"batch_min_cosine": math.nan}, "is nan"),
        ({"speed": {"ratio": 1.05}}, "computes 1.05 times the texts of fp32 on this machine, asked 1.1"),
    ],
)
def test_each_limit_fails_by_itself(change: dict[str, Any], fragment: str) -> None:
    assert find_failures(FIGURES, LIMITS) == []
    (failure,) = find_failures(FIGURES | change, LIMITS)
    assert fragment in failure


@pytest.mark.slow
def test_the_real_model_is_certified_and_a_batch_equals_its_singles(tmp_path: Path) -> None:
    from flows.core.models import resolve_base_model
    from tests.factories import make_tiny_lunchbox

    box = make_tiny_lunchbox(tmp_path / "box", model_path=Path(resolve_base_model(DEFAULT_BASE_MODEL)))
    sample = DataParams(
        profiles=str(ROOT / "data/sample/profiles.csv"), judgements=str(ROOT / "data/sample/judgements.csv")
    )
    test = prepare_dataset(read_data(sample, root=ROOT), sample).test
    section = attempt(box, ReleaseParams(int8_min_speedup=0.001), test)  # how fast it is depends on the processor
    assert section["certified"], section["reason"]
    assert section["mean_cosine"] > 0.995

    manifest = read_manifest(box)
    both = manifest.model_copy(update={"precisions": {**manifest.precisions, "int8": INT8_FILE}})
    engine = Engine(box, both, precision="int8")
    rng = np.random.default_rng(0)
    ids = [[101, *rng.integers(1000, 30_000, rng.integers(1, 200)).tolist(), 102] for _ in range(60)]
    ids += [text.ids for text in engine.tokenize(EDGE_TEXTS)]
    alone = np.vstack([engine.infer([text]) for text in ids])
    for size in (2, 5, 9):
        rows = rng.permutation(len(ids))
        together = np.vstack(
            [engine.infer([ids[row] for row in rows[at : at + size]]) for at in range(0, len(ids), size)]
        )
        assert cosine_pairs(together, alone[rows]).min() >= 0.9999
