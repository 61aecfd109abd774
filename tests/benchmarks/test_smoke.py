"""The whole benchmark, on the real model and a real server, as short as it gets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_quick_run_measures_the_server_and_writes_a_page(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks", "--quick", "--servers", "ekiben-fp32", "--only", "W1,W4"]
    command += ["--json", str(tmp_path / "results.json"), "--page", str(tmp_path / "page")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    figures = {row["workload"]: row for row in results["runs"]}
    assert figures.keys() == {"start", "W1", "W4", "memory"}
    for workload in ("W1", "W4"):
        assert figures[workload]["ok"] == figures[workload]["requests"] > 0
        assert figures[workload]["min_cosine"] > 0.999
    assert "### W1" in (tmp_path / "page" / "benchmarks.md").read_text(encoding="utf-8")
