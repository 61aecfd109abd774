"""Pictures of an evaluation, a fit and a study, as files for MLflow and the reader.

Core layer: draws what it is given, computes nothing that counts. Colours are Okabe and Ito's, which colour-blind
readers can tell apart; figures are made without pyplot, so that no global state is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from bentos.manifest import Calibration
from flows.core.evaluation import Evaluation, Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASE_COLOUR = "#D55E00"  # vermilion
TUNED_COLOUR = "#0072B2"  # blue
GUIDE_COLOUR = "#555555"
MAX_POINTS = 4000  # more would be one blot
_DPI = 120
COST_AXES = {
    "p95_ms": "p95 of one text alone, ms of one core",
    "bytes_per_vector": "bytes a vector (float32)",
    "memory_mb": "memory of model and runtime, MiB",
}
_LABEL_AXIS = "label (0 unrelated, 1 same meaning)"


def write_plots(evaluation: Evaluation, losses: Sequence[tuple[int, float]], folder: Path) -> list[Path]:
    """Draw what there is to draw into `folder` (created when missing) and return the files.

    Args:
        evaluation: Pairs give `score_scatter.png` and `calibration.png`, retrieval data give `ndcg_gain.png`.
        losses: (step, loss) of the fit; gives `training_curve.png`, none when empty.
        folder: Where the files go; files of the same name are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Figure] = {}
    if len(evaluation.test_rows) and evaluation.calibration is not None and evaluation.base_calibration is not None:
        figures["score_scatter"] = _draw_scatter(evaluation, evaluation.base_calibration, evaluation.calibration)
        figures["calibration"] = _draw_calibration(evaluation, evaluation.calibration)
    if evaluation.base.per_query_ndcg is not None and evaluation.tuned.per_query_ndcg is not None:
        figures["ndcg_gain"] = _draw_ndcg_gain(evaluation.base.per_query_ndcg, evaluation.tuned.per_query_ndcg)
    if losses:
        figures["training_curve"] = _draw_training_curve(losses)
    paths = [folder / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=_DPI)
    return paths


def write_front_plot(
    rows: Sequence[Mapping[str, Any]],
    metric: str,
    costs: Sequence[str],
    folder: Path,
    *,
    limits: Mapping[str, float],
    policy: str,
) -> list[Path]:
    """Draw a study's finished trials, quality against each cost, into `front.png` and `front.svg` in `folder`.

    Args:
        rows: `trial`, `value`, `front`, `taken`, a column a cost, and the parameters that make the architecture.
        metric: Name of the dev metric.
        costs: Columns of cost, at least one; each gets a panel.
        folder: Where the files go; created when missing.
        limits: Largest cost allowed, where there is one.
        policy: How the taken one was chosen.
    """
    figure = _make_figure(max(7.2, 5.6 * len(costs)), 5.4)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axes, cost in zip(panels, costs, strict=True):
        _draw_front_panel(axes, rows, cost, limits.get(cost))
    panels[0].set_ylabel(f"{metric} on dev")
    _add_legend(panels[0], loc="lower right")
    count = sum(bool(row["front"]) for row in rows)
    taken = next((row["trial"] for row in rows if row["taken"]), None)
    figure.suptitle(
        f"Quality against cost: {count} of {len(rows)} finished trials are on the front\n{policy} takes trial {taken}",
        fontsize=11,
    )
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "front.png", folder / "front.svg"]
    for path in paths:
        figure.savefig(path, dpi=_DPI)
    return paths


def _draw_front_panel(axes: Axes, rows: Sequence[Mapping[str, Any]], cost: str, limit: float | None) -> None:
    """One cost on a logarithmic axis; the line is the best that can be had for so much of this cost."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    front = sorted((row for row in rows if row["front"]), key=lambda row: (row[cost], row["value"]))
    behind = [row for row in rows if not row["front"]]
    best = np.maximum.accumulate([row["value"] for row in front]) if front else np.empty(0)
    axes.step([row[cost] for row in front], best, where="post", color=TUNED_COLOUR, linewidth=1.2, alpha=0.6)
    for group, colour, label in ((behind, "#AAAAAA", "behind the front"), (front, TUNED_COLOUR, "on the front")):
        if group:
            axes.scatter(
                [row[cost] for row in group], [row["value"] for row in group], s=46, color=colour, zorder=5, label=label
            )
    taken = [row for row in rows if row["taken"]]
    if taken:
        axes.scatter(
            [row[cost] for row in taken],
            [row["value"] for row in taken],
            s=190,
            facecolors="none",
            edgecolors=BASE_COLOUR,
            linewidths=2.2,
            zorder=6,
            label="taken",
        )
    if limit is not None:
        axes.axvline(limit, color=BASE_COLOUR, linestyle=":", linewidth=2, label=f"allowed: {limit:g}")
    middle = np.sqrt(min(row[cost] for row in rows) * max(row[cost] for row in rows))  # of the logarithmic axis
    for row in front:
        side = -1 if row[cost] > middle else 1
        axes.annotate(
            _name_architecture(row),
            (row[cost], row["value"]),
            xytext=(9 * side, 6),
            textcoords="offset points",
            ha="right" if side < 0 else "left",
            fontsize=8,
            zorder=4,  # under the points
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.22, y=0.1)
    axes.set_xlabel(COST_AXES.get(cost, cost))
    axes.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def _name_architecture(row: Mapping[str, Any]) -> str:
    layers = row["layers"]
    parts = [f"{layers} layer{'' if layers == 1 else 's'}"] if layers else []
    parts += [f"{row['dimensions']} dims"] if row["dimensions"] else []
    parts += [row["precision"]] if row["precision"] != "auto" else []
    return f"{row['trial']}: {', '.join(parts) or 'whole'}"


def _draw_scatter(evaluation: Evaluation, base: Calibration, tuned: Calibration) -> Figure:
    """Label against calibrated score of the test pairs: base model left, tuned model right."""
    figure = _make_figure(10.5, 6.4)
    rows = _thin_out(evaluation.test_rows)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    _scatter_one(left, "Base model", evaluation.base, rows, base.apply(rows["base_cosine"]), BASE_COLOUR)
    _scatter_one(right, "Tuned model", evaluation.tuned, rows, tuned.apply(rows["tuned_cosine"]), TUNED_COLOUR)
    left.set_ylabel("calibrated score of the model")
    figure.suptitle(f"Label and score of {_count(rows, evaluation.test_rows)}")
    return figure


def _scatter_one(
    axes: Axes, title: str, scores: Scores, rows: pd.DataFrame, predicted: npt.NDArray[np.float64], colour: str
) -> None:
    metrics = scores.metrics
    labels = rows["score"].to_numpy()
    axes.plot([0, 1], [0, 1], color=GUIDE_COLOUR, linestyle="--", linewidth=1, label="score = label")
    axes.scatter(labels, predicted, s=14, color=colour, alpha=_alpha(len(rows)), linewidths=0, label="one pair")
    edges = np.linspace(0, 1, 11)
    bins = np.clip(np.digitize(labels, edges) - 1, 0, 9)
    filled = [index for index in range(10) if (bins == index).any()]
    axes.plot(
        [labels[bins == index].mean() for index in filled],
        [np.median(predicted[bins == index]) for index in filled],
        color="black",
        marker="o",
        markersize=4,
        linewidth=1.5,
        label="median by tenth of the label",
    )
    axes.set_title(
        f"{title}\nSpearman {metrics['spearman']:.3f} · MAE {metrics['mae']:.3f} · accuracy {metrics['accuracy']:.1%}",
        fontsize=11,
    )
    axes.set_xlabel(_LABEL_AXIS)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    _add_legend(axes, loc="lower right")


def _draw_calibration(evaluation: Evaluation, calibration: Calibration) -> Figure:
    """Cosine of the tuned model against label of the test pairs, and the map that was fitted on dev."""
    figure = _make_figure(7.2, 5.6)
    axes = figure.subplots()
    rows = _thin_out(evaluation.test_rows)
    cosines = rows["tuned_cosine"].to_numpy()
    lowest = min(0.0, float(cosines.min()))
    axes.plot([lowest, 0, 1], [0, 0, 1], color=GUIDE_COLOUR, linestyle="--", linewidth=1, label="score = cosine")
    axes.scatter(
        cosines, rows["score"], s=14, color=TUNED_COLOUR, alpha=_alpha(len(rows)), linewidths=0, label="test pair"
    )
    grid = np.unique(np.concatenate([[lowest, 1.0], calibration.cosines]))
    axes.plot(
        grid,
        calibration.apply(grid),
        color="black",
        linewidth=2,
        label="fitted map (on dev, not on these)",
    )
    if evaluation.decision_threshold is not None:
        axes.axvline(
            evaluation.decision_threshold,
            color=BASE_COLOUR,
            linestyle=":",
            linewidth=2,
            label=f"decision threshold {evaluation.decision_threshold:.2f}",
        )
    metrics = evaluation.tuned.metrics
    axes.set_title(
        f"From cosine to score, tuned model\nMAE {metrics['mae_uncalibrated']:.3f} as cosine, "
        f"{metrics['mae']:.3f} calibrated ({_count(rows, evaluation.test_rows)})",
        fontsize=11,
    )
    axes.set_xlabel("cosine of the two vectors")
    axes.set_ylabel(_LABEL_AXIS)
    axes.set(xlim=(lowest - 0.03, 1.03), ylim=(-0.03, 1.03))
    _add_legend(axes, loc="upper left")
    return figure


def _draw_ndcg_gain(base: npt.NDArray[np.float64], tuned: npt.NDArray[np.float64]) -> Figure:
    """Change of nDCG@10 of each test query, sorted: who wins, who loses, and by how much."""
    figure = _make_figure(8.0, 4.6)
    axes = figure.subplots()
    gains = np.sort(tuned - base)[::-1]
    positions = np.arange(1, len(gains) + 1)
    better, worse = gains > 1e-9, gains < -1e-9
    axes.bar(positions[better], gains[better], width=1.0, color=TUNED_COLOUR, label=f"better: {better.sum()}")
    axes.bar(positions[worse], gains[worse], width=1.0, color=BASE_COLOUR, label=f"worse: {worse.sum()}")
    axes.axhline(0, color=GUIDE_COLOUR, linewidth=1, label=f"equal: {len(gains) - better.sum() - worse.sum()}")
    axes.set_title(
        f"nDCG@10 of {len(gains)} test queries, tuned minus base\n"
        f"base {base.mean():.3f} · tuned {tuned.mean():.3f} · mean change {gains.mean():+.3f}",
        fontsize=11,
    )
    axes.set_xlabel("test query, sorted by change")
    axes.set_ylabel("change of nDCG@10")
    axes.set_xlim(0.5, len(gains) + 0.5)
    _add_legend(axes, loc="upper right")
    return figure


def _draw_training_curve(losses: Sequence[tuple[int, float]]) -> Figure:
    """Loss of each step, and its running mean."""
    figure = _make_figure(8.0, 4.6)
    axes = figure.subplots()
    steps, values = (np.asarray(column, dtype=np.float64) for column in zip(*losses, strict=True))
    window = max(1, len(values) // 8)
    axes.plot(steps, values, color=TUNED_COLOUR, alpha=0.35, linewidth=1, marker=".", markersize=4, label="one batch")
    if window > 1:
        smooth = pd.Series(values).rolling(window, center=True, min_periods=1).mean()
        axes.plot(steps, smooth, color=TUNED_COLOUR, linewidth=2.5, label=f"mean of {window} neighbouring steps")
    axes.set_title(f"Training loss over {len(values)} steps", fontsize=11)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.set_ylim(min(0.0, float(values.min())), 1.25 * float(values.max()) or 1.0)
    axes.locator_params(axis="x", integer=True)
    _add_legend(axes, loc="upper right")
    return figure


def _make_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _add_legend(axes: Axes, loc: str) -> None:
    axes.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    legend: Any = axes.legend(loc=loc, fontsize=9, framealpha=0.9)
    for handle in legend.legend_handles:
        handle.set_alpha(1.0)


def _thin_out(rows: pd.DataFrame) -> pd.DataFrame:
    return rows if len(rows) <= MAX_POINTS else rows.sample(MAX_POINTS, random_state=0)


def _count(shown: pd.DataFrame, rows: pd.DataFrame) -> str:
    return f"{len(rows)} test pairs" if len(shown) == len(rows) else f"{len(shown)} of {len(rows)} test pairs"


def _alpha(points: int) -> float:
    return float(np.clip(250 / points, 0.12, 0.7))
