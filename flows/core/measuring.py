"""Does the built Bento answer as it must, how fast, and how does it compare with the champion's? Core layer.

Both are served on this machine as their users would serve them, by `bentoml serve`, one worker each, with the default
settings. Requests go over HTTP, a few to the one, a few to the other, in turns: what else the machine does meanwhile
slows both. Every text is new to the server, so no cache answers.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil  # type: ignore[import-untyped]

from bentos.errors import LunchboxError
from bentos.lunchbox import MIN_CANARY_COSINE, read_canary
from bentos.manifest import Manifest
from bentos.vectors import cosine_pairs
from flows.core.packing import stored_path
from flows.core.serving import quote_log, served_bento, wait_ready
from flows.errors import EkibenError, SmokeTestError

REQUEST_TIMEOUT_S = 30.0
PROBE_TEXT = "Senior data engineer with five years of Python and SQL"
ROUNDS = 20
REQUESTS_A_ROUND = 5  # of one short text each
BATCH_EVERY = 5  # rounds
BATCH_TEXTS = 64

Measured = tuple[str, Manifest]  # the tag of a Bento, and what it was built from


@dataclass(frozen=True)
class Serving:
    """What a served Bento was measured at."""

    p95_ms: float  # of one short text, one caller
    texts_per_s: float  # short texts, 64 a request, one caller
    start_s: float  # from the start of the command to readiness
    memory_mb: float  # MiB, resident, of the worker
    bytes_per_vector: float  # float32

    def as_metrics(self) -> dict[str, float]:
        """Return the figures under their names in MLflow."""
        return {METRIC_NAMES[name]: value for name, value in vars(self).items()}


METRIC_NAMES = {
    "p95_ms": "serve/p95_ms",
    "texts_per_s": "serve/texts_per_s",
    "start_s": "serve/start_s",
    "memory_mb": "serve/rss_mb",
    "bytes_per_vector": "serve/bytes_per_vector",
}


@dataclass
class Server:
    """A Bento that is being served, and the times that it took."""

    tag: str
    manifest: Manifest
    log: Path
    pid: int
    client: httpx.Client
    start_s: float
    single_ms: list[float] = field(default_factory=list)
    batch_ms: list[float] = field(default_factory=list)
    asked: int = 0  # texts so far: each text carries its number

    def ask(self, texts: int) -> float:
        """Have so many new texts embedded and return the time in ms."""
        bodies = [f"{PROBE_TEXT} {100_000 + self.asked + number}" for number in range(texts)]
        self.asked += texts
        started = time.perf_counter()
        _post(self.client, "/encode", {"texts": bodies}, 200)
        return 1000 * (time.perf_counter() - started)

    def run_round(self, number: int) -> None:
        """Ask a few times; the first round only warms up."""
        single = [self.ask(1) for _ in range(REQUESTS_A_ROUND)]
        batch = [self.ask(BATCH_TEXTS)] if number % BATCH_EVERY == 0 else []
        if number:
            self.single_ms += single
            self.batch_ms += batch

    def summarise(self) -> Serving:
        """Return what the rounds came to."""
        return Serving(
            p95_ms=float(np.percentile(self.single_ms, 95)),
            texts_per_s=1000 * BATCH_TEXTS * len(self.batch_ms) / sum(self.batch_ms),
            start_s=self.start_s,
            memory_mb=_worker_mb(self.pid),
            bytes_per_vector=4.0 * self.manifest.dim,
        )


def measure_bentos(
    candidate: Measured, rival: Measured | None, *, log: Path, home: Path | None = None
) -> tuple[Serving, Serving | None]:
    """Serve the candidate, check what it answers, and measure it and its rival in turns.

    Whoever is started first also reads Python's packages from disk. So when the candidate took longer than its rival,
    it is started once more, and the shorter start counts.

    Args:
        candidate: The Bento, and the manifest of the lunchbox that it was built from: what it must say that it serves.
        rival: The champion's; None measures the candidate alone.
        log: The file that the candidate's output goes to; the rival's goes to `<name>.champion.log` beside it.
        home: BentoML's home folder, with the stores that hold both; default: its own.

    Returns:
        The figures of both. A rival that cannot be served has none: it must not keep a candidate from its place.

    Raises:
        SmokeTestError: the candidate did not start or answered something else than it must; says what was wrong, and
            quotes the end of its log.
    """
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(_serve(candidate, log, home))
        with _blaming(ours.tag, log):
            check_answers(ours.client, ours.manifest, stored_path(ours.manifest, home=home))
        theirs = _try_serve(stack, rival, log.with_suffix(".champion.log"), home)
        for number in range(ROUNDS + 1):
            with _blaming(ours.tag, log):
                ours.run_round(number)
            if theirs is not None:
                try:
                    theirs.run_round(number)
                except (SmokeTestError, httpx.HTTPError):
                    theirs = None
        figures_of_theirs = None
        with contextlib.suppress(psutil.Error, OSError):  # it has ended since
            figures_of_theirs = None if theirs is None else theirs.summarise()
        with _blaming(ours.tag, log):
            figures = ours.summarise()
    if figures_of_theirs is not None and figures.start_s > figures_of_theirs.start_s:
        with _serve(candidate, log, home) as again:
            figures = replace(figures, start_s=min(figures.start_s, again.start_s))
    return figures, figures_of_theirs


def check_answers(client: httpx.Client, manifest: Manifest, stored: Path) -> None:
    """Ask a served Bento for the canary vectors, a similarity and an error, and look at its headers.

    Args:
        client: Of the server.
        manifest: What it must say that it serves.
        stored: Its lunchbox in the model store.

    Raises:
        SmokeTestError: an answer is not what it must be.
        LunchboxError: the canary texts cannot be read.
        httpx.HTTPError: there was no answer.
    """
    from bentos.http import MODEL_HEADER, SPACE_HEADER  # it brings the whole server

    canary = read_canary(stored, manifest)
    encoded = _post(client, "/encode", {"texts": canary.texts, "prompt_text": "", "model": manifest.tag}, 200)
    for header, expected in ((MODEL_HEADER, manifest.tag), (SPACE_HEADER, manifest.space_id)):
        if encoded.headers.get(header) != expected:
            raise SmokeTestError(f"the header {header} is {encoded.headers.get(header)!r}, expected {expected!r}")
    vectors = np.asarray(encoded.json()["embeddings"], dtype=np.float32)
    if vectors.shape != canary.vectors.shape:
        raise SmokeTestError(f"/encode gave vectors of shape {vectors.shape}, expected {canary.vectors.shape}")
    cosine = float(cosine_pairs(vectors, canary.vectors).min())
    if not cosine >= MIN_CANARY_COSINE:  # also when it is not a number
        raise SmokeTestError(
            f"/encode gave a canary vector with cosine {cosine}, at least {MIN_CANARY_COSINE} is needed"
        )
    compared = _post(client, "/similarity", {"a": [PROBE_TEXT], "b": [PROBE_TEXT, canary.texts[0]]}, 200).json()
    if len(compared["similarity"][0]) != 2 or abs(compared["similarity"][0][0] - 1.0) > 1e-3:
        raise SmokeTestError(
            f"/similarity of a text with itself and another gave {compared['similarity']}, not [[1, ...]]"
        )
    refused = _post(client, "/encode", {"texts": []}, 422).json()
    if refused.get("error", {}).get("code") != "invalid_request":
        raise SmokeTestError(f"an empty list of texts was refused with {refused}, expected the code invalid_request")


@contextlib.contextmanager
def _serve(bento: Measured, log: Path, home: Path | None) -> Iterator[Server]:
    """Serve a Bento of the stores in `home` on a free port of this machine until the block ends.

    Raises:
        SmokeTestError: it did not get ready.
    """
    tag, manifest = bento
    port = _find_free_port()
    url = f"http://127.0.0.1:{port}"
    started = time.perf_counter()
    served = served_bento(tag, host="127.0.0.1", port=port, log=log, by_default=True, home=home)
    with served as process:
        try:
            wait_ready(process, url, log)
        except EkibenError as error:  # it quotes the log already
            raise SmokeTestError(f"{tag}: {error}") from error
        start_s = time.perf_counter() - started
        with httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S) as client:
            yield Server(tag, manifest, log, process.pid, client, start_s)


def _try_serve(stack: contextlib.ExitStack, bento: Measured | None, log: Path, home: Path | None) -> Server | None:
    try:
        return None if bento is None else stack.enter_context(_serve(bento, log, home))
    except (SmokeTestError, OSError):
        return None


@contextlib.contextmanager
def _blaming(tag: str, log: Path) -> Iterator[None]:
    """Say in every error of the block which Bento it was about, and what its log ends with.

    Raises:
        SmokeTestError: in place of what was raised.
    """
    try:
        yield
    except (SmokeTestError, LunchboxError) as error:
        raise SmokeTestError(f"{tag}: {error}. {quote_log(log)}") from error
    except (httpx.HTTPError, psutil.Error) as error:
        raise SmokeTestError(f"{tag}: {type(error).__name__} {error}. {quote_log(log)}") from error


def _post(client: httpx.Client, path: str, body: dict[str, Any], status: int) -> httpx.Response:
    response = client.post(path, json=body)
    if response.status_code != status:
        raise SmokeTestError(f"POST {path} answered {response.status_code}, expected {status}: {response.text[:300]}")
    return response


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _worker_mb(pid: int) -> float:
    """Memory in MiB of the largest child of the server process: its worker."""
    return max((child.memory_info().rss for child in psutil.Process(pid).children(recursive=True)), default=0) / 2**20
