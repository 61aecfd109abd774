"""`python -m tests.benchmarks.swaps`: what callers feel when the live version changes under load.

W1's callers (32 connections, short texts, one a request, no cache) ask for over a minute while a server changes from
version 1 to 2 and back, three times by the alias that it follows and three times by POST, with one worker and with two.
The versions are the base model with all its layers and with all but the last one, so that each text has two vectors and
every answer shows which version made it. A swap lasts from the moment it is asked for until the new version is the only
one in memory: fetching, hashing, loading, warming, the flip, and the old one's leaving are in it.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from bentos.engine import Engine
from bentos.manifest import TOKENIZER_FILE, read_manifest
from bentos.vectors import Vectors
from tests.benchmarks.box import BASE_MODEL, ROOT
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.texts import Writer
from tests.bentos.served import Served, open_server
from tests.bentos.traffic import Shot, Traffic, find_wrong, percentile_ms

PICTURE = ROOT / "docs" / "releases-swap.png"
ORDER = (("alias", 2), ("alias", 1), ("alias", 2), ("POST", 1), ("POST", 2), ("POST", 1))
QUIET_S = 20.0  # before the first swap
PAUSE_S = 5.0  # after each
WARM_S = 3.0  # not counted, at the beginning
TEXTS = 1000
WINDOW_S = 0.5  # of the picture
logger = logging.getLogger("benchmarks")
mpl.use("Agg")


@dataclass(frozen=True)
class Swap:
    """One change of the live version."""

    how: str  # `alias` or `POST`
    to: int  # version
    began_s: float  # after the first request
    seconds: float  # until nothing of the old version is left
    p99_ms: float  # of the requests under way at some time in it


@dataclass(frozen=True)
class Result:
    """What one server's callers felt."""

    workers: int
    seconds: float
    requests: int
    failed: int  # no answer, or a status other than 200
    wrong: int  # answers whose vector is not that of the version in their header
    by_version: dict[str, int]
    p50_ms: float  # before the swaps
    p99_ms: float  # before the swaps
    longest_ms: float  # of all
    swaps: list[Swap]
    memory_before_mb: float  # of all workers, resident
    memory_after_mb: float  # the same version is live again
    windows: list[tuple[float, float, float]]  # for the picture: s, p50 in ms, p99 in ms

    @property
    def ratios(self) -> list[float]:
        """p99 in each swap, in shares of the p99 before."""
        return [swap.p99_ms / self.p99_ms for swap in self.swaps]


def make_home(folder: Path) -> tuple[Path, dict[int, str]]:
    """Make a BentoML home whose store has both versions, and return it and their tags.

    The Bento's code is served from this checkout: only models are swapped.
    """
    from flows.core.models import load_base_model
    from tests.factories import MODEL_YAML, make_tiny_lunchbox

    home = folder / "home"
    tags = {}
    for version, layers in ((1, None), (2, 5)):
        path = folder / f"model-{version}"
        load_base_model(BASE_MODEL, layers=layers).save(str(path))
        box = make_tiny_lunchbox(
            folder / f"box-{version}", model_path=path, version=str(version), run_id=str(version) * 32
        )
        manifest = read_manifest(box)
        place = home / "models" / f"{manifest.name}-model" / manifest.bento_version
        shutil.copytree(box, place)
        (place / "model.yaml").write_text(MODEL_YAML.format(version=place.name), encoding="utf-8")
        tags[version] = manifest.tag
    return home, tags


def measure(home: Path, tags: dict[int, str], folder: Path, *, workers: int, quiet_s: float, pause_s: float) -> Result:
    """Serve version 1, ask without end, and change versions meanwhile."""
    boxes = {tag: home / "models" / "ekiben-model" / tag.partition(":")[2] for tag in tags.values()}
    texts = Writer(boxes[tags[1]] / TOKENIZER_FILE).write_short("swaps", TEXTS)
    vectors = {tag: Engine(box, read_manifest(box)).embed(texts) for tag, box in boxes.items()}
    model = f"ekiben-model:{tags[1].partition(':')[2]}"
    environment = {"EKIBEN_MODEL_TAG": model, "PYTHONPATH": str(ROOT), "EKIBEN_CACHE_MB": "0"}
    service = "bentos.service:EmbeddingService"
    with open_server(home, folder / f"served-{workers}", service, workers=workers, **environment) as served:
        served.point(tags[1])
        with Traffic(served.server.url, texts) as traffic:
            first = time.monotonic()
            time.sleep(quiet_s)
            before = served.memory_mb()
            quiet = (first + min(WARM_S, quiet_s / 2), time.monotonic())
            spans = []
            for how, version in ORDER:
                began = time.monotonic()
                change(served, how, tags[version])
                spans.append((how, version, began, time.monotonic()))
                logger.info(
                    "%d worker(s): %s to version %d took %.1f s", workers, how, version, time.monotonic() - began
                )
                time.sleep(pause_s)
            after = served.memory_mb()
            last = time.monotonic()
    return summarise(traffic.shots, vectors, first, last, quiet, spans, workers=workers, memory=(before, after))


def change(served: Served, how: str, tag: str) -> None:
    """Ask for a version, and wait until it is the only one in all workers."""
    if how == "alias":
        served.point(tag)
    else:
        answer = served.load(tag)
        assert answer.status_code == 200, answer.text
    served.wait_live(tag)


def summarise(
    shots: Sequence[Shot],
    vectors: dict[str, Vectors],
    first: float,
    last: float,
    quiet: tuple[float, float],
    spans: Sequence[tuple[str, int, float, float]],
    *,
    workers: int,
    memory: tuple[float, float],
) -> Result:
    """Look at every answer; times are those of `time.monotonic()`, memory is in MiB."""
    answered = [shot for shot in shots if shot.status == 200]
    times_ms = [1000 * (shot.done - shot.sent) for shot in shots]
    return Result(
        workers=workers,
        seconds=round(last - first, 1),
        requests=len(shots),
        failed=len(shots) - len(answered),
        wrong=len(find_wrong(answered, vectors)),
        by_version={tag: sum(shot.model == tag for shot in answered) for tag in vectors},
        p50_ms=percentile_ms(shots, *quiet, percent=50),
        p99_ms=percentile_ms(shots, *quiet),
        longest_ms=max(times_ms),
        swaps=[
            Swap(how, version, begin - first, end - begin, percentile_ms(shots, begin, end))
            for how, version, begin, end in spans
        ],
        memory_before_mb=memory[0],
        memory_after_mb=memory[1],
        windows=[
            (at, *(percentile_ms(shots, first + at, first + at + WINDOW_S, percent) for percent in (50, 99)))
            for at in np.arange(WARM_S, last - first - WINDOW_S, WINDOW_S).tolist()
        ],
    )


def write_table(results: Sequence[Result]) -> str:
    """The table of docs/releases.md."""
    rows = [
        ("", *(f"{result.workers} worker{'s' if result.workers > 1 else ''}" for result in results)),
        ("---", *("---:" for _ in results)),
        ("requests, in seconds", *(f"{result.requests:,} in {result.seconds:.0f} s" for result in results)),
        ("failed", *(f"{result.failed}" for result in results)),
        ("with a vector of another version than the header says", *(f"{result.wrong}" for result in results)),
        ("swaps, and how long one took", *(_describe_swaps(result) for result in results)),
        ("p50 before", *(f"{result.p50_ms:.1f} ms" for result in results)),
        ("p99 before", *(f"{result.p99_ms:.1f} ms" for result in results)),
        ("p99 in a swap, in shares of that: median", *(f"{median(result.ratios):.2f}" for result in results)),
        ("... of the worst swap", *(f"{max(result.ratios):.2f}" for result in results)),
        ("the slowest answer of all", *(f"{result.longest_ms:.0f} ms" for result in results)),
        ("memory of all workers, before and after", *(_describe_memory(result) for result in results)),
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _describe_swaps(result: Result) -> str:
    seconds = [swap.seconds for swap in result.swaps]
    return f"{len(seconds)}, {min(seconds):.1f} to {max(seconds):.1f} s"


def _describe_memory(result: Result) -> str:
    return f"{result.memory_before_mb:.0f} MiB, {result.memory_after_mb:.0f} MiB"


def draw(results: Sequence[Result], path: Path) -> None:
    """Latency over time; each swap is a stripe."""
    figure, axes = plt.subplots(len(results), 1, figsize=(9, 2.4 * len(results) + 0.5), squeeze=False)
    for axis, result in zip(axes[:, 0], results, strict=True):
        for swap in result.swaps:
            axis.axvspan(swap.began_s, swap.began_s + swap.seconds, color="#efc9b6", linewidth=0)
            axis.annotate(
                f"{swap.how}: {swap.to}",
                (swap.began_s + swap.seconds / 2, 0.98),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="top",
                fontsize=7,
            )
        at, p50, p99 = zip(*result.windows, strict=True)
        axis.plot(at, p99, color="#c1440e", linewidth=1, label="p99")
        axis.plot(at, p50, color="#3b6ea5", linewidth=1, label="p50")
        axis.axhline(2 * result.p99_ms, color="#777777", linewidth=0.8, linestyle=":", label="2 x p99 before")
        axis.set_ylim(0, 1.2 * max(2 * result.p99_ms, *p99))
        axis.set_title(f"{result.workers} worker{'s' if result.workers > 1 else ''}", fontsize=9, loc="left")
        axis.set_ylabel("ms", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(fontsize=7, loc="upper left", frameon=False)
    axes[-1, 0].set_xlabel("seconds; the stripes are swaps, with the version that they lead to", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measure, print the table, draw the picture."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.swaps", description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quiet-s", type=float, default=QUIET_S, help="seconds before the first swap (default 20)")
    parser.add_argument("--pause-s", type=float, default=PAUSE_S, help="seconds after each swap (default 5)")
    parser.add_argument("--json", type=Path, help="where all figures go")
    parser.add_argument(
        "--render", type=Path, help="measure nothing; write the table and the picture from these figures"
    )
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    facts = json.loads(options.render.read_text(encoding="utf-8")) if options.render else measure_all(options)
    results = [read_result(figures) for figures in facts["results"]]
    draw(results, options.picture)
    machine = facts["machine"]
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_gib']} GiB\n\n{write_table(results)}")  # noqa: T201


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every number of workers; the figures, with the machine that they were measured on."""
    with tempfile.TemporaryDirectory(prefix="ekiben-swaps-") as name:
        home, tags = make_home(Path(name))
        times = {"quiet_s": options.quiet_s, "pause_s": options.pause_s}
        results = [measure(home, tags, Path(name), workers=count, **times) for count in options.workers]
    facts = {"machine": describe_machine(), "results": [asdict(result) for result in results]}
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return facts


def read_result(figures: dict[str, Any]) -> Result:
    """What was written as JSON."""
    return Result(**{**figures, "swaps": [Swap(**swap) for swap in figures["swaps"]]})


if __name__ == "__main__":
    main()
