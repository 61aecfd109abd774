"""What may be asked of one model. Most rules are seen at work in test_encoder.py and test_openai.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

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
    for ask in (lambda: rules.check_model("model", "x" * 9999), lambda: rules.choose_prompt("x" * 9999)):
        with pytest.raises(Exception, match=r"x{200}'") as caught:
            ask()
        assert len(str(caught.value)) < 600
