"""What may be asked of one model. Most rules are seen at work in test_encoder.py and test_openai.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bentos.adapter import Adapter
from bentos.engine import Engine
from bentos.errors import InvalidRequestError
from bentos.manifest import TOKENIZER_FILE, read_manifest
from bentos.rules import ModelRules, find_frame, list_names
from bentos.schemas import TextField
from bentos.settings import ServeSettings


def load(box: Path, to: Path, template: list[Any] | None) -> Engine:
    """The tiny model with a tokenizer that puts other special tokens around a text."""
    shutil.copytree(box, to)
    tokenizer = json.loads((to / TOKENIZER_FILE).read_text())
    special = tokenizer["post_processor"]["special_tokens"]
    tokenizer["post_processor"] = template and {
        "type": "TemplateProcessing",
        "single": template,
        "pair": [*template, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": special,
    }
    (to / TOKENIZER_FILE).write_text(json.dumps(tokenizer))
    return Engine(to, read_manifest(to))


TEXT = {"Sequence": {"id": "A", "type_id": 0}}
FIRST, LAST = ({"SpecialToken": {"id": name, "type_id": 0}} for name in ("[CLS]", "[SEP]"))


@pytest.mark.parametrize(
    ("template", "before", "behind"),
    [
        (None, [], []),
        ([FIRST, TEXT, LAST], ["[CLS]"], ["[SEP]"]),
        ([FIRST, TEXT], ["[CLS]"], []),
        ([TEXT, LAST], [], ["[SEP]"]),
        ([FIRST, FIRST, TEXT, LAST, FIRST], ["[CLS]", "[CLS]"], ["[SEP]", "[CLS]"]),
    ],
    ids=["none", "both", "before", "behind", "several"],
)
def test_the_special_tokens_around_a_text_are_found_and_asked_for(
    tiny_lunchbox_path: Path, tmp_path: Path, template: Any, before: list[str], behind: list[str]
) -> None:
    engine = load(tiny_lunchbox_path, tmp_path / "box", template)
    special = {"[CLS]": 2, "[SEP]": 3}  # as tests/factories.py numbers them
    first, last = ([special[name] for name in names] for names in (before, behind))
    assert find_frame(engine) == (first, last)
    rules = ModelRules(engine.manifest, engine, ServeSettings())
    own = [list(text.ids) for text in engine.tokenize(["a fast train", "bread"])]
    rules.check_ids(TextField("input", own))
    if before or behind:
        with pytest.raises(InvalidRequestError, match=r"`input\[0\]` does not begin with"):
            rules.check_ids(TextField("input", [[100]]))


def test_the_names_of_a_model_are_all_different_ways_to_say_the_same(tiny_lunchbox_path: Path) -> None:
    manifest = read_manifest(tiny_lunchbox_path)
    assert list_names(manifest) == ["ekiben", "ekiben:1-01234567", "1-01234567", "1", "v1", manifest.run_id]


def test_a_long_name_is_shortened_in_the_message(tiny_lunchbox_path: Path) -> None:
    manifest = read_manifest(tiny_lunchbox_path)
    rules = ModelRules(manifest, Engine(tiny_lunchbox_path, manifest), ServeSettings())
    with pytest.raises(InvalidRequestError, match=r"x{200}'") as caught:
        rules.choose_prompt("x" * 9999)
    assert len(str(caught.value)) < 600


@pytest.fixture(scope="module")
def engine(tiny_lunchbox_path: Path) -> Engine:
    return Engine(tiny_lunchbox_path, read_manifest(tiny_lunchbox_path))


@given(st.sets(st.integers(1, 31)), st.integers(1, 64), st.booleans(), st.none() | st.integers(1, 64))
def test_dimensions_are_all_or_those_trained_for_or_those_that_the_server_allows_and_mapped_ones_are_never_cut(
    engine: Engine, nested: set[int], asked: int, allowed: bool, mapped: int | None
) -> None:
    manifest = engine.manifest.model_copy(update={"nested_dims": sorted(nested)})
    rules = ModelRules(manifest, engine, ServeSettings(allow_truncated_dimensions=allowed))
    adapter = None if mapped is None else Adapter("0" * 16, np.eye(32, mapped, dtype=np.float32))
    full = 32 if mapped is None else mapped
    assert rules.check_dimensions(None, adapter) == full
    if asked == full or (mapped is None and (asked in nested or (allowed and asked < full))):
        assert rules.check_dimensions(asked, adapter) == asked
    else:
        with pytest.raises(InvalidRequestError, match=f"`dimensions` is {asked}"):
            rules.check_dimensions(asked, adapter)


@pytest.mark.parametrize("trained", [True, False])
def test_mapped_vectors_have_length_1_whatever_the_model_does_by_itself(engine: Engine, trained: bool) -> None:
    rules = ModelRules(engine.manifest.model_copy(update={"normalize": trained}), engine, ServeSettings())
    assert [rules.check_normalize(asked) for asked in (None, True, False)] == [trained, True, False]
    adapter = Adapter("0" * 16, np.eye(32, dtype=np.float32))
    assert [rules.check_normalize(asked, adapter) for asked in (None, True)] == [True, True]
    with pytest.raises(InvalidRequestError, match="the map knows directions, not lengths"):
        rules.check_normalize(False, adapter)
