from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from bentos.engine import Engine
from bentos.manifest import read_manifest
from bentos.vectors import cosine_pairs
from flows.core.edge_texts import CANARY_TEXTS, EDGE_TEXTS
from flows.core.export import MODEL_FILE
from flows.core.precision import INT8_FILE
from flows.core.quantization import MIN_TABLE_ROWS, Quantized, quantize
from tests.factories import TINY_MAX_TOKENS, VARIANTS, tiny_vocabulary

FLOOR = 0.98  # of the cosine with fp32: 32 random dimensions hold more noise than a trained model
ROW_ERROR = 0.03  # of a product's row, against its length
token_ids = st.lists(st.integers(5, len(tiny_vocabulary()) - 1), min_size=1, max_size=TINY_MAX_TOKENS)


def add_int8(box: Path) -> Quantized:
    """Write model.int8.onnx into the box, without asking whether it is any good."""
    texts = Engine(box, read_manifest(box)).tokenize([*EDGE_TEXTS, *CANARY_TEXTS])
    return quantize(box / MODEL_FILE, box / INT8_FILE, [text.ids for text in texts])


def open_engine(box: Path, precision: str) -> Engine:
    manifest = read_manifest(box)
    both = manifest.model_copy(update={"precisions": {"fp32": MODEL_FILE, "int8": INT8_FILE}})
    return Engine(box, both, threads=1, precision=precision)


@pytest.fixture(scope="module")
def boxes(
    tmp_path_factory: pytest.TempPathFactory, variants: dict[str, Path], tiny_lunchbox_path: Path
) -> dict[str, Path]:
    """A copy of the lunchbox of every kind of model, with an int8 form that nobody judged."""
    folder = tmp_path_factory.mktemp("int8")
    copies = {
        name: Path(shutil.copytree(box, folder / str(number)))
        for number, (name, box) in enumerate({"plain": tiny_lunchbox_path, **variants}.items())
    }
    for box in copies.values():
        add_int8(box)
    return copies


def save_product(
    path: Path,
    weights: Sequence[np.ndarray],
    *,
    after: Callable[[str], list[Any]] = lambda name: [],
    kind: str = "MatMul",
    rank: int = 3,
) -> Path:
    """Write a graph `x > (nodes that `after` makes of x) > one product for each of the weights`."""
    nodes = after("x")
    source = nodes[-1].output[0] if nodes else "x"
    constants = [numpy_helper.from_array(matrix, f"w{number}") for number, matrix in enumerate(weights)]
    nodes += [helper.make_node(kind, [source, f"w{number}"], [f"y{number}"]) for number in range(len(weights))]
    axes = [f"axis{number}" for number in range(rank - 1)]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*axes, weights[0].shape[-2]])],
        [
            helper.make_tensor_value_info(f"y{number}", TensorProto.FLOAT, [*axes, matrix.shape[-1]])
            for number, matrix in enumerate(weights)
        ],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def run(path: Path, x: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x.astype(np.float32)}))


def random_matrix(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", ["plain", *VARIANTS])
def test_int8_of_every_kind_of_model_is_near_fp32(name: str, boxes: dict[str, Path]) -> None:
    fp32, int8 = (open_engine(boxes[name], precision) for precision in ("fp32", "int8"))
    for unit in (True, False):
        wide, small = (engine.embed([*EDGE_TEXTS], normalize=unit) for engine in (fp32, int8))
        assert cosine_pairs(small, wide).min() > FLOOR
        assert not np.array_equal(small, wide)
    assert (boxes[name] / INT8_FILE).stat().st_size < 0.6 * (boxes[name] / MODEL_FILE).stat().st_size


def test_what_a_norm_bounds_gets_a_fixed_scale_and_what_follows_gelu_a_row_s_own(boxes: dict[str, Path]) -> None:
    made = quantize(boxes["plain"] / MODEL_FILE, boxes["plain"] / "again.onnx", [[2, 7, 3], [2, 8, 9, 10, 3]])
    (boxes["plain"] / "again.onnx").unlink()
    assert (made.fixed, made.by_row, made.left) == (2 * 5, 2 * 1, 0)  # of each layer: q, k, v, out, up; down
    assert made.products == 12
    assert made.tables == sum(size >= MIN_TABLE_ROWS for size in (len(tiny_vocabulary()), 512, 2))
    head = quantize(boxes["cls and dense"] / MODEL_FILE, boxes["plain"] / "again.onnx", [[2, 7, 3]])
    assert (head.products, head.left) == (12, 1)


def test_after_onnx_runtime_s_own_rewriting_no_scale_is_taken_over_a_batch(
    boxes: dict[str, Path], tmp_path: Path
) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(boxes["plain"] / INT8_FILE, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimised.onnx").graph
    constants = {item.name for item in graph.initializer}
    kinds = {node.op_type for node in graph.node}
    assert "MatMulIntegerToFloat" in kinds
    assert not {kind for kind in kinds if kind.startswith("Dynamic")}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            assert set(node.input[1:]) <= constants
        if node.op_type == "ReduceMax":
            assert [numpy_helper.to_array(item) for item in graph.initializer if item.name == node.input[1]] == [[-1]]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["plain", *VARIANTS])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.lists(token_ids, min_size=2, max_size=9))
def test_a_batch_equals_its_singles(
    batch: list[list[int]], name: str, precision: str, boxes: dict[str, Path], engines: dict[tuple[str, str], Engine]
) -> None:
    if (name, precision) not in engines:
        engines[name, precision] = open_engine(boxes[name], precision)
    engine = engines[name, precision]
    ids = [[2, *text[: TINY_MAX_TOKENS - 2], 3] for text in batch]
    together, alone = (
        engine.infer(ids, normalize=False),
        np.vstack([engine.infer([text], normalize=False) for text in ids]),
    )
    assert cosine_pairs(together, alone).min() >= 0.9999
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), np.linalg.norm(alone, axis=1), rtol=1e-3)


@pytest.fixture(scope="module")
def engines() -> dict[tuple[str, str], Engine]:
    return {}


@pytest.mark.parametrize(("inner", "outer"), [(1, 1), (3, 5), (5, 2), (33, 7), (384, 31), (64, 64)])
def test_products_of_any_size_are_near(inner: int, outer: int, tmp_path: Path) -> None:
    weights, x = random_matrix(inner, outer), random_matrix(2, 9, inner, seed=1)
    source = save_product(tmp_path / "wide.onnx", [weights])
    assert quantize(source, tmp_path / "small.onnx", []) == Quantized(fixed=0, by_row=1, tables=0, left=0)
    (small,) = run(tmp_path / "small.onnx", x)
    bound = ROW_ERROR * np.linalg.norm(x, axis=-1, keepdims=True) * np.abs(weights).max(axis=0) * np.sqrt(inner)
    assert (np.abs(small - x @ weights) <= bound).all()


@pytest.mark.parametrize("activation", [None, "Gelu", "Relu"])
def test_a_row_knows_nothing_of_the_others_however_large(activation: str | None, tmp_path: Path) -> None:
    def activate(name: str) -> list[Any]:
        return [helper.make_node(activation, [name], ["active"])] if activation else []

    weights = random_matrix(24, 8)
    source = save_product(tmp_path / "wide.onnx", [weights], after=activate)
    quantize(source, tmp_path / "small.onnx", [])
    x = random_matrix(1, 6, 24, seed=2)
    (alone,) = run(tmp_path / "small.onnx", x)
    mates = np.concatenate([np.zeros((1, 1, 24)), x, 1e15 * np.abs(x[:, :1]), -1e15 * np.abs(x[:, :1])], axis=1)
    (among,) = run(tmp_path / "small.onnx", mates)
    np.testing.assert_array_equal(among[:, 1:7], alone)
    np.testing.assert_array_equal(among[:, 0], 0)
    assert np.isfinite(among).all()
    (wide,) = run(source, mates)
    lengths = np.linalg.norm(wide[:, 1:8], axis=-1, keepdims=True)
    assert (np.abs(among[:, 1:8] - wide[:, 1:8]) <= 2 * ROW_ERROR * lengths).all()


def test_a_number_that_is_none_stays_none(tmp_path: Path) -> None:
    source = save_product(tmp_path / "wide.onnx", [random_matrix(8, 4)])
    quantize(source, tmp_path / "small.onnx", [])
    x = random_matrix(1, 3, 8)
    x[0, 1, 2] = np.inf
    (small,) = run(tmp_path / "small.onnx", x)
    assert not np.isfinite(small[0, 1]).any()
    assert np.isfinite(small[0, [0, 2]]).all()


def test_products_of_one_input_share_its_uint8_form(tmp_path: Path) -> None:
    source = save_product(tmp_path / "wide.onnx", [random_matrix(8, 4), random_matrix(8, 6, seed=3)])
    assert quantize(source, tmp_path / "small.onnx", []).by_row == 2
    kinds = [node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node]
    assert (kinds.count("QuantizeLinear"), kinds.count("MatMulIntegerToFloat")) == (1, 2)


@pytest.mark.parametrize(
    ("kind", "weights", "left"),
    [
        ("Gemm", random_matrix(8, 4), 1),
        ("MatMul", random_matrix(2, 8, 4), 1),
        ("MatMul", random_matrix(8, 4).astype(np.float64), 1),
    ],
)
def test_what_is_of_another_kind_stays_as_it_is(kind: str, weights: np.ndarray, left: int, tmp_path: Path) -> None:
    rank = 2 if kind == "Gemm" else 3
    source = save_product(tmp_path / "wide.onnx", [weights], kind=kind, rank=rank)
    assert quantize(source, tmp_path / "small.onnx", []) == Quantized(fixed=0, by_row=0, tables=0, left=left)
    assert not (tmp_path / "small.onnx").exists()


def test_an_older_graph_stays_as_it_is(tmp_path: Path) -> None:
    model = onnx.load(save_product(tmp_path / "wide.onnx", [random_matrix(8, 4)]))
    model.opset_import[0].version = 17
    onnx.save(model, tmp_path / "wide.onnx")
    assert quantize(tmp_path / "wide.onnx", tmp_path / "small.onnx", []).products == 0
    assert not (tmp_path / "small.onnx").exists()


def test_weights_keep_to_seven_bits_so_that_no_processor_overflows(boxes: dict[str, Path]) -> None:
    constants = {item.name: item for item in onnx.load(boxes["plain"] / INT8_FILE).graph.initializer}
    products = [
        node for node in onnx.load(boxes["plain"] / INT8_FILE).graph.node if node.op_type == "MatMulIntegerToFloat"
    ]
    assert len(products) == 12
    for node in products:
        weights = numpy_helper.to_array(constants[node.input[1]])
        assert weights.dtype == np.int8
        assert 2 * 255 * int(np.abs(weights.astype(int)).max()) < 2**15
