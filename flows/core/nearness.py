"""How near a model was kept to the champion of then: as metrics of its run, and in words. Core layer, pure.

The metrics go on into manifest and model card. They stand beside the gain: the one was paid for with the other.
"""

from __future__ import annotations

from collections.abc import Mapping

COSINE_METRIC = "anchor/same_text_cosine"  # mean over texts of dev
WEIGHT_METRIC = "anchor/weight"  # `train.anchor_weight`
VERSION_METRIC = "anchor/version"  # of the champion then


def nearness_metrics(cosine: float, *, weight: float, version: str) -> dict[str, float]:
    """Return what a run notes.

    Args:
        cosine: Mean cosine of the two vectors of a text, over texts of dev.
        weight: `train.anchor_weight`.
        version: Of the champion; left out when it is no number (a box from elsewhere).
    """
    metrics = {COSINE_METRIC: cosine, WEIGHT_METRIC: weight}
    return metrics | ({VERSION_METRIC: float(version)} if version.isdigit() else {})


def describe_nearness(metrics: Mapping[str, float]) -> str:
    """Say in one line how near a model was kept, and to what, from the metrics of its run; empty: to nothing."""
    if COSINE_METRIC not in metrics:
        return ""
    near = f"version {metrics[VERSION_METRIC]:.0f}" if VERSION_METRIC in metrics else "the champion of then"
    weight = f", weight {metrics[WEIGHT_METRIC]:g} (train.anchor_weight)" if WEIGHT_METRIC in metrics else ""
    return f"kept near {near}: same-text cosine {metrics[COSINE_METRIC]:.4f} on dev{weight}"
