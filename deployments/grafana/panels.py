"""What a dashboard is made of: panels in rows, and the PromQL that several of them need."""

from __future__ import annotations

from dataclasses import dataclass, field

HERE = 'instance=~"$instance"'


@dataclass(frozen=True)
class Panel:
    """One panel: what it is called, what it asks, in which unit it answers."""

    title: str
    unit: str  # Grafana's name of it
    queries: dict[str, str]  # legend -> PromQL
    about: str
    kind: str = "timeseries"  # stat, table
    width: int = 8
    red_from: float | None = None  # the alert's threshold
    red_below: float | None = None
    names: dict[str, str] = field(default_factory=dict)  # value -> text


@dataclass(frozen=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: tuple[Panel, ...]


def quantile(share: float, metric: str, by: str, only: str) -> str:
    """A quantile of a histogram, over what happened lately."""
    labels = ", ".join(filter(None, (by, "le")))
    return f"histogram_quantile({share}, sum by ({labels}) (rate({metric}_bucket{{{only}}}[$__rate_interval])))"


def rate(metric: str, by: str = "", only: str = HERE) -> str:
    """How often a second."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({metric}{{{only}}}[$__rate_interval]))"


def mean(metric: str, by: str = "") -> str:
    """The mean of a histogram."""
    return f"{rate(f'{metric}_sum', by)} / {rate(f'{metric}_count', by)}"
