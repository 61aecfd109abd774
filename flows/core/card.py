"""The model card: one page that travels with the model and says what it is, how well it does, where it comes from.

Core layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bentos.manifest import Manifest
from flows.core.models import resolve_base_model
from flows.core.nearness import describe_nearness
from flows.core.relations import render_compat
from flows.core.verdicts import Report
from flows.errors import ModelNotFoundError

if TYPE_CHECKING:
    from flows.core.measuring import Serving

UNKNOWN = "unknown"
POOLING_WORDS = {
    "mean": "the mean of its token vectors",
    "cls": "the vector of its first token",
    "max": "the maximum of its token vectors in each dimension",
    "lasttoken": "the vector of its last token",
}


def render_card(
    manifest: Manifest,
    certificate: Mapping[str, Any],
    *,
    params: Mapping[str, Any],
    licence: str | None,
    report: Report | None = None,
    serving: Serving | None = None,
) -> str:
    """Return the model card as Markdown.

    Args:
        manifest: The box's manifest; its `files` are not read.
        certificate: What `certify` returned.
        params: Parameters of the training, flat.
        licence: Licence of the base model, as its card declares it.
        report: The gates' verdicts.
        serving: What the built Bento was measured at.
    """
    lines = [
        f"# {manifest.tag}",
        "",
        f"A text embedding model: `{manifest.base_model}`, fine-tuned on the data named below. A text becomes "
        f"{manifest.dim} numbers, {POOLING_WORDS[manifest.pooling]}"
        f"{', scaled to length 1' if manifest.normalize else ''}.",
        "",
        "## Use",
        "",
        "```sh",
        f"bentoml serve {manifest.tag}",
        "curl -s localhost:3000/encode -H 'content-type: application/json' -d '{\"texts\": [\"hello world\"]}'",
        "```",
        "",
        f"Compare vectors by their cosine, and only with vectors of the same space, `{manifest.space_id}` "
        "(every answer carries it in `X-Ekiben-Space`).",
        *_prompts(manifest),
        "",
        "## Quality",
        "",
        "On test rows that were not trained on; the base model saw the same rows.",
        "",
        *_metrics(manifest.metrics),
        "",
        *_scores(manifest),
        *render_compat(manifest),
        *(["## Gates", "", report.to_markdown().rstrip(), ""] if report else []),
        *_serving(serving),
        "## Certificate",
        "",
        *_certificate(certificate),
        "",
        *_int8(certificate.get("int8")),
        "## Limits",
        "",
        f"- Texts are cut after {manifest.max_tokens} tokens.",
        "- The figures above say how it does on data like the test rows, and nothing about other domains or languages.",
        "- It inherits what its base model and its training data hold of errors and prejudice.",
        "",
        "## Origin",
        "",
        *_table(("what", "value"), _origin(manifest, licence)),
        "",
        *_params(params),
    ]
    return "\n".join(lines)


def find_licence(model_path: Path | None, base_model: str) -> str | None:
    """Return the licence that the README of the model, or of its base model on this machine, declares; None if none."""
    folders = [] if model_path is None else [model_path]
    with suppress(ModelNotFoundError):  # the base model was moved since: its licence is unknown, the release goes on
        folders.append(Path(resolve_base_model(base_model)))
    for folder in folders:
        try:
            _, front_matter, _ = (folder / "README.md").read_text(encoding="utf-8").split("---", 2)
            fields = yaml.safe_load(front_matter)
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(fields, dict) and fields.get("license"):
            return str(fields["license"])
    return None


def _prompts(manifest: Manifest) -> list[str]:
    if not manifest.prompts:
        return []
    rows = [
        (name, repr(text), "yes" if name == manifest.default_prompt else "") for name, text in manifest.prompts.items()
    ]
    return ["", *_table(("prompt", "text put first", "default"), rows)]


def _metrics(metrics: Mapping[str, float]) -> Iterator[str]:
    rows = []
    for name in sorted(name.removeprefix("eval/") for name in metrics if name.startswith("eval/")):
        tuned, base = metrics[f"eval/{name}"], metrics.get(f"base/{name}", math.nan)
        rows.append((name, f"{base:.4f}", f"{tuned:.4f}", f"{tuned - base:+.4f}"))
    yield from _table(("metric", "base model", "this model", "difference"), rows)
    gain = next((name for name in metrics if name.startswith("gain/") and name not in ("gain/low", "gain/high")), None)
    if gain is not None and "gain/low" in metrics and "gain/high" in metrics:
        yield ""
        yield (
            f"Gain in {gain.removeprefix('gain/')}: {metrics[gain]:+.4f}, bootstrap interval "
            f"{metrics['gain/low']:+.4f} to {metrics['gain/high']:+.4f}."
        )
    if near := describe_nearness(metrics):
        yield ""
        yield f"It was {near}. That keeps old indexes of use, and costs quality that the labels would have brought."


def _scores(manifest: Manifest) -> list[str]:
    sentences = []
    if manifest.decision_threshold is not None:
        sentences.append(f"Two texts count as similar from a cosine of {manifest.decision_threshold:.4f} on.")
    if manifest.calibration is not None:
        sentences.append("`manifest.json` holds the map from cosine to score; both were fitted on dev rows only.")
    return [" ".join(sentences), ""] if sentences else []


def _serving(serving: Serving | None) -> list[str]:
    if serving is None:
        return []
    rows = [(name.removeprefix("serve/"), f"{value:,.1f}") for name, value in serving.as_metrics().items()]
    return ["## Serving", "", "The built Bento, asked over HTTP:", "", *_table(("figure", "value"), rows), ""]


def _certificate(certificate: Mapping[str, Any]) -> list[str]:
    batch, texts = certificate["batch_invariance"], certificate["texts"]
    comparisons = sum(part["comparisons"] for part in certificate["parity"])
    versions = ", ".join(f"{name} {number}" for name, number in certificate["versions"].items())
    return [
        f"- With sentence-transformers' own vectors: smallest cosine {certificate['min_cosine']:.7f} in {comparisons} "
        f"comparisons over {texts['shipped'] + texts['own']} texts.",
        f"- In a batch with other texts or alone: smallest cosine {certificate['batch_min_cosine']:.7f} in "
        f"{batch['comparisons']} comparisons.",
        f"- Asked for: {certificate['thresholds']['min_cosine']}. Made {certificate['created_at']} with {versions}, on "
        f"{certificate['machine']['cpu']}.",
    ]


def _int8(section: Mapping[str, Any] | None) -> list[str]:
    """What int8 proved, or why it is not there."""
    if section is None:
        return []
    verdict = "the default precision" if section["certified"] else f"not shipped: {section['reason']}"
    lines = ["## int8", "", f"int8 is {verdict}.", ""]
    if "quality" not in section:
        return lines
    size = {name: count / 1e6 for name, count in section["bytes"].items()}
    thresholds, speed, texts = section["thresholds"], section["speed"], section["texts"]
    rows = [
        (
            item["metric"],
            f"{item['fp32']:.4f}",
            f"{item['int8']:.4f}",
            f"{item['loss']:+.4f}" + (f" ({item['low']:+.4f} to {item['high']:+.4f})" if "low" in item else ""),
            f"{item['mixed_loss']:+.4f}",
            f"{thresholds['int8_max_loss']:g}",
        )
        for item in section["quality"]
    ]
    head = ("test metric", "fp32", "int8", "loss (interval)", "loss beside fp32 vectors", "allowed")
    return [
        *lines,
        *_table(head, rows),
        "",
        f"- With fp32's vectors: mean cosine {section['mean_cosine']:.5f} over {texts['test']} test texts, smallest "
        f"{section['min_cosine']:.5f}, {texts['edge']} edge texts and own ones included; asked "
        f"{thresholds['int8_mean_cosine']:g} and {thresholds['int8_min_cosine']:g}. So both share one space.",
        f"- In a batch with other texts or alone: smallest cosine {section['batch_min_cosine']:.7f} in "
        f"{section['batch_comparisons']} comparisons; asked {thresholds['min_cosine']:g}.",
        f"- Texts a second of one core, alone {speed['alone']['int8_texts_per_s']:.0f} (fp32 "
        f"{speed['alone']['fp32_texts_per_s']:.0f}), {speed['batch_texts']} at a time "
        f"{speed['in_batches']['int8_texts_per_s']:.0f} (fp32 {speed['in_batches']['fp32_texts_per_s']:.0f}): "
        f"{speed['ratio']:.2f} times fp32 at least; asked {thresholds['int8_min_speedup']:g}.",
        f"- Size: {', '.join(f'`{name}` {megabytes:.1f} MB' for name, megabytes in size.items())}.",
        "",
    ]


def _origin(manifest: Manifest, licence: str | None) -> list[tuple[str, str]]:
    return [
        ("registered as", f"`{manifest.name}` version {manifest.version}"),
        ("MLflow run", f"`{manifest.run_id}`"),
        ("data", f"`{manifest.data.path}`"),
        ("data MD5", f"`{manifest.data.md5}`"),
        ("data revision", f"`{manifest.data.revision}`" if manifest.data.revision else "working tree"),
        ("code", f"`{manifest.git_commit or UNKNOWN}`"),
        ("package lock SHA-256", f"`{manifest.lock_sha256 or UNKNOWN}`"),
        ("base model", f"`{manifest.base_model}`"),
        ("licence of the base model", licence or UNKNOWN),
        ("space", f"`{manifest.space_id}`"),
        ("packed", manifest.created_at),
    ]


def _params(params: Mapping[str, Any]) -> list[str]:
    if not params:
        return []
    rows = [(name, f"`{value}`") for name, value in sorted(params.items())]
    return ["## Training parameters", "", *_table(("parameter", "value"), rows), ""]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    cells = [head, tuple("---" for _ in head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells]
