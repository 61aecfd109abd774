from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sentence_transformers import SentenceTransformer

from bentos.engine import Engine
from bentos.errors import LunchboxError
from bentos.lunchbox import open_lunchbox
from bentos.manifest import Calibration, Compat, DataVersion, Manifest, read_manifest, verify_files, write_manifest
from bentos.text import apply_prompt
from bentos.vectors import Vectors, cosine_pairs, normalize
from flows.core.card import find_licence
from flows.core.dataset import Part
from flows.core.edge_texts import CANARY_TEXTS, EDGE_TEXTS
from flows.core.evaluation import Interval
from flows.core.evidence import Evidence
from flows.core.gates import run_gates
from flows.core.lunchbox import ReleaseFacts, attach_compat, find_packed, finish_card, pack_lunchbox
from flows.core.measuring import Serving
from flows.core.precision import INT8_FILE, Int8Trial
from flows.core.rivals import Comparison
from flows.errors import CertificationError
from flows.params import ReleaseParams
from tests.factories import TINY_RUN_ID, VARIANTS
from tests.flows.support import write_pairs

FACTS = ReleaseFacts(
    name="ekiben",
    version="1",
    run_id=TINY_RUN_ID,
    data=DataVersion(path="data/pairs.csv", md5="0cc175b9c0f1b6a831c399e269772661", revision="v7"),
    base_model="tiny",
    git_commit="8843d7f92416211de9ebb963ff4ce28125932878",
    metrics={"eval/spearman": 0.84, "base/spearman": 0.82, "gain/spearman": 0.02, "gain/low": 0.01, "gain/high": 0.03},
    params={"train.learning_rate": 2e-5},
    calibration=Calibration(cosines=[0.0, 1.0], scores=[0.1, 0.9]),
    decision_threshold=0.4321,
)


@pytest.fixture
def box(tiny_lunchbox_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_lunchbox_path, tmp_path / "boxes" / "1"))


def age_of(box: Path) -> int:
    return (box / "manifest.json").stat().st_mtime_ns


def test_a_packed_box_opens_and_its_canary_sings(tiny_lunchbox_path: Path, tiny_model_path: Path) -> None:
    box = open_lunchbox(tiny_lunchbox_path)
    assert set(box.manifest.files) | {"manifest.json"} == {path.name for path in tiny_lunchbox_path.iterdir()}
    assert box.find_deviation(box.engine.embed(box.canary.texts)) is None
    reference = SentenceTransformer(str(tiny_model_path), device="cpu").encode(box.canary.texts)
    np.testing.assert_allclose(box.canary.vectors, reference, atol=1e-5)
    assert tuple(box.canary.texts) == CANARY_TEXTS


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_model_serves_the_vectors_of_sentence_transformers(name: str, variants: dict[str, Path]) -> None:
    manifest = read_manifest(variants[name])
    model = SentenceTransformer(str(variants[name].with_name(f"{variants[name].name}-model")), device="cpu")
    engine = Engine(variants[name], manifest)
    texts = [text.strip() for text in EDGE_TEXTS]
    for prompt in ("", *filter(None, manifest.prompts.values())):
        reference = model.encode(texts, prompt=prompt)
        served = engine.embed([apply_prompt(text, prompt) for text in texts])
        np.testing.assert_allclose(served, reference, atol=1e-4)
    assert manifest.dim == reference.shape[1] == (16 if name == "cls and dense" else 32)
    assert manifest.normalize == VARIANTS[name].get("normalize", True)
    assert manifest.prompts == ({"query": "query: ", "document": ""} if "prompts" in VARIANTS[name] else {})
    assert manifest.default_prompt == VARIANTS[name].get("default_prompt")
    assert (
        cosine_pairs(normalize(engine.embed(texts, normalize=False)), engine.embed(texts, normalize=True)).min()
        > 0.9999
    )


def test_every_kind_of_model_has_a_space_of_its_own(variants: dict[str, Path], tiny_lunchbox_path: Path) -> None:
    boxes = [tiny_lunchbox_path, *variants.values()]
    assert len({read_manifest(box).space_id for box in boxes}) == len(boxes)


@pytest.mark.parametrize(
    "name", ["model.fp32.onnx", "tokenizer.json", "canary.json", "certificate.json", "MODEL_CARD.md"]
)
def test_an_altered_file_does_not_verify(name: str, box: Path) -> None:
    with (box / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(LunchboxError, match=name):
        verify_files(box, read_manifest(box))


def test_packing_the_same_run_again_does_nothing(box: Path, tiny_model_path: Path) -> None:
    before = age_of(box)
    manifest = pack_lunchbox(tiny_model_path, box, FACTS, min_cosine=0.9999)
    assert manifest == read_manifest(box)
    assert age_of(box) == before


def test_a_broken_box_is_packed_anew_in_the_same_space(box: Path, tiny_model_path: Path) -> None:
    old = read_manifest(box)
    (box / "model.fp32.onnx").write_bytes(b"half a mod")
    gain = Comparison("spearman", 0.84, 0.82, Interval(0.02, 0.01, 0.03), 100, 0.95)
    evidence = Evidence(ReleaseParams(), FACTS.metrics, versus_base=gain)
    report = run_gates(evidence, candidate="ekiben:1-01234567")
    near = {"anchor/same_text_cosine": 0.98124, "anchor/weight": 1.0, "anchor/version": 12.0}
    facts = dataclasses.replace(FACTS, report=report, metrics={**FACTS.metrics, **near})
    new = pack_lunchbox(tiny_model_path, box, facts, min_cosine=0.9999)
    verify_files(box, read_manifest(box))
    assert new.space_id == old.space_id
    assert new.files["model.fp32.onnx"] == old.files["model.fp32.onnx"]
    assert (new.params, new.licence, new.nested_dims) == ({"train.learning_rate": 2e-5}, None, [])
    assert [path.name for path in box.parent.iterdir()] == [box.name]
    card = (box / "MODEL_CARD.md").read_text(encoding="utf-8")
    for fact in (
        "ekiben:1-01234567", "| spearman | 0.8200 | 0.8400 | +0.0200 |", "+0.0100 to +0.0300", "data/pairs.csv", "`v7`",
        FACTS.data.md5, str(FACTS.git_commit), new.space_id, "train.learning_rate", "0.4321", "smallest cosine",
        "| quality | passed |", "It was kept near version 12: same-text cosine 0.9812 on dev, weight 1 (",
    ):  # fmt: skip
        assert fact in card
    assert json.loads((box / "certificate.json").read_text())["thresholds"]["min_cosine"] == 0.9999


def test_a_certified_int8_is_the_default_and_every_precision_has_its_canary(
    box: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    fp32_only = read_manifest(box)
    test = Part(pd.read_csv(write_pairs(tmp_path / "pairs.csv", rows=40)))
    lenient = ReleaseParams(int8_max_loss=1, int8_mean_cosine=0.9, int8_min_cosine=0.9, int8_min_speedup=0.001)
    pack = partial(pack_lunchbox, tiny_model_path, box, min_cosine=0.9999)
    manifest = pack(FACTS, int8=Int8Trial(lenient, test))
    assert manifest == read_manifest(box)
    assert manifest.precisions == {"fp32": "model.fp32.onnx", "int8": INT8_FILE}
    assert manifest.default_precision == "int8"
    assert manifest.space_id == fp32_only.space_id
    assert INT8_FILE in manifest.files
    opened = [open_lunchbox(box), open_lunchbox(box, precision="int8"), open_lunchbox(box, precision="fp32")]
    for each in opened:
        assert each.find_deviation(each.engine.embed(each.canary.texts)) is None
    assert [each.engine.precision for each in opened] == ["int8", "int8", "fp32"]
    np.testing.assert_array_equal(opened[0].canary.vectors, opened[1].canary.vectors)
    assert not np.array_equal(opened[0].canary.vectors, opened[2].canary.vectors)
    card = (box / "MODEL_CARD.md").read_text(encoding="utf-8")
    for fact in ("int8 is the default precision.", "| spearman |", "mean cosine 0.9", "times fp32", INT8_FILE):
        assert fact in card

    before = age_of(box)
    assert pack(FACTS, int8=Int8Trial(lenient, test)) == manifest
    assert age_of(box) == before
    # Asked for more than int8 can do: packed anew without it.
    strict = lenient.model_copy(update={"int8_min_speedup": 1e6})
    without = pack(FACTS, int8=Int8Trial(strict, test))
    assert (without.precisions, without.default_precision) == ({"fp32": "model.fp32.onnx"}, "fp32")
    assert not (box / INT8_FILE).exists()
    assert "not shipped: it computes" in (box / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert json.loads((box / "certificate.json").read_text())["int8"]["reason"]
    with pytest.raises(LunchboxError, match="'int8' is not in this lunchbox"):
        open_lunchbox(box, precision="int8")
    # Not asked for at all: no trace of it.
    pack(FACTS)
    assert "int8" not in json.loads((box / "certificate.json").read_text())


def test_a_refused_box_leaves_nothing_and_the_old_one_stays(box: Path, tiny_model_path: Path) -> None:
    before = age_of(box)
    other_run = dataclasses.replace(FACTS, version="2", run_id="f" * 32)
    with pytest.raises(CertificationError, match="below 1"):
        pack_lunchbox(tiny_model_path, box, other_run, min_cosine=1.0)
    assert age_of(box) == before
    assert [path.name for path in box.parent.iterdir()] == [box.name]


def test_the_licence_is_what_the_model_or_its_base_declares(tmp_path: Path, tiny_model_path: Path) -> None:
    assert find_licence(tmp_path, "sentence-transformers/all-MiniLM-L6-v2") == "apache-2.0"
    assert find_licence(tmp_path, "no such model at all") is None
    assert find_licence(tiny_model_path, str(tiny_model_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Model", encoding="utf-8")
    assert find_licence(tmp_path, "sentence-transformers/all-MiniLM-L6-v2") == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n", encoding="utf-8")
    assert find_licence(tmp_path, "no such model at all") is None


# --- what a release adds to a packed box


COMPAT = Compat(kind="adapter", version="1", tag="ekiben:1-00000000", space_id="0a0b0c0d", dim=24, reason="it turned")
EARLIER = Compat(
    kind="compatible", version="0", tag="ekiben:0-00000000", space_id="0e0f", dim=32, reason="hardly moved"
)
SERVING = Serving(p95_ms=3.25, texts_per_s=512.0, start_s=4.5, memory_mb=210.0, bytes_per_vector=128.0)


def make_map(seed: int, columns: int = 24) -> Vectors:
    turn: Vectors = np.linalg.qr(np.random.default_rng(seed).normal(size=(32, 32)))[0][:, :columns].astype(np.float32)
    return turn


def finish(box: Path, manifest: Manifest) -> Manifest:
    gain = Comparison("spearman", 0.84, 0.82, Interval(0.02, 0.01, 0.03), 100, 0.95)
    evidence = Evidence(ReleaseParams(), FACTS.metrics, versus_base=gain, compat=manifest.compat)
    return finish_card(box, manifest, run_gates(evidence, candidate="ekiben:1-01234567"), SERVING)


def is_packed(box: Path) -> bool:
    return find_packed(box, FACTS, min_cosine=0.9999) is not None


def test_relation_maps_and_last_verdicts_join_a_packed_box(box: Path) -> None:
    packed = read_manifest(box)
    related = attach_compat(box, packed, COMPAT, make_map(0), earlier=[(EARLIER, make_map(1, 32))])
    assert related == read_manifest(box)
    assert related.compat is not None
    assert related.compat.adapter == "adapter.0a0b0c0d.npy"
    assert [relation.adapter for relation in related.earlier] == ["adapter.0e0f.npy"]
    finished = finish(box, related)
    assert finished == read_manifest(box)
    opened = open_lunchbox(box)
    assert {space: adapter.dim for space, adapter in opened.adapters.items()} == {"0a0b0c0d": 24, "0e0f": 32}
    assert set(finished.files) | {"manifest.json"} == {path.name for path in box.iterdir()}
    unchanged = {"files", "compat", "earlier"}
    assert finished.model_dump(exclude=unchanged) == packed.model_dump(exclude=unchanged)
    card = (box / "MODEL_CARD.md").read_text(encoding="utf-8")
    for fact in ("**adapter** with ekiben:1-00000000", "it turned", "hardly moved", "| quality | passed |", "3.2"):
        assert fact in card


def test_a_related_and_finished_box_is_still_the_packed_one(box: Path, tiny_model_path: Path) -> None:
    finish(box, attach_compat(box, read_manifest(box), COMPAT, make_map(0)))
    before = age_of(box)
    assert pack_lunchbox(tiny_model_path, box, FACTS, min_cosine=0.9999) == read_manifest(box)
    assert age_of(box) == before


def test_adding_the_same_again_changes_no_byte(box: Path) -> None:
    def read_all() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in box.iterdir()}

    finish(box, attach_compat(box, read_manifest(box), COMPAT, make_map(0)))
    first = read_all()
    finish(box, attach_compat(box, read_manifest(box), COMPAT, make_map(0)))
    assert read_all() == first


def test_another_champion_takes_the_place_of_the_one_before_with_all_its_maps(box: Path) -> None:
    attach_compat(box, read_manifest(box), COMPAT, make_map(0), earlier=[(EARLIER, make_map(1, 32))])
    other = COMPAT.model_copy(update={"kind": "breaking", "space_id": "ffff", "version": "5"})
    manifest = attach_compat(box, read_manifest(box), other, None)
    assert [path.name for path in box.glob("adapter.*")] == []
    assert [relation.space_id for relation in manifest.relations] == ["ffff"]
    assert open_lunchbox(box).adapters == {}
    manifest = attach_compat(box, manifest, None, None)
    assert manifest.relations == []
    assert open_lunchbox(box).manifest == manifest


def test_what_is_no_map_never_gets_into_a_box(box: Path) -> None:
    before = read_manifest(box)
    with pytest.raises(ValueError, match=r"space 0a0b0c0d stretches"):
        attach_compat(box, before, COMPAT, 2 * make_map(0))
    assert open_lunchbox(box).manifest == before


def run_killed(act: Callable[[], object], step: int) -> bool:
    """Run `act` in a copy of this process that is killed before its rename number `step`; whether it was."""
    child = os.fork()
    if child == 0:
        done, real = [], Path.replace

        def replace_or_die(self: Path, target: Path) -> Path:
            if len(done) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(target)
            return real(self, target)

        Path.replace = replace_or_die  # type: ignore[method-assign,assignment]
        try:
            act()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("stage", ["attach", "attach another map", "finish"])
def test_a_kill_leaves_the_box_as_it_was_or_to_be_packed_anew_and_the_next_call_completes_it(
    stage: str, tiny_lunchbox_path: Path, tmp_path: Path
) -> None:
    start = Path(shutil.copytree(tiny_lunchbox_path, tmp_path / "start"))
    if stage != "attach":
        attach_compat(start, read_manifest(start), COMPAT, make_map(7 if stage == "attach another map" else 0))

    def act(box: Path) -> Manifest:
        if stage == "finish":
            return finish(box, read_manifest(box))
        return attach_compat(box, read_manifest(box), COMPAT, make_map(0))

    outcomes = []
    for step in range(5):
        box = Path(shutil.copytree(start, tmp_path / "boxes" / f"{stage} {step}"))
        if not run_killed(lambda box=box: act(box), step):  # type: ignore[misc]
            break
        outcomes.append(is_packed(box))
        if outcomes[-1]:
            assert open_lunchbox(box).manifest == read_manifest(start)
            assert act(box) == open_lunchbox(box).manifest
            assert [path for path in box.parent.iterdir() if path.name.startswith(f".{box.name}-")] == []
    # Two renames: after a kill between them a new map has no hash yet, and an altered file has the wrong one.
    assert outcomes == [True, stage == "attach"]
    assert is_packed(box)
    assert open_lunchbox(box).adapters.keys() == {"0a0b0c0d"}


def test_a_box_of_the_layout_before_opens_and_gets_the_new_one_with_what_is_added(box: Path) -> None:
    raw = json.loads((box / "manifest.json").read_text(encoding="utf-8"))
    for name in ("compat", "earlier", "nested_dims", "licence", "params"):
        del raw[name]
    (box / "manifest.json").write_text(json.dumps(raw | {"layout": 1}), encoding="utf-8")
    old = open_lunchbox(box).manifest
    assert (old.layout, old.compat, old.nested_dims, old.relations) == (1, None, [], [])
    assert is_packed(box)
    assert attach_compat(box, old, COMPAT, make_map(0)).layout == 2
    assert finish(box, read_manifest(box)).layout == 2
    assert open_lunchbox(box).manifest.space_id == old.space_id


def test_a_box_of_a_layout_to_come_is_refused(box: Path) -> None:
    manifest = read_manifest(box)
    write_manifest(box, manifest.model_copy(update={"layout": 3}))
    with pytest.raises(LunchboxError, match=r"layout 3; this server reads 1 and 2: update the server"):
        open_lunchbox(box)
