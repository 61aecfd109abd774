from __future__ import annotations

from pathlib import Path

import pytest

from flows.errors import ParamsError
from flows.options import has_data, load_params, parameter_names
from flows.params import Params
from flows.settings import PROJECT_ROOT


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("train: {steps: 10, seed: 1}\ndata: {pairs: from_file.csv}\n")

    params = load_params(file, ["train.steps=20"], {"pairs": "from_option.csv", "dev": None})

    assert (params.train.steps, params.train.seed) == (20, 1)
    assert params.data.pairs == "from_option.csv"


def test_set_takes_yaml_values_and_scientific_numbers() -> None:
    params = load_params(
        None,
        ["train.learning_rate=3e-5", "tune.space.base_model=[a, b]", "data.columns={text_a: q}", "train.layers=null"],
        {},
    )
    assert params.train.learning_rate == pytest.approx(3e-5)
    assert params.tune.space.base_model == ["a", "b"]
    assert params.data.columns == {"text_a": "q"}
    assert params.train.layers is None


@pytest.mark.parametrize(
    ("assignment", "section", "name", "expected"),
    [
        ("data.profile_template={title}. {summary} Skills: {skills}", "data", "profile_template", None),
        ("data.profile_template={title}", "data", "profile_template", None),
        ("data.profile_template='{title}: {years} #1'", "data", "profile_template", "{title}: {years} #1"),
        ("data.data_rev=1234567", "data", "data_rev", None),
        ("data.data_rev=12e4567", "data", "data_rev", None),
        ("data.pairs=2026-01-31", "data", "pairs", None),
        ("data.columns.score=1e5", "data", "columns", {"score": "1e5"}),
        ("train.base_model=5", "train", "base_model", None),
    ],
)
def test_a_text_parameter_takes_what_is_given_as_it_stands(
    assignment: str, section: str, name: str, expected: object
) -> None:
    params = load_params(None, [assignment], {})
    assert getattr(getattr(params, section), name) == (expected or assignment.partition("=")[2])


def test_nothing_unsets_an_optional_text(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("data: {pairs: a.csv, dev: b.csv, test: c.csv}\ntrain:\n  # steps: 5\n")
    params = load_params(file, ["data.dev=null", "data.test="], {})
    assert (params.data.pairs, params.data.dev, params.data.test) == ("a.csv", None, None)


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (["train.learningrate=1"], "did you mean train.learning_rate?"),
        (["nonsense.value=1"], "the sections are data, train, evaluate, tune, release"),
        (["train.steps=0"], "train.steps: Input should be greater than or equal to 1 (found 0)"),
        (["train.steps=many"], "found 'many'"),
        (["train.loss=hinge"], "cosine_similarity"),
        (["steps=3"], "--set takes section.key=value"),
        (["train.steps"], "--set takes section.key=value"),
        (["train=1", "train.steps=2"], "--set takes section.key=value"),
        (["train.steps=[1"], "is not a YAML value"),
        (["train.steps=1", "train.steps.x=2"], "holds a value, not a group"),
        (["data.score_min=5"], "must be above score_min"),
        (["tune.space.learning_rate={low: 2, high: 1}"], "needs low <= high"),
        (["tune.space.learning_rate={low: 0.001, high: 1}"], "learning_rate 1.0: Input should be less than or equal"),
        (["tune.space.steps=[30, 0]"], "steps 0: Input should be greater than or equal to 1"),
        (["tune.space.max_tokens=[4]"], "max_tokens 4: Input should be greater than or equal to 8"),
        (["train.steps=2026-13-45"], "is not a YAML value"),
        (["train.base_model="], "train.base_model: Input should be a valid string"),
        (["data.score_max=.inf"], "data.score_max: Input should be a finite number"),
        (["release.min_gain=.nan"], "release.min_gain: Input should be a finite number"),
    ],
)
def test_bad_assignments_say_what_is_allowed(assignments: list[str], said: str) -> None:
    with pytest.raises(ParamsError) as caught:
        load_params(None, assignments, {})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"train: [1", "is not YAML"),
        (b"- 1", "it must map sections"),
        (b"\xff\xfe\x00", "cannot read the params file"),
        (b"train: {step: 3}", "did you mean train.steps?"),
    ],
)
def test_bad_params_files_say_what_is_wrong(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes(content)
    with pytest.raises(ParamsError) as caught:
        load_params(file, [], {})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_params_file_points_to_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="deployments/params"):
        load_params(tmp_path / "none.yaml", [], {})


@pytest.mark.parametrize("file", sorted((PROJECT_ROOT / "deployments" / "params").glob("*.yaml")), ids=lambda f: f.name)
def test_the_shipped_params_files_are_valid(file: Path) -> None:
    assert load_params(file, [], {}) != Params()


def test_has_data_sees_any_of_the_data_options() -> None:
    assert not has_data(load_params(None, [], {"data_rev": "v1"}).data)
    assert has_data(load_params(None, [], {"judgements": "j.csv"}).data)


def test_parameter_names_reach_into_nested_sections() -> None:
    names = parameter_names()
    assert "train.learning_rate" in names
    assert "tune.space.learning_rate.low" in names


@pytest.mark.parametrize(
    "file", sorted((PROJECT_ROOT / "deployments" / "params").glob("*.yaml")), ids=lambda file: file.stem
)
def test_every_ready_made_file_can_be_read(file: Path) -> None:
    assert load_params(file, [], {}) != load_params(None, [], {})
