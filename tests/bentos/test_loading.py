"""A version from disk to standby, and out again; every way in which it can be wrong."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bentos.errors import LunchboxError, NotReadyError
from bentos.loading import LOWEST_NICENESS, estimate_memory_mb, load_version, run_aside, unload_version
from bentos.manifest import CANARY_FILE, CERTIFICATE_FILE, MANIFEST_FILE, read_manifest, sha256_file, write_manifest
from bentos.observer import Observer
from bentos.schemas import EncodeRequest
from bentos.settings import ServeSettings

SETTINGS = ServeSettings(threads=1)


@pytest.fixture
def box(tiny_lunchbox_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_lunchbox_path, tmp_path / "box"))


def rewrite(box: Path, name: str, change: Callable[[Any], None]) -> None:
    """Change a JSON file of the box, and its hash in the manifest."""
    content = json.loads((box / name).read_text())
    change(content)
    (box / name).write_text(json.dumps(content))
    if name != MANIFEST_FILE:
        manifest = read_manifest(box)
        write_manifest(box, manifest.model_copy(update={"files": manifest.files | {name: sha256_file(box / name)}}))


def test_a_loaded_version_answers_until_it_is_unloaded(box: Path) -> None:
    async def main() -> None:
        before = set(threading.enumerate())
        encoder, memory_mb = await load_version(box, SETTINGS, Observer())
        assert memory_mb >= estimate_memory_mb(box, SETTINGS) > 0
        vectors = (await encoder.encode(EncodeRequest(texts=["bread"])))["embeddings"]
        np.testing.assert_allclose(vectors, encoder.box.engine.embed(["bread"]), atol=1e-5)
        await unload_version(encoder)
        with pytest.raises(NotReadyError):
            await encoder.encode(EncodeRequest(texts=["bread"]))
        with pytest.raises(NotReadyError, match="has left"):
            encoder.box.engine.tokenize(["bread"])
        left = {thread.name for thread in set(threading.enumerate()) - before}
        assert not {name for name in left if name.startswith("ekiben")}

    asyncio.run(main())


def alter_model(box: Path) -> None:
    path = box / "model.fp32.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def corrupt_model(box: Path) -> None:
    (box / "model.fp32.onnx").write_bytes(b"no model at all")
    rewrite(box, MANIFEST_FILE, lambda m: m["files"].update({"model.fp32.onnx": sha256_file(box / "model.fp32.onnx")}))


def turn_canary(box: Path) -> None:
    rewrite(box, CANARY_FILE, lambda canary: canary["vectors"].reverse())


WRONG: list[tuple[str, Callable[[Path], None], str]] = [
    ("wrong hash", alter_model, r"model\.fp32\.onnx in .* was altered"),
    ("corrupt file", corrupt_model, r"model\.fp32\.onnx cannot be loaded"),
    ("missing file", lambda box: (box / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
    ("no manifest", lambda box: (box / MANIFEST_FILE).unlink(), "this is not a lunchbox"),
    ("older layout", lambda box: rewrite(box, MANIFEST_FILE, lambda m: m.update(layout=0)), "has layout 0.*reads 1"),
    ("newer layout", lambda box: rewrite(box, MANIFEST_FILE, lambda m: m.update(layout=9)), "has layout 9.*reads 1"),
    (
        "weak certificate",
        lambda box: rewrite(box, CERTIFICATE_FILE, lambda c: c.update(min_cosine=0.9)),
        r"only within cosine 0\.900000",
    ),
    ("bad certificate", lambda box: rewrite(box, CERTIFICATE_FILE, lambda c: c.clear()), "cannot be used: KeyError"),
    ("NaN certificate", lambda box: rewrite(box, CERTIFICATE_FILE, lambda c: c.update(min_cosine=float("nan"))), "nan"),
    ("bad canary", turn_canary, "the canary vectors are wrong: cosine"),
    ("no folder", lambda box: shutil.rmtree(box), "this is not a lunchbox"),
]


@pytest.mark.parametrize(("spoil", "message"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_what_is_wrong_with_a_version_is_said_and_nothing_of_it_stays(
    box: Path, spoil: Callable[[Path], None], message: str
) -> None:
    async def main() -> None:
        before = set(threading.enumerate())
        with pytest.raises(LunchboxError, match=message):
            await load_version(box, SETTINGS, Observer())
        left = {thread.name for thread in set(threading.enumerate()) - before}
        assert not {name for name in left if name.startswith("ekiben")}

    spoil(box)
    asyncio.run(main())


def test_layout_1_is_still_served(box: Path) -> None:
    def make_older(manifest: dict[str, Any]) -> None:
        manifest["layout"] = 1
        for later in ("nested_dims", "compat"):
            manifest.pop(later, None)

    async def main() -> None:
        encoder, _ = await load_version(box, SETTINGS, Observer())
        await unload_version(encoder)

    rewrite(box, MANIFEST_FILE, make_older)
    asyncio.run(main())


def test_a_precision_that_was_not_released_is_refused(box: Path) -> None:
    with pytest.raises(LunchboxError, match="'int8' is not in this lunchbox"):
        asyncio.run(load_version(box, ServeSettings(threads=1, precision="int8"), Observer()))


def test_heavy_work_stands_back_and_its_result_and_errors_come_out() -> None:
    def look() -> tuple[int, str]:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), threading.current_thread().name

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert run_aside(look) == (LOWEST_NICENESS, "ekiben-aside")
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before

    def fail() -> None:
        raise LunchboxError("no good")

    with pytest.raises(LunchboxError, match="no good"):
        run_aside(fail)


def test_versions_with_the_same_tokenizer_read_it_once(
    tiny_lunchbox_path: Path, successor_path: Path, tmp_path: Path
) -> None:
    from bentos.vocabulary import read_tokenizer

    one = read_tokenizer(tiny_lunchbox_path / "tokenizer.json", 64)
    assert read_tokenizer(successor_path / "tokenizer.json", 64) is one
    assert read_tokenizer(successor_path / "tokenizer.json", 32) is not one, "it is cut to another length"
    other = tmp_path / "tokenizer.json"
    other.write_bytes((tiny_lunchbox_path / "tokenizer.json").read_bytes() + b"\n")
    assert read_tokenizer(other, 64) is not one
