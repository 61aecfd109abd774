"""What each door means, without HTTP; real model."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from bentos.encoder import CHECK_EVERY_S, Encoder
from bentos.engine import Engine
from bentos.errors import InvalidRequestError, NotReadyError, TextTooLongError, TooLargeError
from bentos.lunchbox import open_lunchbox
from bentos.manifest import Calibration, read_manifest, write_manifest
from bentos.observer import BatchRecord, Observer
from bentos.render import Base64Rows, render
from bentos.schemas import (
    EncodeRequest,
    PredictRequest,
    PredictSimilarityRequest,
    RankRequest,
    SimilarityRequest,
)
from bentos.settings import ServeSettings
from bentos.vectors import cosine_matrix

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
    assert isinstance(packed["embeddings"], Base64Rows)
    strings = json.loads(render(packed).body)["embeddings"]
    unpacked = [np.frombuffer(base64.b64decode(text), "<f4") for text in strings]
    np.testing.assert_allclose(unpacked, plain["embeddings"], atol=1e-6)


def test_usage_counts_whole_texts_and_names_the_cut_ones(box: Path) -> None:
    usage = encode(box, texts=["bread", LONG, "milk"], prompt_text="")["usage"]
    assert usage == {"tokens": [3, 502, 3], "truncated": [1], "total_tokens": 508}


def test_an_overflow_is_an_error_on_demand(box: Path) -> None:
    with pytest.raises(TextTooLongError, match=r"`texts\[1\]` has 50\d tokens; the model takes 64"):
        encode(box, texts=["bread", LONG], on_overflow="error")


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


def unpack(answer: dict[str, Any]) -> npt.NDArray[Any]:
    """The embeddings of an answer of /encode as they would arrive."""
    return np.array(json.loads(render(answer).body)["embeddings"], dtype=np.float64)


def test_smaller_numbers_point_the_same_way(box: Path, engine: Engine) -> None:
    texts = ["bread", "a fast train", "milk and eggs"]
    exact = encode(box, texts=texts)["embeddings"]
    for dtype, error in (("float16", 1e-6), ("int8", 1e-3)):
        rows = unpack(encode(box, texts=texts, dtype=dtype))
        assert np.diag(cosine_matrix(rows, exact)).min() > 1 - error
    assert np.abs(unpack(encode(box, texts=texts, dtype="int8"))).max(axis=1).tolist() == [127, 127, 127]


def test_every_text_may_have_so_many_tokens_and_no_more_when_the_server_says_so(box: Path) -> None:
    limited = {"max_text_tokens": 5}
    assert encode(box, texts=["milk"], prompt_text="", settings=limited)["usage"]["tokens"] == [3]
    with pytest.raises(
        TooLargeError, match=r"`texts\[1\]` has 8 tokens; at most 5 are .*EKIBEN_MAX_TEXT_TOKENS"
    ) as caught:
        encode(box, texts=["milk", "one two three four five six"], prompt_text="", settings=limited)
    assert caught.value.details == {"field": "texts[1]", "found": 8, "limit": 5}


@pytest.mark.parametrize("cache_mb", [0, 1])
def test_the_length_is_checked_for_texts_that_are_cached_or_under_way_too(box: Path, cache_mb: int) -> None:
    async def test(encoder: Encoder) -> None:
        tolerant, strict = EncodeRequest(texts=[LONG]), EncodeRequest(texts=["milk", LONG], on_overflow="error")
        answers = await asyncio.gather(*map(encoder.encode, (tolerant, strict)), return_exceptions=True)
        assert isinstance(answers[0], dict)
        assert isinstance(answers[1], TextTooLongError)
        with pytest.raises(TextTooLongError, match=r"`texts\[1\]`"):
            await encoder.encode(strict)

    run(box, test, cache_mb=cache_mb)


# --- /rank


def rank(box: Path, **request: Any) -> dict[str, Any]:
    return run(box, lambda encoder: encoder.rank(RankRequest(**request)))  # type: ignore[no-any-return]


def test_a_ranking_puts_the_most_alike_first_with_prompts_of_their_own(box: Path, engine: Engine) -> None:
    documents = ["bread", "a fast train", "window", "bread"]
    answer = rank(box, query="bread and milk", documents=documents, ids=["a", "b", 7, "d"])
    query, *others = engine.embed(["find: bread and milk", *(f"text: {text}" for text in documents)])
    cosines = np.array(others) @ query
    order = sorted(range(4), key=lambda index: (-cosines[index], index))
    assert [result["index"] for result in answer["results"]] == order
    assert [result["id"] for result in answer["results"]] == [["a", "b", 7, "d"][index] for index in order]
    np.testing.assert_allclose([result["similarity"] for result in answer["results"]], cosines[order], atol=1e-5)
    assert engine.manifest.calibration is not None
    scores = [result["score"] for result in answer["results"]]
    np.testing.assert_allclose(scores, engine.manifest.calibration.apply(cosines[order]), atol=1e-5)
    assert answer["usage"]["query"]["tokens"] == [len(engine.tokenize(["find: bread and milk"])[0].ids)]
    assert len(answer["usage"]["documents"]["tokens"]) == 4


def test_equal_documents_stay_in_the_order_given(box: Path) -> None:
    results = rank(box, query="milk", documents=["bread"] * 5, document_prompt_text="")["results"]
    assert [result["index"] for result in results] == [0, 1, 2, 3, 4]
    assert all("id" not in result for result in results)


def test_top_k_keeps_the_best_and_may_be_more_than_there_are(box: Path) -> None:
    documents = ["bread", "a fast train", "milk"]
    every = rank(box, query="milk", documents=documents)["results"]
    assert rank(box, query="milk", documents=documents, top_k=2)["results"] == every[:2]
    assert rank(box, query="milk", documents=documents, top_k=99)["results"] == every


@pytest.mark.parametrize(
    ("prompts", "embedded"),
    [
        ({"query_prompt": "document"}, ("text: milk", "text: bread")),
        ({"query_prompt_text": "q "}, ("q milk", "text: bread")),
        ({"query_prompt_text": "", "document_prompt_text": ""}, ("milk", "bread")),
        ({"document_prompt": "query"}, ("find: milk", "find: bread")),
    ],
)
def test_a_ranking_takes_other_prompts(
    box: Path, engine: Engine, prompts: dict[str, str], embedded: tuple[str, str]
) -> None:
    (result,) = rank(box, query="milk", documents=["bread"], **prompts)["results"]
    query, document = engine.embed(embedded)
    assert result["similarity"] == pytest.approx(query @ document, abs=1e-5)


def test_without_prompts_of_its_own_a_ranking_takes_the_default(box: Path, engine: Engine) -> None:
    update = {"prompts": {"passage": "say: "}, "default_prompt": "passage", "calibration": None}
    write_manifest(box, read_manifest(box).model_copy(update=update))
    (result,) = rank(box, query="milk", documents=["bread"])["results"]
    query, document = engine.embed(["say: milk", "say: bread"])
    assert result["similarity"] == pytest.approx(query @ document, abs=1e-5)
    assert result["score"] is None


def test_an_unknown_prompt_of_a_ranking_is_named_by_its_field(box: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"`document_prompt` is 'x'.* as `document_prompt_text`"):
        rank(box, query="milk", documents=["bread"], document_prompt="x")


# --- /predict


def test_predict_gives_one_vector_and_the_version(box: Path, engine: Engine) -> None:
    answer = run(box, lambda encoder: encoder.predict(PredictRequest(text=" bread ")))
    np.testing.assert_allclose(answer["embedding"], engine.embed(["text: bread"])[0], atol=1e-5)
    assert (answer["model"], answer["model_version"]) == (engine.manifest.tag, engine.manifest.version)
    assert answer["usage"]["total_tokens"] == len(engine.tokenize(["text: bread"])[0].ids)


def test_predict_similarity_gives_cosine_and_score(box: Path, engine: Engine) -> None:
    request = PredictSimilarityRequest(text_a="bread", text_b="a fast train")
    answer = run(box, lambda encoder: encoder.predict_similarity(request))
    a, b = engine.embed(["text: bread", "text: a fast train"])
    assert answer["similarity"] == pytest.approx(a @ b, abs=1e-5)
    assert engine.manifest.calibration is not None
    assert answer["score"] == pytest.approx(float(engine.manifest.calibration.apply(a @ b)), abs=1e-5)
    assert (answer["model_version"], len(answer["usage"]["tokens"])) == (engine.manifest.version, 2)


def test_whoever_watches_sees_the_raw_vectors_of_all_texts(box: Path, engine: Engine) -> None:
    seen: list[Any] = []
    request = RankRequest(query="milk", documents=["bread"])
    run(box, lambda encoder: encoder.rank(request, None, lambda *shown: seen.append(shown)))
    ((watched, vectors),) = seen
    assert watched is request
    np.testing.assert_allclose(vectors, engine.embed(["find: milk", "text: bread"], normalize=False), atol=1e-5)


def test_some_texts_are_embedded_aside_by_the_bulk_lane_and_not_counted(box: Path, engine: Engine) -> None:
    class Heard(Observer):
        lanes: ClassVar[list[str]] = []

        def record_batch(self, record: BatchRecord) -> None:
            self.lanes.append(record.lane)

        def record_texts(self, texts: int, tokens: int, truncated: int) -> None:
            raise AssertionError("nobody was answered")

    async def main() -> Any:
        encoder = Encoder(open_lunchbox(box), ServeSettings(), Heard())
        await encoder.start()
        Heard.lanes.clear()
        try:
            return await encoder.embed_aside(RankRequest(query="milk", documents=["a", "bread", "b"]), [0, 2])
        finally:
            await encoder.stop()

    vectors = asyncio.run(main())
    np.testing.assert_allclose(vectors, engine.embed(["find: milk", "text: bread"], normalize=False), atol=1e-5)
    assert set(Heard.lanes) == {"bulk"}


def test_plain_texts_get_the_vectors_of_encode(box: Path) -> None:
    rows = run(box, lambda encoder: encoder.embed_texts(["bread", LONG]))
    np.testing.assert_allclose(rows, encode(box, texts=["bread", LONG])["embeddings"], atol=1e-6)


# --- readiness


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


def test_vectors_that_are_no_numbers_are_withheld_and_a_problem(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(encoder: Encoder) -> None:
        run_session = encoder.box.engine._session.run

        def spoil(outputs: list[str], feeds: dict[str, Any]) -> list[npt.NDArray[np.float32]]:
            return [np.full_like(vectors, np.nan) for vectors in run_session(outputs, feeds)]

        with monkeypatch.context() as patch:
            patch.setattr(encoder.box.engine, "_session", SimpleNamespace(run=spoil))
            await asyncio.sleep(1.1 * CHECK_EVERY_S)
            assert "cannot be embedded: the model gave a vector that is not finite" in (
                await encoder.find_problem() or ""
            )
            with pytest.raises(NotReadyError, match="not finite; the vector was withheld"):
                await encoder.encode(EncodeRequest(texts=["bread"]))
        await asyncio.sleep(1.1 * CHECK_EVERY_S)
        assert await encoder.find_problem() is None
        assert (await encoder.encode(EncodeRequest(texts=["bread"])))["usage"]["tokens"]

    run(box, test)


def test_a_dead_batcher_is_a_problem(box: Path) -> None:
    async def test(encoder: Encoder) -> None:
        await encoder._batcher.stop()
        await asyncio.sleep(1.1 * CHECK_EVERY_S)
        assert "cannot be embedded" in (await encoder.find_problem() or "")

    run(box, test)
