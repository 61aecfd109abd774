from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.core.models import (
    PACKAGED_MODELS,
    available_base_models,
    find_token_limit,
    load_base_model,
    load_saved_model,
    resolve_base_model,
)
from flows.errors import ModelNotFoundError, ParamsError

TEXTS = ["a young child rides a horse", "the server is down again", "jazz"]


def make_backbone(folder: Path, kind: str, layers: int = 5) -> Path:
    """Save a sentence-transformers model around another small architecture than BERT."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertTokenizerFast, DistilBertConfig, DistilBertModel, MPNetConfig, MPNetModel

    from tests.factories import tiny_vocabulary

    vocabulary = {token: index for index, token in enumerate(tiny_vocabulary())}
    size = {"vocab_size": len(vocabulary), "max_position_embeddings": 40}
    torch.manual_seed(0)
    if kind == "mpnet":
        config = MPNetConfig(
            **size,
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=32,
            pad_token_id=0,
        )
        backbone = MPNetModel(config)
    else:
        backbone = DistilBertModel(DistilBertConfig(**size, dim=16, n_layers=layers, n_heads=2, hidden_dim=32))
    backbone.save_pretrained(folder / "backbone")
    BertTokenizerFast(vocab=vocabulary, model_max_length=32).save_pretrained(folder / "backbone")
    model = SentenceTransformer(modules=[Transformer(str(folder / "backbone")), Pooling(16)], device="cpu")
    model.save(str(folder / "model"), create_model_card=False)
    return folder / "model"


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that loading a model uses: file heads, files, and what a repository holds."""

    def __init__(self, repositories: dict[str, Path], *args: Any) -> None:
        self.repositories = repositories
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        asked_api = parts[:2] == ["api", "models"]
        repository = "/".join(parts[2:4] if asked_api else parts[:2])
        folder = self.repositories.get(repository)
        if folder is None:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"}, with_body=with_body)
        elif asked_api:
            files = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
            tree = [
                {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": "0"} for name in files
            ]
            info = {"id": repository, "sha": "c" * 40, "siblings": [{"rfilename": name} for name in files], "tags": []}
            self.reply(200, json.dumps(tree if "tree" in parts else info).encode(), {}, with_body=with_body)
        else:
            path = folder.joinpath(*parts[4:])
            if path.is_file():
                self.reply(200, path.read_bytes(), {"ETag": f'"{"-".join(parts[4:])}"'}, with_body=with_body)
            else:
                self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body=with_body)

    def reply(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": "c" * 40, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve_hub(repositories: dict[str, Path]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, repositories))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


# Two rounds of the same questions in one new interpreter, since the hub's address is read at import; between them it
# waits for a line on stdin.
ASK_THE_HUB_TWICE = """
import json
from flows.core.models import available_base_models, load_base_model, resolve_base_model
from flows.errors import ModelNotFoundError

for _ in range(2):
    before = resolve_base_model("someone/tiny")
    model = load_base_model("someone/tiny", max_tokens=32)
    try:
        load_base_model("someone/nothing", max_tokens=32)
    except ModelNotFoundError as error:
        message = str(error)
    names = ["someone/tiny", "someone/nothing", "someone/other"]
    answers = [before, resolve_base_model("someone/tiny"), model.encode(["jazz"])[0].tolist(), message]
    print(json.dumps([*answers, available_base_models(names)]), flush=True)
    input()
"""


def test_a_hub_model_is_fetched_then_kept_in_the_hub_cache(tiny_model_path: Path, tmp_path: Path) -> None:
    expected = pytest.approx(load_saved_model(tiny_model_path).encode(["jazz"])[0].tolist(), abs=1e-6)
    ours = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    with ExitStack() as stack:
        with serve_hub({"someone/tiny": tiny_model_path}) as endpoint:
            child = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", ASK_THE_HUB_TWICE],
                    env=os.environ | ours | {"HF_ENDPOINT": endpoint},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(child.kill)
            before, after, vector, message, (available, reasons) = json.loads(child.stdout.readline())
        assert before == "someone/tiny"
        assert Path(after).is_dir()
        assert vector == expected
        assert "the hub has no someone/nothing" in message
        assert "\n" not in message
        assert available == ["someone/tiny"]
        assert ["someone/nothing" in reasons[0], "someone/other" in reasons[1]] == [True, True]

        # The hub is gone: what is in the cache still loads, the rest is refused without many retries.
        output, noise = child.communicate("\n\n", timeout=120)
        before, after, vector, message, (available, reasons) = json.loads(output)
        assert Path(before).is_dir()
        assert before == after
        assert vector == expected
        assert "the hub cannot be reached" in message
        assert available == ["someone/tiny"]
        assert ["the hub cannot be reached" in reason for reason in reasons] == [True, True]
        assert noise == ""


@pytest.mark.parametrize("name", [*PACKAGED_MODELS, "all-MiniLM-L6-v2", "ALL-minilm-l6-V2"])
def test_a_packaged_model_needs_no_hub(name: str) -> None:
    folder = Path(resolve_base_model(name))
    assert (folder / "modules.json").is_file()
    assert available_base_models([name]) == ([name], [])


def test_a_bare_name_means_a_sentence_transformers_model() -> None:
    assert resolve_base_model("all-mpnet-base-v2") == "sentence-transformers/all-mpnet-base-v2"
    assert resolve_base_model("intfloat/e5-small-v2") == "intfloat/e5-small-v2"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("", "empty"),
        ("./no/such/folder", "no folder and no hub id"),
        ("/no/such/folder", "no folder and no hub id"),
        ("two words", "no folder and no hub id"),
        ("a/b/c", "no folder and no hub id"),
        ("sentence-transformers/all-mpnet-base-v2", "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_model_that_cannot_be_had_is_refused_in_one_line_with_the_cure(name: str, found: str) -> None:
    with pytest.raises(ModelNotFoundError, match=found) as caught:
        load_base_model(name, max_tokens=32)
    assert "allowed are" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert available_base_models([name, name]) == ([], [str(caught.value)])


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"neither modules\.json nor config\.json"):
        load_base_model(str(tmp_path), max_tokens=32)


def test_a_broken_model_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_model_path, tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="cannot be read") as caught:
        load_base_model(str(broken), max_tokens=32)
    assert "\n" not in str(caught.value)


def test_a_model_of_somebody_elses_is_refused_with_the_cure(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tests may run as root, who reads everything: so the weights are out of sight, and said to be locked.
    theirs, ask = shutil.copytree(tiny_model_path, tmp_path / "theirs"), os.access
    locked = (theirs / "model.safetensors").rename(theirs / "locked")
    monkeypatch.setattr("os.access", lambda path, *words, **more: path != locked and ask(path, *words, **more))
    with pytest.raises(ModelNotFoundError, match=r"may not read locked: .*chmod -R a\+rX"):
        load_base_model(str(theirs), max_tokens=32)


def test_no_saved_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        load_saved_model(tmp_path / "nothing")


def test_max_tokens_cuts_texts_and_stays_below_the_position_limit(tiny_model_path: Path) -> None:
    model = load_base_model(str(tiny_model_path), max_tokens=8)
    long, cut = model.encode(["one two three four five six seven eight", "one two three four five six"])
    assert np.allclose(long, cut)
    limit = find_token_limit(model)
    assert limit == 512
    assert load_base_model(str(tiny_model_path), max_tokens=limit).max_seq_length == limit
    with pytest.raises(ParamsError, match="reads at most 512 tokens"):
        load_base_model(str(tiny_model_path), max_tokens=limit + 1)
    published = load_saved_model(tiny_model_path).max_seq_length
    assert load_base_model(str(tiny_model_path)).max_seq_length == published


@pytest.mark.parametrize(("kind", "limit"), [("mpnet", 38), ("distilbert", 40)])
def test_other_encoders_keep_layers_and_know_their_limit(kind: str, limit: int, tmp_path: Path) -> None:
    path = make_backbone(tmp_path, kind)
    model = load_base_model(str(path), max_tokens=32, layers=3)
    whole = load_base_model(str(path), max_tokens=32)
    assert find_token_limit(whole) == limit
    assert np.isfinite(load_base_model(str(path), max_tokens=limit).encode(["word " * 60])).all()
    model.save(str(tmp_path / "saved"), create_model_card=False)
    saved = load_saved_model(tmp_path / "saved")
    assert np.allclose(saved.encode(TEXTS), model.encode(TEXTS), atol=1e-6)
    assert saved.transformers_model.config.num_hidden_layers == 3
    assert not np.allclose(whole.encode(TEXTS), model.encode(TEXTS), atol=1e-3)
    full, kept = (layer_weights(each) for each in (whole, saved))
    assert [full.index(weights) for weights in kept] == [0, 2, 4]


def layer_weights(model: Any) -> list[bytes]:
    transformer = model.transformers_model
    stack = (getattr(transformer, "encoder", None) or transformer.transformer).layer
    return [b"".join(value.numpy().tobytes() for value in layer.state_dict().values()) for layer in stack]


def test_more_layers_than_there_are_is_refused(tiny_model_path: Path) -> None:
    with pytest.raises(ParamsError, match="has 2 layers: set 2 or less"):
        load_base_model(str(tiny_model_path), max_tokens=32, layers=3)
