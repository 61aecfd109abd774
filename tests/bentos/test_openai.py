"""OpenAI's door: without HTTP on a real model, and over HTTP by the official client."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from bentos.encoder import Encoder
from bentos.engine import Engine
from bentos.errors import (
    InvalidRequestError,
    NotReadyError,
    OverloadedError,
    ServeError,
    TextTooLongError,
    UnauthorizedError,
    UnknownModelError,
)
from bentos.lunchbox import open_lunchbox
from bentos.manifest import read_manifest, write_manifest
from bentos.openai import EmbeddingsRequest, EmbeddingsResponse, describe_error
from bentos.parsing import parse_request
from bentos.render import render
from bentos.settings import ServeSettings
from tests.serving import Server

OTHER_TOKENIZER = "send the text itself .*check_embedding_ctx_length=False"


@pytest.fixture(scope="module")
def box(tiny_lunchbox_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lunchbox with two prompts."""
    box = Path(shutil.copytree(tiny_lunchbox_path, tmp_path_factory.mktemp("openai") / "box"))
    prompts = {"prompts": {"query": "find: ", "document": "text: "}, "default_prompt": "document"}
    write_manifest(box, read_manifest(box).model_copy(update=prompts))
    return box


@pytest.fixture(scope="module")
def engine(box: Path) -> Engine:
    return Engine(box, read_manifest(box))


def ask(box: Path, settings: Any = None, **request: Any) -> Any:
    """What a client reads."""

    async def main() -> Any:
        limits = ServeSettings(**(settings or {}))
        encoder = Encoder(open_lunchbox(box), limits)
        await encoder.start()
        try:
            parsed = parse_request(EmbeddingsRequest, json.dumps(request).encode(), limits)
            return await asyncio.wait_for(encoder.openai_embeddings(parsed), 30)
        finally:
            await encoder.stop()

    return json.loads(render(asyncio.run(main())).body)


def vectors(answer: Any) -> Any:
    return np.array([item["embedding"] for item in answer["data"]])


@pytest.mark.parametrize("value", ["bread", ["bread"], ["bread", "a fast train", "bread"]])
def test_the_answer_has_openais_shape_and_our_vectors(box: Path, engine: Engine, value: Any) -> None:
    answer = ask(box, input=value, model="ekiben", user="somebody")
    texts = [f"text: {text}" for text in ([value] if isinstance(value, str) else value)]
    assert list(answer) == ["object", "data", "model", "usage"]
    assert [list(item) for item in answer["data"]] == [["object", "index", "embedding"]] * len(texts)
    assert [(item["object"], item["index"]) for item in answer["data"]] == [
        ("embedding", row) for row in range(len(texts))
    ]
    np.testing.assert_allclose(vectors(answer), engine.embed(texts), atol=1e-5)
    total = sum(len(text.ids) for text in engine.tokenize(texts))
    assert answer["usage"] == {"prompt_tokens": total, "total_tokens": total}
    assert answer["model"] == engine.manifest.tag
    EmbeddingsResponse.model_validate(answer)


def test_base64_is_little_endian_float32(box: Path) -> None:
    plain, packed = (ask(box, input=["bread", "milk"], encoding_format=form) for form in ("float", "base64"))
    unpacked = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in packed["data"]]
    np.testing.assert_allclose(unpacked, vectors(plain), atol=1e-6)


@pytest.mark.parametrize(
    ("request_fields", "embedded"),
    [({"prompt": "query"}, "find: bread"), ({"prompt_text": "q "}, "q bread"), ({"prompt_text": ""}, "bread")],
)
def test_a_prompt_may_be_asked_for(box: Path, engine: Engine, request_fields: Any, embedded: str) -> None:
    np.testing.assert_allclose(vectors(ask(box, input="bread", **request_fields)), engine.embed([embedded]), atol=1e-5)


def test_fewer_dimensions_need_the_servers_consent_and_have_length_1(box: Path, engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="EKIBEN_ALLOW_TRUNCATED_DIMENSIONS"):
        ask(box, input="bread", dimensions=8)
    short = vectors(ask(box, input="bread", dimensions=8, settings={"allow_truncated_dimensions": True}))
    full = engine.embed(["text: bread"])[:, :8]
    np.testing.assert_allclose(short, full / np.linalg.norm(full), atol=1e-5)


def test_an_answer_says_what_was_cut_only_when_something_was(box: Path) -> None:
    answer = ask(box, input=["bread", "long " * 300])
    assert answer["usage"]["truncated"] == [1]
    EmbeddingsResponse.model_validate(answer)
    with pytest.raises(TextTooLongError, match=r"`input\[1\]` has 30\d tokens; the model takes 64"):
        ask(box, input=["bread", "long " * 300], on_overflow="error")
    with pytest.raises(TextTooLongError, match="`input` has"):
        ask(box, input="long " * 300, on_overflow="error")


def test_token_ids_give_the_vectors_of_their_text_without_any_prompt(box: Path, engine: Engine) -> None:
    ids = [list(text.ids) for text in engine.tokenize(["bread", "a fast train"])]
    expected = engine.embed(["bread", "a fast train"])
    several = ask(box, input=ids)
    np.testing.assert_allclose(vectors(several), expected, atol=1e-5)
    assert several["usage"]["prompt_tokens"] == sum(map(len, ids))
    np.testing.assert_allclose(vectors(ask(box, input=ids[1])), expected[1:], atol=1e-5)


def test_token_ids_that_this_model_cannot_have_made_are_refused(box: Path, engine: Engine) -> None:
    first, *body, last = engine.tokenize(["a fast train"])[0].ids
    size = engine.vocabulary_size
    assert ask(box, input=[[first, *body, last], [first, size - 1, last]])["usage"]["total_tokens"] == 8
    for odd in (size, -1, 10**15):
        with pytest.raises(InvalidRequestError, match=rf"`input` has the token id {odd}; .* 0 to {size - 1}\."):
            ask(box, input=[first, odd, last])
    for ids in ([first, *body], [*body, last], body, [last], [first]):
        with pytest.raises(InvalidRequestError, match=rf"`input\[1\]` does not begin with .*{OTHER_TOKENIZER}"):
            ask(box, input=[[first, *body, last], ids])


def test_token_ids_are_never_cut(box: Path, engine: Engine) -> None:
    first, *_, last = engine.tokenize([""])[0].ids
    full = [first, *([engine.tokenize(["bread"])[0].ids[1]] * 62), last]
    assert ask(box, input=full)["usage"] == {"prompt_tokens": 64, "total_tokens": 64}
    with pytest.raises(TextTooLongError, match=r"`input` has 65 tokens; the model takes 64\. Token ids are never cut"):
        ask(box, input=[*full[:-1], *full[-2:]])


def test_the_token_limit_of_the_server_holds_for_ids_too(box: Path, engine: Engine) -> None:
    ids = list(engine.tokenize(["a fast train"])[0].ids)
    with pytest.raises(ServeError, match="`input` has 5 tokens; at most 4 are allowed") as caught:
        ask(box, input=ids, settings={"max_text_tokens": 4})
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InvalidRequestError("no", field="dimensions"), ("invalid_request_error", "dimensions")),
        (InvalidRequestError("no", errors=[{"field": "input", "message": "no"}]), ("invalid_request_error", "input")),
        (UnknownModelError("no", field="model"), ("invalid_request_error", "model")),
        (UnauthorizedError("no"), ("authentication_error", None)),
        (OverloadedError("no", retry_after_s=1), ("rate_limit_error", None)),
        (NotReadyError("no"), ("server_error", None)),
    ],
)
def test_errors_have_openais_type_and_param(error: ServeError, expected: tuple[str, str | None]) -> None:
    assert describe_error(error) == {"type": expected[0], "param": expected[1]}


# --- the official client, which knows nothing of us


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_official_client_reads_both_encodings(client: openai.OpenAI, tiny_lunchbox_path: Path) -> None:
    expected = Engine(tiny_lunchbox_path, read_manifest(tiny_lunchbox_path)).embed(["bread", "milk"])
    for options in ({}, {"encoding_format": "float"}):  # without the option the client asks for base64 by itself
        answer = client.embeddings.create(input=["bread", "milk"], model="ekiben", **options)
        np.testing.assert_allclose([item.embedding for item in answer.data], expected, atol=1e-5)
        assert (answer.model, answer.usage.prompt_tokens) == ("ekiben:1-01234567", 6)
    single = client.embeddings.create(input="bread", model="ekiben", extra_body={"on_overflow": "error"})
    np.testing.assert_allclose(single.data[0].embedding, expected[0], atol=1e-5)


def test_the_official_client_lists_the_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["ekiben", "ekiben:1-01234567"]
    card = client.models.retrieve("ekiben:1-01234567")
    assert (card.owned_by, card.model_extra["model"]) == ("ekiben", card.id)


def test_the_official_client_shows_what_is_wrong(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="this model has 32") as refused:
        client.embeddings.create(input="bread", model="ekiben", dimensions=8)
    assert (refused.value.code, refused.value.param) == ("invalid_request", "dimensions")
    assert refused.value.type == "invalid_request_error"
    for ask in (
        lambda: client.embeddings.create(input="bread", model="text-embedding-3-small"),
        lambda: client.models.retrieve("text-embedding-3-small"),
    ):
        with pytest.raises(openai.NotFoundError, match="ekiben:1-01234567 is served here") as unknown:
            ask()
        assert (unknown.value.code, unknown.value.param) == ("unknown_model", "model")
    with pytest.raises(openai.UnprocessableEntityError, match="`input\\[1\\]` is empty") as empty:
        client.embeddings.create(input=["bread", " "], model="ekiben")
    assert empty.value.param == "input[1]"


def test_the_official_client_sends_ids_of_other_tokenizers_in_vain(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="check_embedding_ctx_length=False"):
        client.embeddings.create(input=[[15, 19]], model="ekiben")
