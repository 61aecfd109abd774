"""Pack the lunchbox: export, certify, canary texts, model card, manifest; the one thing that passes to the server.

Core layer. A box appears under its name complete and verified, or not at all. What a release learns later (relations
to older spaces, the last verdicts) is put into the packed box by `attach_compat` and `finish_card`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bentos.adapter import ADAPTER_PREFIX, find_problem, name_adapter
from bentos.engine import Engine
from bentos.errors import LunchboxError
from bentos.manifest import (
    CANARY_FILE,
    CERTIFICATE_FILE,
    LAYOUT,
    MANIFEST_FILE,
    MODEL_CARD_FILE,
    TOKENIZER_FILE,
    Calibration,
    Compat,
    DataVersion,
    Manifest,
    compute_space_id,
    dump_manifest,
    read_manifest,
    sha256_bytes,
    sha256_file,
    verify_files,
    write_manifest,
)
from bentos.vectors import Vectors
from flows.core.card import find_licence, render_card
from flows.core.certification import certify
from flows.core.edge_texts import CANARY_TEXTS
from flows.core.export import MODEL_FILE, Export, export_model
from flows.core.folders import replace_files, replaced_folder
from flows.core.precision import INT8_FILE, Int8Trial, try_int8
from flows.core.verdicts import Report

if TYPE_CHECKING:
    from flows.core.measuring import Serving

CANARY_DIGITS = 7  # what a float32 holds
Relation = tuple[Compat, Vectors | None]  # to an older space, and the map into it when it ships


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
        licence = find_licence(model_path, facts.base_model)
        manifest = _make_manifest(box, export_model(model_path, box), facts, licence)
        certificate = certify(model_path, box, manifest, min_cosine=min_cosine, extra_texts=extra_texts)
        if int8 is not None:
            certificate["int8"] = try_int8(box, manifest, int8, extra_texts=extra_texts)
            if certificate["int8"]["certified"]:
                precisions = {**manifest.precisions, "int8": INT8_FILE}
                manifest = manifest.model_copy(update={"precisions": precisions, "default_precision": "int8"})
        _write_json(box / CERTIFICATE_FILE, certificate)
        _write_canary(box, manifest)
        card = render_card(manifest, certificate, params=manifest.params, licence=licence, report=facts.report)
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


def attach_compat(
    box: Path,
    manifest: Manifest,
    compat: Compat | None,
    adapter: Vectors | None,
    *,
    earlier: Sequence[Relation] = (),
) -> Manifest:
    """Put into the box at `box` how its space relates to older ones, and the maps into them; return its new manifest.

    A kill leaves the box as it was, or as it will be, or broken, so that it is packed anew; with equal arguments it
    ends the same however often it is called. Maps of an earlier call that are not among the given ones are removed.

    Args:
        box: The packed lunchbox.
        manifest: Its manifest.
        compat: The relation to the champion; None for the first version.
        adapter: The map into the champion's space, float32 (dim, dim of the champion); None when none ships.
        earlier: Relations to champions before that one, with their maps.

    Raises:
        ValueError: when a map is none.
    """
    relations = [*([] if compat is None else [(compat, adapter)]), *earlier]
    contents: dict[str, bytes] = {}
    named = []
    for relation, matrix in relations:
        file = None
        if matrix is not None:
            if problem := find_problem(matrix, manifest.dim):
                raise ValueError(f"the map into the space {relation.space_id} {problem}")
            file = name_adapter(relation.space_id)
            contents[file] = _dump_array(matrix)
        named.append(relation.model_copy(update={"adapter": file}))
    stale = [name for name in manifest.files if name.startswith(ADAPTER_PREFIX) and name not in contents]
    manifest = manifest.model_copy(
        update={
            "layout": LAYOUT,
            "compat": None if compat is None else named[0],
            "earlier": named if compat is None else named[1:],
            "files": {name: digest for name, digest in manifest.files.items() if name not in stale},
        }
    )
    manifest = _write_box(box, manifest, contents)
    for name in stale:
        (box / name).unlink(missing_ok=True)
    return manifest


def finish_card(box: Path, manifest: Manifest, report: Report, serving: Serving | None) -> Manifest:
    """Write the model card of the box at `box` anew, with the final report of the gates, and return its new manifest.

    A kill leaves the box as it was, or finished, or broken, so that it is packed anew.

    Args:
        box: The packed lunchbox, with what `attach_compat` added.
        manifest: Its manifest.
        report: Every gate's verdict.
        serving: What the built Bento was measured at.
    """
    card = render_card(
        manifest,
        read_certificate(box),
        params=manifest.params,
        licence=manifest.licence,
        report=report,
        serving=serving,
    )
    return _write_box(box, manifest.model_copy(update={"layout": LAYOUT}), {MODEL_CARD_FILE: card.encode()})


def _write_box(box: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> Manifest:
    """Put files into a packed box, then the manifest that vouches for them, and return that."""
    hashes = {name: sha256_bytes(content) for name, content in contents.items()}
    manifest = manifest.model_copy(update={"files": dict(sorted({**manifest.files, **hashes}.items()))})
    replace_files(box, {**contents, MANIFEST_FILE: dump_manifest(manifest)})
    return manifest


def _dump_array(matrix: Vectors) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, matrix, allow_pickle=False)
    return buffer.getvalue()


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


def _make_manifest(box: Path, export: Export, facts: ReleaseFacts, licence: str | None) -> Manifest:
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
        nested_dims=list(export.nested_dims),
        licence=licence,
        params=dict(facts.params),
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
