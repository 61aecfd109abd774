"""Pack the lunchbox: export, certify, canary texts, model card, manifest; the one thing that passes to the server.

Core layer. A box appears under its name complete and verified, or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bentos.engine import Engine
from bentos.errors import LunchboxError
from bentos.manifest import (
    CANARY_FILE,
    CERTIFICATE_FILE,
    MODEL_CARD_FILE,
    TOKENIZER_FILE,
    Calibration,
    DataVersion,
    Manifest,
    compute_space_id,
    read_manifest,
    sha256_file,
    verify_files,
    write_manifest,
)
from flows.core.card import find_licence, render_card
from flows.core.certification import certify
from flows.core.edge_texts import CANARY_TEXTS
from flows.core.export import MODEL_FILE, Export, export_model
from flows.core.folders import replaced_folder
from flows.core.gates import Report
from flows.core.precision import INT8_FILE, Int8Trial, try_int8

CANARY_DIGITS = 7  # what a float32 holds


@dataclass(frozen=True)
class ReleaseFacts:
    """What is known about a model before it is packed: who it is and where it comes from."""

    name: str  # registered model name
    version: str  # registry version
    run_id: str
    data: DataVersion
    base_model: str
    git_commit: str | None = None
    lock_sha256: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)  # of the training, flat; for the model card
    calibration: Calibration | None = None
    decision_threshold: float | None = None
    report: Report | None = None  # the gates' verdicts so far; for the model card


def pack_lunchbox(
    model_path: Path,
    to: Path,
    facts: ReleaseFacts,
    *,
    min_cosine: float,
    extra_texts: Sequence[str] = (),
    int8: Int8Trial | None = None,
) -> Manifest:
    """Pack the model at `model_path` into the folder `to`, or return the manifest of the same run's box found there.

    A box that is broken, of another run, certified to less than `min_cosine`, or whose int8 was judged by other limits
    is replaced, once the new one is complete.

    Args:
        model_path: The sentence-transformers folder.
        to: Where the box appears.
        facts: Who the model is and where it comes from.
        min_cosine: What `certify` asks.
        extra_texts: Texts of the user's own domain, for the certificate.
        int8: By what int8 is judged; it becomes the default precision when certified, and is left out when not. None
            makes no int8.

    Raises:
        UnsupportedModelError: when the model cannot be exported.
        CertificationError: when the exported model is not the trained one. What stood at `to` stays.
    """
    packed = find_packed(to, facts, min_cosine=min_cosine, int8=int8)
    if packed is not None:
        return packed
    with replaced_folder(to) as box:
        manifest = _make_manifest(box, export_model(model_path, box), facts)
        certificate = certify(model_path, box, manifest, min_cosine=min_cosine, extra_texts=extra_texts)
        if int8 is not None:
            certificate["int8"] = try_int8(box, manifest, int8, extra_texts=extra_texts)
            if certificate["int8"]["certified"]:
                precisions = {**manifest.precisions, "int8": INT8_FILE}
                manifest = manifest.model_copy(update={"precisions": precisions, "default_precision": "int8"})
        _write_json(box / CERTIFICATE_FILE, certificate)
        _write_canary(box, manifest)
        licence = find_licence(model_path, facts.base_model)
        card = render_card(manifest, certificate, params=facts.params, licence=licence, report=facts.report)
        (box / MODEL_CARD_FILE).write_text(card, encoding="utf-8")
        files = {path.name: sha256_file(path) for path in sorted(box.iterdir())}
        manifest = manifest.model_copy(update={"files": files})
        write_manifest(box, manifest)
    return manifest


def find_packed(to: Path, facts: ReleaseFacts, *, min_cosine: float, int8: Int8Trial | None = None) -> Manifest | None:
    """Return the manifest of the box at `to` if it is whole, of the same run, and certified as asked."""
    try:
        manifest = read_manifest(to)
        verify_files(to, manifest)
        certificate = read_certificate(to)
    except LunchboxError:
        return None
    same = (manifest.name, manifest.version, manifest.run_id) == (facts.name, facts.version, facts.run_id)
    good = min(certificate["min_cosine"], certificate["batch_min_cosine"]) >= min_cosine
    complete = {MODEL_FILE, TOKENIZER_FILE, CERTIFICATE_FILE, CANARY_FILE, MODEL_CARD_FILE} <= manifest.files.keys()
    judged_alike = certificate.get("int8", {}).get("thresholds") == (None if int8 is None else int8.limits)
    return manifest if same and good and complete and judged_alike else None


def read_certificate(box: Path) -> dict[str, Any]:
    """Read `certificate.json` of a box.

    Raises:
        LunchboxError: when it is missing or lacks its figures.
    """
    try:
        certificate: dict[str, Any] = json.loads((box / CERTIFICATE_FILE).read_text(encoding="utf-8"))
        float(certificate["min_cosine"]), float(certificate["batch_min_cosine"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LunchboxError(f"{CERTIFICATE_FILE} in {box} cannot be used: {error!r}") from None
    return certificate


def _make_manifest(box: Path, export: Export, facts: ReleaseFacts) -> Manifest:
    """Say all of the manifest but the hashes of the files, which come when the last one is written."""
    space_id = compute_space_id(
        weights_sha256=export.weights_sha256,
        tokenizer_sha256=sha256_file(box / TOKENIZER_FILE),
        pooling=export.pooling,
        normalize=export.normalize,
        prompts=export.prompts,
        dim=export.dim,
    )
    return Manifest(
        name=facts.name,
        version=facts.version,
        run_id=facts.run_id,
        data=facts.data,
        git_commit=facts.git_commit,
        lock_sha256=facts.lock_sha256,
        base_model=facts.base_model,
        dim=export.dim,
        max_tokens=export.max_tokens,
        pooling=export.pooling,
        normalize=export.normalize,
        prompts=export.prompts,
        default_prompt=export.default_prompt,
        precisions={"fp32": MODEL_FILE},
        space_id=space_id,
        calibration=facts.calibration,
        decision_threshold=facts.decision_threshold,
        metrics=dict(facts.metrics),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        files={},
    )


def _write_canary(box: Path, manifest: Manifest) -> None:
    """Write the canary texts and their vectors; `certify` has compared these texts with sentence-transformers."""
    vectors = {}
    for precision in manifest.precisions:
        embedded = Engine(box, manifest, precision=precision).embed(CANARY_TEXTS).tolist()
        vectors[precision] = [[round(value, CANARY_DIGITS) for value in vector] for vector in embedded]
    default = vectors.pop(manifest.default_precision)
    _write_json(box / CANARY_FILE, {"texts": list(CANARY_TEXTS), "vectors": default, "other_precisions": vectors})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
