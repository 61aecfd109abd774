"""What is known about two spaces, in words: for the model card, for a rollback, for whoever keeps an index.

Core layer, pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from bentos.manifest import Compat, Manifest
from flows.params import ReleaseParams

ASKED_RECALL = "asked_recall"  # figure: the `release.compat_min_recall` of that release
MEANINGS = {
    "identical": "One model: a text's two vectors differ by rounding, or by what int8 may change, which is some 4 % of "
    "the nearest neighbours. An index of the old vectors stays as it is.",
    "compatible": "An index of the old vectors may be asked with new ones as they are, and both may stand in it.",
    "adapter": "An index of the old vectors may be asked with new ones that went through the map in this box: send "
    "`space` until it is built anew.",
    "breaking": "An index of the old vectors must be built anew before it is asked with new ones.",
}
_ROWS = (
    ("mean cosine of a text's two vectors", "cosine_mean"),
    ("5 % of texts have less than", "cosine_p05"),
    ("recall@{ranks}: new queries among old vectors", "recall"),
    ("recall@{ranks} where every other document is a new vector", "mixed_recall"),
    ("nearness to the query that the found ones keep", "kept"),
    ("recall@{ranks} the way back: old queries among new vectors", "back_recall"),
    ("nDCG@{ranks} by the labels: new queries among old vectors", "ndcg"),
)


def list_earlier(champion: Manifest) -> list[Compat]:
    """Older spaces that a champion can still be asked in: its successor should be compared with them too."""
    return [relation for relation in champion.relations if relation.kind != "breaking"]


def can_be_asked(made_with: Manifest, served_by: Manifest) -> bool:
    """Whether an index of the vectors of one model can be asked, as it is, with queries of another one.

    Where the index is the newer one, as after a rollback, `compatible` is not enough: it says that new queries find
    their way among old vectors. The way back has a figure of its own, which is held against the same threshold.

    Args:
        made_with: The model that the index was built with.
        served_by: The model that queries come from.
    """
    if made_with.space_id == served_by.space_id:
        return True
    forward = _find_relation(served_by, made_with.space_id)
    if forward is not None:
        return forward.kind in ("identical", "compatible")
    backward = _find_relation(made_with, served_by.space_id)
    if backward is None or backward.kind != "compatible":
        return backward is not None and backward.kind == "identical"
    found = _way_back(backward)
    return found is not None and found >= _asked(backward)


def describe_mismatch(made_with: Manifest, served_by: Manifest) -> str:
    """Say whether vectors that one model made still match when another one serves, in one or two sentences.

    Knows what either box says of the other's space, so it holds for an upgrade and for a rollback. What nobody measured
    counts as no match.

    Args:
        made_with: The model that an index was built with.
        served_by: The model that new queries come from.
    """
    made, served = made_with.tag, served_by.tag
    if made_with.space_id == served_by.space_id:
        return f"Vectors made by {made} match those of {served}: both are of space {served_by.space_id}."
    forward = _find_relation(served_by, made_with.space_id)
    backward = _find_relation(made_with, served_by.space_id)
    relation = forward or backward
    if relation is None:
        return (
            f"Vectors made by {made} (space {made_with.space_id}) and by {served} (space {served_by.space_id}) were "
            f"never compared and do not match: embed again what {made} embedded, or ask for `model` {made} while it is "
            "loaded."
        )
    if relation.kind == "identical":
        return f"Vectors made by {made} match those of {served}: the spaces have two ids, of one model."
    if relation.kind == "compatible" and not can_be_asked(made_with, served_by):
        found = _way_back(relation)
        how = "it was not measured what they find" if found is None else f"they may find no more than {found:.0%}"
        return (
            f"Vectors made by {made} must not be asked with queries of {served}: {how} of their neighbours among them, "
            f"asked {_asked(relation):.0%} (release.compat_min_recall). Embed again what {made} embedded, or ask for "
            f"`model` {made} while it is loaded."
        )
    if relation.kind == "compatible":
        found = relation.figures.get("recall" if forward else "back_recall")
        share = "" if found is None else f" (measured: {found:.0%} of the neighbours stay)"
        return f"Vectors made by {made} are near those of {served}: an index of them may be asked as it is{share}."
    if relation.kind == "adapter" and forward:
        return (
            f"Vectors made by {made} do not match those of {served} as they are: ask {served} with `space` "
            f"{made_with.space_id}, which maps into the old space, until the index is built anew."
        )
    if relation.kind == "adapter":
        return (
            f"Vectors made by {made} do not match those of {served} as they are: multiply them by the map in {made}'s "
            f"lunchbox ({relation.adapter}), which brings them into space {served_by.space_id}, or embed those texts "
            "again."
        )
    return (
        f"Vectors made by {made} do not match those of {served}, and no map between them holds: embed again what "
        f"{made} embedded, or ask for `model` {made} while it is loaded."
    )


def _way_back(relation: Compat) -> float | None:
    """What old queries find among new vectors, 0..1: the low end, or the mean of boxes that have no low end."""
    return relation.figures.get("back_recall_low", relation.figures.get("back_recall"))


def _asked(relation: Compat) -> float:
    return relation.figures.get(ASKED_RECALL, ReleaseParams().compat_min_recall)


def _find_relation(manifest: Manifest, space_id: str) -> Compat | None:
    return next((relation for relation in manifest.relations if relation.space_id == space_id), None)


def render_compat(manifest: Manifest) -> list[str]:
    """Lines of the model card on older spaces, with an empty one at the end; nothing when there are none."""
    if not manifest.relations:
        return []
    lines = ["## Older spaces", ""]
    for relation in manifest.relations:
        lines += [
            f"**{relation.kind}** with {relation.tag}, space `{relation.space_id}`. {MEANINGS[relation.kind]}",
            "",
            f"Why: {relation.reason}.",
            "",
            *_table(relation),
        ]
    return lines


def _table(relation: Compat) -> Sequence[str]:
    figures = relation.figures
    if not figures:
        return []
    ranks = int(figures.get("ranks", 10))
    rows = [
        f"| {name.format(ranks=ranks)} | {_cell(figures, key)} | {_cell(figures, f'mapped_{key}')} |"
        for name, key in _ROWS
        if key in figures or f"mapped_{key}" in figures
    ]
    notes = [
        f"Measured on {figures['queries']:.0f} queries and {figures['documents']:.0f} documents of the test rows; the "
        f"map was fitted on {figures['fit_texts']:.0f} other texts. Each among its own vectors, both models find "
        f"{figures['overlap']:.0%} of the nearest {ranks} alike"
        + (
            f", and reach an nDCG@{ranks} of {figures['old_ndcg']:.4f} (old) and {figures['new_ndcg']:.4f} (new)."
            if "old_ndcg" in figures
            else "."
        )
    ]
    return ["| figure | as they are | mapped |", "| --- | --- | --- |", *rows, "", *notes, ""]


def _cell(figures: dict[str, float], key: str) -> str:
    return f"{figures[key]:.4f}" if key in figures else "-"
