"""The page: medians over the rounds, ratios beside their targets, met or not, and where Ekiben is behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.plots import draw_latency, draw_throughput
from tests.benchmarks.workloads import TITLES

PAGE, THROUGHPUT, LATENCY = "benchmarks.md", "benchmarks-throughput.svg", "benchmarks-latency.svg"
NOTES = Path(__file__).with_name("notes.md")  # by hand: what was tried where a target is missed
OURS = "ekiben-fp32"
MARGIN = 1.02  # a peer is ahead when it is better by more than the noise of a quiet machine
QUIET = 0.05  # share of the cores that others may take before the page warns


@dataclass(frozen=True)
class Column:
    """One measured figure, as a column of a table."""

    metric: str
    title: str
    digits: int
    more_is_better: bool | None = None  # None: it says nothing about who is ahead


RATE = Column("texts_per_s", "texts/s", 1, True)
LATENCIES = (Column("p50_ms", "p50 ms", 1, False), Column("p99_ms", "p99 ms", 1, False))
CPU = Column("cpu_ms_a_text", "CPU ms a text", 2, False)
ERRORS = Column("errors", "errors", 0)
COLUMNS: dict[str, tuple[Column, ...]] = {
    "W1": (RATE, *LATENCIES, CPU, ERRORS),
    "W2": (RATE, *LATENCIES, CPU, ERRORS),
    "W3": (RATE, *LATENCIES, CPU, ERRORS),
    "W4": (RATE, *LATENCIES, CPU, ERRORS),
    "W5": (
        Column("offered_per_s", "offered/s", 1),
        Column("goodput_per_s", "good/s", 1),
        Column("goodput_share", "good / capacity", 2, True),
        Column("p99_ms", "p99 ms of the good", 0),
        Column("refused", "429", 0),
        Column("late", "late", 0),
        Column("server_errors", "5xx", 0),
        Column("resets", "resets", 0),
        Column("settled_s", "calm again after s", 1),
    ),
    "W6": (
        *LATENCIES,
        Column("idle_p50_ms", "idle p50 ms", 1),
        Column("idle_p99_ms", "idle p99 ms", 1),
        Column("p99_ratio", "p99 / idle p99", 1),
        Column("bulk_texts_per_s", "bulk texts/s beside", 1, True),
        Column("late", "late", 0),
    ),
    "start": (
        Column("ready_s", "ready after s", 1, False),
        Column("first_vector_s", "first right vector after s", 1, False),
        Column("min_cosine", "smallest cosine", 5),
    ),
    "memory": (
        Column("idle_pss_mb", "PSS MiB after start", 0, False),
        Column("pss_mb", "PSS MiB, highest", 0, False),
        Column("rss_mb", "RSS MiB, highest", 0),
    ),
}
HEADINGS = {
    **{name: f"{name}: {title}" for name, title in TITLES.items()},
    "start": "Start: from the start of the process, files in the page cache",
    "memory": "Memory of all processes of a server together",
}


@dataclass(frozen=True)
class Target:
    """A promise: a figure of ours, or its ratio to another's, and the least or most that it may be."""

    workload: str
    server: str
    metric: str
    limit: float
    over: str | None = None  # a server, or `ceiling-PRECISION`
    at_least: bool = True
    worst: bool = False  # the worst round counts, not the median

    def is_met(self, value: float) -> bool:
        """Whether `value` is on the right side of the limit."""
        return value >= self.limit if self.at_least else value <= self.limit


TARGETS = (
    Target("W1", OURS, "texts_per_s", 3.0, over="infinity"),
    Target("W1", OURS, "texts_per_s", 6.0, over="seed"),
    Target("W1", "ekiben-int8", "texts_per_s", 3.5, over="infinity"),
    Target("W1", OURS, "texts_per_s", 0.65, over="ceiling-fp32"),
    Target("W2", OURS, "texts_per_s", 1.5, over="infinity"),
    Target("W2", OURS, "texts_per_s", 2.0, over="seed"),
    Target("W2", "ekiben-int8", "texts_per_s", 2.3, over="infinity"),
    Target("W2", OURS, "texts_per_s", 0.9, over="ceiling-fp32"),
    Target("W3", OURS, "texts_per_s", 1.0, over="infinity"),
    Target("W3", OURS, "texts_per_s", 0.9, over="ceiling-fp32"),
    Target("W4", OURS, "p50_ms", 0.4, over="infinity", at_least=False),
    Target("W5", OURS, "goodput_share", 0.85),
    Target("W5", OURS, "server_errors", 0, at_least=False, worst=True),
    Target("W5", OURS, "resets", 0, at_least=False, worst=True),
    Target("W5", OURS, "refused_without_retry_after", 0, at_least=False, worst=True),
    Target("W6", OURS, "p99_ratio", 5.0, at_least=False),
    Target("start", OURS, "first_vector_s", 0.25, over="seed", at_least=False),
    Target("memory", OURS, "pss_mb", 450, at_least=False),
)


class Figures:
    """The results of a run, by server, workload and metric."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self._values: dict[tuple[str, str, str], dict[int, float]] = {}
        for row in results["runs"]:
            counted = {**row, "errors": sum(row.get(name, 0) for name in ("server_errors", "other_errors", "resets"))}
            for metric, value in counted.items():
                if isinstance(value, int | float):
                    self._put(row["server"], row["workload"], metric, row["repetition"], value)
        for row in results["ceilings"]:  # of the batch sizes, the best in each round
            name, round_ = f"ceiling-{row['precision']}", row["repetition"]
            known = self._values.get((name, row["workload"], "texts_per_s"), {}).get(round_, 0.0)
            self._put(name, row["workload"], "texts_per_s", round_, max(known, row["texts_per_s"]))

    def _put(self, server: str, workload: str, metric: str, repetition: int, value: float) -> None:
        self._values.setdefault((server, workload, metric), {})[repetition] = value

    def list_values(self, server: str, workload: str, metric: str) -> list[float]:
        """The figure of each round in which it was measured."""
        return list(self._values.get((server, workload, metric), {}).values())

    def find_median(self, server: str, workload: str, metric: str) -> float | None:
        """The median over the rounds, or None when it was never measured."""
        values = self.list_values(server, workload, metric)
        return median(values) if values else None

    def evaluate(self, target: Target) -> tuple[float, list[float]] | None:
        """The value that a target is held against, and the same of each round; None when something is missing."""
        own = self._values.get((target.server, target.workload, target.metric), {})
        if not own:
            return None
        if target.over is None:
            values = list(own.values())
            return (max(values) if target.worst else median(values)), values
        other = self._values.get((target.over, target.workload, target.metric), {})
        rounds = [own[round_] / other[round_] for round_ in own if other.get(round_)]
        if not rounds:
            return None
        return median(own.values()) / median(other.values()), rounds

    def list_leads(self, servers: Sequence[str]) -> list[tuple[str, Column, str, float, float]]:
        """Where another server is ahead of ours: workload, figure, who, its median, ours."""
        leads = []
        for workload, columns in COLUMNS.items():
            for column in columns:
                ours = self.find_median(OURS, workload, column.metric)
                for server in servers:
                    theirs = self.find_median(server, workload, column.metric)
                    if column.more_is_better is None or ours is None or theirs is None or server.startswith("ekiben"):
                        continue
                    better, worse = (theirs, ours) if column.more_is_better else (ours, theirs)
                    if better > worse * MARGIN:
                        leads.append((workload, column, server, theirs, ours))
        return leads


def write_page(results: Mapping[str, Any], folder: Path) -> Path:
    """Write the page and its plots into `folder` and return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = Figures(results)
    measured = {row["server"] for row in results["runs"]}
    titles = {name: facts["title"] for name, facts in results["servers"].items() if name in measured}
    draw_throughput(folder / THROUGHPUT, titles, figures.list_values)
    draw_latency(folder / LATENCY, titles, figures.list_values)
    page = folder / PAGE
    page.write_text(render_page(results), encoding="utf-8")
    return page


def render_page(results: Mapping[str, Any]) -> str:
    """Write the whole page as Markdown."""
    figures = Figures(results)
    parts = [
        _render_head(results),
        _render_targets(results, figures),
        f"![Texts a second]({THROUGHPUT})\n\n![Latency]({LATENCY})",
        "## Figures\n\nMedian over the rounds (smallest to largest).",
        *(_render_table(results, figures, workload) for workload in COLUMNS),
        _render_losses(results, figures),
        *([NOTES.read_text(encoding="utf-8").strip()] if NOTES.is_file() else []),
        _render_method(results),
        _render_machine(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _render_head(results: Mapping[str, Any]) -> str:
    machine, foreign = results["machine"], _find_worst(results, "foreign_share")
    warning = (
        f"\n\n**Other programs took up to {100 * foreign:.0f} % of the cores meanwhile: "
        "every figure is too low, and the ratios are uncertain.**"
    )
    return (
        "# Benchmarks\n\n"
        "This page is written by `make bench`; do not edit it. It compares Ekiben with other ways to serve the same "
        "weights (all-MiniLM-L6-v2, 384 dimensions) over HTTP on a CPU.\n\n"
        f"Measured {results['made_at'][:10]} on {machine['cores']} cores of {machine['cpu']}, "
        f"{results['repetitions']} rounds, {results['minutes']:.0f} minutes. Other machines give other figures: "
        "compare ratios, and measure yours." + (warning if foreign > QUIET else "")
    )


def _render_targets(results: Mapping[str, Any], figures: Figures) -> str:
    lines = ["## Targets", "", "| | what | target | found | of each round | |", "| --- | --- | --- | --- | --- | --- |"]
    for target in TARGETS:
        found = figures.evaluate(target)
        if found is None:
            if _was_run(results, target.workload):
                lines.append(f"| {target.workload} | {_name(target)} | {_limit(target)} | not measured | | |")
            continue
        value, rounds = found
        verdict = "met" if target.is_met(value) else "**not met**"
        span = f"{_number(min(rounds))} to {_number(max(rounds))}"
        lines.append(
            f"| {target.workload} | {_name(target)} | {_limit(target)} | {_number(value)} | {span} | {verdict} |"
        )
    return "\n".join(lines)


def _was_run(results: Mapping[str, Any], workload: str) -> bool:
    return any(row["workload"] == workload for row in results["runs"])


def _name(target: Target) -> str:
    titles = {column.metric: column.title for columns in COLUMNS.values() for column in columns}
    metric = titles.get(target.metric, target.metric.replace("_", " "))
    return f"{target.server}: {metric}" + (f" / {target.over}" if target.over else "")


def _limit(target: Target) -> str:
    return f"{'≥' if target.at_least else '≤'} {target.limit:g}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.2f}"


def _render_table(results: Mapping[str, Any], figures: Figures, workload: str) -> str:
    columns = COLUMNS[workload]
    rows = []
    for server, facts in results["servers"].items():
        cells = [_cell(figures.list_values(server, workload, column.metric), column.digits) for column in columns]
        if any(cells):
            rows.append([facts["title"], *cells])
    ceilings = sorted({f"ceiling-{row['precision']}" for row in results["ceilings"]})
    for name in ceilings:
        if values := figures.list_values(name, workload, "texts_per_s"):
            rows.append([f"*{name.replace('-', ' of the engine, ')}*", _cell(values, 1), *[""] * (len(columns) - 1)])
    if not rows:
        return ""
    heads = ["", *(column.title for column in columns)]
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)]
    return f"### {HEADINGS[workload]}\n\n" + "\n".join(lines)


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    middle = f"{median(values):.{digits}f}"
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return middle if low == high else f"{middle} ({low} to {high})"


def _render_losses(results: Mapping[str, Any], figures: Figures) -> str:
    titles = {name: facts["title"] for name, facts in results["servers"].items()}
    missed = [
        f"- {target.workload}: target missed: {_name(target)} is {_number(found[0])}, wanted {_limit(target)}."
        for target in TARGETS
        if (found := figures.evaluate(target)) is not None and not target.is_met(found[0])
    ]
    ahead = [
        f"- {workload}, {column.title}: {titles[server]} {theirs:.{column.digits}f}, "
        f"{titles[OURS]} {ours:.{column.digits}f}."
        for workload, column, server, theirs, ours in figures.list_leads(list(titles))
    ]
    skipped = [f"- {name} could not be measured: {reason}" for name, reason in results["skipped"].items()]
    lines = [*missed, *ahead, *skipped] or ["- In no figure of this run was another server ahead."]
    return "## Where we lose\n\n" + "\n".join(lines)


def _render_method(results: Mapping[str, Any]) -> str:
    texts, times = results["texts"], results["times"]
    generator, foreign, steal = (
        100 * _find_worst(results, name) for name in ("generator_share", "foreign_share", "steal_share")
    )
    described = "; ".join(
        f"{workload} {facts['mean_tokens']:.1f} ({facts['min_tokens']} to {facts['max_tokens']})"
        for workload, facts in texts.items()
    )
    return f"""## Method

- One server at a time, on loopback. In every round each server is started, checked, measured on all workloads and
  ended; then the next one. The order turns by one place a round. Nothing is pinned to cores; every server may use all.
- Before anything is measured, a server's vectors are compared with those of sentence-transformers itself: cosine
  above 0.999 (int8: 0.97), else it is left out. Some answers under load are compared in the same way.
- No measured text was sent before. The texts are put together from phrases of the sample data, the same for every
  server. Their tokens by the model's own tokenizer, mean (smallest to largest):
  {described}.
- {times["measure_s"]:g} s are measured after {times["warm_s"]:g} s of warm-up; W4 {times["single_s"]:g} s, W6 idle
  {times["idle_s"]:g} s. A request that reaches over an end of the window counts by its part inside.
- Single texts come before bulk, in the order W1, W4, W5, W2, W3, W6; after W5 we wait until the server is calm again.
- W1 to W4 are closed loops. In W5 requests arrive at a constant rate, whatever the server does, and clients hang up
  after 2 s: good is a 200 within that time; capacity is the same server's W1 rate in the same round. In W6 a query's
  time runs from when it was due, so a slow answer does not hide the next; one that could not be sent until the end
  (late) counts with the time that it had waited, so the true figure of such a server is worse.
- `/encode_batchable` is a door of Ekiben that leaves the batching to BentoML; the other BentoML server is a plain
  service that does the same with ONNX Runtime's defaults, on the same ONNX file.
- The seed has no way to send several texts at once: in W3 and W6 its bulk is the same texts one a request.
- The ceiling is Ekiben's engine inside one process: one single-threaded lane a core, texts tokenized beforehand and
  sorted by length, the best of several batch sizes. No HTTP, no queue.
- The load generator is one Python thread that writes rendered requests to raw sockets. It took at most
  {generator:.0f} % of one core in any workload. CPU a text is user and system time of all processes of the server;
  memory is PSS (shared pages divided among processes) and RSS (counted in each).
- In no workload did other programs take more than {foreign:.0f} % of the cores' time, or the hypervisor more than
  {steal:.0f} % of a core.
- Run it: `make bench`. Quick look: `.venv/bin/python -m tests.benchmarks --quick`; a part: `--only W1,W5 --servers
  ekiben-fp32,infinity`; the page from saved results: `--render .bench/results-TIME.json`."""


def _find_worst(results: Mapping[str, Any], name: str) -> float:
    return float(max((row.get(name) or 0.0 for row in results["runs"]), default=0.0))


def _render_machine(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    lines = [
        "## Machine and versions",
        "",
        f"- CPU: {machine['cpu']} (family/model/stepping {machine['cpu_family']}), {machine['cores']} cores; "
        f"instructions: {', '.join(machine['flags']) or 'none of interest'}",
        f"- {machine['ram_gib']:g} GiB RAM, Linux {machine['kernel']}, Python {machine['python']}",
    ]
    for name, facts in results["servers"].items():
        versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
        lines.append(f"- {facts['title']} (`{name}`): {versions}")
    return "\n".join(lines)
