"""`python -m tests.benchmarks`: measure Ekiben and its peers side by side, and write docs/benchmarks.md."""

from __future__ import annotations

import argparse
import json
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.benchmarks.box import ROOT
from tests.benchmarks.peers import ALL_WORKLOADS, SERVERS
from tests.benchmarks.report import write_page
from tests.benchmarks.rounds import STATE, Benchmark
from tests.benchmarks.workloads import FULL, QUICK

DOCS = ROOT / "docs"
logger = logging.getLogger("benchmarks")


def main() -> None:
    """Read the command line, measure or read results, write the page."""
    options = _parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    results = json.loads(options.render.read_text(encoding="utf-8")) if options.render else _measure(options)
    logger.info("wrote %s", write_page(results, options.page))


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    benchmark = Benchmark(
        QUICK if options.quick else FULL,
        servers=options.servers,
        workloads=options.only or ALL_WORKLOADS,
        with_ceiling=not options.no_ceiling,
        save_to=options.json,
    )
    return benchmark.run(options.repetitions)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round: does everything run?")
    parser.add_argument("--repetitions", type=int, help="rounds (default 3; with --quick 1)")
    parser.add_argument("--only", type=_split, default=(), help="workloads, such as W1,W5 (default all)")
    parser.add_argument("--servers", type=_split, default=(), help="servers, such as ekiben-fp32,seed (default all)")
    parser.add_argument("--no-ceiling", action="store_true", help="leave the engine's ceiling out")
    parser.add_argument("--json", type=Path, help="where the results go (default .bench/results-TIME.json)")
    parser.add_argument("--render", type=Path, help="measure nothing; write the page from these results")
    parser.add_argument("--page", type=Path, help="folder of the page (default docs; of a part .bench/page)")
    options = parser.parse_args()
    for name, allowed in (("only", ALL_WORKLOADS), ("servers", SERVERS)):
        if unknown := set(getattr(options, name)) - set(allowed):
            parser.error(f"--{name} has {', '.join(sorted(unknown))}; allowed are {', '.join(allowed)}")
    partial = options.quick or options.only or options.servers or options.no_ceiling
    options.repetitions = options.repetitions or (1 if options.quick else 3)
    options.page = (options.page or (STATE / "page" if partial else DOCS)).absolute()
    options.json = (options.json or STATE / f"results-{datetime.now():%Y%m%d-%H%M%S}.json").absolute()
    return options


def _split(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


if __name__ == "__main__":
    main()
