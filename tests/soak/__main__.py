"""`python -m tests.soak --minutes 10`: a server under all that clients and fate can do, each answer checked."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path

from tests.soak.report import render
from tests.soak.soak import soak


def main() -> int:
    """Read the command line, soak, and report; 1 when anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="how long (default 10), starts and ends not counted"
    )
    parser.add_argument("--model", type=Path, help="a lunchbox to serve (default: a tiny one, made for it)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other requests and faults (default 0)")
    parser.add_argument("--report", type=Path, default=Path(".soak/report.json"), help="default .soak/report.json")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    folder = Path(tempfile.mkdtemp(prefix="ekiben-soak-"))
    report = soak(folder, seconds=options.minutes * 60, model=options.model, seed=options.seed)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(render(report) + f"\n\nwritten to {options.report}; the servers' logs are in {folder}\n")
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
