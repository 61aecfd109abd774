"""What an architecture costs in serving: the figures, what they hang on, and what cannot be had."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bentos.vectors import cosine_pairs
from flows.core.cost import (
    CostMeter,
    Costs,
    Exported,
    encode_served,
    export_for_serving,
    identify_machine,
    open_scratch,
    serving_precision,
)
from flows.core.models import load_saved_model
from flows.errors import ParamsError, UnsupportedModelError
from flows.params import TrainParams
from tests.factories import TINY_DIM, make_tiny_model

TEXTS = ["a quick brown fox", "the train leaves at seven", "rice", "people read and sleep and look out of the window"]
ALL = ("p95_ms", "bytes_per_vector", "memory_mb")


@pytest.fixture(scope="module")
def meter(tmp_path_factory: pytest.TempPathFactory) -> CostMeter:
    return CostMeter(TEXTS, ALL, tmp_path_factory.mktemp("costs"))


@pytest.fixture(scope="module")
def whole(meter: CostMeter, tiny_model_path: Path) -> Costs:
    return meter.measure(TrainParams(base_model=str(tiny_model_path), max_tokens=32))


def test_every_cost_is_measured_on_the_export_of_an_untrained_model(whole: Costs) -> None:
    assert whole.keys() == set(ALL)
    assert whole["bytes_per_vector"] == 4 * TINY_DIM
    assert 0 < whole["p95_ms"] < 1000
    assert 10 < whole["memory_mb"] < 1000
    # Two digits: what differs in more is not the same architecture, but chance.
    assert all(float(f"{whole[name]:.2g}") == whole[name] for name in ("p95_ms", "memory_mb"))


def test_other_precisions_and_limits_of_tokens_need_no_other_export(
    meter: CostMeter, whole: Costs, tiny_model_path: Path
) -> None:
    before = sorted(meter._scratch.iterdir())
    again = meter.measure(TrainParams(base_model=str(tiny_model_path), max_tokens=8, precision="fp32"))
    assert again.keys() == whole.keys()
    assert sorted(meter._scratch.iterdir()) == before


def test_bytes_alone_need_no_export_and_no_cost_needs_nothing(tmp_path: Path, tiny_model_path: Path) -> None:
    params = TrainParams(base_model=str(tiny_model_path), max_tokens=32, dimensions=8)
    scratch = tmp_path / "never made"
    assert CostMeter(TEXTS, ["bytes_per_vector"], scratch).measure(params) == {"bytes_per_vector": 32.0}
    assert CostMeter(TEXTS, [], scratch).measure(TrainParams(base_model="nowhere")) == {}
    assert not scratch.exists()


@pytest.mark.parametrize("costs", [[], ["bytes_per_vector"], ["p95_ms"]])
@pytest.mark.parametrize("wrong", [{"layers": 3}, {"dimensions": TINY_DIM + 1}])
def test_an_architecture_that_there_is_not_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_model_path: Path, costs: list[str], wrong: dict[str, int]
) -> None:
    params = TrainParams(base_model=str(tiny_model_path), max_tokens=32).model_copy(update=wrong)
    with pytest.raises(ParamsError, match=next(iter(wrong))):
        CostMeter(TEXTS, costs, tmp_path / "never made").measure(params)
    assert not (tmp_path / "never made").exists()


def test_what_is_measured_and_scored_is_what_would_be_served(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "model", prompts={"query": "find: "}, default_prompt="query")
    model = load_saved_model(path)
    exported = export_for_serving(model, tmp_path / "box", texts=TEXTS)
    expected = np.asarray(model.encode(TEXTS))  # under its default prompt
    for precision, least in (("fp32", 0.9999), ("int8", 0.95)):
        vectors = encode_served(exported.open(precision), TEXTS)
        assert vectors.shape == expected.shape
        assert cosine_pairs(vectors, expected).min() > least
    precisions = {name: serving_precision(exported, TrainParams(precision=name)) for name in ("auto", "fp32", "int8")}
    assert precisions == {"auto": "int8", "fp32": "fp32", "int8": "int8"}

    only_fp32 = Exported(exported.box, exported.manifest.model_copy(update={"precisions": {"fp32": "model.fp32.onnx"}}))
    assert serving_precision(only_fp32, TrainParams(precision="auto")) == "fp32"
    with pytest.raises(UnsupportedModelError, match=r"leave int8 out of tune\.space\.precision"):
        serving_precision(only_fp32, TrainParams(precision="int8"))


def test_the_machine_has_a_name_that_stays() -> None:
    assert identify_machine() == identify_machine()
    assert "onnxruntime" in identify_machine()


def test_exports_of_a_process_that_was_killed_are_cleared_away_and_those_of_others_are_not(tmp_path: Path) -> None:
    code = "import sys, pathlib, time; from flows.core.cost import open_scratch\n"
    code += "with open_scratch(pathlib.Path(sys.argv[1])) as folder: print(folder, flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "runs")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    theirs = Path(child.stdout.readline().strip())
    try:
        with open_scratch(tmp_path / "runs") as ours:
            assert theirs.is_dir()
            assert ours.is_dir()
    finally:
        child.kill()
        child.wait()
    assert theirs.is_dir()
    with open_scratch(tmp_path / "runs") as ours:
        assert list((tmp_path / "runs").iterdir()) == [ours]
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.slow
def test_fewer_layers_and_int8_are_cheaper_and_little_space_is_taken(tmp_path: Path) -> None:
    """The order of real figures, far enough apart for any machine."""
    meter = CostMeter(TEXTS, ALL, tmp_path / "costs")
    base = TrainParams(precision="fp32")
    whole = meter.measure(base)
    int8 = meter.measure(base.model_copy(update={"precision": "int8"}))
    single = meter.measure(base.model_copy(update={"layers": 1}))
    short = meter.measure(base.model_copy(update={"dimensions": 64}))
    assert single["p95_ms"] < whole["p95_ms"] / 2
    assert int8["memory_mb"] < whole["memory_mb"]
    assert short["bytes_per_vector"] == whole["bytes_per_vector"] / 6
    assert len(list((tmp_path / "costs").iterdir())) == 2  # of three exports
