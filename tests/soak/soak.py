"""The whole soak: what is served, leg after leg."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bentos.manifest import read_manifest
from flows.core.packing import build_bento, store_model
from tests.factories import make_tiny_lunchbox
from tests.serving import bento_home
from tests.soak.leg import KEY, ROOT, SOURCE, Leg, find_problems, run_leg
from tests.soak.reference import make_reference


def soak(folder: Path, *, seconds: float, model: Path | None = None, seed: int = 0) -> dict[str, Any]:
    """Serve a model in two ways, for half of the time each, and report.

    Args:
        folder: for BentoML's home, the logs and the model.
        seconds: of traffic.
        model: a lunchbox; a tiny one is made when None.
        seed: of requests and faults.
    """
    box = model or make_tiny_lunchbox(folder / "box")
    reference = make_reference(box, seed=seed)
    manifest = read_manifest(box)
    with bento_home(folder / "home") as home:
        stored = store_model(box, manifest)
        build_bento(manifest, root=ROOT)
    legs = [
        Leg("a Bento, without cache and keys", manifest.tag),
        Leg(
            "its service with threads that die and hang, with cache and keys",
            SOURCE,
            # small: it is soon full, and memory is flat then
            {"EKIBEN_CACHE_MB": "1", "EKIBEN_MODEL_TAG": stored},
            has_spells=True,
            key=KEY,
        ),
    ]
    begin = datetime.now(UTC)
    reports = [
        run_leg(leg, home, folder / f"leg-{number}", reference, seconds=seconds / len(legs), seed=f"{seed} {number}")
        for number, leg in enumerate(legs, start=1)
    ]
    return {
        "begin": begin.isoformat(timespec="seconds"),
        "seconds": seconds,
        "seed": seed,
        "model": manifest.tag,
        "dim": manifest.dim,
        "precision": manifest.default_precision,
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "problems": find_problems(reports),
        "legs": reports,
    }
