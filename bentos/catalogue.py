"""The names under which the models that are loaded can be asked for."""

from __future__ import annotations

from typing import Any

from bentos.encoder import Encoder
from bentos.openai import list_models, write_model
from bentos.rules import list_names
from bentos.shelf import Shelf
from bentos.spaces import list_spaces


def list_catalogue(shelf: Shelf) -> dict[str, Any]:
    """Answer GET /v1/models: the name that stays, the aliases of what is loaded, and every version's tag.

    Raises:
        NotReadyError: when no version is live.
    """
    live = shelf.live
    return list_models({live.manifest.name: live.manifest, **{n: e.manifest for n, e in _short_names(shelf).items()}})


def find_in_catalogue(shelf: Shelf, name: str) -> dict[str, Any]:
    """Answer GET /v1/models/{name}, for any name that a request may hold.

    Raises:
        UnknownModelError: when no version of that name is loaded.
        NotReadyError: when no version is live.
    """
    return write_model(shelf.choose("model", name).manifest, name)


def list_all_names(shelf: Shelf) -> list[str]:
    """Every name that a request may hold, of all versions, those of the live one first."""
    names = [name for encoder in shelf.encoders() for name in list_names(encoder.manifest)]
    return list(dict.fromkeys([*names, *_short_names(shelf)]))


def list_all_spaces(shelf: Shelf) -> list[str]:
    """Every space that some version answers in, those of the live one first."""
    return list(dict.fromkeys(space for encoder in shelf.encoders() for space in list_spaces(encoder.box)))


def _short_names(shelf: Shelf) -> dict[str, Encoder]:
    """Aliases and tags -> the version meant; an alias of a version that is not loaded is left out."""
    return shelf.known_aliases() | {encoder.manifest.tag: encoder for encoder in shelf.encoders()}
