"""How a model's space relates to the space of a champion before it: identical, compatible, by a map, or not at all.

Core layer. Both models embed the same texts as they are served (default precision; a prompt named `query` or `document`
where there is one, else the default prompt). A map is fitted on texts of train and dev, and everything that is claimed
is measured on texts of test, with and without the map, so that a map that only learned its texts by heart shows.

Figures, of `n` held-out texts; those that begin with `mapped_` are the same after the map:

| name | what |
| --- | --- |
| `cosine_mean`, `cosine_p05`, `cosine_min` | old and new vector of the same text |
| `recall` | of what the old model's queries find among its own vectors, the share that new queries find there |
| `mixed_recall` | the same where every other document was embedded by the new model: an index that goes on growing |
| `kept` | the same with near misses: similarity to the query, by the old model, that the found documents keep |
| `overlap` | the share that both models find alike, each among its own vectors: what a rebuilt index would find alike |
| `back_recall` | the way back: what old queries find among new vectors, as a share of what they find among old ones |
| `asked_recall` | `release.compat_min_recall`, which a rollback holds `back_recall` against |
| `ndcg`, `old_ndcg`, `new_ndcg` | by the labels: new queries among old vectors; either model among its own |
| `ndcg_share` | `ndcg` as a share of `old_ndcg`: only its low end is kept |
| `..._low` | low end of the bootstrap interval over the queries (95 %) |
| `ranks` | how many neighbours were looked at: 10, or a tenth of the documents when there are fewer than 100 |
| `fit_texts`, `queries`, `documents` | how many there were |

A class rests on `cosine_mean` and on low ends, so that few held-out texts give the more careful class: of `recall`, of
`ndcg_share` where there are labels, and for `compatible` of `mixed_recall` as well. For an index that new vectors are
added to without a word, or that is built anew bit by bit, is a mixed one; where a map is needed nothing is mixed unless
somebody asks for it. `recall` is asked to be 0.8, not more, as any model that learned something ranks otherwise: MiniLM
after 60 steps of fine-tuning finds 0.87 of what it found before, with the same nDCG.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bentos.engine import Engine
from bentos.manifest import Compat, CompatClass, Manifest, read_manifest
from bentos.text import apply_prompt
from bentos.vectors import FloatArray, Vectors, cosine_pairs
from flows.core.neighbours import (
    choose_ranks,
    group_judgements,
    low_end,
    ndcg,
    rank,
    share_found,
    similarities,
    similarity_kept,
)
from flows.core.probes import PROBE_FILE, Probe, choose_probe_texts, read_probe
from flows.core.procrustes import fit_map
from flows.core.relations import ASKED_RECALL, describe_mismatch, list_earlier
from flows.params import ReleaseParams

if TYPE_CHECKING:
    from flows.core.rivals import Champion

__all__ = ["PROBE_FILE", "choose_probe_texts", "compare_spaces", "describe_mismatch", "list_earlier"]

MAPPED = "mapped_"  # prefix of figures after the map
AS_THEY_ARE = ("cosine_min", "mixed_recall_low", "back_recall_low")  # figures that nobody asks for after the map
LEAST_TEXTS = 10  # queries, and documents, below which nothing can be shown
QUERY_PROMPTS = ("query",)
DOCUMENT_PROMPTS = ("document", "passage", "corpus")


@dataclass(frozen=True)
class Embedded:
    """The probe texts as one model serves them: unit vectors (texts, dim)."""

    manifest: Manifest
    fit: Vectors
    queries: Vectors
    documents: Vectors

    @property
    def held_out(self) -> Vectors:
        """Queries, then documents."""
        vectors: Vectors = np.vstack([self.queries, self.documents])
        return vectors


def compare_spaces(box: Path, champion: Champion, probe: Path, params: ReleaseParams) -> tuple[Compat, Vectors | None]:
    """Say how the space of the lunchbox at `box` relates to a champion's, and give the map into it where one holds.

    Args:
        box: The candidate's lunchbox.
        champion: Version, tag and lunchbox of the champion.
        probe: The candidate's `probe_texts.json`. Without it only one space id tells that both spaces are the same.
        params: The thresholds.

    Returns:
        The relation, whose `adapter` is None until `attach_compat` names the file; and the map, float32 (dim, dim of
        the champion), or None when none is needed or none holds.

    Raises:
        DataError: when the probe texts are malformed.
        LunchboxError: when a lunchbox cannot be read or loaded.
    """
    texts = read_probe(probe)
    new, old = read_manifest(box), read_manifest(champion.box)
    about = {"version": champion.version, "tag": champion.tag, "space_id": old.space_id, "dim": old.dim}
    if texts is None or min(len(texts.queries), len(texts.documents)) < LEAST_TEXTS:
        kind, reason = _judge_untested(new, old, texts)
        return Compat(kind=kind, reason=reason, figures={}, **about), None
    ours, theirs = _embed(box, new, texts), _embed(champion.box, old, texts)
    matrix = fit_map(ours.fit, theirs.fit) if new.space_id != old.space_id and len(ours.fit) else None
    figures = measure(ours, theirs, matrix, texts) | {ASKED_RECALL: params.compat_min_recall}
    is_same = _is_served_alike(figures, new, old, params) and (
        new.space_id == old.space_id or _is_same_model((box, new), (champion.box, old), texts, params)
    )
    kind, reason = classify(figures, params, is_same=is_same)
    # A compatible space is reached without a map as well: one ships only where it finds more.
    helps = figures.get("mapped_recall", 0.0) > figures.get("recall", 0.0) and not find_failures(
        figures, params, MAPPED
    )
    ships = kind == "adapter" or (kind == "compatible" and helps)
    return Compat(kind=kind, reason=reason, figures=figures, **about), matrix if ships else None


def _embed(box: Path, manifest: Manifest, texts: Probe, *, precision: str | None = None) -> Embedded:
    engine = Engine(box, manifest, precision=precision)

    def embed(role: tuple[str, ...], these: list[str]) -> Vectors:
        prompt = next((manifest.prompts[name] for name in role if name in manifest.prompts), None)
        if prompt is None:
            prompt = manifest.prompts.get(manifest.default_prompt or "")
        return engine.embed([apply_prompt(text, prompt) for text in these], normalize=True)

    return Embedded(
        manifest,
        np.vstack([embed(QUERY_PROMPTS, texts.fit_queries), embed(DOCUMENT_PROMPTS, texts.fit_documents)]),
        embed(QUERY_PROMPTS, texts.queries),
        embed(DOCUMENT_PROMPTS, texts.documents),
    )


def measure(ours: Embedded, theirs: Embedded, matrix: Vectors | None, texts: Probe) -> dict[str, float]:
    """Take every figure that the two spaces allow: as they are when they have as many dimensions, and mapped."""
    same = np.array([[query == document for document in texts.documents] for query in texts.queries])
    relevances = group_judgements(texts.judgements, same)
    ranks = choose_ranks(len(texts.documents))
    old_cosines = similarities(theirs.queries, theirs.documents, same)
    wanted = rank(old_cosines, ranks)
    rebuilt = rank(similarities(ours.queries, ours.documents, same), ranks)
    figures = {
        "fit_texts": float(len(ours.fit)),
        "queries": float(len(texts.queries)),
        "documents": float(len(texts.documents)),
        "ranks": float(ranks),
        "overlap": float(share_found(rebuilt, wanted).mean()),
    }
    if relevances:
        figures["old_ndcg"] = float(ndcg(wanted, relevances).mean())
        figures["new_ndcg"] = float(ndcg(rebuilt, relevances).mean())

    def cross(queries: FloatArray, documents: FloatArray) -> dict[str, float]:
        """Figures of new vectors, mapped or not, among old ones."""
        cosines = cosine_pairs(np.vstack([queries, documents]), theirs.held_out)
        found = rank(similarities(queries, theirs.documents, same), ranks)
        back = rank(similarities(theirs.queries, documents, same), ranks)
        grown = np.where(np.arange(len(documents))[:, None] % 2, documents, theirs.documents)
        mixed = share_found(rank(similarities(queries, grown, same), ranks), wanted)
        shares, back_shares = share_found(found, wanted), share_found(back, wanted)
        taken = {
            "cosine_mean": float(cosines.mean()),
            "cosine_p05": float(np.quantile(cosines, 0.05)),
            "cosine_min": float(cosines.min()),
            "recall": float(shares.mean()),
            "recall_low": low_end(shares),
            "mixed_recall": float(mixed.mean()),
            "mixed_recall_low": low_end(mixed),
            "kept": float(similarity_kept(found, old_cosines).mean()),
            "back_recall": float(back_shares.mean()),
            "back_recall_low": low_end(back_shares),
        }
        if relevances:
            by_labels, before = ndcg(found, relevances), ndcg(wanted, relevances)
            taken |= {"ndcg": float(by_labels.mean()), "ndcg_share_low": low_end(by_labels, before)}
        return taken

    if ours.manifest.dim == theirs.manifest.dim:
        figures |= cross(ours.queries, ours.documents)
    if matrix is not None:
        mapped = cross(ours.queries @ matrix, ours.documents @ matrix)
        figures |= {f"{MAPPED}{name}": value for name, value in mapped.items() if name not in AS_THEY_ARE}
    return figures


def classify(figures: Mapping[str, float], params: ReleaseParams, *, is_same: bool) -> tuple[CompatClass, str]:
    """Give the best class that the figures carry, and why, as a clause."""
    if is_same:
        least, mean, ranks = figures["cosine_min"], figures["cosine_mean"], int(figures["ranks"])
        return "identical", (
            f"a text's two vectors have a cosine of {mean:.5f} on average and {least:.5f} at least, as one model's "
            f"have in fp32 or int8, and new queries find {figures['recall']:.0%} of the old ones' {ranks} nearest "
            "documents"
        )
    failures = find_failures(figures, params)
    if not failures:
        return "compatible", f"as they are, {_summarise(figures)}"
    mapped_failures = find_failures(figures, params, MAPPED)
    if not mapped_failures:
        return "adapter", f"through the map, {_summarise(figures, MAPPED)}; as they are, {' and '.join(failures)}"
    return "breaking", f"as they are, {' and '.join(failures)}; through a map, {' and '.join(mapped_failures)}"


def find_failures(figures: Mapping[str, float], params: ReleaseParams, prefix: str = "") -> list[str]:
    """Say what keeps new queries from asking an index of old vectors, each with its figures; a NaN is never good."""
    if f"{prefix}cosine_mean" not in figures:
        return ["none could be fitted" if prefix else "the spaces have different numbers of dimensions"]
    checks = [
        ("cosine_mean", "compat_min_cosine", "mean cosine of a text's two vectors {:.3f}"),
        ("recall_low", "compat_min_recall", "recall of new queries on old vectors down to {:.3f}"),
        ("ndcg_share_low", "compat_min_ndcg", "their nDCG down to {:.3f} of the old queries'"),
    ]
    if not prefix:
        mixed = "recall of new queries where every other document is a new vector down to {:.3f}"
        checks.append(("mixed_recall_low", "compat_min_recall", mixed))
    failures = []
    for name, param, meaning in checks:
        value, least = figures.get(f"{prefix}{name}"), getattr(params, param)
        if value is not None and not value >= least:
            failures.append(f"{meaning.format(value)}, asked {least:g} (release.{param})")
    return failures


def _summarise(figures: Mapping[str, float], prefix: str = "") -> str:
    ranks = int(figures["ranks"])
    return (
        f"new queries find {figures[f'{prefix}recall']:.0%} of the old ones' {ranks} nearest documents among old "
        f"vectors and keep {figures[f'{prefix}kept']:.1%} of their nearness; mean cosine of a text's two vectors "
        f"{figures[f'{prefix}cosine_mean']:.3f}"
    )


def _judge_untested(new: Manifest, old: Manifest, texts: Probe | None) -> tuple[CompatClass, str]:
    """Without texts to try it on only equal ids say anything."""
    if new.space_id == old.space_id:
        return "identical", "both have the same weights, tokenizer and prompts"
    lack = "the run kept no probe texts: train again with this version of Ekiben"
    if texts is not None:
        lack = (
            f"the test rows hold {len(texts.queries)} queries and {len(texts.documents)} documents, at least "
            f"{LEAST_TEXTS} of each are needed"
        )
    return "breaking", f"nothing could be measured, {lack}"


def _is_served_alike(figures: Mapping[str, float], new: Manifest, old: Manifest, params: ReleaseParams) -> bool:
    """Whether held-out texts get the same vectors, but for what int8 may differ from fp32.

    Each side in int8 may be as far from fp32 as a release allows. Where both are, they err in their own ways, and the
    cosine of two errors at right angles is the product of both.
    """
    if "cosine_mean" not in figures:
        return False
    sides = sum(manifest.default_precision != "fp32" for manifest in (new, old))
    mean = params.int8_mean_cosine**sides if sides else params.min_cosine
    least = params.int8_min_cosine**sides if sides else params.min_cosine
    return figures["cosine_mean"] >= mean and figures["cosine_min"] >= least


def _is_same_model(new: tuple[Path, Manifest], old: tuple[Path, Manifest], texts: Probe, params: ReleaseParams) -> bool:
    """Whether models with different ids give held-out texts the same vectors in fp32, as export and model must."""
    ours, theirs = (_embed(box, manifest, texts, precision="fp32") for box, manifest in (new, old))
    return bool(cosine_pairs(ours.held_out, theirs.held_out).min() >= params.min_cosine)
