"""From lunchbox to Bento: the model store, `bentoml build`, and a test of what was built over real HTTP.

Core layer; the only module of `flows` that imports bentoml. The store is BentoML's own, at `BENTOML_HOME`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil  # type: ignore[import-untyped]

from bentos.errors import LunchboxError
from bentos.lunchbox import MIN_CANARY_COSINE, read_canary
from bentos.manifest import Manifest, read_manifest, verify_files
from bentos.vectors import cosine_pairs
from flows.core.serving import quote_log, served_bento, wait_ready
from flows.errors import EkibenError, InputError, SmokeTestError

BENTOFILE = "bentofile.yaml"
BUILD_TIMEOUT_S = 600.0
MAX_REASON_CHARS = 500
REQUEST_TIMEOUT_S = 30.0
PROBE_TEXT = "Senior data engineer with five years of Python and SQL"
PROBE_REQUESTS, PROBE_BATCH, PROBE_BATCHES = 100, 64, 4


def model_tag(manifest: Manifest) -> str:
    """The lunchbox's name in the model store, e.g. `ekiben-model:3-1f2e3d4c`."""
    return f"{manifest.name}-model:{manifest.bento_version}"


def store_model(box: Path, manifest: Manifest) -> str:
    """Copy the lunchbox at `box` into the model store, unless it is there already, and return its tag.

    A copy that was cut short or altered is replaced.

    Raises:
        LunchboxError: when the lunchbox itself does not verify.
    """
    import bentoml

    verify_files(box, manifest)
    tag = model_tag(manifest)
    if is_stored(manifest):
        return tag
    if _find(bentoml.models, tag) is not None:  # half copied, altered since, or packed anew
        bentoml.models.delete(tag)
    with bentoml.models.create(tag, labels=release_labels(manifest), metadata={"metrics": manifest.metrics}) as model:
        shutil.copytree(box, model.path, dirs_exist_ok=True)
    return tag


def is_stored(manifest: Manifest) -> bool:
    """Whether the model store holds just this lunchbox, whole."""
    import bentoml

    stored = _find(bentoml.models, model_tag(manifest))
    if stored is None:
        return False
    try:
        if read_manifest(Path(stored.path)) != manifest:
            return False
        verify_files(Path(stored.path), manifest)
    except LunchboxError:
        return False
    return True


def build_bento(manifest: Manifest, *, root: Path) -> str:
    """Build the Bento of a stored model from `root`/bentofile.yaml, unless it is there already, and return its tag.

    The build imports the service and sets state that lasts as long as its process, so it runs in one of its own.

    Raises:
        InputError: when there is no bentofile.
        EkibenError: when the build fails; the message is the error that it printed, in one line.
    """
    import bentoml

    bentofile = root / BENTOFILE
    if not bentofile.is_file():
        raise InputError(f"no {BENTOFILE} in {root}: run from the project's folder, or from a clone that has one")
    if _find(bentoml.bentos, manifest.tag) is not None:
        return manifest.tag
    command = [sys.executable, "-m", "bentoml", "build", str(root), "--bentofile", str(bentofile)]
    command += ["--name", manifest.name, "--version", manifest.bento_version]
    for name, value in release_labels(manifest).items():
        command += ["--label", f"{name}={value}"]
    build = subprocess.run(
        command,
        env={**os.environ, "EKIBEN_MODEL_TAG": model_tag(manifest)},  # handed on, not read
        cwd=root,
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )
    if build.returncode != 0:
        printed = " ".join((build.stdout + build.stderr).split())
        reason = printed[printed.rfind("Error: ") :][:MAX_REASON_CHARS] or f"exit code {build.returncode}"
        raise EkibenError(f"`bentoml build` of {manifest.tag} failed: {reason}")
    return manifest.tag


def bento_exists(tag: str) -> bool:
    """Whether the Bento store holds `tag`, whole."""
    import bentoml

    return _find(bentoml.bentos, tag, repair=False) is not None


def remove_bento(tag: str) -> None:
    """Take a Bento out of the store again, so that `latest` names the one before; its model stays."""
    import bentoml

    if bento_exists(tag):
        bentoml.bentos.delete(tag)


def release_labels(manifest: Manifest) -> dict[str, str]:
    """The way back from a Bento or a stored model to run, data and code."""
    return {
        "run_id": manifest.run_id,
        "version": manifest.version,
        "data_md5": manifest.data.md5,
        "git_commit": manifest.git_commit or "unknown",
        "space_id": manifest.space_id,
    }


def _find(store: Any, tag: str, *, repair: bool = True) -> Any:
    """The item of a BentoML store, or None; with `repair` an item that was cut short while being written is removed."""
    from bentoml.exceptions import BentoMLException, NotFound

    try:
        item = store.get(tag)
    except NotFound:
        return None
    except BentoMLException:
        if repair:
            with contextlib.suppress(NotFound):
                store.delete(tag)
        return None
    return item if str(item.tag) == tag else None  # the store also finds tags by their beginning


def smoke_test(tag: str, manifest: Manifest, *, log: Path) -> dict[str, float]:
    """Serve the Bento `tag` on a free port of this machine, check what it answers, measure it, and end it.

    Args:
        tag: the Bento, built from the lunchbox of `manifest`.
        manifest: what it must say that it serves.
        log: the file that the server's output goes to.

    Returns:
        `serve/p95_ms` (one short text, one caller), `serve/texts_per_s` (short texts, 64 a request),
        `serve/rss_mb` (memory of the worker in MiB), `serve/bytes_per_vector` (float32).

    Raises:
        SmokeTestError: says what was wrong, and quotes the end of the server's log.
    """
    port = _find_free_port()
    url = f"http://127.0.0.1:{port}"
    try:
        with served_bento(tag, host="127.0.0.1", port=port, log=log) as process:
            wait_ready(process, url, log)
            with httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S) as client:
                _check_answers(client, manifest)
                measured = _measure_speed(client)
            measured["serve/rss_mb"] = _worker_rss_mb(process.pid)
    except SmokeTestError as error:
        raise SmokeTestError(f"{tag}: {error}. {quote_log(log)}") from error
    except httpx.HTTPError as error:
        raise SmokeTestError(f"{tag}: {type(error).__name__} {error}. {quote_log(log)}") from error
    except EkibenError as error:  # it did not get ready: the log is quoted already
        raise SmokeTestError(f"{tag}: {error}") from error
    return {**measured, "serve/bytes_per_vector": 4.0 * manifest.dim}


def _check_answers(client: httpx.Client, manifest: Manifest) -> None:
    """The canary vectors, the headers, a similarity and an error, all over HTTP."""
    import bentoml

    from bentos.http import MODEL_HEADER, SPACE_HEADER

    canary = read_canary(Path(bentoml.models.get(model_tag(manifest)).path), manifest)
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


def _measure_speed(client: httpx.Client) -> dict[str, float]:
    latencies_ms = [_time_ms(client, [PROBE_TEXT]) for _ in range(PROBE_REQUESTS)]
    batches_ms = [_time_ms(client, [f"{PROBE_TEXT} {n}" for n in range(PROBE_BATCH)]) for _ in range(PROBE_BATCHES)]
    return {
        "serve/p95_ms": float(np.percentile(latencies_ms, 95)),
        "serve/texts_per_s": 1000 * PROBE_BATCH * PROBE_BATCHES / sum(batches_ms),
    }


def _time_ms(client: httpx.Client, texts: list[str]) -> float:
    started = time.perf_counter()
    _post(client, "/encode", {"texts": texts}, 200)
    return 1000 * (time.perf_counter() - started)


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


def _worker_rss_mb(pid: int) -> float:
    """Memory of the largest child of the server process: its worker."""
    return max((child.memory_info().rss for child in psutil.Process(pid).children(recursive=True)), default=0) / 2**20
