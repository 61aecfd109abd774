"""What is served: the untrained base model, packed and built into a Bento by the project's own code, and its reference.

int8 is in the box when it is certified, on the test rows of the sample data. All of this is slow and imports torch, so
it runs in a process of its own and is kept until the code changes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from bentos.manifest import CERTIFICATE_FILE, Manifest, read_manifest

ROOT = Path(__file__).parents[2]
BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
SAMPLE = {"profiles": "data/sample/profiles.csv", "judgements": "data/sample/judgements.csv"}
SOURCES = ("bentos/**/*", "flows/core/*.py", "flows/params.py", "bentofile.yaml")
STAMP = "box.json"


@dataclass(frozen=True)
class Box:
    """Where the things to serve are."""

    model: str  # folder of the sentence-transformers model
    lunchbox: str  # folder of the lunchbox
    home: str  # BENTOML_HOME
    tag: str  # the Bento in it

    @property
    def manifest(self) -> Manifest:
        """The lunchbox's manifest."""
        return read_manifest(Path(self.lunchbox))

    def explain_missing_int8(self) -> str | None:
        """Why int8 is not in the box, or None when it is."""
        if "int8" in self.manifest.precisions:
            return None
        certificate = json.loads((Path(self.lunchbox) / CERTIFICATE_FILE).read_text(encoding="utf-8"))
        return f"not certified: {certificate['int8']['reason']}"


def prepare_box(folder: Path) -> Box:
    """Pack and build into `folder`/<hash of the code>, unless that was done, and drop what older code made."""
    key = hash_sources()
    here = folder / key
    if (here / STAMP).is_file():
        return Box(**json.loads((here / STAMP).read_text(encoding="utf-8")))
    shutil.rmtree(folder, ignore_errors=True)
    here.mkdir(parents=True)
    box = _build(here, key)
    (here / STAMP).write_text(json.dumps(asdict(box)), encoding="utf-8")
    return box


def hash_sources() -> str:
    """Hash of all code that goes into the Bento or makes what is in it."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def _build(here: Path, key: str) -> Box:
    from flows.core.dataset import prepare_dataset, read_data
    from flows.core.lunchbox import ReleaseFacts, pack_lunchbox
    from flows.core.models import resolve_base_model
    from flows.core.packing import build_bento, store_model
    from flows.core.precision import Int8Trial
    from flows.params import DataParams, ReleaseParams
    from tests.serving import bento_home

    model, lunchbox, home = Path(resolve_base_model(BASE_MODEL)), here / "lunchbox", here / "bentoml"
    params = DataParams(**SAMPLE)
    data = prepare_dataset(read_data(params, root=ROOT), params)
    facts = ReleaseFacts(name="ekiben", version="bench", run_id=key, data=data.version, base_model=BASE_MODEL)
    release = ReleaseParams()
    int8 = Int8Trial(release, data.test)
    manifest = pack_lunchbox(model, lunchbox, facts, min_cosine=release.min_cosine, int8=int8)
    with bento_home(home):
        store_model(lunchbox, manifest)
        tag = build_bento(manifest, root=ROOT)
    return Box(str(model), str(lunchbox), str(home), tag)


def encode_reference(model: str, texts: list[str]) -> list[list[float]]:
    """Embed `texts` with sentence-transformers itself, one at a time: what every server has to answer."""
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(model, device="cpu")
    return [reference.encode([text], normalize_embeddings=True)[0].tolist() for text in texts]
