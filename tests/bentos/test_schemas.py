"""The models of requests and answers, as BentoML and its client see them. What a body may hold: test_parsing.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import bentoml
import numpy as np
import pytest
from pydantic import BaseModel, TypeAdapter

from bentos.doors import DOORS, DOORS_BY_PATH, Door
from bentos.encoder import Encoder
from bentos.schemas import TextField
from tests.serving import Server


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.path)
def test_every_field_is_described(door: Door) -> None:
    for model in (door.request, door.response):
        for name, field in model.model_fields.items():
            nested = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            described = field.description or nested or name in ("root", "object", "data", "results", "usage")
            assert described or name in ("embedding", "id"), f"{model.__name__}.{name}"


def test_the_encoder_answers_every_door_that_bentoml_does_not() -> None:
    assert [door.path for door in DOORS if door.method is None] == ["/encode_batchable"]
    assert all(callable(getattr(Encoder, door.method)) for door in DOORS if door.method is not None)
    assert len(DOORS_BY_PATH) == len(DOORS)


def test_a_text_is_named_by_field_and_position() -> None:
    assert TextField("texts", ["a", "b"]).label(1) == "texts[1]"
    assert TextField("query", ["a"], is_list=False).label(0) == "query"


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with bentoml.SyncHTTPClient(server.url) as client:
        yield client


def test_bentomls_client_reads_every_form_of_every_answer(client: Any) -> None:
    plain = client.encode(texts=["bread", "milk"])
    assert np.shape(plain["embeddings"]) == (2, 32)
    packed = client.encode(texts=["bread"], encoding="base64", dtype="float16")
    assert TypeAdapter(list[str]).validate_python(packed["embeddings"], strict=True)
    assert np.shape(client.similarity(a=["bread"], b=["bread", "milk"])["similarity"]) == (1, 2)
    assert client.similarity(a=["bread"], b=["bread"], pairwise=True)["similarity"] == [pytest.approx(1.0)]
    ranked = client.rank(query="milk", documents=["bread", "milk"], ids=["a", 7], top_k=1)["results"]
    assert (ranked[0]["index"], ranked[0]["id"]) == (1, 7)
    assert len(client.predict(text="bread")["embedding"]) == 32
    assert client.predict_similarity(text_a="bread", text_b="bread")["similarity"] == pytest.approx(1.0)
    assert np.shape(client.encode_batchable(texts=["bread"])) == (1, 32)


@pytest.mark.parametrize("value", ["bread", ["bread"]])
def test_bentomls_client_sends_openais_input_as_it_is(client: Any, value: Any) -> None:
    answer = client.openai_embeddings(input=value)
    assert [len(item["embedding"]) for item in answer["data"]] == [32]
