"""May int8 take the place of fp32? As good on the test rows, as close, as independent of mates, and really faster.

Core layer. int8 shares the space id of fp32, so vectors of both may stand in one index, and precision may change from
release to release. Three things make that honest: the loss is also measured with one side of each comparison in fp32
and the other in int8; the mean cosine between both forms of a text is 0.99 or more, so that a cosine between two texts
moves by less than 0.01 (an error of angle a, in no particular direction among d dimensions, moves it by about
sin(a) / sqrt(d)); and no single text is far off. What is not certified is not shipped, and the release goes on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bentos.engine import Engine
from bentos.errors import LunchboxError, NotReadyError
from bentos.manifest import Manifest
from bentos.text import apply_prompt, clean_text
from bentos.vectors import Vectors, cosine_pairs
from flows.core.certification import compare_batches, gather_texts
from flows.core.dataset import Part
from flows.core.evaluation import Encode, bootstrap_gain, primary_metric, score_part
from flows.core.export import MODEL_FILE
from flows.core.heldout import FrozenTest
from flows.core.quantization import Quantized, quantize
from flows.errors import one_line
from flows.params import EvaluateParams, ReleaseParams

INT8_FILE = "model.int8.onnx"
METRICS = ("spearman", "ndcg_at_10")
MAX_PAIRS = 1500  # of the test set that are scored twice
SPEED_TEXTS = 24
SPEED_BATCH = 8  # texts a batch, of similar length: as the server makes them under load
SPEED_ROUNDS = 5
SPEED_SECONDS = 30.0  # after which no further round is begun, when there were two
MISSING_TEST = "the run kept no test rows to judge it by: train it again with this version of Ekiben"

Section = dict[str, Any]  # of the certificate


@dataclass(frozen=True)
class Int8Trial:
    """What int8 is judged by."""

    params: ReleaseParams
    test: Part | None  # rows that the model was not trained on; None when the run kept none

    @property
    def limits(self) -> dict[str, float]:
        """What is asked of int8."""
        names = ("int8_max_loss", "int8_mean_cosine", "int8_min_cosine", "int8_min_speedup", "min_cosine")
        return {name: getattr(self.params, name) for name in names}


def try_int8(box: Path, manifest: Manifest, trial: Int8Trial, *, extra_texts: Sequence[str] = ()) -> Section:
    """Write `model.int8.onnx` into the folder `box`, judge it, and take it away again unless it is certified.

    Args:
        box: The folder with the exported files.
        manifest: What the box says of itself; only fp32 is in it.
        trial: By what it is judged.
        extra_texts: Texts of the user's own domain; with the edge texts they say how far activations reach.

    Returns:
        The certificate's section: `certified`, `reason` (empty when certified), and all figures that were taken.
    """
    started = time.perf_counter()
    section: Section = {"certified": False, "reason": "", "thresholds": trial.limits}
    try:
        section |= _judge(box, manifest, trial, extra_texts)
    except NotReadyError:
        section["reason"] = "its vectors are not finite"
    except LunchboxError as error:
        section["reason"] = f"it cannot be loaded: {one_line(error)}"
    section["certified"] = not section["reason"]
    section["seconds"] = round(time.perf_counter() - started, 1)
    if not section["certified"]:
        (box / INT8_FILE).unlink(missing_ok=True)
    return section


def find_misses(box: Path, manifest: Manifest, trial: Int8Trial, *, extra_texts: Sequence[str] = ()) -> list[str]:
    """Say what the int8 form in `box` misses of what a release asks, each with its figures; nothing when all is well.

    Its speed is not asked: that hangs on the architecture, not on what was learned.

    Args:
        box: The folder with both forms.
        manifest: Names both.
        trial: By what it is judged; it has rows.
        extra_texts: Texts of the user's own domain, beside the edge texts.
    """
    if trial.test is None:
        return [MISSING_TEST]
    try:
        fp32, int8 = (Engine(box, manifest, precision=name) for name in ("fp32", "int8"))
        return find_failures(_compare_vectors(fp32, int8, trial.test, gather_texts(fp32, extra_texts)), trial.limits)
    except NotReadyError:
        return ["its vectors are not finite"]


def _judge(box: Path, manifest: Manifest, trial: Int8Trial, extra_texts: Sequence[str]) -> Section:
    if trial.test is None:
        return {"reason": MISSING_TEST}
    fp32 = Engine(box, manifest)
    texts = gather_texts(fp32, extra_texts)
    try:
        made = quantize(box / MODEL_FILE, box / INT8_FILE, [text.ids for text in fp32.tokenize(texts)])
    except Exception as error:  # onnx and onnxruntime raise bare ones; a graph that they refuse is no reason to end
        return {"reason": f"it cannot be made: {one_line(error)}"}
    if made.products == 0:
        return {"reason": "no matrix product of this model can be quantized"}
    both = manifest.model_copy(update={"precisions": {**manifest.precisions, "int8": INT8_FILE}})
    int8 = Engine(box, both, precision="int8")
    figures: Section = {
        "made": _describe(made),
        "bytes": {name: (box / name).stat().st_size for name in (MODEL_FILE, INT8_FILE)},
        **_compare_vectors(fp32, int8, trial.test, texts),
    }
    test_texts = _list_texts(_sample(trial.test), manifest)
    figures["speed"] = _compare_speed(box, both, [text.ids for text in fp32.tokenize(_spread(test_texts, fp32))])
    return figures | {"reason": "; ".join(find_failures(figures, trial.limits))}


def _compare_vectors(fp32: Engine, int8: Engine, test: Part, texts: list[str]) -> Section:
    """Compare both forms on the test rows and on edge texts: quality, cosines, and int8 among others with itself."""
    test, manifest = _sample(test), fp32.manifest
    test_texts = _list_texts(test, manifest)
    wide, small = fp32.embed(test_texts), int8.embed(test_texts)
    quality = _compare_quality(
        test, dict(zip(test_texts, wide, strict=True)), dict(zip(test_texts, small, strict=True)), manifest
    )
    test_cosines = cosine_pairs(small, wide)
    edge_cosines = cosine_pairs(int8.embed(texts, normalize=True), fp32.embed(texts, normalize=True))
    batches = compare_batches(int8, texts)
    return {
        "texts": {"test": len(test_texts), "edge": len(texts)},
        "quality": quality,
        "mean_cosine": float(test_cosines.mean()),
        "min_cosine": float(min(test_cosines.min(), edge_cosines.min())),
        "batch_min_cosine": float(batches.cosines.min()),
        "batch_comparisons": len(batches.cosines),
    }


def find_failures(figures: Mapping[str, Any], limits: Mapping[str, float]) -> list[str]:
    """Say what is worse than asked, each with its figures; nothing when all is well. A NaN is never well.

    Speed is asked when it is among the figures.
    """
    failures = []
    for item in figures["quality"]:
        for key, how in (("loss", ""), ("mixed_loss", " beside fp32 vectors")):
            if not item[key] <= limits["int8_max_loss"]:
                failures.append(
                    f"{item['metric']} falls by {item[key]:.4f}{how}, allowed {limits['int8_max_loss']:g} "
                    "(release.int8_max_loss)"
                )
    checks = (
        ("mean_cosine", "int8_mean_cosine", "the mean cosine with fp32"),
        ("min_cosine", "int8_min_cosine", "the smallest cosine with fp32"),
        ("batch_min_cosine", "min_cosine", "the smallest cosine of a text among others with itself alone"),
    )
    for key, limit, meaning in checks:
        if not figures[key] >= limits[limit]:
            failures.append(f"{meaning} is {figures[key]:.5f}, asked {limits[limit]:g} (release.{limit})")
    if "speed" in figures and not (ratio := figures["speed"]["ratio"]) >= limits["int8_min_speedup"]:
        failures.append(
            f"it computes {ratio:.2f} times the texts of fp32 on this machine, asked {limits['int8_min_speedup']:g} "
            "(release.int8_min_speedup)"
        )
    return failures


def _describe(made: Quantized) -> dict[str, int]:
    return {
        "products_fixed_scale": made.fixed,
        "products_by_row": made.by_row,
        "embedding_tables": made.tables,
        "products_left_fp32": made.left,
    }


def _sample(test: Part) -> Part:
    """Limit the pairs: the loss of 1500 is known to a few ten-thousandths."""
    return FrozenTest(test, None, None).limit(MAX_PAIRS).part


def _prompted(text: str, manifest: Manifest) -> str:
    """A text as the server computes it when a request names no prompt."""
    return apply_prompt(clean_text(text), manifest.prompts.get(manifest.default_prompt or "", ""))


def _list_texts(test: Part, manifest: Manifest) -> list[str]:
    """Every text of the test rows, as the model sees it, once."""
    retrieval = [*test.retrieval.queries.values(), *test.retrieval.corpus.values()] if test.retrieval else []
    texts = [*test.pairs["text_a"], *test.pairs["text_b"], *retrieval]
    return list(dict.fromkeys(_prompted(str(text), manifest) for text in texts))


def _compare_quality(
    test: Part, wide: Mapping[str, Vectors], small: Mapping[str, Vectors], manifest: Manifest
) -> list[Section]:
    """Score fp32, int8, and int8 documents (or second texts) against fp32 queries (or first texts)."""
    stored = {_prompted(str(text), manifest) for text in test.pairs["text_b"]}
    if test.retrieval is not None:
        stored |= {_prompted(text, manifest) for text in test.retrieval.corpus.values()}
    mixed = {text: small[text] if text in stored else wide[text] for text in wide}

    def encode(vector_of: Mapping[str, Vectors]) -> Encode:
        return lambda texts: np.stack([vector_of[_prompted(text, manifest)] for text in texts])

    params = EvaluateParams()
    scored, scored_int8, scored_mixed = (score_part(test, encode(vectors), params) for vectors in (wide, small, mixed))
    primary = primary_metric(test)
    gain = bootstrap_gain(test, scored, scored_int8, params)
    return [
        {
            "metric": name,
            "fp32": scored.metrics[name],
            "int8": scored_int8.metrics[name],
            "loss": scored.metrics[name] - scored_int8.metrics[name],
            "mixed_loss": scored.metrics[name] - scored_mixed.metrics[name],
            **({"low": -gain.high, "high": -gain.low} if name == primary else {}),
        }
        for name in METRICS
        if name in scored.metrics
    ]


def _spread(texts: Sequence[str], engine: Engine) -> list[str]:
    """A few texts, from the shortest to the longest."""
    lengths = {text: len(tokenized.ids) for text, tokenized in zip(texts, engine.tokenize(texts), strict=True)}
    ordered = sorted(texts, key=lengths.__getitem__)
    rows = np.linspace(0, len(ordered) - 1, min(SPEED_TEXTS, len(ordered))).round().astype(int)
    return [ordered[row] for row in rows]


def _compare_speed(box: Path, manifest: Manifest, token_ids: Sequence[Sequence[int]]) -> Section:
    """Let both compute the same texts in turns, on one core, alone and in batches; the slower gain counts.

    What is measured is the processor time of this thread, which does all the work: other load on the machine makes
    both slower, not one of them.
    """
    engines = {name: Engine(box, manifest, threads=1, precision=name) for name in ("fp32", "int8")}
    batches: dict[str, list[Sequence[Sequence[int]]]] = {
        "alone": [[ids] for ids in token_ids],
        "in_batches": [token_ids[start : start + SPEED_BATCH] for start in range(0, len(token_ids), SPEED_BATCH)],
    }
    seconds: dict[tuple[str, str], list[float]] = {(name, way): [] for name in engines for way in batches}
    started = time.monotonic()
    for turn in range(SPEED_ROUNDS + 1):
        if turn > 2 and time.monotonic() - started > SPEED_SECONDS:
            break
        for (name, way), times in seconds.items():
            begun = time.thread_time()
            for batch in batches[way]:
                engines[name].infer(batch)
            if turn:  # the first one warms up
                times.append(time.thread_time() - begun)
    section: Section = {}
    for way in batches:
        pairs = zip(seconds["fp32", way], seconds["int8", way], strict=True)
        section[way] = {
            **{f"{name}_texts_per_s": len(token_ids) / statistics.median(seconds[name, way]) for name in engines},
            "ratio": statistics.median(wide / small for wide, small in pairs),
        }
    section["ratio"] = min(section[way]["ratio"] for way in batches)
    section["batch_texts"], section["threads"] = SPEED_BATCH, 1
    return section
