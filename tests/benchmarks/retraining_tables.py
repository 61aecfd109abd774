"""The tables of the retraining benchmark, in Markdown, with how they were made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
NONE = "-"


def render_tables(results: Mapping[str, Any]) -> str:
    """Write what was measured on what, then a table of spaces and one of smaller models."""
    parts = [_render_method(results), _render_spaces(results), _render_smaller(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _render_method(results: Mapping[str, Any]) -> str:
    machine, train, data = results["machine"], results["train"], results["data"]
    sizes = "; ".join(f"{name} {_size(data[name])}" for name in ("train", "dev", "test"))
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return (
        f"Measured {results['made_at'][:10]} in {results['minutes']:.0f} minutes on {machine['cores']} cores of "
        f"{machine['cpu']}, Python {machine['python']}, {versions}. {train['base_model']} (test {results['metric']} "
        f"{results['base']:.4f} as published); the champion: {train['steps']} steps of {train['batch_size']} at rate "
        f"{train['learning_rate']:g}. Data {data['md5'][:12]}: {sizes}.{_render_probe(results)}"
    )


def _size(counts: Mapping[str, int]) -> str:
    return " and ".join(f"{count:,} {kind}" for kind, count in counts.items())


def _render_probe(results: Mapping[str, Any]) -> str:
    figures = next((row["compat"]["figures"] for row in results["spaces"] if _figures(row)), None)
    if figures is None:
        return ""
    return (
        f" Spaces: {figures['queries']:,.0f} queries over {figures['documents']:,.0f} documents of the test rows, "
        f"{figures['ranks']:.0f} ranks; the map was fitted on {figures['fit_texts']:,.0f} other texts."
    )


def _render_spaces(results: Mapping[str, Any]) -> str:
    """Of intervals the low end is in parentheses: it is what a class rests on."""
    columns: dict[str, Callable[[Row], str]] = {
        "the new model": lambda row: str(row["title"]),
        str(results["metric"]): lambda row: f"{row['metric']:.4f}",
        "gain": lambda row: f"{row['gain'][0]:+.4f} ({row['gain'][1]:+.4f})",
        "same text": lambda row: _number(_figures(row).get("cosine_mean")),
        "found": lambda row: _share(row, "recall"),
        "found, mixed": lambda row: _share(row, "mixed_recall"),
        "found, mapped": lambda row: _share(row, "mapped_recall"),
        "mixed, mapped": lambda row: _share(row, "mapped_mixed_recall"),
        "nDCG kept": _kept_ndcg,
        "class": lambda row: str(row["compat"]["kind"]) if "compat" in row else NONE,
    }
    return _render(results["spaces"], columns)


def _render_smaller(results: Mapping[str, Any]) -> str:
    metric = results["metric"]
    columns: dict[str, Callable[[Row], str]] = {
        "the model": lambda row: str(row["title"]),
        f"{metric}, fp32": lambda row: _cell(row, "fp32", "metric", "{:.4f}"),
        f"{metric}, int8": lambda row: _cell(row, "int8", "metric", "{:.4f}"),
        "bytes a vector": lambda row: _cell(row, "fp32", "bytes_per_vector", "{:,.0f}"),
        "p95 ms, fp32": lambda row: _cell(row, "fp32", "p95_ms", "{:g}"),
        "p95 ms, int8": lambda row: _cell(row, "int8", "p95_ms", "{:g}"),
        "MiB, int8": lambda row: _cell(row, "int8", "memory_mb", "{:.0f}"),
    }
    return _render(results["smaller"], columns)


def _render(rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]]) -> str:
    """A table without the columns that have no figure; nothing when there is no row."""
    if not rows:
        return ""
    cells = {title: [write(row) for row in rows] for title, write in columns.items()}
    cells = {title: column for title, column in cells.items() if set(column) != {NONE}}
    rule = " | ".join("---" if number == 0 or title == "class" else "---:" for number, title in enumerate(cells))
    lines = [f"| {' | '.join(cells)} |", f"| {rule} |"]
    lines += [f"| {' | '.join(line)} |" for line in zip(*cells.values(), strict=True)]
    return "\n".join(lines)


def _figures(row: Row) -> Mapping[str, float]:
    figures: Mapping[str, float] = row.get("compat", {}).get("figures", {})
    return figures


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _share(row: Row, name: str) -> str:
    figures = _figures(row)
    return _percent(figures.get(name), figures.get(f"{name}_low"))


def _kept_ndcg(row: Row) -> str:
    """By the labels: new queries among old vectors, as a share of what the old queries reach."""
    figures = _figures(row)
    share = figures["ndcg"] / figures["old_ndcg"] if "ndcg" in figures and figures["old_ndcg"] else None
    return _percent(share, figures.get("ndcg_share_low"))


def _percent(value: float | None, low: float | None) -> str:
    """A share with the low end of its interval."""
    if value is None:
        return NONE
    return f"{100 * value:.1f} %" + ("" if low is None else f" ({100 * low:.1f})")


def _cell(row: Row, precision: str, name: str, form: str) -> str:
    return form.format(row[precision][name]) if precision in row else NONE
