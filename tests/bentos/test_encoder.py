"""What /encode and /similarity mean, without HTTP; real model."""

from __future__ import annotations

import asyncio
import base64
import shutil
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bentos.encoder import CHECK_EVERY_S, Encoder
from bentos.engine import Engine, TokenizedText
from bentos.errors import InvalidRequestError, NotReadyError, OverloadedError, TextTooLongError, UnknownModelError
from bentos.lunchbox import open_lunchbox
from bentos.manifest import Calibration, read_manifest, write_manifest
from bentos.schemas import EncodeRequest, SimilarityRequest
from bentos.settings import ServeSettings

LONG = "long " * 500


@pytest.fixture
def box(tiny_lunchbox_path: Path, tmp_path: Path) -> Path:
    """A lunchbox with two prompts and a calibration, whatever the packed one has."""
    box = Path(shutil.copytree(tiny_lunchbox_path, tmp_path / "box"))
    update = {
        "prompts": {"query": "find: ", "document": "text: "},
        "default_prompt": "document",
        "calibration": Calibration(cosines=[0.0, 0.5, 1.0], scores=[0.1, 0.2, 0.9]),
        "decision_threshold": 0.6,
    }
    write_manifest(box, read_manifest(box).model_copy(update=update))
    return box


@pytest.fixture
def engine(box: Path) -> Engine:
    return Engine(box, read_manifest(box))


def run(box: Path, test: Callable[[Encoder], Awaitable[Any]], **settings: Any) -> Any:
    async def main() -> Any:
        encoder = Encoder(open_lunchbox(box), ServeSettings(**settings))
        await encoder.start()
        try:
            return await asyncio.wait_for(test(encoder), 30)
        finally:
            await encoder.stop()

    return asyncio.run(main())


def encode(box: Path, *, settings: dict[str, Any] | None = None, **request: Any) -> dict[str, Any]:
    request.setdefault("texts", ["bread"])
    return run(box, lambda encoder: encoder.encode(EncodeRequest(**request)), **(settings or {}))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("request_fields", "embedded"),
    [
        ({}, "text: bread"),
        ({"prompt": "query"}, "find: bread"),
        ({"prompt_text": "my own "}, "my own bread"),
        ({"prompt_text": ""}, "bread"),
        ({"texts": [" \n bread  "], "prompt_text": ""}, "bread"),
    ],
)
def test_the_prompt_goes_before_the_cleaned_text(
    box: Path, engine: Engine, request_fields: dict[str, Any], embedded: str
) -> None:
    np.testing.assert_allclose(encode(box, **request_fields)["embeddings"], engine.embed([embedded]), atol=1e-5)


def test_an_unknown_prompt_names_the_known_ones(box: Path) -> None:
    with pytest.raises(InvalidRequestError, match="'query', 'document'"):
        encode(box, prompt="passage")


def test_base64_holds_the_same_numbers_as_float(box: Path) -> None:
    plain, packed = encode(box, texts=["bread", "milk"]), encode(box, texts=["bread", "milk"], encoding="base64")
    unpacked = [np.frombuffer(base64.b64decode(text), "<f4") for text in packed["embeddings"]]
    np.testing.assert_allclose(unpacked, plain["embeddings"], atol=1e-6)


def test_usage_counts_whole_texts_and_names_the_cut_ones(box: Path) -> None:
    usage = encode(box, texts=["bread", LONG, "milk"], prompt_text="")["usage"]
    assert usage == {"tokens": [3, 502, 3], "truncated": [1], "total_tokens": 508}


def test_an_overflow_is_an_error_on_demand(box: Path) -> None:
    with pytest.raises(TextTooLongError, match=r"`texts\[1\]` has 50\d tokens; the model takes 64"):
        encode(box, texts=["bread", LONG], on_overflow="error")


def test_the_right_model_may_be_named_in_many_ways_and_a_wrong_one_not(box: Path) -> None:
    manifest = read_manifest(box)
    for name in (manifest.tag, manifest.name, manifest.bento_version, manifest.version, f"v{manifest.version}"):
        assert encode(box, model=name)["model"] == manifest.tag
    with pytest.raises(UnknownModelError, match=manifest.tag):
        encode(box, model="ekiben:99")


def test_fewer_dimensions_need_the_servers_consent(box: Path, engine: Engine) -> None:
    full = engine.embed(["text: bread"])
    np.testing.assert_allclose(encode(box, dimensions=engine.manifest.dim)["embeddings"], full, atol=1e-5)
    with pytest.raises(InvalidRequestError, match="EKIBEN_ALLOW_TRUNCATED_DIMENSIONS"):
        encode(box, dimensions=8)
    consent = {"allow_truncated_dimensions": True}
    short = encode(box, dimensions=8, settings=consent)["embeddings"]
    np.testing.assert_allclose(short, full[:, :8] / np.linalg.norm(full[:, :8]), atol=1e-5)
    raw = encode(box, dimensions=8, normalize=False, settings=consent)["embeddings"]
    np.testing.assert_allclose(raw, engine.embed(["text: bread"], normalize=False)[:, :8], atol=1e-5)
    with pytest.raises(InvalidRequestError, match="1 to 32"):
        encode(box, dimensions=33, settings=consent)


def test_similarity_gives_cosines_and_calibrated_scores(box: Path, engine: Engine) -> None:

    a, b = ["bread", "milk"], ["bread", "a fast train", "window"]
    answer = run(box, lambda encoder: encoder.similarity(SimilarityRequest(a=a, b=b, prompt_text="")))
    cosines = engine.embed(a, normalize=True) @ engine.embed(b, normalize=True).T
    np.testing.assert_allclose(answer["similarity"], cosines, atol=1e-5)
    assert engine.manifest.calibration is not None
    np.testing.assert_allclose(answer["scores"], engine.manifest.calibration.apply(cosines), atol=1e-5)
    assert answer["decision_threshold"] == 0.6
    pairs = run(box, lambda encoder: encoder.similarity(SimilarityRequest(a=a, b=b[:2], prompt_text="", pairwise=True)))
    np.testing.assert_allclose(pairs["similarity"], np.diag(cosines[:, :2]), atol=1e-5)
    assert pairs["usage"] == {
        "a": {"tokens": [3, 3], "truncated": [], "total_tokens": 6},
        "b": {"tokens": [3, 5], "truncated": [], "total_tokens": 8},
    }


def test_an_uncalibrated_model_gives_no_scores(box: Path) -> None:
    write_manifest(box, read_manifest(box).model_copy(update={"calibration": None, "decision_threshold": None}))
    answer = run(box, lambda encoder: encoder.similarity(SimilarityRequest(a=["bread"], b=["milk"])))
    assert answer["scores"] is None
    assert answer["decision_threshold"] is None


def test_more_than_the_queue_holds_is_refused(box: Path) -> None:
    async def test(encoder: Encoder) -> None:
        requests = [encoder.encode(EncodeRequest(texts=[LONG, LONG])) for _ in range(20)]
        answers = await asyncio.gather(*requests, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, OverloadedError)]
        served = [answer for answer in answers if isinstance(answer, dict)]
        assert refused
        assert served
        assert len(refused) + len(served) == 20
        await encoder.encode(EncodeRequest(texts=["bread"]))

    run(box, test, queue_texts=3, max_texts=2, batch_tokens=1)


def test_a_request_of_megabytes_is_tokenized_in_turns_and_lets_short_ones_pass(
    box: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[list[str]] = []
    tokenize = Engine.tokenize

    def recorded(self: Engine, texts: Sequence[str]) -> list[TokenizedText]:
        turns.append(list(texts))
        return tokenize(self, texts)

    monkeypatch.setattr(Engine, "tokenize", recorded)
    texts = [f"{number} " + "long " * 6000 for number in range(12)] + ["very long " * 9000]

    async def both(encoder: Encoder) -> dict[str, Any]:
        turns.clear()
        large = asyncio.create_task(encoder.encode(EncodeRequest(texts=texts)))
        await asyncio.sleep(0)  # it has begun
        await encoder.encode(EncodeRequest(texts=["short"], prompt_text=""))
        return await large

    answer = run(box, both)
    assert turns.index(["short"]) < len(turns) - 1
    assert [len(turn) for turn in turns if turn != ["short"]] == [2] * 6 + [1]
    assert answer["usage"]["truncated"] == list(range(13))
    np.testing.assert_allclose(answer["embeddings"][11], encode(box, texts=[texts[11]])["embeddings"][0], atol=1e-5)


def test_wrong_canary_vectors_stop_all_answers(box: Path) -> None:
    async def test(encoder: Encoder) -> None:
        encoder.box.canary = type(encoder.box.canary)(encoder.box.canary.texts, -encoder.box.canary.vectors)
        await asyncio.sleep(1.1 * CHECK_EVERY_S)
        assert "canary" in (await encoder.find_problem() or "")
        with pytest.raises(NotReadyError, match="canary"):
            await encoder.encode(EncodeRequest(texts=["bread"]))

    run(box, test)


def test_a_file_altered_while_serving_is_a_problem_but_no_reason_to_stop(box: Path) -> None:
    async def test(encoder: Encoder) -> None:
        assert await encoder.find_problem() is None
        (box / "model.fp32.onnx").write_bytes(b"altered")
        await asyncio.sleep(1.1 * CHECK_EVERY_S)
        assert "model.fp32.onnx" in (await encoder.find_problem() or "")
        await encoder.encode(EncodeRequest(texts=["bread"]))

    run(box, test)


def test_a_dead_batcher_is_a_problem(box: Path) -> None:
    async def test(encoder: Encoder) -> None:
        await encoder._batcher.stop()
        await asyncio.sleep(1.1 * CHECK_EVERY_S)
        assert "cannot be embedded" in (await encoder.find_problem() or "")

    run(box, test)
