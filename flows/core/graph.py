"""A transformer, a pooling and some heads as one torch module, and that module as one ONNX file.

Core layer, part of the export. Pooling is written out here, so that the graph holds it and no module of
sentence-transformers is needed to serve.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentos.engine import RAW_OUTPUT, UNIT_OUTPUT
from bentos.vectors import EPSILON
from flows.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

MAX_FILE_BYTES = 2**31 - 2**24  # protobuf's limit for one message, less room for the graph itself
EXAMPLE_TEXTS = ("a short text", "a somewhat longer text, so that the first one is padded")
NOISY_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


def _pool_mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)


def _pool_cls(states: Tensor, mask: Tensor) -> Tensor:
    return states[:, 0]


def _pool_max(states: Tensor, mask: Tensor) -> Tensor:
    return states.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(dim=1)


def _pool_lasttoken(states: Tensor, mask: Tensor) -> Tensor:
    last = mask.sum(dim=1, keepdim=True) - 1  # the server pads on the right
    return states.gather(1, last.unsqueeze(-1).expand(-1, -1, states.shape[-1])).squeeze(1)


POOLERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _pool_mean,
    "cls": _pool_cls,
    "max": _pool_max,
    "lasttoken": _pool_lasttoken,
}


def make_encoder(backbone: nn.Module, pooling: str, heads: Iterable[nn.Module]) -> nn.Module:
    """Join the parts into one module: token ids and mask -> vectors and unit vectors."""
    import torch

    pool = POOLERS[pooling]
    takes_types = "token_type_ids" in inspect.signature(backbone.forward).parameters

    class Encoder(torch.nn.Module):  # type: ignore[misc] # torch is not followed by mypy
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone
            self.heads = torch.nn.ModuleList(heads)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
            extra = {"token_type_ids": torch.zeros_like(input_ids)} if takes_types else {}
            output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **extra)
            vectors = pool(output.last_hidden_state, attention_mask)
            for head in self.heads:
                vectors = head({"sentence_embedding": vectors})["sentence_embedding"]
            return vectors, torch.nn.functional.normalize(vectors, dim=-1, eps=EPSILON)

    return Encoder().eval()


def write_graph(encoder: nn.Module, tokenizer: Any, path: Path) -> int:
    """Export with dynamic batch and token axes, check, and return the number of dimensions.

    The torch.export based exporter gives the smaller graph, and an error instead of a constant where a model's code
    depends on its input. Plain ("eager") attention is what ONNX Runtime runs fastest on a CPU.

    Args:
        encoder: What `make_encoder` returned.
        tokenizer: The model's transformers tokenizer; it makes the example that is traced.
        path: The ONNX file; one file, without external data.

    Raises:
        UnsupportedModelError: when the weights do not fit into one file, or the transformer cannot be exported.
    """
    import onnx
    import torch

    size = sum(tensor.numel() * tensor.element_size() for tensor in encoder.state_dict().values())
    if size > MAX_FILE_BYTES:
        raise UnsupportedModelError(
            f"the weights take {size / 1e9:.1f} GB in fp32; one ONNX file holds {MAX_FILE_BYTES / 1e9:.1f} GB: "
            "choose a smaller base model, or keep fewer layers (train.layers)"
        )
    backbone: Any = encoder.backbone
    backbone.set_attn_implementation("eager")
    backbone.config.use_cache = False
    example = tokenizer(list(EXAMPLE_TEXTS), padding=True, padding_side="right", return_tensors="pt")
    inputs = (example["input_ids"], example["attention_mask"])
    axes = {0: "batch", 1: "tokens"}
    with _quiet_exporter(), torch.no_grad():
        dim = int(encoder(*inputs)[0].shape[-1])
        try:
            program = torch.onnx.export(
                encoder,
                inputs,
                dynamo=True,
                input_names=["input_ids", "attention_mask"],
                output_names=[RAW_OUTPUT, UNIT_OUTPUT],
                dynamic_shapes=(axes, axes),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise UnsupportedModelError(
                f"{type(backbone).__name__} cannot be exported to ONNX ({str(error).splitlines()[0]}): "
                "choose another base model"
            ) from error
        _drop_metadata(program.model)
        program.save(path, external_data=False)
    onnx.checker.check_model(path)
    return dim


def _drop_metadata(model: Any) -> None:
    """Remove what the exporter notes about the source: stack traces with paths of this machine."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
    model.metadata_props.clear()


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's hints for its developers off the terminal."""
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
