"""What the `ekiben` command shows: lines that can be copied as they are, made from results and nothing else."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from flows.core.front_text import picture_lines, table_lines
from flows.core.lineage import Lineage
from flows.core.nearness import describe_nearness
from flows.core.serving import local_url
from flows.settings import FlowSettings

if TYPE_CHECKING:
    from flows.release import ReleaseResult
    from flows.rollback import RollbackResult
    from flows.train import TrainResult
    from flows.tune import TuneResult

SHOWN_METRICS = ("spearman", "pearson", "mae", "accuracy", "ndcg_at_10", "mrr_at_10", "recall_at_10")
GAIN_ENDS = ("gain/low", "gain/high")


def trained(result: TrainResult, settings: FlowSettings) -> Text:
    """The end of `ekiben train`."""
    return _screen(
        f"Trained: version {result.version}",
        _facts({"MLflow run": f"{result.run_id} in {settings.shown_mlflow_uri}"}),
        _scores(result.metrics),
        _next_steps(result, settings),
    )


def tuned(result: TuneResult, settings: FlowSettings) -> Text:
    """The end of `ekiben tune`: the front, the trial that was taken from it, and what that gives."""
    best = ", ".join(f"{name} {_value(value)}" for name, value in result.best_params.items())
    given_up = f", {result.hopeless_trials} given up as hopeless" if result.hopeless_trials else ""
    facts = {
        "study": f"{result.study}, {result.finished_trials} finished trials{given_up}, ended by {result.ended_by}",
        "taken": f"trial {result.trial}, by tune.policy={result.policy}",
        "parameters": best,
        "MLflow run": f"{result.run_id} in {settings.shown_mlflow_uri}",
    }
    blocks = [_facts(facts)]
    if result.costs and len(result.trials) > 1:
        shown = [row for row in result.trials if row["front"] or row["taken"]]
        blocks.append(table_lines(shown, result.primary_metric, result.costs, list(result.best_params)))
        blocks += [picture_lines(result.trials, result.primary_metric, cost) for cost in result.costs[:1]]
    return _screen(f"Tuned: version {result.version}", *blocks, _scores(result.metrics), _next_steps(result, settings))


def released(lineage: Lineage, settings: FlowSettings) -> Text:
    """What was released, and where everything is kept."""
    title = f"Released: {lineage.bento_tag} is the {' and '.join(lineage.aliases) or 'released version'}"
    return _screen(title, _lineage_facts(lineage, settings), _scores(lineage.metrics))


def would_release(result: ReleaseResult, settings: FlowSettings) -> Text:
    """The end of `ekiben release --dry-run`: every gate has passed."""
    facts = {
        "version": f"{result.version}, MLflow run {result.run_id} in {settings.shown_mlflow_uri}",
        "replaces": f"version {result.replaces}" if result.replaces else "nothing: it would be the first",
        "space": f"{result.space_id}, {result.compat or 'compared with none'}",
    }
    rows: list[tuple[str, ...]] = [("gate", "value", "asked")]
    rows += [(row["gate"], row["value"], row["threshold"]) for row in result.gates]
    title = f"Would be released: {result.bento_tag} has passed every gate; nothing was changed"
    return _screen(title, _facts(facts), _align(rows))


def rolled_back(result: RollbackResult, settings: FlowSettings) -> Text:
    """The end of `ekiben rollback`: who serves, and what that means for indexes."""
    how = "is the champion already" if result.unchanged else f"is the champion again, in place of version {result.left}"
    facts = {
        "space": result.space_id,
        "Bento": f"{result.bento_tag} in {short_path(settings.bento_store_path)}",
        "MLflow run": f"{result.run_id} in {settings.shown_mlflow_uri}",
    }
    indexes = [f"  {match['advice']}" for match in result.indexes] or [
        "  no index was built with another version since"
    ]
    servers = [f"  {url}: {said}" for url, said in result.servers.items()] or [
        "  those that follow the champion change over by themselves; --server URL tells others"
    ]
    return _screen(
        f"Rolled back: {result.bento_tag} {how}",
        _facts(facts),
        ["Indexes:", *indexes],
        ["Servers:", *servers],
    )


def serving(lineage: Lineage, settings: FlowSettings, host: str, port: int, log: Path) -> Text:
    """The closing screen of `ekiben up` and `ekiben serve`."""
    url = local_url(host, port)
    prefect_home = shlex.quote(short_path(settings.home_path / "prefect"))
    commands = {
        "vectors": curl(url, "encode", '{"texts": ["senior Go developer", "barista"]}'),
        "similarity": curl(url, "similarity", '{"a": ["senior Go developer"], "b": ["backend engineer", "barista"]}'),
        "the playground, in a browser": f"{url}/ui",
        "the API's page": url,
        "the runs, with metrics and plots": mlflow_command(settings),
        "the flows, with progress and gates": f"PREFECT_HOME={prefect_home} {program('prefect')} server start",
        "the same Bento, without Ekiben": bento_command(lineage, settings),
        "your own data: text_a, text_b, score 0..1 (docs/data.md)": (
            f"{program('ekiben')} pipeline --pairs my_pairs.csv"
        ),
    }
    title = f"Ready: {url} serves {lineage.bento_tag}. Ctrl-C ends it; its log is {short_path(log)}"
    return _screen(title, _scores(lineage.metrics), ["Try, in another terminal:"], _commands(commands))


def lineage(found: Lineage, settings: FlowSettings) -> Text:
    """`ekiben status --version V`: the whole way back."""
    return _screen(f"Version {found.version}", _lineage_facts(found, settings), _scores(found.metrics))


def status(found: list[Lineage], holders: Sequence[str], warnings: Sequence[str], settings: FlowSettings) -> Text:
    """`ekiben status`: every version, newest first, what is at work, and what is not as it should be."""
    if not found:
        return Text(
            f"nothing is registered yet in {settings.shown_mlflow_uri}; `ekiben up` starts with the sample data"
        )
    head = ("version", "alias", "gates", "metric", "base", "tuned", "space", "", "replaces", "champion since", "Bento")
    rows = [
        (
            item.version,
            ", ".join(item.aliases) or "-",
            item.verdict or "-",
            item.primary_metric,
            _number(item.base_score),
            _number(item.score),
            item.space_id or "-",
            item.compat or "-",
            item.replaces or "-",
            _place(item) or "-",
            item.bento_tag or "not released",
        )
        for item in found
    ]
    lines = _align([head, *rows])
    lines += [f"\nat work: {holder}" for holder in holders]
    if warnings:
        lines.append("\nnot as it should be on this machine (`ekiben release --run champion` puts it right):")
        lines += [f"  {warning}" for warning in warnings]
    return Text("\n".join(lines))


def history(acts: Sequence[Mapping[str, Any]], settings: FlowSettings) -> Text:
    """`ekiben history`: every act, newest first."""
    if not acts:
        return Text(f"nothing was released yet in {settings.shown_mlflow_uri}")
    head = ("time (UTC)", "what", "version", "replaces", "space", "by", "why")
    rows = [
        (
            _minute(act["time"]),
            act["kind"] if act["done"] else f"{act['kind']}, not carried through",
            act["version"],
            act["replaces"] or "-",
            act["compat"] or "-",
            act["by"],
            ", ".join(act["gates"]) or act["reason"] or "-",
        )
        for act in acts
    ]
    return Text("\n".join(_align([head, *rows])))


def mlflow_command(settings: FlowSettings) -> str:
    """How to open MLflow's pages on the runs."""
    if settings.mlflow_uri.startswith("http"):
        return settings.shown_mlflow_uri
    return f"{program('mlflow')} ui --backend-store-uri {quote_mlflow_uri(settings)}"


def quote_mlflow_uri(settings: FlowSettings) -> str:
    """MLflow's address as a word of a command; one with a password stays in the environment that it came from."""
    shown = settings.shown_mlflow_uri
    return shlex.quote(shown) if shown == settings.mlflow_uri else '"$MLFLOW_TRACKING_URI"'


def bento_command(lineage: Lineage, settings: FlowSettings) -> str:
    """How to serve the Bento without Ekiben, from any folder."""
    command = f"{Path(sys.executable).with_name('bentoml')} serve {lineage.bento_tag}"
    own = settings.bento_store_path == Path.home() / "bentoml"
    return command if own else f"BENTOML_HOME={shlex.quote(str(settings.bento_store_path))} {command}"


def curl(url: str, route: str, body: str) -> str:
    """A request to try."""
    return f"curl -s {url}/{route} -H 'content-type: application/json' -d '{body}'"


def _next_steps(result: TrainResult, settings: FlowSettings) -> list[str]:
    release = f"{program('ekiben')} release --run {result.version}"
    return ["Next:", *_commands({"look at the run": mlflow_command(settings), "release it": release})]


def _lineage_facts(item: Lineage, settings: FlowSettings) -> list[str]:
    revision = f", revision {item.data_rev}" if item.data_rev else ""
    return _facts(
        {
            "version": f"{item.version} ({', '.join(item.aliases)})" if item.aliases else item.version,
            "Bento": f"{item.bento_tag} in {short_path(settings.bento_store_path)}"
            if item.bento_tag
            else "not released",
            "space": f"{item.space_id}, {item.compat} with {item.compat_space_id}"
            if item.compat
            else item.space_id or "-",
            "gates": item.verdict or "not asked",
            "replaces": f"version {item.replaces}" if item.replaces else "-",
            "champion": _place(item) or "no",
            "MLflow run": f"{item.run_id} in {settings.shown_mlflow_uri}",
            "base model": item.base_model,
            "data": f"{item.data_path} (md5 {item.data_md5}{revision})",
            "commit": item.git_commit or "-",
            "lock": f"sha256 {item.lock_sha256}" if item.lock_sha256 else "-",
            "created": item.created_at,
        }
    )


def _scores(metrics: dict[str, float]) -> list[str]:
    names = [name for name in SHOWN_METRICS if f"eval/{name}" in metrics]
    rows = [(name, _number(metrics.get(f"base/{name}")), _number(metrics[f"eval/{name}"])) for name in names]
    lines = _align([("on the test set", "base", "tuned"), *rows])
    gain = next((value for key, value in metrics.items() if key.startswith("gain/") and key not in GAIN_ENDS), None)
    if gain is not None and all(end in metrics for end in GAIN_ENDS):
        low, high = (metrics[end] for end in GAIN_ENDS)
        lines.append(f"  gain {gain:+.4f}, interval {low:+.4f} to {high:+.4f}")
    if near := describe_nearness(metrics):
        lines.append(f"  {near}")
    return lines


def _screen(title: str, *blocks: Iterable[str]) -> Text:
    body = "\n\n".join("\n".join(block) for block in blocks)
    return Text.assemble("\n", (title, "bold"), "\n\n", body, "\n")


def _facts(facts: dict[str, str]) -> list[str]:
    return [f"  {name:<12}{value}" for name, value in facts.items()]


def _commands(commands: dict[str, str]) -> list[str]:
    return [line for name, command in commands.items() for line in (f"  # {name}", f"  {command}")]


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def program(name: str) -> str:
    """A program of this environment, as it is called from here."""
    return short_path(Path(sys.executable).with_name(name))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _place(item: Lineage) -> str:
    """Since when a version is the champion, or that a rollback has left it; empty when it is neither."""
    places = {
        "release": _minute(item.champion_since),
        "rollback": f"{_minute(item.champion_since)}, by a rollback",
        "hand": "moved by hand",
        "": f"left by a rollback {_minute(item.left_at)}" if item.left_at else "",
    }
    return places[item.champion_by]


def _minute(time: str) -> str:
    """An ISO 8601 time to the minute."""
    return time[:16].replace("T", " ")


def _value(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "all" if value is None else str(value)


def short_path(path: Path) -> str:
    """An absolute path as it is called from the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
