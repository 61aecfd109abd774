"""The front of a study as lines of text: a table, and a picture that any terminal can show. Core layer, pure.

Both are made from the rows that the `front` artifact holds: `trial`, `value`, `taken`, `front`, one column a cost, the
varied parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
WIDTH, HEIGHT = 60, 11  # characters of the picture's plane
TAKEN, ON_FRONT, BEHIND = "◉", "●", "·"
UNITS = {"p95_ms": "ms", "bytes_per_vector": "bytes", "memory_mb": "MB"}
HIDDEN = ("learning_rate", "steps", "batch_size", "loss")  # how it was trained; the trials' table has them


def table_lines(rows: Sequence[Row], metric: str, costs: Sequence[str], params: Sequence[str]) -> list[str]:
    """A line a trial of the front, cheapest first, and the trial that was taken marked.

    Args:
        rows: Cheapest first.
        metric: Name of the dev metric.
        costs: Columns of cost.
        params: Columns of varied parameters; those that are the same in all rows, and `HIDDEN` ones, are left out.
    """
    shown = [name for name in params if name not in HIDDEN and len({row[name] for row in rows}) > 1]
    table = [("", "trial", f"dev {metric}", *costs, *shown)]
    for row in rows:
        mark = TAKEN if row["taken"] else ON_FRONT if row["front"] else BEHIND
        cells = [f"{row[cost]:g}" for cost in costs] + [_name(row[name]) for name in shown]
        table.append((mark, str(row["trial"]), f"{row['value']:.4f}", *cells))
    widths = [max(len(cells[column]) for cells in table) for column in range(len(table[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in table
    ]


def picture_lines(rows: Sequence[Row], metric: str, cost: str) -> list[str]:
    """Quality against one cost, on a logarithmic axis: up is better, left is cheaper. Nothing for fewer than two rows.

    Args:
        rows: Finished trials, on the front or behind it.
        metric: Name of the dev metric.
        cost: The column that is the horizontal axis.
    """
    if len(rows) < 2:
        return []
    x = _scale([math.log(row[cost]) for row in rows], WIDTH - 1)
    y = _scale([row["value"] for row in rows], HEIGHT - 1)
    plane = [[" "] * (WIDTH + 4) for _ in range(HEIGHT)]
    marked = sorted(zip(rows, x, y, strict=True), key=lambda item: (item[0]["taken"], item[0]["front"]))
    for row, column, line in marked:  # the taken one last, over the others
        label = f"{TAKEN if row['taken'] else ON_FRONT}{row['trial']}" if row["front"] or row["taken"] else BEHIND
        for offset, letter in enumerate(label):
            plane[HEIGHT - 1 - line][column + offset] = letter
    values, bounds = [row["value"] for row in rows], sorted(row[cost] for row in rows)
    labels = [f"{max(values):.4f}", *[""] * (HEIGHT - 2), f"{min(values):.4f}"]
    lines = [f"  {label:>8} ┤{''.join(cells).rstrip()}" for label, cells in zip(labels, plane, strict=True)]
    low, high = (f"{bound:g} {UNITS.get(cost, '')}".strip() for bound in (bounds[0], bounds[-1]))
    legend = f"{TAKEN} taken  {ON_FRONT} on the front  {BEHIND} behind it"
    return [
        f"  dev {metric} against {cost}:  {legend}",
        *lines,
        f"  {'':>8} └{'─' * WIDTH}",
        f"  {'':>8}  {low}{high:>{WIDTH - len(low)}}",
    ]


def _scale(values: Sequence[float], most: int) -> list[int]:
    """Map values to 0..most, in proportion; all to the middle when they are equal."""
    low, span = min(values), max(values) - min(values)
    return [round((value - low) / span * most) if span else most // 2 for value in values]


def _name(value: object) -> str:
    """A parameter as people write it: the last part of a model's name, `all` for layers and dimensions that stay."""
    return "all" if value is None else str(value).rstrip("/").rpartition("/")[2]
