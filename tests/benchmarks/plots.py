"""The two pictures of the page: texts a second, and latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

COLOURS = {
    "ekiben-fp32": "#c1440e",
    "ekiben-int8": "#e8956d",
    "ekiben-batchable": "#efc9b6",
    "infinity": "#3b6ea5",
    "bentoml-batchable": "#7fa8cf",
    "seed": "#9a9a9a",
}
Values = Callable[[str, str, str], list[float]]  # server, workload, metric -> the figure of each round
mpl.use("Agg")


def draw_throughput(path: Path, titles: Mapping[str, str], values: Values) -> None:
    """Texts a second in W1 to W3: a bar a server, its whisker from the smallest to the largest round."""
    figure, axes = _make_axes(titles)
    for axis, workload in zip(axes, ("W1", "W2", "W3"), strict=True):
        for row, server in enumerate(titles):
            if found := values(server, workload, "texts_per_s"):
                axis.barh(row, median(found), xerr=_spread(found), color=COLOURS[server], error_kw={"linewidth": 1})
                _write_beside(axis, found, row)
        if ceiling := values("ceiling-fp32", workload, "texts_per_s"):
            axis.axvline(median(ceiling), color="#444444", linestyle="--", linewidth=1)
            place = {"xytext": (-3, 0), "textcoords": "offset points", "ha": "right", "fontsize": 7}
            axis.annotate("engine fp32", (median(ceiling), -0.7), color="#444444", **place)
        axis.set_title(f"{workload}: texts a second", fontsize=10)
        axis.set_xlim(left=0)
    _save(figure, path)


def draw_latency(path: Path, titles: Mapping[str, str], values: Values) -> None:
    """Latency: median of a lone request (W4), tail under 32 connections (W1), tail of queries beside bulk (W6)."""
    figure, axes = _make_axes(titles)
    shown = (
        ("W4", "p50_ms", "alone, p50"),
        ("W1", "p99_ms", "32 connections, p99"),
        ("W6", "p99_ms", "beside bulk, p99"),
    )
    for axis, (workload, metric, title) in zip(axes, shown, strict=True):
        for row, server in enumerate(titles):
            if found := values(server, workload, metric):
                axis.errorbar(median(found), row, xerr=_spread(found), fmt="o", color=COLOURS[server], linewidth=1)
                _write_beside(axis, found, row)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="x", color="#dddddd", linewidth=0.5)
        axis.set_title(f"{workload}: {title}, ms (log)", fontsize=10)
    _save(figure, path)


def _make_axes(titles: Mapping[str, str]) -> tuple[Any, Any]:
    """Three panels that share their rows, a server a row."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 1 + 0.45 * len(titles)), layout="constrained", sharey=True)
    axes[0].set_yticks(range(len(titles)), list(titles.values()))
    axes[0].set_ylim(len(titles) - 0.4, -0.9)
    for axis in axes:
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def _spread(found: list[float]) -> list[list[float]]:
    middle = median(found)
    return [[middle - min(found)], [max(found) - middle]]


def _write_beside(axis: Any, found: list[float], row: int) -> None:
    place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
    axis.annotate(_number(median(found)), (max(found), row), **place)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _save(figure: Any, path: Path) -> None:
    with mpl.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):  # text as text: a tenth of the bytes
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
