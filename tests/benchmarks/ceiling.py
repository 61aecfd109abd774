"""The engine's ceiling: what the machine could do if HTTP, queues and scheduling cost nothing.

One single-threaded lane a core runs the lunchbox's own engine over texts that are tokenized beforehand and sorted by
length, at the batch size that turns out best. Runs in a process of its own, with no server alive.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from bentos.engine import Engine
from bentos.machine import count_cores
from bentos.manifest import read_manifest

TEXTS = {"W1": 512, "W2": 128, "W3": 256}  # enough for the mean to settle
BATCH_TEXTS = {"W1": (4, 8, 16), "W2": (1, 2, 4), "W3": (1, 4, 8)}
WARM_BATCHES = 4


def measure_ceiling(
    lunchbox: str, precision: str, texts: dict[str, list[str]], seconds: float
) -> list[dict[str, object]]:
    """Measure the engine for the texts of each workload, at least `seconds` and all texts a batch size.

    Returns:
        A row a workload and batch size: `workload`, `precision`, `batch_texts`, `texts_per_s`.
    """
    box = Path(lunchbox)
    engine = Engine(box, read_manifest(box), threads=1, precision=precision)
    rows: list[dict[str, object]] = []
    for workload, some in texts.items():
        ids = sorted((text.ids for text in engine.tokenize(some[: TEXTS[workload]])), key=len)
        for size in BATCH_TEXTS[workload]:
            batches = [ids[at : at + size] for at in range(0, len(ids), size)]
            random.Random(workload).shuffle(batches)  # so that a part of them is like all of them
            rate = _measure_lanes(engine, batches, seconds)
            rows.append({"workload": workload, "precision": precision, "batch_texts": size, "texts_per_s": rate})
    return rows


def _measure_lanes(engine: Engine, batches: Sequence[Sequence[Sequence[int]]], seconds: float) -> float:
    """Texts a second of all lanes together; each takes the next batch when its last is done."""
    for batch in batches[:WARM_BATCHES]:
        engine.infer(batch)
    source = count()
    rates: list[float] = []
    begin = time.perf_counter()

    def work() -> None:
        done = taken = 0
        while (spent_s := time.perf_counter() - begin) < seconds or taken < len(batches):
            taken = next(source)
            batch = batches[taken % len(batches)]
            engine.infer(batch)
            done += len(batch)
        rates.append(done / spent_s)

    lanes = [threading.Thread(target=work) for _ in range(count_cores())]
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
    return sum(rates)
