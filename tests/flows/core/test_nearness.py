from __future__ import annotations

from flows.core.nearness import describe_nearness, nearness_metrics


def test_one_line_says_how_near_a_model_was_kept() -> None:
    assert describe_nearness({"eval/spearman": 0.8}) == ""
    near = {"anchor/same_text_cosine": 0.98124, "anchor/weight": 1.0, "anchor/version": 12.0}
    assert describe_nearness(near) == (
        "kept near version 12: same-text cosine 0.9812 on dev, weight 1 (train.anchor_weight)"
    )
    older = {"anchor/same_text_cosine": 0.98124}  # of a run that noted no more
    assert describe_nearness(older) == "kept near the champion of then: same-text cosine 0.9812 on dev"


def test_a_run_notes_what_is_told_later() -> None:
    noted = nearness_metrics(0.5, weight=2.0, version="7")
    assert (
        describe_nearness(noted)
        == "kept near version 7: same-text cosine 0.5000 on dev, weight 2 (train.anchor_weight)"
    )
    assert "the champion of then" in describe_nearness(nearness_metrics(0.5, weight=2.0, version="tests"))
