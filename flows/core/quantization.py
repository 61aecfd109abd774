"""From `model.fp32.onnx` to `model.int8.onnx`: the same graph with int8 products, a text's vector free of its mates.

Core layer; knows ONNX and ONNX Runtime. Weights become int8 with one scale a column, word embeddings int8 with one
scale a row. What a product reads (its rows are tokens) becomes uint8 with a scale that never depends on another text:

- a fixed scale, where a LayerNorm bounds the values: its output, and the attention's means of linear maps of it. The
  range is measured on texts. Before that, channels that stick out are scaled down and their weights up (Xiao et al.,
  2023, "SmoothQuant"), as one channel in 400 would else take ten times the range of the others;
- a scale for each row, where nothing bounds them: behind Gelu, say, where single tokens are ten times larger.

ONNX Runtime's own dynamic quantization takes one range over the whole batch, so that its vectors depend on their mates
(cosine down to 0.97); padding would widen it as well. Weights keep to 7 bits, as two products of 8 bits overflow the
16-bit sums of processors without VNNI.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
MIN_OPSET = 18  # ReduceMax takes its axes as an input
MIN_TABLE_ROWS = 256  # smaller embedding tables (positions of short models, token types) stay as they are
WEIGHT_LIMIT = 63  # 7 bits: 2 x 255 x 64 fits into 16 bits with its sign
TABLE_LIMIT = 127
ROW_LIMIT, ROW_ZERO = 127, 128  # by row: uint8 around 128
TINY = 1e-30  # a scale of 0 would divide by it; a row of zeros stays zero
SMOOTHING = 0.5  # share of a channel's range that moves into the weights
ACTIVATION_FLOORS = {"Gelu": -0.171, "Relu": 0.0}  # what their values never fall below: the range need not be even
GELU_STEPS = 24  # of the 256 that lie below zero then
NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
RESHAPES = ("Reshape", "Transpose", "Identity")
CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class Quantized:
    """What became int8."""

    fixed: int  # products whose input has a fixed scale
    by_row: int  # products whose input has a scale for each row
    tables: int  # embedding tables
    left: int  # products with weights of another kind than can be quantized: they stay fp32

    @property
    def products(self) -> int:
        """How many matrix products compute in int8."""
        return self.fixed + self.by_row


@dataclass(frozen=True)
class _Input:
    """A tensor that products read, as uint8: `(x - zero) * scale`, times `row_scale` when it has one."""

    name: str
    scale: str
    zero: str
    row_scale: str | None = None
    smoothing: Array | None = None  # (channels,) what each channel was divided by


@dataclass
class _Range:
    """The smallest and the largest value of each channel, over all texts that were looked at."""

    low: Array
    high: Array

    def widen(self, values: Array) -> None:
        rows = values.reshape(-1, values.shape[-1])
        self.low, self.high = np.minimum(self.low, rows.min(axis=0)), np.maximum(self.high, rows.max(axis=0))


def quantize(source: Path, target: Path, token_ids: Sequence[Sequence[int]]) -> Quantized:
    """Write the int8 form of the model at `source` to `target`, or nothing when no product can become int8.

    Args:
        source: An ONNX file as the export writes it.
        target: The file to write.
        token_ids: Texts as the model sees them, a few hundred tokens at least: they say how far the values that get a
            fixed scale reach. Values beyond are cut.
    """
    import onnx

    model = onnx.load(source)
    rewriter = _Rewriter(model)
    found = rewriter.products if _opset(model) >= MIN_OPSET else []
    if found:
        fixed = sorted({node.input[0] for node in found if rewriter.is_bounded(node.input[0])})
        rewriter.rewrite(_measure_ranges(model, fixed, token_ids))
        onnx.checker.check_model(model)
        onnx.save(model, target)
    return Quantized(rewriter.fixed, rewriter.by_row, rewriter.tables, rewriter.find_left())


def _opset(model: Any) -> int:
    return max((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), default=0)


def _measure_ranges(model: Any, names: Sequence[str], token_ids: Sequence[Sequence[int]]) -> dict[str, _Range]:
    """Run each text alone, so that no padding is looked at."""
    import onnx
    import onnxruntime as ort

    if not names:
        return {}
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = ort.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    ranges: dict[str, _Range] = {}
    for ids in token_ids:
        feeds = {"input_ids": np.asarray([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
        for name, values in zip(names, session.run(list(names), feeds), strict=True):
            if name not in ranges:
                zeros = np.zeros(values.shape[-1], np.float32)  # zero is in every range: it must be exact
                ranges[name] = _Range(zeros, zeros)
            ranges[name].widen(values)
    return ranges


@dataclass
class _Rewriter:
    """One graph while its nodes are replaced, in their order."""

    model: Any
    fixed: int = 0
    by_row: int = 0
    tables: int = 0
    nodes: list[Any] = field(default_factory=list)  # the new ones
    constants: dict[str, Array] = field(default_factory=dict)  # likewise
    inputs: dict[str, _Input] = field(default_factory=dict)  # by the name of the tensor

    def __post_init__(self) -> None:
        from onnx import numpy_helper

        graph = self.model.graph
        self.old = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.users: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.outputs = {item.name for item in graph.output}
        self.products = [node for node in graph.node if self._is_product(node)]

    def _is_product(self, node: Any) -> bool:
        """Whether it multiplies tokens by weights. Gemm, of the heads, does so once a text: nothing to gain there."""
        weights = self.old.get(node.input[1]) if node.op_type == "MatMul" else None
        return (
            weights is not None and weights.ndim == 2 and weights.dtype == np.float32 and node.input[0] not in self.old
        )

    def find_left(self) -> int:
        """Count the products with weights that were not quantized."""
        known = {id(node) for node in self.products} if self.fixed + self.by_row else set()
        kinds = ("MatMul", "Gemm", "Conv", "Einsum")
        nodes = (node for node in self.makers.values() if node.op_type in kinds and id(node) not in known)
        return sum(any(name in self.old and self.old[name].ndim > 1 for name in node.input) for node in nodes)

    def is_bounded(self, name: str) -> bool:
        """Whether a norm bounds a tensor, and its weights are its own, so that they can be scaled to its channels."""
        if any(len(self.users[node.input[1]]) > 1 for node in self.products if node.input[0] == name):
            return False
        node = self.makers.get(name)
        if node is not None and node.op_type in NORMS:
            return True
        while node is not None and node.op_type in RESHAPES:
            node = self.makers.get(node.input[0])
        return node is not None and node.op_type == "MatMul" and not any(name in self.old for name in node.input)

    def rewrite(self, ranges: Mapping[str, _Range]) -> None:
        """Replace what can be replaced, then drop the weights that nothing reads any more."""
        from onnx import helper, numpy_helper

        graph = self.model.graph
        products = {id(node) for node in self.products}
        done: set[str] = set()  # outputs that were made already
        for node in graph.node:
            if node.output[0] in done:
                continue
            if id(node) in products:
                done.add(self._rewrite_product(node, ranges))
            elif self._is_table(node):
                self._rewrite_table(node)
            else:
                self.nodes.append(node)
        read = {name for node in self.nodes for name in node.input}
        kept = [item for item in graph.initializer if item.name in read]
        kept += [numpy_helper.from_array(array, name) for name, array in self.constants.items() if name in read]
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(kept)
        self.model.opset_import.append(helper.make_opsetid(CONTRIB, 1))

    def _rewrite_product(self, node: Any, ranges: Mapping[str, _Range]) -> str:
        """Write `x @ W` (+ bias) in int8, and return the name of what it gives."""
        source, weights, result = node.input[0], self.old[node.input[1]], node.output[0]
        if source not in self.inputs:
            make = self._quantize_fixed if source in ranges else self._quantize_rows
            self.inputs[source] = make(source, ranges)
        x = self.inputs[source]
        name = node.input[1]
        if x.smoothing is not None:
            weights, name = weights * x.smoothing[:, None], f"{result}/smoothed"
        scales = np.maximum(np.abs(weights).max(axis=0) / WEIGHT_LIMIT, TINY).astype(np.float32)
        int8 = np.rint(weights / scales).clip(-WEIGHT_LIMIT, WEIGHT_LIMIT).astype(np.int8)
        inputs = [
            x.name,
            self._constant(f"{name}/int8", int8),
            x.scale,
            self._constant(f"{name}/scales", scales),
            x.zero,
        ]
        if x.row_scale is not None:
            self.by_row += 1
            product = self._node("MatMulIntegerToFloat", inputs, f"{result}/product", domain=CONTRIB)
            return self._node("Mul", [product, x.row_scale], result)
        self.fixed += 1
        addition, bias = self._find_bias(result, weights.shape[1])
        if addition is None:
            return self._node("MatMulIntegerToFloat", inputs, result, domain=CONTRIB)
        return self._node("MatMulIntegerToFloat", [*inputs, "", bias], addition.output[0], domain=CONTRIB)

    def _find_bias(self, result: str, width: int) -> tuple[Any, str]:
        """Find the addition of a bias that alone reads a product, and the bias."""
        users = self.users.get(result, [])
        if len(users) == 1 and users[0].op_type == "Add" and result not in self.outputs:
            for name in users[0].input:
                if name in self.old and self.old[name].shape == (width,) and self.old[name].dtype == np.float32:
                    return users[0], name
        return None, ""

    def _quantize_fixed(self, source: str, ranges: Mapping[str, _Range]) -> _Input:
        """Scale by numbers that are known beforehand."""
        low, high = ranges[source].low, ranges[source].high
        name, smoothing = source, None
        if self.makers[source].op_type in NORMS:
            smoothing = self._find_smoothing(source, np.maximum(high, -low))
            low, high = low / smoothing, high / smoothing
            inverse = self._constant(f"{source}/smoothing", (1 / smoothing).astype(np.float32))
            name = self._node("Mul", [source, inverse], f"{source}/smooth")
        least, most = float(low.min()), float(high.max())
        scale = max((most - least) / 255, TINY)
        scale_name = self._constant(f"{source}/scale", np.asarray(scale, np.float32))
        zero_name = self._constant(f"{source}/zero", np.asarray(round(-least / scale), np.uint8))
        quantized = self._node("QuantizeLinear", [name, scale_name, zero_name], f"{source}/uint8")
        return _Input(quantized, scale_name, zero_name, smoothing=smoothing)

    def _find_smoothing(self, source: str, reach: Array) -> Array:
        """What to divide each channel by: its own range against that of the weights that it meets."""
        weights = [self.old[node.input[1]] for node in self.products if node.input[0] == source]
        strength = np.max([np.abs(matrix).max(axis=1) for matrix in weights], axis=0)
        reach, strength = (np.maximum(values, max(values.max() * 1e-4, TINY)) for values in (reach, strength))
        smoothing = reach**SMOOTHING / strength ** (1 - SMOOTHING)
        scaled: Array = smoothing / np.exp(np.log(smoothing).mean())
        return scaled.astype(np.float32)

    def _quantize_rows(self, source: str, ranges: Mapping[str, _Range]) -> _Input:
        """Scale each row by the largest of its own values."""
        maker = self.makers.get(source)
        floor = ACTIVATION_FLOORS.get(maker.op_type) if maker is not None else None
        if floor is None:
            zero, least, values = ROW_ZERO, TINY, self._node("Abs", [source], f"{source}/size")
            steps = ROW_LIMIT
        else:  # one-sided: nearly all of the 256 steps for what is above zero
            zero, values = (GELU_STEPS if floor < 0 else 0), source
            least, steps = (-floor / zero if floor < 0 else TINY), 255 - zero
        last = self._constant("last_axis", np.asarray([-1], np.int64))
        largest = self._node("ReduceMax", [values, last], f"{source}/largest", keepdims=1)
        inverse = self._constant(f"one_of_{steps}", np.asarray(1 / steps, np.float32))
        raw = self._node("Mul", [largest, inverse], f"{source}/raw_row_scale")
        bound = self._constant(f"{source}/least_row_scale", np.asarray(least, np.float32))
        scale = self._node("Max", [raw, bound], f"{source}/row_scale")
        scaled = self._node("Div", [source, scale], f"{source}/scaled")
        one, zero_name = self._constant("one", np.asarray(1, np.float32)), f"zero_at_{zero}"
        self._constant(zero_name, np.asarray(zero, np.uint8))
        return _Input(self._node("QuantizeLinear", [scaled, one, zero_name], f"{source}/uint8"), one, zero_name, scale)

    def _is_table(self, node: Any) -> bool:
        """Whether it looks up rows of a large table of numbers that nothing else reads."""
        if node.op_type != "Gather" or any(item.name == "axis" and item.i != 0 for item in node.attribute):
            return False
        table = self.old.get(node.input[0])
        large = table is not None and table.ndim == 2 and table.dtype == np.float32 and len(table) >= MIN_TABLE_ROWS
        return large and len(self.users[node.input[0]]) == 1

    def _rewrite_table(self, node: Any) -> None:
        """Look up int8 rows and their scales."""
        from onnx import TensorProto

        self.tables += 1
        name, rows, result = node.input[0], node.input[1], node.output[0]
        table = self.old[name]
        scales = np.maximum(np.abs(table).max(axis=1, keepdims=True) / TABLE_LIMIT, TINY).astype(np.float32)
        int8 = self._constant(f"{name}/int8", np.rint(table / scales).astype(np.int8))
        found = self._node("Gather", [int8, rows], f"{result}/int8")
        numbers = self._node("Cast", [found], f"{result}/numbers", to=TensorProto.FLOAT)
        scale = self._node("Gather", [self._constant(f"{name}/scales", scales), rows], f"{result}/scale")
        self._node("Mul", [numbers, scale], result)

    def _constant(self, name: str, value: Array) -> str:
        self.constants[name] = value
        return name

    def _node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output
