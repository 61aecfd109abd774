"""Write dashboards/serving.json and dashboards/line.json: `python -m deployments.grafana.make_dashboards`.

What a panel shows stands in serving.py and line.py, a line a query; a test says that the files are what this writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deployments.grafana import line, serving
from deployments.grafana.panels import Panel, Row

FOLDER = Path(__file__).parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "prometheus"}
SCHEMA = 39  # of Grafana 11; newer ones migrate it
COLUMNS = 24


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
        serving.ROWS,
        [_choose("instance", "ekiben_ready")],
    ),
    "line": make_dashboard(
        "ekiben-line",
        "Ekiben line",
        "Whether the training line runs, what it released, and whether the servers follow.",
        line.ROWS,
        [],
    ),
}


def render(dashboard: dict[str, Any]) -> str:
    """The text of a dashboard's file."""
    return json.dumps(dashboard, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, dashboard in DASHBOARDS.items():
        (FOLDER / f"{name}.json").write_text(render(dashboard), encoding="utf-8")
