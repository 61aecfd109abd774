"""Write dashboards/serving.json and dashboards/line.json: `python deployments/grafana/make_dashboards.py`.

What a panel shows is said here, in one line a query; a test says that the files are what this writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "prometheus"}
SCHEMA = 39  # of Grafana 11; newer ones migrate it
COLUMNS = 24
DOORS = 'route=~"/encode|/similarity|/rank|/v1/embeddings|/predict|/predict/similarity|/encode_batchable"'
HERE = 'instance=~"$instance"'
DOOR_ERRORS = f'{HERE}, {DOORS}, code=~"5.."'


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


SERVING = (
    Row(
        "Now",
        (
            Panel(
                "Ready",
                "none",
                {"": f"min(ekiben_ready{{{HERE}}})"},
                "1: the last check found every worker's vectors right. 0: some server has no model, or a wrong one.",
                "stat",
                4,
                red_below=1,
                names={"0": "not ready", "1": "ready"},
            ),
            Panel(
                "Requests",
                "reqps",
                {"": rate("ekiben_requests_total", only=f"{HERE}, {DOORS}")},
                "Requests a second at the doors: the routes that embed texts.",
                "stat",
                4,
            ),
            Panel(
                "Errors",
                "percentunit",
                {
                    "": f"({rate('ekiben_requests_total', only=DOOR_ERRORS)} or vector(0)) / "
                    + rate("ekiben_requests_total", only=f"{HERE}, {DOORS}")
                },
                "Share of requests at the doors that end in a 5xx. The alert begins at 1 %.",
                "stat",
                4,
                red_from=0.01,
            ),
            Panel(
                "Slowest 1 %",
                "s",
                {"": quantile(0.99, "ekiben_request_seconds", "", f"{HERE}, {DOORS}")},
                "99 of 100 requests take less. The alert begins at 1 s.",
                "stat",
                4,
                red_from=1,
            ),
            Panel(
                "Live",
                "none",
                {"{{model}}": f"sum by (model) (ekiben_model_live{{{HERE}}} > 0)"},
                "The version that answers, and in how many workers. Two for a moment: a change is under way.",
                "stat",
                4,
            ),
            Panel(
                "Alerts",
                "none",
                {"": 'count(ALERTS{alertname=~"Ekiben.*", alertstate="firing"}) or vector(0)'},
                "Alerts of Ekiben that fire now; docs/monitoring.md says for each what to do.",
                "stat",
                4,
                red_from=1,
            ),
        ),
    ),
    Row(
        "Requests",
        (
            Panel(
                "Requests by route",
                "reqps",
                {"{{route}}": rate("ekiben_requests_total", "route")},
                "All routes, probes and /metrics included; paths that do not exist are /unknown.",
            ),
            Panel(
                "Answers that are no 200",
                "reqps",
                {"{{code}} {{route}}": rate("ekiben_requests_total", "code, route", f'{HERE}, code!="200"')},
                "4xx: what callers send. 409: they want another space. 429, 504: too much at once. 499: they left.",
            ),
            Panel(
                "Latency",
                "s",
                {
                    f"p{round(share * 100)}": quantile(share, "ekiben_request_seconds", "", f"{HERE}, {DOORS}")
                    for share in (0.5, 0.9, 0.99)
                },
                "From the end of the headers to the end of the answer, at the doors.",
                red_from=1,
            ),
            Panel(
                "Slowest 5 % by route",
                "s",
                {"{{route}}": quantile(0.95, "ekiben_request_seconds", "route", f"{HERE}, {DOORS}")},
                "95 of 100 requests of the route take less; bulk requests take longer than single texts.",
            ),
            Panel(
                "Texts and tokens",
                "cps",
                {"texts": rate("ekiben_texts_total"), "tokens": rate("ekiben_tokens_total")},
                "What was embedded a second, tokens before any were cut.",
            ),
            Panel(
                "Answers by version",
                "reqps",
                {"{{model}} in {{space}}": rate("ekiben_answers_total", "model, space")},
                "Who still asks for an old version or space, before it is taken away.",
            ),
        ),
    ),
    Row(
        "Where the time goes",
        (
            Panel(
                "Mean of each stage",
                "s",
                {"{{stage}}": mean("ekiben_stage_seconds", "stage")},
                "A value a turn (tokenize), a batch (queue, infer), an answer (respond): they do not add up.",
            ),
            Panel(
                "Slowest 1 % of waits",
                "s",
                {"{{lane}}": quantile(0.99, "ekiben_queue_seconds", "lane", HERE)},
                "How long texts wait until they are computed. Interactive must stay short while bulk works.",
            ),
            Panel(
                "Oldest text that waits",
                "s",
                {"{{lane}} {{instance}}": f"max by (lane, instance) (ekiben_queue_oldest_seconds{{{HERE}}})"},
                "Grows steadily: the lane stands still. The alert begins at 5 s.",
                red_from=5,
            ),
            Panel(
                "Texts that wait",
                "none",
                {"{{lane}}": f"sum by (lane) (ekiben_queue_texts{{{HERE}}})"},
                "In all servers together, by lane.",
            ),
            Panel(
                "Tokens that wait",
                "none",
                {"{{lane}}": f"sum by (lane) (ekiben_queue_tokens{{{HERE}}})"},
                "Beyond EKIBEN_QUEUE_TOKENS_INTERACTIVE or _BULK of a server, requests are answered 429.",
            ),
            Panel(
                "Batches",
                "none",
                {"texts": mean("ekiben_batch_texts"), "tokens": mean("ekiben_batch_tokens")},
                "Mean size of what is computed together: near 1 text on an idle server, larger under load.",
            ),
            Panel(
                "Padding",
                "percentunit",
                {
                    "wasted": f"{rate('ekiben_padding_tokens_total')} / "
                    f"({rate('ekiben_padding_tokens_total')} + {rate('ekiben_batch_tokens_sum')})"
                },
                "Share of the computed tokens that only fill texts up to the length of their batch mates.",
            ),
            Panel(
                "Spared by the cache",
                "percentunit",
                {
                    "found in the cache": f"{rate('ekiben_cache_hits_total')} / "
                    f"({rate('ekiben_cache_hits_total')} + {rate('ekiben_cache_misses_total')})",
                    "computed already for another": f"{rate('ekiben_deduplicated_texts_total')} / "
                    + rate("ekiben_texts_total"),
                },
                "Empty while EKIBEN_CACHE_MB is 0 and no text comes twice at once.",
            ),
            Panel(
                "Texts that were cut",
                "percentunit",
                {"cut": f"{rate('ekiben_truncated_texts_total')} / {rate('ekiben_texts_total')}"},
                "Longer than the model takes: what is behind the cut counts for nothing.",
                red_from=0.01,
            ),
        ),
    ),
    Row(
        "What is refused",
        (
            Panel(
                "Requests refused or given up",
                "reqps",
                {"{{reason}}": rate("ekiben_shed_total", "reason")},
                "requests, queue, wait: 429 by that limit. deadline: 504. Empty while there was none.",
            ),
            Panel(
                "Connections",
                "none",
                {"{{instance}}": f"sum by (instance) (ekiben_connections{{{HERE}}})"},
                "Open now; the limit is EKIBEN_MAX_CONNECTIONS a worker.",
            ),
            Panel(
                "Connections closed for what the client did",
                "cps",
                {"{{reason}}": rate("ekiben_connections_refused_total", "reason")},
                "Slow, broken or malicious clients, by what they did.",
            ),
        ),
    ),
    Row(
        "Versions",
        (
            Panel(
                "Workers by live version",
                "none",
                {"{{model}}": f"sum by (model) (ekiben_model_live{{{HERE}}})"},
                "A release: one line falls, another one rises, at once.",
            ),
            Panel(
                "Loads",
                "none",
                {"{{result}}": f"sum by (result) (increase(ekiben_swaps_total{{{HERE}}}[$__range]))"},
                "Versions that were to be brought to all workers in the time shown, and how that ended.",
                "stat",
            ),
            Panel(
                "Refused versions",
                "none",
                {"{{model}} {{instance}}": f"ekiben_version_refused{{{HERE}}} > 0"},
                "Failed their checks on that server; GET /models/info there says why. Empty is good.",
                "stat",
                red_from=1,
            ),
            Panel(
                "Since the alias was read",
                "s",
                {"{{instance}}": f"time() - (ekiben_follow_seen_timestamp_seconds{{{HERE}}} > 0)"},
                "Seconds since each server last read the alias that it follows. The alert begins at 300 s.",
                red_from=300,
            ),
            Panel(
                "Failures to follow",
                "none",
                {"{{instance}}": f"ekiben_follow_failures{{{HERE}}}"},
                "In a row: the alias could not be read, or its version not be fetched. The alert begins above 5.",
                red_from=6,
            ),
            Panel(
                "Threads replaced",
                "none",
                {"{{lane}} {{instance}}": f"increase(ekiben_lane_restarts_total{{{HERE}}}[$__range])"},
                "Threads that died or hung in the time shown: 0, or there is something in the log.",
                "stat",
                red_from=1,
            ),
            Panel(
                "Loaded versions",
                "none",
                {"": f"ekiben_model_info{{{HERE}}} == 1"},
                "Every version in memory, with run, space and precision.",
                "table",
                24,
            ),
        ),
    ),
)

NIGHTLY = 'flow="pipeline", deployment!=""'
LINE = (
    Row(
        "Now",
        (
            Panel(
                "Sources",
                "none",
                {"{{source}}": "ekiben_line_up"},
                "Whether the exporter can ask Prefect and the registry; what it cannot ask is missing below.",
                "stat",
                4,
                red_below=1,
                names={"0": "down", "1": "up"},
            ),
            Panel(
                "Since the last good pipeline",
                "s",
                {
                    "{{deployment}}": f"time() - ekiben_line_last_success_timestamp_seconds{{{NIGHTLY}}}",
                },
                "The alert begins at 3 days.",
                "stat",
                5,
                red_from=3 * 86400,
            ),
            Panel(
                "Age of the champion",
                "s",
                {"": "time() - ekiben_line_champion_since_timestamp_seconds"},
                "Since it became the champion. Empty when its alias was moved by hand.",
                "stat",
                5,
            ),
            Panel(
                "Servers behind the champion",
                "none",
                {
                    "": 'count(ekiben_follow_info{alias="champion"} == 1 unless on (job, instance) '
                    "(ekiben_model_live > 0 and on (model) ekiben_line_champion_info == 1)) or vector(0)"
                },
                "Servers that follow `champion` and serve something else. After a release: for seconds only.",
                "stat",
                5,
                red_from=1,
            ),
            Panel(
                "Deployments whose last run failed",
                "none",
                {"": 'sum(ekiben_line_last_run_state{state=~"failed|crashed", deployment!=""}) or vector(0)'},
                "Failed or crashed; a release that its gates refused is not among them.",
                "stat",
                5,
                red_from=1,
            ),
        ),
    ),
    Row(
        "Runs",
        (
            Panel(
                "How the last runs ended",
                "none",
                {"{{flow}}/{{deployment}} {{state}}": "ekiben_line_last_run_state == 1"},
                "One entry a deployment; without a name behind the stroke: runs that somebody started by hand.",
                "table",
                12,
            ),
            Panel(
                "Ended within the last day",
                "none",
                {"{{flow}}/{{deployment}} {{state}}": "ekiben_line_ended_runs > 0"},
                "Runs that no other run has started, by state; refused: a gate said no.",
                width=12,
            ),
            Panel(
                "Duration of the last run",
                "s",
                {"{{flow}}/{{deployment}}": "ekiben_line_last_run_seconds"},
                "Grows with the data and with the trials of a study.",
            ),
            Panel(
                "Runs that have not ended",
                "none",
                {"{{state}}": "sum by (state) (ekiben_line_runs)"},
                "Scheduled ones are there for days ahead; none at all means that Prefect's scheduler is broken.",
            ),
            Panel(
                "Running for",
                "s",
                {"{{flow}}/{{deployment}}": "time() - ekiben_line_running_since_timestamp_seconds"},
                "The run that has been running longest. The alert begins at 6 hours.",
                red_from=6 * 3600,
            ),
            Panel(
                "Behind schedule",
                "s",
                {"{{flow}}/{{deployment}}": "ekiben_line_late_seconds"},
                "How far the run that is most behind is behind. The alert begins at 10 minutes.",
                red_from=600,
            ),
            Panel(
                "Last success",
                "s",
                {"{{flow}}/{{deployment}}": "time() - ekiben_line_last_success_timestamp_seconds"},
                "How long ago each deployment last did what it is for.",
            ),
            Panel(
                "Active schedules",
                "none",
                {"{{flow}}/{{deployment}}": "ekiben_line_deployment_schedules"},
                "0 also while the deployment is paused.",
            ),
        ),
    ),
    Row(
        "Champion",
        (
            Panel(
                "Champion",
                "none",
                {"": "ekiben_line_champion_info"},
                "The version that is in use, by the registry, with its run and space.",
                "table",
                12,
            ),
            Panel(
                "What the servers serve",
                "none",
                {"{{model}}": "sum by (model) (ekiben_model_live)"},
                "Workers by live version, in all servers.",
                width=12,
            ),
            Panel(
                "Releases, refusals, rollbacks",
                "none",
                {"{{kind}}": "sum by (kind) (ekiben_line_acts_total)"},
                "Entries of the history since its beginning.",
            ),
            Panel(
                "In the time shown",
                "none",
                {"{{kind}}": "sum by (kind) (increase(ekiben_line_acts_total[$__range]))"},
                "Many refusals and no release: the new data makes no better model, or a gate is too strict.",
                "stat",
            ),
            Panel(
                "Last of each kind",
                "s",
                {"{{kind}}": "time() - ekiben_line_last_act_timestamp_seconds"},
                "How long ago it was.",
                "stat",
            ),
        ),
    ),
    Row(
        "Workers",
        (
            Panel(
                "Workers",
                "none",
                {"{{pool}} {{status}}": "ekiben_line_workers"},
                "By pool; those that have ended stay offline for a while.",
            ),
            Panel(
                "Since a worker was heard",
                "s",
                {"{{pool}}": "time() - ekiben_line_worker_heartbeat_timestamp_seconds"},
                "The alert begins at 3 minutes.",
                red_from=180,
            ),
            Panel(
                "Pools",
                "none",
                {"{{pool}} {{status}}": "ekiben_line_pool_status == 1"},
                "Status of each work pool; not_ready: nobody polls it.",
                "stat",
            ),
            Panel(
                "Time that the exporter needs",
                "s",
                {"{{source}}": "ekiben_line_ask_seconds"},
                "For one look at Prefect, and at the registry.",
                width=12,
            ),
            Panel(
                "Since the source answered",
                "s",
                {"{{source}}": "time() - (ekiben_line_seen_timestamp_seconds > 0)"},
                "What was said more than 300 s ago is not shown any more.",
                width=12,
                red_from=300,
            ),
        ),
    ),
)


def make_dashboard(uid: str, title: str, about: str, rows: tuple[Row, ...], variables: list[Any]) -> dict[str, Any]:
    """A dashboard as Grafana reads it."""
    return {
        "uid": uid,
        "title": title,
        "description": about,
        "tags": ["ekiben"],
        "schemaVersion": SCHEMA,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": [_alerts()]},
        "links": [{"type": "dashboards", "tags": ["ekiben"], "title": "Ekiben", "asDropdown": True}],
        "templating": {"list": variables},
        "panels": list(_lay_out(rows)),
    }


def _lay_out(rows: tuple[Row, ...]) -> Iterator[dict[str, Any]]:
    """Panels from left to right and from top to bottom, numbered."""
    number, top = 0, 0
    for row in rows:
        number, left, height = number + 1, 0, 0
        place = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
        yield {"id": number, "type": "row", "title": row.title, "collapsed": False, "gridPos": place, "panels": []}
        top += 1
        for panel in row.panels:
            if left + panel.width > COLUMNS:
                top, left, height = top + height, 0, 0
            number, own = number + 1, 4 if panel.kind == "stat" and panel.width < 8 else 8
            yield _draw(panel, number, {"x": left, "y": top, "w": panel.width, "h": own})
            left, height = left + panel.width, max(height, own)
        top += height


def _draw(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.red_from is not None:
        steps.append({"color": "red", "value": panel.red_from})
    if panel.red_below is not None:
        steps = [{"color": "red", "value": None}, {"color": "green", "value": panel.red_below}]
    texts = {value: {"text": text} for value, text in panel.names.items()}
    at_once = panel.kind != "timeseries"
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "thresholds": {"mode": "absolute", "steps": steps},
                "mappings": [{"type": "value", "options": texts}] if texts else [],
                **({} if at_once else {"min": 0, "custom": _lines(panel)}),
            },
            "overrides": [],
        },
        "options": _options(panel.kind),
        "targets": [
            {
                "refId": chr(ord("A") + position),
                "datasource": SOURCE,
                "expr": expression,
                "legendFormat": legend or "__auto",
                "instant": at_once,
                "range": not at_once,
                "format": "table" if panel.kind == "table" else "time_series",
            }
            for position, (legend, expression) in enumerate(panel.queries.items())
        ],
        **({"transformations": [_hide_columns()]} if panel.kind == "table" else {}),
    }


def _lines(panel: Panel) -> dict[str, Any]:
    style = "off" if panel.red_from is None else "dashed"
    return {"lineWidth": 1, "fillOpacity": 8, "showPoints": "never", "thresholdsStyle": {"mode": style}}


def _options(kind: str) -> dict[str, Any]:
    if kind == "timeseries":
        return {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}
    if kind == "stat":
        return {
            "reduceOptions": {"calcs": ["lastNotNull"]},
            "colorMode": "value",
            "graphMode": "none",
            "textMode": "auto",
        }
    return {"showHeader": True}


def _hide_columns() -> dict[str, Any]:
    return {
        "id": "organize",
        "options": {"excludeByName": {"Time": True, "Value": True, "__name__": True, "job": True}},
    }


def _alerts() -> dict[str, Any]:
    return {
        "name": "Alerts",
        "datasource": SOURCE,
        "enable": True,
        "iconColor": "red",
        "expr": 'ALERTS{alertname=~"Ekiben.*", alertstate="firing"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{instance}} {{flow}} {{deployment}}",
    }


def _choose(name: str, metric: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": f"label_values({metric}, {name})", "refId": "variable"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


DASHBOARDS = {
    "serving": make_dashboard(
        "ekiben-serving",
        "Ekiben serving",
        "What callers feel, where the time goes, which version answers.",
        SERVING,
        [_choose("instance", "ekiben_ready")],
    ),
    "line": make_dashboard(
        "ekiben-line",
        "Ekiben line",
        "Whether the training line runs, what it released, and whether the servers follow.",
        LINE,
        [],
    ),
}


def render(dashboard: dict[str, Any]) -> str:
    """The text of a dashboard's file."""
    return json.dumps(dashboard, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, dashboard in DASHBOARDS.items():
        (FOLDER / f"{name}.json").write_text(render(dashboard), encoding="utf-8")
