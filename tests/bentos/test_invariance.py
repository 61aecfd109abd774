"""A text's vector does not depend on its company: any mates, any lengths, any order, for every precision that ships."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bentos.batcher import Batcher
from bentos.engine import Engine
from bentos.manifest import read_manifest, write_manifest
from bentos.observer import BatchRecord, Observer
from bentos.vectors import Vectors, cosine_pairs
from flows.core.edge_texts import EDGE_TEXTS
from flows.core.export import MODEL_FILE
from flows.core.precision import INT8_FILE
from flows.core.quantization import quantize
from tests.factories import make_limits, make_tiny_lunchbox, tiny_vocabulary

MIN_COSINE = 0.9999
TOLERANCE = 1e-5
WORDS = [word for word in tiny_vocabulary() if word.isalpha()]

# Most texts are short and some are longer than the model takes, as it is in life: batches are then uneven.
lengths = st.one_of(st.integers(1, 6), st.integers(1, 30), st.integers(50, 400))
texts = st.builds(lambda length, seed: _make_text(length, seed), lengths, st.integers(0, 2**20))
# Requests that come at the same time: of one text or of many, so that both lanes have work.
crowds = st.lists(st.lists(texts, min_size=1, max_size=14), min_size=1, max_size=8)


def _make_text(length: int, seed: int) -> str:
    generator = np.random.default_rng(seed)
    return " ".join(generator.choice(WORDS, size=length))


class BatchSizes(Observer):
    """Counts texts that had mates."""

    def __init__(self) -> None:
        self.in_company = 0

    def record_batch(self, record: BatchRecord) -> None:
        self.in_company += record.texts if record.texts > 1 else 0


class Company:
    """A real batcher over one precision of a lunchbox, on a loop of its own, for many examples."""

    def __init__(self, box: Path, precision: str, *, threads: int = 2) -> None:
        manifest = read_manifest(box)
        self.precision = precision
        self.engine = Engine(box, manifest, threads=1, precision=precision)
        self.sizes = BatchSizes()
        self._runner = asyncio.Runner()
        limits = make_limits(threads=threads, max_tokens=manifest.max_tokens, batch_tokens=256)
        self._batcher = Batcher(self.engine, limits, self.sizes)

    def __enter__(self) -> Company:
        self._runner.run(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._batcher.stop())
        self._runner.close()

    async def _start(self) -> None:
        self._batcher.start()

    def embed(self, requests: list[list[str]]) -> list[Vectors]:
        """The answers to requests that come all at once."""

        async def ask() -> list[Vectors]:
            answers = await asyncio.gather(*(self._batcher.embed(request) for request in requests))
            return [answer.vectors for answer in answers]

        return self._runner.run(ask())

    def check(self, requests: list[list[str]]) -> None:
        """Compare each vector with that of its text alone."""
        together = np.concatenate(self.embed(requests))
        tokenized = self.engine.tokenize([text for request in requests for text in request])
        alone = np.concatenate([self.engine.infer([text.ids], normalize=False) for text in tokenized])
        assert together.shape == alone.shape
        if self.precision == "fp32":
            np.testing.assert_allclose(together, alone, atol=TOLERANCE, rtol=TOLERANCE)
        assert cosine_pairs(together, alone).min() >= MIN_COSINE


def add_int8(box: Path) -> Path:
    """Put int8 into a box, as a release does, but without asking whether it is any good: only its mates matter here."""
    manifest = read_manifest(box)
    ids = [text.ids for text in Engine(box, manifest).tokenize(list(EDGE_TEXTS))]
    quantize(box / MODEL_FILE, box / INT8_FILE, ids)
    both = {"precisions": {"fp32": MODEL_FILE, "int8": INT8_FILE}}
    write_manifest(box, manifest.model_copy(update=both))
    return box


@pytest.fixture(scope="module")
def tiny_box(tiny_lunchbox_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_int8(Path(shutil.copytree(tiny_lunchbox_path, tmp_path_factory.mktemp("both") / "box")))


@pytest.fixture(scope="module")
def real_box(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from flows.core.models import resolve_base_model
    from flows.params import DEFAULT_BASE_MODEL

    model = Path(resolve_base_model(DEFAULT_BASE_MODEL))
    return add_int8(make_tiny_lunchbox(tmp_path_factory.mktemp("real") / "box", model_path=model))


@contextlib.contextmanager
def in_company(box: Path, precision: str) -> Iterator[Company]:
    with Company(box, precision) as company:
        yield company
    assert company.sizes.in_company, "texts were computed together"


@pytest.fixture(scope="module", params=["fp32", "int8"])
def tiny(request: pytest.FixtureRequest, tiny_box: Path) -> Iterator[Company]:
    with in_company(tiny_box, request.param) as company:
        yield company


@pytest.fixture(scope="module", params=["fp32", "int8"])
def real(request: pytest.FixtureRequest, real_box: Path) -> Iterator[Company]:
    with in_company(real_box, request.param) as company:
        yield company


@given(crowds)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_batch_gives_what_each_text_gives_alone(tiny: Company, requests: list[list[str]]) -> None:
    tiny.check(requests)


@pytest.mark.slow
@given(crowds)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_batch_of_the_real_model_gives_what_each_text_gives_alone(real: Company, requests: list[list[str]]) -> None:
    real.check(requests)


def test_a_precision_that_depends_on_mates_would_be_found(tiny_box: Path, tmp_path: Path) -> None:
    """ONNX Runtime's own dynamic quantization takes one range over the whole batch."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    box = Path(shutil.copytree(tiny_box, tmp_path / "box"))
    quantize_dynamic(box / MODEL_FILE, box / INT8_FILE, weight_type=QuantType.QInt8)
    generator = np.random.default_rng(0)
    requests = [[_make_text(int(length), seed)] for seed, length in enumerate(generator.integers(1, 60, 200))]
    with Company(box, "int8", threads=1) as company, pytest.raises(AssertionError):
        company.check(requests)
