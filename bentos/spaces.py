"""In which space a model may answer, and what helps a caller who wants another one.

A model answers in its own space, and by the maps in its lunchbox (adapter.py) in older ones, for an index that is not
rebuilt yet. Another version that is loaded beside it may be the very one that made the old vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bentos.adapter import Adapter
from bentos.errors import SpaceMismatchError
from bentos.lunchbox import Lunchbox
from bentos.schemas import DoorRequest

EXPECT_SPACE_HEADER = "X-Ekiben-Expect-Space"
MAX_QUOTED_CHARS = 60


def choose_adapter(box: Lunchbox, request: DoorRequest, loaded: Iterable[Lunchbox] = ()) -> Adapter | None:
    """The map into the space that a request asks for; None when it is the model's own.

    Args:
        box: the model that answers.
        request: what is asked of it.
        loaded: all models that could be named instead, for the message.

    Raises:
        SpaceMismatchError: when the model cannot answer in that space.
    """
    asked, own = request.asked_space, box.manifest.space_id
    if asked is None or asked == own:
        return None
    if (adapter := box.adapters.get(asked)) is not None:
        return adapter
    raise SpaceMismatchError(
        f"`space` is {_quote(asked)}, but {box.manifest.tag} answers in {_list_spaces(box)}. "
        + ". ".join([*_name_others(request, asked, box, loaded), f"{_name_choices(box)}, or leave `space` out"]),
        field="space",
        expected=asked[:MAX_QUOTED_CHARS],
        found=own,
        available=list_spaces(box),
    )


def check_expected(
    expected: str, box: Lunchbox, adapter: Adapter | None, request: DoorRequest, loaded: Iterable[Lunchbox] = ()
) -> None:
    """Let a request pass whose answer will be in the space that its header expects.

    Args:
        expected: the header's value.
        box: the model that answers.
        adapter: the map that its vectors go through, as `choose_adapter` found it.
        request: what is asked.
        loaded: all models that could be named instead, for the message.

    Raises:
        SpaceMismatchError: when the answer would be in another space; says what would help.
    """
    own = box.manifest.space_id
    found = own if adapter is None else adapter.space_id
    if expected == found:
        return
    if adapter is not None:
        problem = f"`space` asks for vectors of space {found!r}"
        cures = [f"Leave `space` out: {box.manifest.tag} makes them"] if expected == own else []
    else:
        problem = f"{box.manifest.tag} makes vectors of space {found!r}, which must not be compared with them"
        cures = []
    if expected in box.adapters and "space" in type(request).model_fields:
        cures.append(f"Send `space`: {expected!r}, and they are mapped into it until your index is rebuilt")
    cures += _name_others(request, expected, box, loaded)
    if any(each.space_id == expected and each.kind == "compatible" for each in box.manifest.relations):
        cures.append(
            "The release found both spaces compatible, so an index of those vectors may be asked with these: to accept "
            f"that, expect {own!r}"
        )
    if not cures:
        cures = ["Embed your texts again, or ask the server that made the old vectors"]
    raise SpaceMismatchError(
        f"{EXPECT_SPACE_HEADER} is {_quote(expected)}, but {problem}. {'. '.join(cures)}",
        expected=expected[:MAX_QUOTED_CHARS],
        found=found,
        available=list_spaces(box),
    )


def list_spaces(box: Lunchbox) -> list[str]:
    """Every space that a model answers in, its own first."""
    return [box.manifest.space_id, *box.adapters]


def _list_spaces(box: Lunchbox) -> str:
    own, *mapped = map(repr, list_spaces(box))
    if not mapped:
        return f"its own space {own} only: its release found no map into another one that keeps what is found"
    return f"its own space {own}, and by a map in {' and '.join(mapped)}"


def _name_choices(box: Lunchbox) -> str:
    return f"Ask for {' or '.join(map(repr, list_spaces(box)))}"


def _name_others(request: DoorRequest, space: str, box: Lunchbox, loaded: Iterable[Lunchbox]) -> Sequence[str]:
    """Name the first model loaded beside `box` that makes vectors of a space, else that maps into it."""
    field = request.asked_model[0]
    if field not in type(request).model_fields:
        return []
    others = [other for other in loaded if other is not box]
    for other in others:
        if other.manifest.space_id == space:
            return [f"Name `{field}`: {other.manifest.tag!r}, which is loaded here and makes them"]
    if "space" in type(request).model_fields:
        for other in others:
            if space in other.adapters:
                return [f"Name `{field}`: {other.manifest.tag!r} with `space`: {space!r}, which has a map into it"]
    return []


def _quote(space: str) -> str:
    return repr(space if len(space) <= MAX_QUOTED_CHARS else space[:MAX_QUOTED_CHARS] + "...")
