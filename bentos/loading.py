"""A lunchbox from disk to a version that is ready to answer, while others are being answered.

Measured with all-MiniLM-L6-v2 (fp32, 90 MB) on two cores: hashing the files (70 ms) and making the ONNX session (140
ms) leave the interpreter lock alone, so a thread does them that stands back for everything else. Reading the tokenizer
(2 x 18 ms, unless it is that of a version which is there) holds the lock all the while. A thread that stands back would
then keep the event loop waiting for as long as other threads are busy; so one does it that does not.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from bentos.encoder import Encoder
from bentos.errors import LunchboxError
from bentos.lunchbox import MIN_CANARY_COSINE, Lunchbox, open_lunchbox
from bentos.machine import read_memory_mb, release_memory, stand_back
from bentos.manifest import CERTIFICATE_FILE, TOKENIZER_FILE, read_manifest
from bentos.observer import Observer
from bentos.settings import ServeSettings

LOWEST_NICENESS = 19
WARM_ROUNDS = 2  # of the canary texts
MIB = 2**20
T = TypeVar("T")


async def load_version(path: Path, settings: ServeSettings, observer: Observer) -> tuple[Encoder, float]:
    """Verify the lunchbox at `path`, load it, start it, and compare its canary vectors.

    Returns:
        The version, warm, and its memory in MiB: what this process has grown by, but at least its files. Versions are
        loaded one at a time, and what requests take is small beside them.

    Raises:
        LunchboxError: when something is wrong with it; the version has gone again then.
    """
    before_mb = read_memory_mb()
    box = await asyncio.to_thread(read_box, path, settings)
    encoder = Encoder(box, settings, observer)
    try:
        await encoder.start()
        await encoder.warm_up(WARM_ROUNDS)
        if (problem := await encoder.find_problem()) is not None:
            raise LunchboxError(problem)
    except BaseException:
        await unload_version(encoder)
        raise
    await asyncio.to_thread(release_memory)
    return encoder, max(read_memory_mb() - before_mb, estimate_memory_mb(path, settings))


async def unload_version(encoder: Encoder) -> None:
    """End a version's threads and give its memory back."""
    await encoder.stop()
    encoder.box.engine.close()
    await asyncio.to_thread(release_memory)


def read_box(path: Path, settings: ServeSettings) -> Lunchbox:
    """Verify and load the lunchbox at `path` as the settings ask; takes long.

    Raises:
        LunchboxError: when a file is missing, altered or unusable, or the certificate does not certify it.
    """
    precision = None if settings.precision == "default" else settings.precision
    try:
        box = open_lunchbox(path, precision=precision, device=settings.device, run_aside=run_aside)
        check_certificate(path)
    except OSError as error:
        raise LunchboxError(f"{path} cannot be read: {error}") from error
    return box


def check_certificate(path: Path) -> None:
    """Let a lunchbox pass whose certificate says that its vectors are those of the trained model.

    Raises:
        LunchboxError: when it does not, or cannot be read.
    """
    try:
        certificate = json.loads((path / CERTIFICATE_FILE).read_text(encoding="utf-8"))
        cosine = min(float(certificate["min_cosine"]), float(certificate["batch_min_cosine"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LunchboxError(f"{CERTIFICATE_FILE} in {path} cannot be used: {error!r}") from None
    if not cosine >= MIN_CANARY_COSINE:
        raise LunchboxError(
            f"{CERTIFICATE_FILE} in {path} says that a vector came only within cosine {cosine:.6f} of the trained "
            f"model's; at least {MIN_CANARY_COSINE} is needed. Release the model again"
        )


def estimate_memory_mb(path: Path, settings: ServeSettings) -> float:
    """Least memory in MiB that the lunchbox at `path` takes once it is loaded: the files that are kept in it.

    Raises:
        LunchboxError: when its manifest cannot be read.
    """
    manifest = read_manifest(path)
    precision = manifest.default_precision if settings.precision == "default" else settings.precision
    names = {TOKENIZER_FILE, manifest.precisions.get(precision, TOKENIZER_FILE)}
    return sum((path / name).stat().st_size for name in names if (path / name).is_file()) / MIB + settings.cache_mb


def run_aside(work: Callable[[], T]) -> T:
    """Do work in a thread that stands back for all others, and wait for it."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        stand_back(LOWEST_NICENESS)
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="ekiben-aside", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
