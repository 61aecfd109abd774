"""Who is compared: how each server is installed and started, and how it is asked.

Each peer runs as its own documentation or common practice has it, with access logs off for all, one after the other on
loopback, with all cores of the machine. No server is pinned to cores or given a number of threads.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from tests.benchmarks.box import Box
from tests.benchmarks.connection import HOST
from tests.benchmarks.environments import list_versions, make_environment

APPS = Path(__file__).with_name("apps")
ALL_WORKLOADS = ("W1", "W4", "W5", "W2", "W3", "W6")  # in the order that they run: single texts before bulk
SERVERS = ("ekiben-fp32", "ekiben-int8", "ekiben-batchable", "infinity", "bentoml-batchable", "seed")
BENTOML_QUIET = {"BENTOML_DO_NOT_TRACK": "true", "BENTOML_CONFIG_OPTIONS": "api_server.logging.access.enabled=false"}
EKIBEN_PACKAGES = "bentoml onnxruntime tokenizers uvicorn uvloop httptools orjson numpy"
PEER_PACKAGES = {
    "seed": ("fastapi==0.154.0", "uvicorn[standard]==0.54.0", "sentence-transformers==6.2.0", "torch==2.13.0"),
    "infinity": ("infinity-emb[server,torch]==0.0.78", "torch==2.13.0"),
    "bentoml-batchable": ("bentoml==1.4.39", "onnxruntime==1.32.0", "tokenizers==0.23.3", "numpy==2.4.6"),
}
TOLD_PACKAGES = (
    "fastapi uvicorn uvloop httptools sentence-transformers transformers torch infinity-emb bentoml onnxruntime"
)
TOLD_PACKAGES += " tokenizers numpy orjson"

Read = Callable[[bytes], list[list[float]]]


@dataclass(frozen=True)
class Peer:
    """One server of the comparison."""

    name: str
    title: str
    command: Sequence[str]  # `{port}` is filled in
    environment: Mapping[str, str]
    ready_path: str
    path: str
    write: Callable[[Sequence[str]], dict[str, Any]]  # texts -> content of the request
    read: Read  # body of the answer -> vectors
    workloads: Sequence[str] = ALL_WORKLOADS
    takes_lists: bool = True  # else a bulk request is as many single ones
    min_cosine: float = 0.999
    versions: Mapping[str, str] = field(default_factory=dict)

    def render_body(self, texts: Sequence[str]) -> bytes:
        """Write the body of a request."""
        return orjson.dumps(self.write(texts))


def list_peers(box: Box, environments: Path, names: Sequence[str] = ()) -> list[Peer]:
    """Make ready the peers called `names`, or all; installs what is missing.

    int8 is left out when the lunchbox has none.
    """
    makers: dict[str, Callable[[], Peer]] = {
        "ekiben-fp32": partial(_make_ekiben, box, "fp32"),
        "ekiben-int8": partial(_make_ekiben, box, "int8"),
        "ekiben-batchable": partial(_make_ekiben_batchable, box),
        "infinity": partial(_make_infinity, box, environments),
        "bentoml-batchable": partial(_make_batchable, box, environments),
        "seed": partial(_make_seed, box, environments),
    }
    if box.explain_missing_int8() is not None:
        del makers["ekiben-int8"]
    return [make() for name, make in makers.items() if not names or name in names]


def _make_ekiben(box: Box, precision: str) -> Peer:
    return Peer(
        name=f"ekiben-{precision}",
        title=f"Ekiben {precision}",
        command=(sys.executable, "-m", "bentoml", "serve", box.tag, "--host", HOST, "--port", "{port}"),
        environment={"BENTOML_HOME": box.home, "BENTOML_DO_NOT_TRACK": "true", "EKIBEN_PRECISION": precision},
        ready_path="/readyz",
        path="/encode",
        write=lambda texts: {"texts": texts},
        read=lambda body: json.loads(body)["embeddings"],
        min_cosine=0.999 if precision == "fp32" else 0.97,
        versions=list_versions(Path(sys.executable), EKIBEN_PACKAGES.split()),
    )


def _make_ekiben_batchable(box: Box) -> Peer:
    plain = _make_ekiben(box, "fp32")
    return Peer(
        name="ekiben-batchable",
        title="Ekiben /encode_batchable",
        command=plain.command,
        environment=plain.environment,
        ready_path=plain.ready_path,
        path="/encode_batchable",
        write=plain.write,
        read=json.loads,
        workloads=("W1", "W2", "W3"),
        versions=plain.versions,
    )


def _make_infinity(box: Box, environments: Path) -> Peer:
    # Its own defaults. Tried on CPU: `--compile` and batches of 4 or 8 take as much CPU a text or more, and a compiled
    # model starts twice as late. BetterTransformer has gone from the libraries that it came with.
    python = make_environment(environments, PEER_PACKAGES["infinity"])
    command = [str(python.with_name("infinity_emb")), "v2", "--model-id", box.model, "--served-model-name", "model"]
    command += ["--engine", "torch", "--device", "cpu", "--dtype", "float32", "--host", HOST, "--port", "{port}"]
    command += ["--no-bettertransformer", "--log-level", "warning"]
    return Peer(
        name="infinity",
        title="Infinity (torch)",
        command=command,
        environment={"INFINITY_ANONYMOUS_USAGE_STATS": "0", "DO_NOT_TRACK": "1"},
        ready_path="/health",
        path="/embeddings",
        write=lambda texts: {"model": "model", "input": texts},
        read=lambda body: [row["embedding"] for row in json.loads(body)["data"]],
        versions=list_versions(python, TOLD_PACKAGES.split()),
    )


def _make_batchable(box: Box, environments: Path) -> Peer:
    python = make_environment(environments, PEER_PACKAGES["bentoml-batchable"])
    serve = [str(python), "-m", "bentoml", "serve", "batchable:Embedder", "--working-dir", str(APPS)]
    return Peer(
        name="bentoml-batchable",
        title="BentoML batchable (ONNX Runtime)",
        command=[*serve, "--host", HOST, "--port", "{port}"],
        environment={"MODEL_PATH": box.lunchbox, "BENTOML_HOME": f"{box.home}-plain", **BENTOML_QUIET},
        ready_path="/readyz",
        path="/encode",
        write=lambda texts: {"texts": texts},
        read=json.loads,
        versions=list_versions(python, TOLD_PACKAGES.split()),
    )


def _make_seed(box: Box, environments: Path) -> Peer:
    python = make_environment(environments, PEER_PACKAGES["seed"])
    serve = [str(python), "-m", "uvicorn", "seed:app", "--app-dir", str(APPS), "--no-access-log"]
    return Peer(
        name="seed",
        title="FastAPI + sentence-transformers",
        command=[*serve, "--host", HOST, "--port", "{port}"],
        environment={"MODEL_PATH": box.model},
        ready_path="/health",
        path="/predict",
        write=lambda texts: {"text": texts[0]},
        read=lambda body: [json.loads(body)["embedding"]],
        takes_lists=False,
        versions=list_versions(python, TOLD_PACKAGES.split()),
    )
