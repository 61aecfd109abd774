from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from bentos.manifest import Manifest, read_manifest
from flows.core.certification import allowed_error, certify
from flows.core.export import MODEL_FILE, dissect_model
from flows.core.graph import make_encoder, write_graph
from flows.errors import CertificationError
from tests.factories import make_tiny_model

MIN_COSINE = 0.9999


@pytest.fixture
def box(tiny_lunchbox_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_lunchbox_path, tmp_path / "box"))


@pytest.fixture
def manifest(tiny_lunchbox_path: Path) -> Manifest:
    return read_manifest(tiny_lunchbox_path)


def export_broken(model_path: Path, box: Path, fault: str) -> None:
    """Write a graph into the box that is wrong in one way."""
    model = SentenceTransformer(str(model_path), device="cpu")
    parts = dissect_model(model)
    right = make_encoder(parts.backbone, "cls" if fault == "pooling" else parts.pooling, parts.heads)

    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = right
            self.backbone = right.backbone

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if fault == "mask":
                attention_mask = torch.ones_like(attention_mask) + 0 * attention_mask
            raw, unit = self.inner(input_ids, attention_mask)
            if fault == "scale":
                raw = 1.05 * raw
            if fault == "nan":
                unit = unit / (input_ids.unsqueeze(-1).amax(dim=1) - 2)  # 2 is [CLS]: fine but for the empty text
                raw = raw / 0.0 * 0.0
            return raw, unit

    write_graph(Broken().eval(), model.tokenizer, box / MODEL_FILE)


def test_a_faithful_export_gets_a_certificate_with_all_figures(
    tiny_model_path: Path, box: Path, manifest: Manifest
) -> None:
    own = "senior plumber with a secret hobby"
    certificate = certify(tiny_model_path, box, manifest, min_cosine=MIN_COSINE, extra_texts=[own, "", "bad\x00text"])
    assert certificate["min_cosine"] > 0.999999
    assert certificate["batch_min_cosine"] > 0.999999
    assert [part["name"] for part in certificate["parity"]] == ["unit", "raw"]
    assert certificate["batch_invariance"]["comparisons"] > 4 * certificate["parity"][0]["comparisons"]
    assert certificate["texts"]["own"] == 1
    assert certificate["thresholds"] == {"min_cosine": MIN_COSINE, "max_error": allowed_error(MIN_COSINE)}
    assert "onnxruntime" in certificate["versions"]
    assert certificate["machine"]["cpu"]
    assert "secret" not in json.dumps(certificate)


def test_other_weights_than_the_trained_ones_fail(box: Path, manifest: Manifest, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(CertificationError, match=r"\(unit\).*cosine -?0\.\d+") as caught:
        certify(other, box, manifest, min_cosine=MIN_COSINE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("pooling", r"\(unit\)"),
        ("mask", r"\(batch invariance\)"),
        ("scale", r"\(raw\).*error 0\.05"),
        ("nan", "not finite.*learning rate"),
    ],
)
def test_a_graph_that_is_wrong_in_one_way_fails(
    fault: str, message: str, tiny_model_path: Path, box: Path, manifest: Manifest
) -> None:
    export_broken(tiny_model_path, box, fault)
    with pytest.raises(CertificationError, match=message):
        certify(tiny_model_path, box, manifest, min_cosine=MIN_COSINE)


def test_files_that_do_not_load_fail(tiny_model_path: Path, box: Path, manifest: Manifest) -> None:
    (box / MODEL_FILE).write_bytes(b"no graph")
    with pytest.raises(CertificationError, match=r"model\.fp32\.onnx cannot be loaded"):
        certify(tiny_model_path, box, manifest, min_cosine=MIN_COSINE)
