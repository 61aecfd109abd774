"""`python -m tests.benchmarks.retraining`: what a retraining does to the vector space, and what smaller models cost.

A champion is trained, then variants of it. Each is exported, certified and compared with the champion by the functions
that a release uses, with its default thresholds; the tables are those of docs/releases.md. Everything but the times is
the same again on the same machine. State goes to a scratch folder that is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bentos.manifest import read_manifest
from flows.core.compat import compare_spaces
from flows.core.cost import CostMeter, encode_served, export_for_serving
from flows.core.dataset import Dataset, prepare_dataset, read_data
from flows.core.evaluation import Encode, Scores, bootstrap_gain, primary_metric, score_part
from flows.core.models import load_base_model
from flows.core.probes import PROBE_FILE, choose_probe_texts
from flows.core.rivals import Champion, open_box
from flows.core.samples import spread_texts
from flows.core.training import make_encode
from flows.errors import EkibenError
from flows.params import DEFAULT_BASE_MODEL, CostName, DataParams, EvaluateParams, ReleaseParams, TrainParams
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.retraining_tables import render_tables
from tests.benchmarks.variants import (
    CHAMPION,
    Kitchen,
    NotCertifiedError,
    Variant,
    list_smaller,
    list_variants,
    measure_base,
)

ANCHORS = (0.3, 1.0, 3.0)
COST_TEXTS = 48  # of dev, as in a study
COSTS: tuple[CostName, ...] = ("p95_ms", "bytes_per_vector", "memory_mb")
PACKAGES = ("torch", "sentence-transformers", "onnxruntime", "numpy")
MOST_MINUTES = 600.0  # of one fit: a fit that was cut short would be another recipe
logger = logging.getLogger("benchmarks")


class Retraining:
    """One run: the data, the base model's scores, then model after model."""

    def __init__(self, data: DataParams, train: TrainParams, anchors: Sequence[float], folder: Path) -> None:
        """Read the data and score the base model on test.

        Raises:
            EkibenError: data or base model cannot be used.
        """
        self.dataset: Dataset = prepare_dataset(read_data(data, root=Path.cwd()), data)
        self.metric = primary_metric(self.dataset.test)
        dim, layers = measure_base(train)
        self.champion = Variant(CHAMPION, "the champion", train)
        self.variants = list_variants(train, dim, anchors)
        self.smaller = list_smaller(train, dim, layers)
        self._train = train
        self._kitchen = Kitchen(self.dataset, train, folder)
        self._scratch = folder / "exports"
        self._scratch.mkdir(parents=True)
        self._cost_texts = spread_texts(self.dataset.dev, COST_TEXTS)
        self._meter = CostMeter(self._cost_texts, COSTS, self._scratch)
        self._probe = folder / PROBE_FILE
        self._probe.write_text(json.dumps(choose_probe_texts(self.dataset)), encoding="utf-8")
        base = load_base_model(train.base_model, max_tokens=train.max_tokens)
        self._base = self._score(make_encode(base, EvaluateParams().batch_size))

    def run(self, keys: Sequence[str] = (), *, save_to: Path | None = None) -> dict[str, Any]:
        """Make the champion and every model, or only those with the keys named, and return the results.

        They are saved after each model: what was measured before an interruption is kept.
        """
        begun = time.monotonic()
        results = self._describe()
        tasks = [("spaces", self.champion, self._compare)]
        tasks += [("spaces", each, self._compare) for each in self.variants if not keys or each.key in keys]
        tasks += [("smaller", each, self._cost) for each in self.smaller if not keys or each.key in keys]
        for table, variant, measure in tasks:
            started = time.monotonic()
            try:
                row = measure(variant)
            except NotCertifiedError:
                logger.warning("%s: not certified, left out", variant.title)
                continue
            about = {"key": variant.key, "title": variant.title, "train": variant.train.model_dump(mode="json")}
            results[table].append(about | row)
            results["minutes"] = (time.monotonic() - begun) / 60
            if save_to is not None:
                save_to.write_text(json.dumps(results, indent=1), encoding="utf-8")
            logger.info("%s: %.0f s", variant.title, time.monotonic() - started)
        return results

    def _describe(self) -> dict[str, Any]:
        return {
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "versions": {name: version(name) for name in PACKAGES},
            "data": {
                "md5": self.dataset.version.md5,
                "notes": list(self.dataset.notes),
                **{name: _count(getattr(self.dataset, name)) for name in ("train", "dev", "test")},
            },
            "train": self._train.model_dump(mode="json"),
            "metric": self.metric,
            "base": self._base.metrics[self.metric],
            "spaces": [],
            "smaller": [],
        }

    def _compare(self, variant: Variant) -> dict[str, Any]:
        """A row of the first table: quality, and the relation to the champion's space."""
        box = self._kitchen.bake(variant)
        manifest, encode = open_box(box)
        row: dict[str, Any] = {"precision": manifest.default_precision, **self._judge(encode)}
        if variant.key != CHAMPION:
            old = self._kitchen.champion_box
            champion = Champion(read_manifest(old).tag, read_manifest(old).version, old)
            relation, _ = compare_spaces(box, champion, self._probe, ReleaseParams())
            row["compat"] = relation.model_dump(mode="json")
            self._kitchen.forget(variant)
        return row

    def _cost(self, variant: Variant) -> dict[str, Any]:
        """A row of the second table: quality and serving cost, in fp32 and in int8 where int8 can be made."""
        with tempfile.TemporaryDirectory(dir=self._scratch) as name:
            exported = export_for_serving(self._kitchen.make(variant), Path(name) / "box", texts=self._cost_texts)
            row: dict[str, Any] = {}
            for precision in exported.manifest.precisions:
                row[precision] = self._judge(partial(encode_served, exported.open(precision)))
        for precision, figures in row.items():
            figures |= self._meter.measure(variant.train.model_copy(update={"precision": precision}))
        return row

    def _score(self, encode: Encode) -> Scores:
        return score_part(self.dataset.test, encode, EvaluateParams())

    def _judge(self, encode: Encode) -> dict[str, Any]:
        """The test metric, and what it is above the base model's with the interval of the paired bootstrap."""
        scores = self._score(encode)
        gain = bootstrap_gain(self.dataset.test, self._base, scores, EvaluateParams())
        return {"metric": scores.metrics[self.metric], "gain": [gain.value, gain.low, gain.high]}


def _count(part: Any) -> dict[str, int]:
    counts = {"pairs": len(part.pairs)} if part.has_pairs else {}
    if part.retrieval is not None:
        counts |= {"queries": len(part.retrieval.queries), "documents": len(part.retrieval.corpus)}
    return counts


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure or read results, write the tables to stdout."""
    options = _parse_arguments(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    results = json.loads(options.render.read_text(encoding="utf-8")) if options.render else _measure(options)
    sys.stdout.write(render_tables(results))


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    data = DataParams(
        pairs=_name(options.train), dev=_name(options.dev), test=_name(options.test), retrieval=_name(options.retrieval)
    )
    train = TrainParams(base_model=options.base_model, steps=options.steps, max_minutes=MOST_MINUTES)
    with tempfile.TemporaryDirectory(prefix="ekiben-retraining-") as folder:
        try:
            benchmark = Retraining(data, train, options.anchors, Path(folder))
        except EkibenError as error:
            sys.exit(f"error: {error}")
        known = [variant.key for variant in (*benchmark.variants, *benchmark.smaller)]
        if unknown := set(options.only) - set(known):
            sys.exit(f"error: --only has {', '.join(sorted(unknown))}; allowed are {', '.join(known)}")
        return benchmark.run(options.only, save_to=options.json)


def _name(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.retraining", description="The tables of docs/releases.md, on your data."
    )
    parser.add_argument("--train", type=Path, help="scored pairs: text_a, text_b, score")
    parser.add_argument("--dev", type=Path, help="the same, held out (default: split off --train)")
    parser.add_argument("--test", type=Path, help="the same, held out (default: split off --train)")
    parser.add_argument("--retrieval", type=Path, help="folder in BEIR's layout, instead of or beside --train")
    parser.add_argument("--base-model", default=DEFAULT_BASE_MODEL, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=60, help="of the champion (default %(default)s)")
    parser.add_argument("--anchors", type=_split_numbers, default=ANCHORS, help="weights (default 0.3,1,3)")
    parser.add_argument("--only", type=_split, default=(), help="models, such as seed,longer (default all)")
    parser.add_argument("--json", type=Path, help="where the results go, after each model")
    parser.add_argument("--render", type=Path, help="measure nothing; write the tables of these results")
    options = parser.parse_args(arguments)
    if not (options.train or options.retrieval or options.render):
        parser.error("give --train FILE, --retrieval FOLDER, or --render JSON")
    return options


def _split(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _split_numbers(value: str) -> tuple[float, ...]:
    return tuple(map(float, _split(value)))


if __name__ == "__main__":
    main()
