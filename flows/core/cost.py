"""What an architecture costs in serving, measured on its export before it is trained. Core layer.

Weights change what a model says, not how long it takes: the untrained model is exported as a release would export it,
and asked through the server's own engine. That happens in a process of its own, which holds what a server holds and no
torch, with one thread for the inference. Times are processor time of that thread, the fastest of several rounds: other
load on the machine makes an architecture no dearer. They hold for this machine only; `identify_machine` names it.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from bentos.engine import Engine
from bentos.errors import LunchboxError
from bentos.manifest import DataVersion, Manifest
from bentos.text import apply_prompt, clean_text
from flows.core.processes import identify_process, is_alive
from flows.errors import EkibenError, UnsupportedModelError, one_line
from flows.params import CostName, TrainParams

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Costs = dict[str, float]  # CostName -> value
MACHINE_COSTS: tuple[CostName, ...] = ("p95_ms", "memory_mb")  # they need an export, and hold for one machine
BYTES_PER_NUMBER = 4.0  # float32
SIGNIFICANT_DIGITS = 2  # of times and memory: what a second measurement agrees with
MIN_ROUNDS = 5  # over all texts; the fastest counts for each text
STEADY_ROUNDS = 4  # in a row that must have found nothing faster by `STEADY_GAIN`: a busy machine needs more of them
STEADY_GAIN = 0.02
MAX_SECONDS = 20.0  # after which no further round is begun
PROBE_TIMEOUT_S = 600.0
KEPT_EXPORTS = 2  # architectures whose files are kept for a next trial that differs in precision or tokens only
SCRATCH_PREFIX, OWNER_FILE = "exports-", "owner.json"
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Exported:
    """The files that serve a model, without the papers of a lunchbox."""

    box: Path
    manifest: Manifest  # `precisions` names int8 only when it could be made

    def open(self, precision: str, *, threads: int = 0) -> Engine:
        """Load it as the server does."""
        return Engine(self.box, self.manifest, threads=threads, precision=precision)


class CostMeter:
    """Measures what architectures cost. Its files lie in a folder that the caller removes."""

    def __init__(self, texts: Sequence[str], costs: Collection[str], scratch: Path) -> None:
        """Prepare; nothing is loaded yet.

        Args:
            texts: Texts as users will send them; each is asked alone.
            costs: Which costs are wanted. Without one of `MACHINE_COSTS` nothing needs to be exported.
            scratch: An empty folder for exports.
        """
        self._texts = list(texts)
        self._costs = frozenset(costs)
        self._scratch = scratch
        self._kept: dict[str, Exported] = {}

    def measure(self, params: TrainParams) -> Costs:
        """Return the costs of the model that a fit with `params` ends as.

        `p95_ms` is the 95th percentile over the texts, `memory_mb` the resident memory in MiB of a process with
        tokenizer, model and runtime after it has computed them, `bytes_per_vector` that of float32. `auto` is measured
        in int8 where int8 can be made; `Prices` asks for both instead, and takes the one that would be served.

        Raises:
            ParamsError: the base model has fewer layers, dimensions or tokens than asked for.
            UnsupportedModelError: it cannot be exported, or has nothing that could become int8.
            EkibenError: the measurement itself failed.
        """
        from flows.core.export import find_max_tokens
        from flows.core.training import make_architecture

        if not self._costs and params.layers is None and params.dimensions is None:
            return {}
        model = make_architecture(params)
        costs: Costs = {"bytes_per_vector": BYTES_PER_NUMBER * (model.get_embedding_dimension() or 0)}
        if self._costs.isdisjoint(MACHINE_COSTS):
            return costs
        exported = self._export(model, params)
        # The export is kept for other limits of tokens.
        manifest = exported.manifest.model_copy(update={"max_tokens": find_max_tokens(model)})
        return costs | _measure_apart(
            Exported(exported.box, manifest), serving_precision(exported, params), self._texts
        )

    def _export(self, model: SentenceTransformer, params: TrainParams) -> Exported:
        key = json.dumps([params.base_model, params.layers, params.dimensions])
        if key not in self._kept:
            while len(self._kept) >= KEPT_EXPORTS:
                shutil.rmtree(self._kept.pop(next(iter(self._kept))).box)
            box = self._scratch / f"architecture-{time.monotonic_ns()}"
            self._kept[key] = export_for_serving(model, box, texts=self._texts)
        return self._kept[key]


@contextmanager
def open_scratch(parent: Path) -> Iterator[Path]:
    """Give a new folder in `parent` for exports, removed at the end. First removes those of killed processes."""
    parent.mkdir(parents=True, exist_ok=True)
    for old in parent.glob(f"{SCRATCH_PREFIX}*"):
        with suppress(OSError, ValueError):
            if not is_alive(json.loads((old / OWNER_FILE).read_text(encoding="utf-8"))):
                shutil.rmtree(old)
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=parent, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / OWNER_FILE).write_text(json.dumps(identify_process()), encoding="utf-8")
        yield folder


def identify_machine() -> str:
    """What times and memory depend on beside the model: the processor and the runtime."""
    import onnxruntime

    processor = platform.processor() or platform.machine()
    if CPUINFO.is_file():
        lines = (line.partition(":") for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines())
        processor = next((value.strip() for name, _, value in lines if name.strip() == "model name"), processor)
    return f"{platform.system()} {processor}, onnxruntime {onnxruntime.__version__}"


def export_for_serving(model: SentenceTransformer, box: Path, *, texts: Sequence[str]) -> Exported:
    """Export a model into the new folder `box`: fp32, and int8 where it can be made. Nothing is certified.

    Args:
        model: Trained or not.
        box: The folder to create.
        texts: With the edge texts they say how far the values reach that int8 gives a fixed scale.

    Raises:
        UnsupportedModelError: it cannot be exported.
    """
    from flows.core.certification import gather_texts
    from flows.core.export import MODEL_FILE, export_model
    from flows.core.precision import INT8_FILE
    from flows.core.quantization import quantize
    from flows.core.training import save_model

    box.mkdir(parents=True)
    folder = box / "model"
    save_model(model, folder)
    export = export_model(folder, box)
    shutil.rmtree(folder)
    manifest = Manifest(
        name="ekiben", version="0", run_id="none", data=DataVersion(path="none", md5="none"), base_model="none",
        dim=export.dim, max_tokens=export.max_tokens, pooling=export.pooling, normalize=export.normalize,
        prompts=export.prompts, default_prompt=export.default_prompt, precisions={"fp32": MODEL_FILE},
        space_id="none", created_at="never", files={},
    )  # fmt: skip
    fp32 = Engine(box, manifest)
    token_ids = [text.ids for text in fp32.tokenize(gather_texts(fp32, texts))]
    both = manifest.model_copy(update={"precisions": {"fp32": MODEL_FILE, "int8": INT8_FILE}})
    try:
        made = quantize(box / MODEL_FILE, box / INT8_FILE, token_ids).products > 0
        if made:
            Engine(box, both, precision="int8")
    except Exception:  # as in a release: a graph that onnx or onnxruntime refuse in int8 is served in fp32
        made = False
    return Exported(box, both if made else manifest)


def serving_precision(exported: Exported, params: TrainParams) -> str:
    """What an export of these parameters is opened in: `auto` as int8 where int8 can be made.

    Raises:
        UnsupportedModelError: int8 is asked for and cannot be made.
    """
    if params.precision == "int8" and "int8" not in exported.manifest.precisions:
        raise UnsupportedModelError(
            f"{params.base_model} cannot be served in int8: no matrix product of it can be quantized; "
            "leave int8 out of tune.space.precision"
        )
    return "int8" if params.precision in ("auto", "int8") and "int8" in exported.manifest.precisions else "fp32"


def encode_served(engine: Engine, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Embed texts as a request would that names no prompt: float32 (texts, dim)."""
    return engine.embed([_as_served(text, engine.manifest) for text in texts])


def _as_served(text: str, manifest: Manifest) -> str:
    return apply_prompt(clean_text(text), manifest.prompts.get(manifest.default_prompt or "", ""))


def _measure_apart(exported: Exported, precision: str, texts: Sequence[str]) -> Costs:
    """Run this module as a program, which does `_measure_here`."""
    question = {
        "box": str(exported.box),
        "manifest": exported.manifest.model_dump(mode="json"),
        "precision": precision,
        "texts": list(texts),
    }
    try:
        answer = subprocess.run(
            [sys.executable, "-P", "-m", __name__],  # -P: not a `flows` of the working directory
            input=json.dumps(question),
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=True,
        )
        costs: Costs = json.loads(answer.stdout)
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.split())[-300:] or f"exit code {error.returncode}"
        raise EkibenError(
            f"the serving cost could not be measured ({said}): free some memory, or set tune.costs=[]"
        ) from None
    except (subprocess.TimeoutExpired, OSError, ValueError) as error:
        raise EkibenError(
            f"the serving cost could not be measured ({one_line(error)}): try again, or set tune.costs=[]"
        ) from error
    return costs


def _measure_here(exported: Exported, precision: str, texts: Sequence[str]) -> Costs:
    """Load one precision and compute each text alone, in turns."""
    import psutil  # type: ignore[import-untyped]

    try:
        engine = exported.open(precision, threads=1)
    except LunchboxError as error:
        raise EkibenError(str(error)) from error
    asked = [_as_served(text, exported.manifest) for text in texts]
    fastest = np.full(len(texts), np.inf)
    p95_s: list[float] = []  # after each round
    started = time.monotonic()
    while len(p95_s) < MIN_ROUNDS or (time.monotonic() - started < MAX_SECONDS and not _is_steady(p95_s)):
        for row, text in enumerate(asked):
            begun = time.thread_time()
            engine.infer([engine.tokenize([text])[0].ids])
            fastest[row] = min(fastest[row], time.thread_time() - begun)
        p95_s.append(float(np.percentile(fastest, 95)))
    return {
        "p95_ms": _round(1000 * p95_s[-1]),
        "memory_mb": _round(psutil.Process().memory_info().rss / 2**20),
    }


def _is_steady(p95_s: Sequence[float]) -> bool:
    return len(p95_s) > STEADY_ROUNDS and p95_s[-1] > p95_s[-1 - STEADY_ROUNDS] * (1 - STEADY_GAIN)


def _round(value: float) -> float:
    """Drop the digits that are chance: of two architectures that differ in these alone, neither is cheaper."""
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def _answer() -> None:
    question = json.load(sys.stdin)
    exported = Exported(Path(question["box"]), Manifest.model_validate(question["manifest"]))
    sys.stdout.write(json.dumps(_measure_here(exported, question["precision"], question["texts"])))


if __name__ == "__main__":
    _answer()
