"""Grafana's files: well made, written by their script, asking for what a real Prometheus can answer."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deployments.grafana import make_dashboards
from tests.deployments.monitored import (
    DEPLOYMENTS,
    OWN,
    Monitored,
    exposed_metrics,
    find_tool,
    monitored_line,
    promtool,
    read_rules,
)
from tests.deployments.promql import find_faults, read_query
from tests.flows.line_servers import act
from tests.processes import find_free_port

FOLDER = DEPLOYMENTS / "grafana"
DASHBOARDS = {
    path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (FOLDER / "dashboards").glob("*.json")
}
ALL_PANELS: list[dict[str, Any]] = [
    panel for dashboard in DASHBOARDS.values() for panel in dashboard["panels"] if panel["type"] != "row"
]
PANELS = [
    pytest.param(panel, id=f"{name}: {panel['title']}")
    for name, dashboard in sorted(DASHBOARDS.items())
    for panel in dashboard["panels"]
    if panel["type"] != "row"
]
UNITS = {"none", "s", "reqps", "cps", "percentunit"}
KINDS = {"timeseries", "stat", "table"}
COLUMNS = 24
SETTLE_S = 90.0


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory, tiny_lunchbox_path: Path) -> dict[str, set[str]]:
    folder = tmp_path_factory.getbasetemp() / "monitored"
    folder.mkdir(exist_ok=True)
    return exposed_metrics(folder, tiny_lunchbox_path)


def fill(expression: str) -> str:
    """An expression as Grafana sends it."""
    return expression.replace("$__rate_interval", "1m").replace("$__range", "5m").replace("$instance", ".*")


def expressions(panel: dict[str, Any]) -> list[str]:
    return [fill(target["expr"]) for target in panel["targets"]]


# --- the files


def test_the_files_are_what_the_script_writes() -> None:
    written = {path.stem: path.read_text(encoding="utf-8") for path in (FOLDER / "dashboards").iterdir()}
    assert written == {
        name: make_dashboards.render(dashboard) for name, dashboard in make_dashboards.DASHBOARDS.items()
    }


@pytest.mark.parametrize("name", sorted(DASHBOARDS))
def test_a_dashboard_can_be_told_from_others_and_its_panels_from_each_other(name: str) -> None:
    dashboard = DASHBOARDS[name]
    assert re.fullmatch(r"[a-z-]{1,40}", dashboard["uid"])
    assert [other["uid"] for other in DASHBOARDS.values()].count(dashboard["uid"]) == 1
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    assert dashboard["schemaVersion"] >= 36
    assert "id" not in dashboard  # Grafana gives it


@pytest.mark.parametrize("name", sorted(DASHBOARDS))
def test_no_panel_covers_another_or_leaves_the_page(name: str) -> None:
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARDS[name]["panels"]:
        place = panel["gridPos"]
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert max(x for x, _ in own) < COLUMNS, panel["title"]
        assert not own & cells, panel["title"]
        cells |= own


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_says_what_it_shows_in_which_unit_and_from_where(panel: dict[str, Any]) -> None:
    source = yaml.safe_load((FOLDER / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"][0]
    wanted = {"type": source["type"], "uid": source["uid"]}
    assert panel["type"] in KINDS
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert panel["datasource"] == wanted
    assert [target["datasource"] for target in panel["targets"]] == [wanted] * len(panel["targets"])
    names = [target["refId"] for target in panel["targets"]]
    assert len(names) == len(set(names)) > 0


def test_the_dashboards_are_where_they_are_looked_for() -> None:
    provider = yaml.safe_load((FOLDER / "provisioning" / "dashboards" / "ekiben.yml").read_text())["providers"][0]
    assert provider["options"]["path"].endswith("/dashboards")
    assert set(DASHBOARDS) == {"serving", "line"}


# --- what they ask for


def test_all_expressions_can_be_read_by_prometheus(tmp_path: Path) -> None:
    asked = [expression for panel in ALL_PANELS for expression in expressions(panel)]
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(asked)]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(asked)} rules found" in promtool("check", "rules", "panels.yml", cwd=tmp_path)


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_asks_for_metrics_and_labels_that_are_exposed(
    panel: dict[str, Any], exposed: dict[str, set[str]]
) -> None:
    for target in panel["targets"]:
        there = exposed | OWN
        assert find_faults(fill(target["expr"]), there) == []
        shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        query = read_query(fill(target["expr"]))
        assert shown <= (set(query.grouped) or set().union(*(there[name] for name in query.selected)))


@pytest.mark.parametrize("name", sorted(DASHBOARDS))
def test_variables_and_marks_ask_for_what_is_there(name: str, exposed: dict[str, set[str]]) -> None:
    for variable in DASHBOARDS[name]["templating"]["list"]:
        found = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
        assert found is not None
        assert found[2] in exposed[found[1]]
        assert variable["name"] == found[2]
    for mark in DASHBOARDS[name]["annotations"]["list"]:
        assert find_faults(mark["expr"], exposed | OWN) == []
    assert set(
        re.findall(r"\$(\w+)", json.dumps([p["targets"] for p in DASHBOARDS[name]["panels"] if "targets" in p]))
    ) <= {
        *(variable["name"] for variable in DASHBOARDS[name]["templating"]["list"]),
        "__rate_interval",
        "__range",
    }


def test_red_begins_where_the_alert_does() -> None:
    """A panel that says where the alert begins has its red line there, and so has some rule."""
    limits = {limit for rule in read_rules() if "alert" in rule for limit in find_limits(rule["expr"])}
    told = [panel for panel in ALL_PANELS if "alert begins at" in panel["description"]]
    assert len(told) == 8
    for panel in told:
        assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"][-1]["value"] in limits, panel["title"]


def find_limits(expression: str) -> set[float]:
    """The numbers with which an expression compares, `3 * 86400` multiplied out."""
    found = re.findall(r"[<>] (\d[\d.]*)(?: \* (\d+))?", expression)
    return {float(first) * float(second or 1) for first, second in found}


# --- a real Prometheus


class Prometheus:
    """A running Prometheus, by its API."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=30)

    def query(self, expression: str) -> list[dict[str, Any]]:
        answer = self.client.post("/api/v1/query", data={"query": expression}).json()
        assert answer["status"] == "success", (expression, answer)
        return answer["data"]["result"]  # type: ignore[no-any-return]

    def rules(self) -> list[dict[str, Any]]:
        groups = self.client.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def targets(self) -> dict[str, str]:
        found = self.client.get("/api/v1/targets").json()["data"]["activeTargets"]
        return {target["labels"]["job"]: target["health"] for target in found}

    def firing(self) -> dict[str, list[dict[str, str]]]:
        alerts = self.client.get("/api/v1/alerts").json()["data"]["alerts"]
        found: dict[str, list[dict[str, str]]] = {}
        for alert in alerts:
            if alert["state"] == "firing":
                found.setdefault(alert["labels"]["alertname"], []).append(alert["labels"] | alert["annotations"])
        return found


@contextlib.contextmanager
def run_prometheus(folder: Path, targets: dict[str, str]) -> Iterator[Prometheus]:
    """Run Prometheus with the project's configuration, but for the addresses and how often it asks."""
    folder.mkdir()
    address = f"127.0.0.1:{find_free_port()}"
    config = yaml.safe_load((DEPLOYMENTS / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for job in config["scrape_configs"]:
        job.pop("dns_sd_configs", None)
        job["static_configs"] = [{"targets": [(targets | {"prometheus": address})[job["job_name"]]]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "rules.yml").write_text((DEPLOYMENTS / "prometheus" / "rules.yml").read_text())
    command = [find_tool("prometheus"), "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], cwd=folder, stdout=log, stderr=log)
    prometheus = Prometheus(f"http://{address}")
    try:
        wait_for(lambda: _is_ready(prometheus), lambda: (folder / "log").read_text())
        yield prometheus
    finally:
        process.terminate()
        process.wait(60)


def _is_ready(prometheus: Prometheus) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return prometheus.client.get("/-/ready").status_code == 200
    return False


def wait_for(condition: Any, what: Any) -> None:
    deadline = time.monotonic() + SETTLE_S
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.5)


@contextlib.contextmanager
def traffic(monitored: Monitored) -> Iterator[None]:
    """Requests, good and bad, until the block ends."""
    ended = threading.Event()

    def ask() -> None:
        number = 0
        while not ended.wait(0.05):
            number += 1
            monitored.ask("/encode", {"texts": [f"text {number}", "fresh bread"]})
            monitored.ask("/similarity", {"a": [f"{number}"], "b": ["b"]})
            monitored.ask("/encode", {"texts": ["a"]}, **{"X-Ekiben-Expect-Space": "0" * 16})
            monitored.ask("/encode", {"texts": [f"{number} word " * 99] * 99}, **{"X-Ekiben-Timeout-Ms": "1"})
            with contextlib.suppress(OSError), contextlib.closing(_connect(monitored)) as raw:
                raw.sendall(b"this is no HTTP\r\n\r\n")
                raw.recv(4096)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _connect(monitored: Monitored) -> socket.socket:
    host, _, port = monitored.served.server.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=30)


@pytest.mark.slow
def test_a_real_prometheus_has_an_answer_for_every_panel_and_no_trouble_with_any_rule(
    tmp_path: Path, tiny_lunchbox_path: Path
) -> None:
    with monitored_line(tmp_path / "line", tiny_lunchbox_path) as monitored, traffic(monitored):
        server, exporter = monitored.served.server.url, monitored.exporter.url
        targets = {"encoder": server.removeprefix("http://"), "line": exporter.removeprefix("http://")}
        with run_prometheus(tmp_path / "prometheus", targets) as prometheus:
            up = {"encoder": "up", "line": "up", "prometheus": "up"}
            wait_for(lambda: prometheus.targets() == up, prometheus.targets)
            empty: dict[str, list[str]] = {}

            def find_empty() -> bool:
                empty.clear()
                for panel in ALL_PANELS:
                    for expression in expressions(panel):
                        answers = [each["value"][1] for each in prometheus.query(expression)]
                        if not [answer for answer in answers if answer != "NaN"]:
                            empty.setdefault(panel["title"], []).append(expression)
                return not empty

            wait_for(find_empty, lambda: empty)
            assert {rule["health"] for rule in prometheus.rules()} == {"ok"}

            # What is ill in this line is told, what is well is not.
            ill = {"EkibenVersionRefused", "EkibenRunFailed", "EkibenSpaceMismatch"}
            wait_for(lambda: ill <= set(prometheus.firing()), prometheus.firing)
            firing = prometheus.firing()
            assert [alert["model"] for alert in firing["EkibenVersionRefused"]] == ["ekiben:7-77777777"]
            assert [alert["flow"] for alert in firing["EkibenRunFailed"]] == ["train"]
            assert not {"EkibenNotReady", "EkibenLaneRestarted", "EkibenEncoderDown"} & set(firing)
            assert "<error" not in json.dumps(firing)  # that is how a text looks that could not be filled in

            # The join of the registry's champion and of what the servers serve.
            behind = next(rule["expr"] for rule in read_rules() if rule.get("alert") == "EkibenChampionNotFollowed")
            assert prometheus.query(behind) == []
            monitored.line.release("9", "9" * 32, "space", dict([act("release", "9", ago_s=1)]))
            wait_for(lambda: prometheus.query(behind), lambda: prometheus.query("ekiben_line_champion_info"))
            assert [each["metric"]["instance"] for each in prometheus.query(behind)] == [targets["encoder"]]
