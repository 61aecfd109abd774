"""Classes of relations between spaces: by vectors whose relation is known, and by real boxes of tiny models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bentos.adapter import find_problem
from bentos.engine import RAW_OUTPUT, UNIT_OUTPUT, Engine
from bentos.errors import LunchboxError
from bentos.lunchbox import open_lunchbox
from bentos.manifest import CANARY_FILE, read_manifest, sha256_file, write_manifest
from bentos.vectors import cosine_pairs, normalize
from flows.core.compat import Embedded, classify, compare_spaces, find_failures, list_earlier, measure
from flows.core.export import MODEL_FILE
from flows.core.lunchbox import attach_compat
from flows.core.probes import Probe
from flows.core.procrustes import fit_map
from flows.core.rivals import Champion
from flows.errors import DataError
from flows.params import ReleaseParams
from tests.flows.support import TOPICS

PARAMS = ReleaseParams()


class Space:
    """A manifest as far as `measure` looks at it."""

    def __init__(self, dim: int) -> None:
        self.dim = dim


def embed(vectors: np.ndarray, fit: int, queries: int) -> Embedded:
    unit = normalize(vectors).astype(np.float32)
    space: Any = Space(unit.shape[1])
    return Embedded(space, unit[:fit], unit[fit : fit + queries], unit[fit + queries :])


def make_texts(fit: int, queries: int, documents: int, judgements: list[tuple[int, int, float]] | None = None) -> Probe:
    return Probe(
        fit_queries=[f"f{n}" for n in range(fit)],
        fit_documents=[],
        queries=[f"q{n}" for n in range(queries)],
        documents=[f"d{n}" for n in range(documents)],
        judgements=judgements or [],
    )


def relate(
    new: np.ndarray, old: np.ndarray, *, fit: int = 300, queries: int = 60, params: ReleaseParams = PARAMS
) -> tuple[str, dict[str, float]]:
    """The class and the figures of two arrays of vectors of the same texts: for the fit, queries, documents."""
    ours, theirs = embed(new, fit, queries), embed(old, fit, queries)
    texts = make_texts(fit, queries, len(new) - fit - queries)
    figures = measure(ours, theirs, fit_map(ours.fit, theirs.fit), texts)
    return classify(figures, params, is_same=False)[0], figures


def make_clusters(random: np.random.Generator, texts: int, dim: int) -> np.ndarray:
    """Vectors as texts have them: some like each other, most not."""
    centres = random.normal(size=(40, dim))
    return normalize(centres[random.integers(40, size=texts)] + 0.7 * random.normal(size=(texts, dim)))


def make_turn(random: np.random.Generator, dim: int) -> np.ndarray:
    return np.linalg.qr(random.normal(size=(dim, dim)))[0]


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), dim=st.integers(8, 48))
def test_a_turned_space_is_reached_by_its_map(seed: int, dim: int) -> None:
    random = np.random.default_rng(seed)
    old = make_clusters(random, 560, dim)
    kind, figures = relate(old @ make_turn(random, dim), old)
    assert kind == "adapter"
    assert figures["mapped_recall"] > 0.9
    assert figures["mapped_cosine_mean"] > 0.99
    assert figures["recall"] < 0.5
    assert figures["recall"] < figures["mixed_recall"] < 0.9 < figures["mapped_mixed_recall"]
    assert figures["overlap"] > 0.99


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), noise=st.floats(0.0, 0.1), dim=st.integers(16, 48))
def test_a_space_that_moved_a_little_is_compatible(seed: int, noise: float, dim: int) -> None:
    random = np.random.default_rng(seed)
    old = make_clusters(random, 560, dim)
    kind, figures = relate(old + noise * random.normal(size=old.shape) / np.sqrt(dim), old)
    assert kind == "compatible"
    assert figures["recall_low"] <= figures["recall"] <= 1.0
    assert figures["kept"] > 0.98


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), dims=st.tuples(st.integers(8, 48), st.integers(8, 48)))
def test_unrelated_spaces_break(seed: int, dims: tuple[int, int]) -> None:
    random = np.random.default_rng(seed)
    kind, figures = relate(make_clusters(random, 560, dims[0]), make_clusters(random, 560, dims[1]))
    assert kind == "breaking"
    assert figures["mapped_recall"] < 0.5
    assert ("recall" in figures) == (dims[0] == dims[1])


def test_a_map_that_learned_few_texts_by_heart_does_not_pass() -> None:
    """With fewer texts than dimensions the map hits each of them, and yet says nothing about others."""
    random = np.random.default_rng(11)
    old = make_clusters(random, 400, 128)
    new = make_clusters(random, 400, 128)
    ours, theirs = embed(new, 40, 60), embed(old, 40, 60)
    matrix = fit_map(ours.fit, theirs.fit)
    assert cosine_pairs(ours.fit @ matrix, theirs.fit).mean() > 0.8
    assert relate(new, old, fit=40)[0] == "breaking"
    assert relate(old @ make_turn(random, 128), old, fit=40)[0] == "breaking"  # there is a map, but 40 do not show it


def test_the_larger_of_two_nested_spaces_maps_onto_the_smaller() -> None:
    random = np.random.default_rng(12)
    whole = make_clusters(random, 560, 24)
    assert relate(whole @ make_turn(random, 24), whole[:, :8])[0] == "adapter"
    kind, figures = relate(whole[:, :8], whole)  # the way back lacks two thirds of the dimensions
    assert kind == "breaking"
    assert "cosine_mean" not in figures
    assert 0.2 < figures["mapped_recall"] < 0.8


def test_a_collapsed_model_breaks_though_it_stays_near() -> None:
    """All vectors nearly the same direction in both: the cosines are high, and nothing is found any more."""
    random = np.random.default_rng(13)
    common = normalize(np.ones((1, 32)))
    old = normalize(common + 0.3 * make_clusters(random, 560, 32))
    kind, figures = relate(normalize(common + 0.01 * random.normal(size=old.shape)), old)
    assert figures["cosine_mean"] > 0.9
    assert kind == "breaking"


def test_labels_may_refuse_what_the_neighbours_let_pass() -> None:
    random = np.random.default_rng(14)
    old = make_clusters(random, 560, 32)
    new = old + 0.02 * random.normal(size=old.shape) / np.sqrt(32)
    ours, theirs = embed(new, 300, 60), embed(old, 300, 60)
    nearest = (theirs.queries @ theirs.documents.T).argmax(axis=1)
    texts = make_texts(300, 60, 200, [(query, int(document), 1.0) for query, document in enumerate(nearest)])
    figures = measure(ours, theirs, None, texts)
    assert figures["old_ndcg"] == 1.0
    assert figures["ndcg_share_low"] <= figures["ndcg"]
    assert not find_failures(figures, PARAMS)
    assert find_failures(figures | {"ndcg_share_low": 0.9}, PARAMS) == [
        "their nDCG down to 0.900 of the old queries', asked 0.95 (release.compat_min_ndcg)"
    ]
    assert find_failures(figures | {"recall_low": float("nan")}, PARAMS)


# Measured on MiniLM and STS-B: 500 queries, 1467 documents.
INT8_BESIDE_FP32 = {
    "cosine_mean": 0.9976, "cosine_min": 0.9901, "recall": 0.9602, "recall_low": 0.9552, "mixed_recall_low": 0.9452,
    "kept": 0.9994, "ndcg_share_low": 1.0, "ranks": 10,
}  # fmt: skip
TRAINED_LONGER = {
    "cosine_mean": 0.9606, "recall": 0.838, "recall_low": 0.8274, "mixed_recall_low": 0.7594, "ndcg_share_low": 0.9856,
    "kept": 0.9841, "ranks": 10, "mapped_cosine_mean": 0.9702, "mapped_recall": 0.852, "mapped_recall_low": 0.8418,
    "mapped_kept": 0.9869, "mapped_ndcg_share_low": 0.9876,
}  # fmt: skip


def test_an_index_of_both_must_hold_for_a_compatible_space() -> None:
    """int8 passes beside fp32; what was trained on with twice the rate is asked through its map."""
    assert classify(INT8_BESIDE_FP32, PARAMS, is_same=False)[0] == "compatible"
    kind, reason = classify(TRAINED_LONGER, PARAMS, is_same=False)
    assert kind == "adapter"
    assert "where every other document is a new vector down to 0.759, asked 0.8 (release.compat_min_recall)" in reason
    assert classify(TRAINED_LONGER, ReleaseParams(compat_min_recall=0.75), is_same=False)[0] == "compatible"
    assert find_failures(INT8_BESIDE_FP32 | {"mixed_recall_low": float("nan")}, PARAMS)


@pytest.mark.parametrize("noise", [0.07, 0.12])  # what int8 adds; what another seed of one recipe does
def test_a_near_model_keeps_an_index_of_both(noise: float) -> None:
    random = np.random.default_rng(16)
    old = make_clusters(random, 560, 48)
    kind, figures = relate(old + noise * random.normal(size=old.shape) / np.sqrt(48), old)
    assert kind == "compatible"
    assert figures["cosine_mean"] > 0.992
    assert 0.8 < figures["mixed_recall_low"] < figures["recall"]


def test_what_is_called_identical_says_what_was_asked() -> None:
    kind, reason = classify(INT8_BESIDE_FP32, PARAMS, is_same=True)
    assert kind == "identical"
    assert "0.99760 on average and 0.99010 at least" in reason
    assert "find 96% of the old ones' 10 nearest documents" in reason


def test_thresholds_are_the_users() -> None:
    random = np.random.default_rng(15)
    old = make_clusters(random, 560, 32)
    new = old + 0.5 * random.normal(size=old.shape) / np.sqrt(32)
    assert relate(new, old)[0] == "breaking"
    lenient = ReleaseParams(compat_min_recall=0.3, compat_min_cosine=0.5)
    assert relate(new, old, params=lenient)[0] == "compatible"


# --- real boxes


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Probe texts about four topics, as a run keeps them."""
    random = np.random.default_rng(9)

    def write(count: int, mark: str) -> list[str]:
        topics = [list(TOPICS)[number % 4] for number in range(count)]
        return [f"{' '.join(random.choice(TOPICS[topic], 4))} {mark}{n}" for n, topic in enumerate(topics)]

    texts = Probe(
        fit_queries=write(150, "a"),
        fit_documents=write(150, "b"),
        queries=write(60, "c"),
        documents=write(120, "d"),
        judgements=[(n, n, 1.0) for n in range(60)],
    )
    path = tmp_path_factory.mktemp("probe") / "probe_texts.json"
    path.write_text(texts.model_dump_json(), encoding="utf-8")
    return path


def turn_box(box: Path, to: Path, matrix: np.ndarray, space_id: str) -> Path:
    """Copy a lunchbox with its vectors multiplied by `matrix`: the same model in another space."""
    shutil.copytree(box, to)
    model = onnx.load(to / MODEL_FILE)
    for node in model.graph.node:
        for names in (node.output, node.input):
            names[:] = [f"{name}_{space_id}" if name in (RAW_OUTPUT, UNIT_OUTPUT) else name for name in names]
    model.graph.initializer.append(onnx.numpy_helper.from_array(matrix.astype(np.float32), f"turn_{space_id}"))
    for output in model.graph.output:
        inputs = [f"{output.name}_{space_id}", f"turn_{space_id}"]
        model.graph.node.append(onnx.helper.make_node("MatMul", inputs, [output.name]))
        output.type.tensor_type.shape.dim[1].dim_value = matrix.shape[1]
    onnx.save(model, to / MODEL_FILE)
    manifest = read_manifest(to).model_copy(update={"dim": matrix.shape[1], "space_id": space_id})
    canary = json.loads((to / CANARY_FILE).read_text())
    canary["vectors"] = Engine(to, manifest).embed(canary["texts"]).tolist()
    (to / CANARY_FILE).write_text(json.dumps(canary))
    files = {name: sha256_file(to / name) for name in manifest.files}
    write_manifest(to, manifest.model_copy(update={"files": files}))
    return to


@pytest.fixture(scope="module")
def turned(tiny_lunchbox_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's box in a turned space."""
    turn = make_turn(np.random.default_rng(1), 32)
    return turn_box(tiny_lunchbox_path, tmp_path_factory.mktemp("turned") / "box", turn, "aaaa")


def as_champion(box: Path, version: str = "1") -> Champion:
    return Champion(read_manifest(box).tag, version, box)


def change(box: Path, to: Path, **changes: Any) -> Path:
    """Copy a box whose manifest says something else."""
    shutil.copytree(box, to)
    write_manifest(to, read_manifest(to).model_copy(update=changes))
    return to


def test_a_turned_model_ships_a_map_that_serves_the_old_vectors(
    turned: Path, tiny_lunchbox_path: Path, probe: Path, tmp_path: Path
) -> None:
    compat, matrix = compare_spaces(turned, as_champion(tiny_lunchbox_path), probe, PARAMS)
    assert compat.kind == "adapter", compat.reason
    assert (compat.version, compat.space_id, compat.dim) == ("1", read_manifest(tiny_lunchbox_path).space_id, 32)
    assert compat.figures["mapped_recall"] > 0.95
    assert compat.figures["mapped_ndcg"] == pytest.approx(compat.figures["old_ndcg"], abs=0.02)
    assert "through the map" in compat.reason
    assert matrix is not None
    assert find_problem(matrix, 32) is None
    box = Path(shutil.copytree(turned, tmp_path / "box"))
    attach_compat(box, read_manifest(box), compat, matrix)
    new, old = open_lunchbox(box), open_lunchbox(tiny_lunchbox_path)
    texts = ["the chef cooks dinner", "a train leaves the station"]
    served = new.adapters[compat.space_id].apply(new.engine.embed(texts))
    assert cosine_pairs(served, old.engine.embed(texts)).min() > 0.99
    assert cosine_pairs(new.engine.embed(texts), old.engine.embed(texts)).max() < 0.9


def test_the_same_box_is_identical_and_other_weights_break(
    tiny_lunchbox_path: Path, variants: dict[str, Path], probe: Path
) -> None:
    compat, matrix = compare_spaces(tiny_lunchbox_path, as_champion(tiny_lunchbox_path), probe, PARAMS)
    assert (compat.kind, matrix) == ("identical", None)
    assert compat.figures["recall"] == compat.figures["overlap"] == 1.0
    for name in ("other weights", "cls and dense", "max and layer norm"):
        compat, matrix = compare_spaces(variants[name], as_champion(tiny_lunchbox_path), probe, PARAMS)
        assert (compat.kind, matrix) == ("breaking", None), name
        assert "asked" in compat.reason or "dimensions" in compat.reason


def test_the_same_vectors_under_another_id_are_identical(tiny_lunchbox_path: Path, probe: Path, tmp_path: Path) -> None:
    renamed = change(tiny_lunchbox_path, tmp_path / "box", space_id="bbbb")
    compat, matrix = compare_spaces(renamed, as_champion(tiny_lunchbox_path), probe, PARAMS)
    assert (compat.kind, matrix) == ("identical", None)
    attach_compat(renamed, read_manifest(renamed), compat, matrix)
    assert list(open_lunchbox(renamed).adapters) == [read_manifest(tiny_lunchbox_path).space_id]


def test_one_id_whose_requests_get_other_vectors_is_not_identical(
    tiny_lunchbox_path: Path, probe: Path, tmp_path: Path
) -> None:
    """Fewer tokens give long texts other vectors; the id, of weights, tokenizer and prompts, does not know it."""
    short = change(tiny_lunchbox_path, tmp_path / "box", max_tokens=4)
    compat, matrix = compare_spaces(short, as_champion(tiny_lunchbox_path), probe, PARAMS)
    assert compat.space_id == read_manifest(short).space_id
    assert compat.kind == "breaking"
    assert matrix is None


def test_int8_and_fp32_of_a_model_are_identical(
    tiny_lunchbox_path: Path, probe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine stands for int8 by adding what int8 adds: an error of cosine 0.997, another one for each side."""
    whole = Engine.embed

    def rounded(self: Engine, texts: list[str], **options: Any) -> np.ndarray:
        vectors = whole(self, texts, **options)
        if self.precision != "int8":
            return vectors
        random = np.random.default_rng(len(self.manifest.space_id))
        return normalize(vectors + 0.08 * random.normal(size=vectors.shape) / np.sqrt(32)).astype(np.float32)

    monkeypatch.setattr(Engine, "embed", rounded)
    int8 = {"precisions": {"fp32": MODEL_FILE, "int8": MODEL_FILE}, "default_precision": "int8"}
    one = change(tiny_lunchbox_path, tmp_path / "one", **int8)
    two = change(tiny_lunchbox_path, tmp_path / "two", space_id="bb", **int8)
    for new, old in ((one, tiny_lunchbox_path), (tiny_lunchbox_path, one), (two, one), (two, tiny_lunchbox_path)):
        compat, _ = compare_spaces(new, as_champion(old), probe, PARAMS)
        assert compat.kind == "identical", compat.reason
        assert compat.figures["cosine_min"] < 0.9999


def test_without_probe_texts_only_equal_ids_say_anything(
    tiny_lunchbox_path: Path, turned: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "probe_texts.json"
    compat, matrix = compare_spaces(tiny_lunchbox_path, as_champion(tiny_lunchbox_path), missing, PARAMS)
    assert (compat.kind, compat.figures, matrix) == ("identical", {}, None)
    compat, matrix = compare_spaces(turned, as_champion(tiny_lunchbox_path), missing, PARAMS)
    assert (compat.kind, matrix) == ("breaking", None)
    assert "kept no probe texts" in compat.reason
    missing.write_text(make_texts(100, 9, 9).model_dump_json(), encoding="utf-8")
    compat, _ = compare_spaces(turned, as_champion(tiny_lunchbox_path), missing, PARAMS)
    assert compat.kind == "breaking"
    assert "9 queries and 9 documents" in compat.reason


def test_without_texts_for_a_fit_there_is_no_map(
    turned: Path, tiny_lunchbox_path: Path, probe: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "probe_texts.json"
    content = json.loads(probe.read_text()) | {"fit_queries": [], "fit_documents": []}
    bare.write_text(json.dumps(content), encoding="utf-8")
    compat, matrix = compare_spaces(turned, as_champion(tiny_lunchbox_path), bare, PARAMS)
    assert (compat.kind, matrix) == ("breaking", None)
    assert compat.reason.endswith("through a map, none could be fitted")


def test_what_cannot_be_read_is_told(tiny_lunchbox_path: Path, probe: Path, tmp_path: Path) -> None:
    with pytest.raises(LunchboxError, match="not a lunchbox"):
        compare_spaces(tiny_lunchbox_path, Champion("ekiben:1-0", "1", tmp_path), probe, PARAMS)
    broken = tmp_path / "probe_texts.json"
    broken.write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match="train again"):
        compare_spaces(tiny_lunchbox_path, as_champion(tiny_lunchbox_path), broken, PARAMS)


def test_a_third_version_reaches_the_first_by_a_map_of_its_own(
    turned: Path, tiny_lunchbox_path: Path, probe: Path, tmp_path: Path
) -> None:
    """Two maps one after the other would add their errors up, and nobody would have measured them."""
    second = Path(shutil.copytree(turned, tmp_path / "2"))
    first_space = read_manifest(tiny_lunchbox_path).space_id
    first = as_champion(tiny_lunchbox_path)
    champion = attach_compat(second, read_manifest(second), *compare_spaces(second, first, probe, PARAMS))
    third = turn_box(second, tmp_path / "3", make_turn(np.random.default_rng(2), 32), "cccc")
    assert [relation.space_id for relation in list_earlier(champion)] == [first_space]
    earlier = [compare_spaces(third, first, probe, PARAMS)]
    to_second = compare_spaces(third, as_champion(second, "2"), probe, PARAMS)
    manifest = attach_compat(third, read_manifest(third), *to_second, earlier=earlier)
    assert [relation.kind for relation in manifest.relations] == ["adapter", "adapter"]
    opened, oldest = open_lunchbox(third), open_lunchbox(tiny_lunchbox_path)
    assert list(opened.adapters) == ["aaaa", first_space]
    texts = ["the chef cooks dinner", "a train leaves the station"]
    served = opened.adapters[first_space].apply(opened.engine.embed(texts))
    assert cosine_pairs(served, oldest.engine.embed(texts)).min() > 0.99
