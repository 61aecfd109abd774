"""What is said about older spaces: in the card, and when another model serves than the one that filled an index."""

from __future__ import annotations

from typing import Any

import pytest

from bentos.manifest import Compat, DataVersion, Manifest
from flows.core.relations import MEANINGS, can_be_asked, describe_mismatch, list_earlier, render_compat

FIGURES = {
    "queries": 500.0,
    "documents": 1467.0,
    "fit_texts": 3000.0,
    "ranks": 10.0,
    "overlap": 0.83,
    "cosine_mean": 0.97,
    "cosine_p05": 0.94,
    "recall": 0.871,
    "kept": 0.991,
    "back_recall": 0.88,
    "mapped_cosine_mean": 0.98,
    "mapped_recall": 0.884,
}


def make_manifest(version: str, *relations: Compat, space_id: str | None = None) -> Manifest:
    return Manifest(
        name="ekiben",
        version=version,
        run_id=f"{version * 8}-run",
        data=DataVersion(path="p", md5="0"),
        base_model="tiny",
        dim=384,
        max_tokens=64,
        pooling="mean",
        normalize=True,
        precisions={"fp32": "model.fp32.onnx"},
        space_id=space_id or f"space{version}",
        compat=relations[0] if relations else None,
        earlier=list(relations[1:]),
        created_at="2026-11-23T00:00:00+00:00",
        files={},
    )


def make_relation(kind: str, version: str, **changed: Any) -> Compat:
    fields = {
        "kind": kind,
        "version": version,
        "tag": f"ekiben:{version}-{version * 8}",
        "space_id": f"space{version}",
        "figures": FIGURES,
        "adapter": f"adapter.space{version}.npy" if kind == "adapter" else None,
        "reason": "because",
    }
    return Compat.model_validate(fields | changed)


@pytest.mark.parametrize(
    ("kind", "upgrade", "rollback"),
    [
        ("identical", "match those of ekiben:2", "match those of ekiben:1"),
        ("compatible", "may be asked as it is (measured: 87%", "may be asked as it is (measured: 88%"),
        ("adapter", "ask ekiben:2-22222222 with `space` space1", "multiply them by the map in ekiben:2-22222222's"),
        ("breaking", "do not match", "do not match"),
    ],
)
def test_an_index_is_told_what_it_is_worth_after_an_upgrade_and_after_a_rollback(
    kind: str, upgrade: str, rollback: str
) -> None:
    old, new = make_manifest("1"), make_manifest("2", make_relation(kind, "1"))
    assert upgrade in describe_mismatch(old, new)
    assert rollback in describe_mismatch(new, old)


@pytest.mark.parametrize(
    ("figures", "usable", "said"),
    [
        ({"back_recall": 0.81}, True, "measured: 81% of the neighbours stay"),  # of a box without low ends
        ({"back_recall": 0.81, "back_recall_low": 0.79}, False, "no more than 79% of their neighbours"),
        ({"back_recall": 0.81, "back_recall_low": 0.79, "asked_recall": 0.7}, True, "81%"),
        ({"back_recall": 0.81, "asked_recall": 0.9}, False, "asked 90% (release.compat_min_recall)"),
        ({"back_recall": float("nan")}, False, "Embed again what ekiben:2-22222222 embedded"),
        ({"recall": 0.99}, False, "it was not measured"),
    ],
)
def test_the_way_back_of_a_compatible_space_is_asked_the_same(
    figures: dict[str, float], usable: bool, said: str
) -> None:
    old, new = make_manifest("1"), make_manifest("2", make_relation("compatible", "1", figures=figures))
    assert can_be_asked(old, new)  # an upgrade: that is what the class says
    assert can_be_asked(new, old) is usable  # a rollback
    advice = describe_mismatch(new, old)
    assert said in advice
    assert ("may be asked as it is" in advice) is usable


@pytest.mark.parametrize("kind", ["identical", "compatible", "adapter", "breaking"])
def test_what_can_be_asked_is_what_the_words_say(kind: str) -> None:
    old, new = make_manifest("1"), make_manifest("2", make_relation(kind, "1"))
    for made_with, served_by in ((old, new), (new, old)):
        assert can_be_asked(made_with, served_by) is (kind in ("identical", "compatible"))
        assert ("do not match" in describe_mismatch(made_with, served_by)) is (kind in ("adapter", "breaking"))
    assert can_be_asked(old, make_manifest("5", space_id=old.space_id))
    assert not can_be_asked(old, make_manifest("5"))


def test_the_same_space_matches_whatever_the_version() -> None:
    assert "both are of space s" in describe_mismatch(
        make_manifest("1", space_id="s"), make_manifest("2", space_id="s")
    )


def test_what_nobody_measured_does_not_match() -> None:
    third = make_manifest("3", make_relation("identical", "2"))
    assert "never compared and do not match" in describe_mismatch(make_manifest("1"), third)
    assert "never compared and do not match" in describe_mismatch(third, make_manifest("1"))


def test_relations_before_the_last_one_count_too() -> None:
    third = make_manifest("3", make_relation("breaking", "2"), make_relation("compatible", "1"))
    assert "may be asked as it is" in describe_mismatch(make_manifest("1"), third)
    assert [relation.version for relation in list_earlier(third)] == ["1"]


def test_the_card_shows_class_reason_and_figures() -> None:
    text = "\n".join(render_compat(make_manifest("2", make_relation("adapter", "1"))))
    for part in (
        "**adapter** with ekiben:1-11111111, space `space1`",
        MEANINGS["adapter"],
        "Why: because.",
        "| recall@10: new queries among old vectors | 0.8710 | 0.8840 |",
        "| nearness to the query that the found ones keep | 0.9910 | - |",
        "500 queries and 1467 documents",
        "3000 other texts",
    ):
        assert part in text
    assert render_compat(make_manifest("1")) == []
    bare = "\n".join(render_compat(make_manifest("2", make_relation("breaking", "1", figures={}))))
    assert "| figure |" not in bare
