"""The names of the versions that are loaded, as /v1/models and the OpenAPI document list them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from bentos.catalogue import find_in_catalogue, list_all_names, list_all_spaces, list_catalogue
from bentos.encoder import Encoder
from bentos.errors import NotReadyError, UnknownModelError
from bentos.lunchbox import open_lunchbox
from bentos.openai import ModelList
from bentos.rules import list_names
from bentos.settings import ServeSettings
from bentos.shelf import Shelf
from tests.bentos.shelves import make_shelf


async def put_on_a_shelf(new: Path, old: Path) -> Shelf:
    encoders = [Encoder(open_lunchbox(box), ServeSettings()) for box in (new, old)]
    tags = [encoder.manifest.tag for encoder in encoders]
    return make_shelf(*encoders, aliases={"previous": tags[1], "champion": tags[0], "challenger": "ekiben:9-00000000"})


@pytest.fixture(scope="module")
def shelf(successor_path: Path, tiny_lunchbox_path: Path) -> Shelf:
    return asyncio.run(put_on_a_shelf(successor_path, tiny_lunchbox_path))


def test_every_version_is_listed_by_what_stays_and_by_its_tag(shelf: Shelf) -> None:
    new, old = (encoder.manifest for encoder in shelf.encoders())
    listed = list_catalogue(shelf)
    ModelList.model_validate(listed)
    meant = {card["id"]: (card["model"], card["space_id"]) for card in listed["data"]}
    assert list(meant) == ["ekiben", "champion", "previous", new.tag, old.tag]
    for name, box in zip(meant, (new, new, old, new, old), strict=True):
        assert meant[name] == (box.tag, box.space_id)
    for card in listed["data"]:
        assert list(card) == ["id", "object", "created", "owned_by", "model", "space_id"]
        assert find_in_catalogue(shelf, card["id"]) == card


def test_any_name_that_a_request_may_hold_is_found(shelf: Shelf) -> None:
    names = list_all_names(shelf)
    assert names[: len(list_names(shelf.live.manifest))] == list_names(shelf.live.manifest)
    assert len(names) == len(set(names))
    for name in names:
        assert find_in_catalogue(shelf, name)["model"] == shelf.choose("model", name).manifest.tag
    assert "challenger" not in names, "it is not loaded"
    with pytest.raises(UnknownModelError, match="`model` is 'challenger'"):
        find_in_catalogue(shelf, "challenger")


def test_all_spaces_are_listed_once(shelf: Shelf) -> None:
    new, old = (encoder.manifest for encoder in shelf.encoders())
    assert list_all_spaces(shelf) == [new.space_id, old.space_id]


@pytest.mark.parametrize("ask", [list_catalogue, lambda shelf: find_in_catalogue(shelf, "ekiben")])
def test_without_a_live_version_the_reason_is_told(ask: Any) -> None:
    with pytest.raises(NotReadyError, match="still loading"):
        ask(Shelf())
