"""From a sentence-transformers folder to the two files that serve it: `model.fp32.onnx` and `tokenizer.json`.

Core layer; knows torch and ONNX, nothing of Prefect or MLflow. The graph holds the whole way from token ids to
vectors: the transformer, our pooling, the dense layers after it, and the scaling to length 1. What cannot be
reproduced to the last module is refused by name, never approximated.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bentos.manifest import TOKENIZER_FILE
from flows.core.graph import POOLERS, make_encoder, write_graph
from flows.core.heads import read_nested_dims
from flows.core.models import find_token_limit, load_saved_model
from flows.errors import UnsupportedModelError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn

MODEL_FILE = "model.fp32.onnx"
SUPPORTED_MODULES = "Transformer, Pooling, then any of Dense and LayerNorm, then optionally Normalize"
LONGEST_TOKENS = 100_000  # tokenizers without a limit report 1e30


@dataclass(frozen=True)
class Export:
    """What was exported: everything that a client must know to use the two files."""

    dim: int
    max_tokens: int  # special tokens included
    pooling: str
    normalize: bool
    prompts: dict[str, str]
    default_prompt: str | None
    nested_dims: tuple[int, ...]  # smaller numbers of dimensions that it was trained for, largest first
    weights_sha256: str  # of the weights themselves, so that exporting again gives the same


@dataclass(frozen=True)
class Anatomy:
    """A sentence-transformers model taken apart into what the graph is made of."""

    backbone: nn.Module
    pooling: str
    heads: tuple[nn.Module, ...]  # Dense and LayerNorm, in order
    normalize: bool


def export_model(model_path: Path, box: Path) -> Export:
    """Write `model.fp32.onnx` and `tokenizer.json` of the model at `model_path` into the folder `box`.

    Raises:
        UnsupportedModelError: when the model has a part that cannot be reproduced; names it.
        ModelNotFoundError: when there is no readable model at `model_path`.
    """
    model = load_saved_model(model_path).to("cpu").eval()
    anatomy = dissect_model(model)
    encoder = make_encoder(anatomy.backbone, anatomy.pooling, anatomy.heads)
    write_tokenizer(model, box / TOKENIZER_FILE)
    dim = write_graph(encoder, model.tokenizer, box / MODEL_FILE)
    # Every model has an empty `query` and `document` prompt; they mean something only beside a real one.
    prompts = {name: text or "" for name, text in model.prompts.items()} if any(model.prompts.values()) else {}
    return Export(
        dim=dim,
        max_tokens=find_max_tokens(model),
        pooling=anatomy.pooling,
        normalize=anatomy.normalize,
        prompts=prompts,
        default_prompt=model.default_prompt_name if model.default_prompt_name in prompts else None,
        nested_dims=read_nested_dims(model),
        weights_sha256=hash_weights(encoder),
    )


def dissect_model(model: SentenceTransformer) -> Anatomy:
    """Take a model apart, and refuse what the graph cannot reproduce. Cheap: call it before training.

    Raises:
        UnsupportedModelError: names the module or setting, and what is supported.
    """
    from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling, Transformer

    modules = list(model)
    names = " > ".join(type(module).__name__ for module in modules)
    if len(modules) < 2 or type(modules[0]) is not Transformer or type(modules[1]) is not Pooling:
        raise UnsupportedModelError(
            f"the model is {names or 'empty'}; supported is {SUPPORTED_MODULES}: choose another base model"
        )
    transformer, pooling, rest = modules[0], modules[1], modules[2:]
    normalize = bool(rest) and type(rest[-1]) is Normalize
    heads = tuple(rest[:-1] if normalize else rest)
    for module in heads:
        if type(module) not in (Dense, LayerNorm):
            raise UnsupportedModelError(
                f"the model is {names}: {type(module).__name__} cannot be exported there; "
                f"supported is {SUPPORTED_MODULES}: choose another base model"
            )
    for module in rest:
        ends = {getattr(module, name, "sentence_embedding") for name in ("module_input_name", "module_output_name")}
        if ends != {"sentence_embedding"}:
            raise UnsupportedModelError(
                f"{type(module).__name__} works on {', '.join(sorted(ends))}; supported is the sentence embedding: "
                "choose another base model"
            )
    text = transformer.modality_config.get("text", {})
    if (text.get("method"), text.get("method_output_name")) != ("forward", "last_hidden_state"):
        raise UnsupportedModelError(
            f"the transformer reads text by {text or 'no method'}; supported are plain text encoders: "
            "choose another base model"
        )
    if pooling.pooling_mode not in POOLERS:
        raise UnsupportedModelError(
            f"pooling is {pooling.pooling_mode!r}; supported are {', '.join(POOLERS)}, one at a time: "
            "choose another base model"
        )
    if not pooling.include_prompt:
        raise UnsupportedModelError(
            "pooling leaves the prompt's tokens out (include_prompt is false), which the server cannot reproduce: "
            "set include_prompt to true before training"
        )
    if model.truncate_dim is not None:
        raise UnsupportedModelError(
            f"the model cuts vectors to {model.truncate_dim} dimensions (truncate_dim); supported is the full vector: "
            "remove truncate_dim from config_sentence_transformers.json, requests choose their `dimensions`"
        )
    return Anatomy(transformer.auto_model, pooling.pooling_mode, heads, normalize)


def find_max_tokens(model: SentenceTransformer) -> int:
    """Return how many tokens of a text the model reads, special ones included.

    Raises:
        UnsupportedModelError: when neither the tokenizer nor the transformer has a limit.
    """
    limits = [limit for limit in (model.max_seq_length, find_token_limit(model)) if limit and limit < LONGEST_TOKENS]
    if not limits:
        raise UnsupportedModelError("the model has no limit of tokens: set train.max_tokens and train it again")
    return int(min(limits))


def write_tokenizer(model: SentenceTransformer, path: Path) -> None:
    """Write the model's tokenizer as one JSON file, truncation and padding off: the server does both.

    Raises:
        UnsupportedModelError: when the tokenizer exists in Python only.
    """
    from tokenizers import Tokenizer

    tokenizer = model.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} exists in Python only; supported are tokenizers with a tokenizer.json: "
            "convert it, or choose another base model"
        )
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.save(str(path), pretty=False)


def hash_weights(encoder: nn.Module) -> str:
    """SHA-256 of all weights, sorted by name, with their names, types and shapes, and of the kinds of the heads."""
    digest = hashlib.sha256(" ".join(repr(head) for head in getattr(encoder, "heads", ())).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        array = tensor.detach().contiguous().numpy()
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.data)
    return digest.hexdigest()
