from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flows.core.losses import LOSS_CLASSES, DistillLoss, JointLoss, Pull, Targets, make_loss
from flows.core.models import load_base_model
from tests.factories import make_tiny_model

COLUMNS = (["a cat", "the server is down", "jazz"], ["a dog", "code and data", "the piano"])
SCORES = torch.tensor([0.9, 0.4, 0.1])


@pytest.fixture
def model(tiny_model_path: Path) -> Any:
    return load_base_model(str(tiny_model_path), max_tokens=16).eval()


def features(model: Any, columns: Sequence[list[str]] = COLUMNS) -> list[dict[str, torch.Tensor]]:
    return [dict(model.preprocess(texts)) for texts in columns]


def embed(model: Any) -> list[torch.Tensor]:
    return [model(column)["sentence_embedding"] for column in features(model)]


def test_without_nesting_and_pull_a_loss_is_the_librarys_own(model: Any) -> None:
    assert type(make_loss("cosent", model)) is LOSS_CLASSES["cosent"]
    assert type(make_loss("cosent", model, dims=[32])) is LOSS_CLASSES["cosent"]


@pytest.mark.parametrize("name", LOSS_CLASSES)
def test_nested_dimensions_share_the_loss_evenly(name: str, model: Any) -> None:
    plain = LOSS_CLASSES[name](model)
    vectors = embed(model)
    expected = [plain.compute_loss_from_embeddings([each[:, :dim] for each in vectors], SCORES) for dim in (32, 16, 8)]
    found = make_loss(name, model, dims=(32, 16, 8))(features(model), SCORES)
    assert found.item() == pytest.approx(np.mean([each.item() for each in expected]), abs=1e-5)


@pytest.mark.parametrize("name", ["cosine_similarity", "multiple_negatives_ranking"])
def test_a_pull_adds_its_weight_times_the_mean_distance_to_the_targets(name: str, model: Any) -> None:
    texts = [*COLUMNS[0], *COLUMNS[1]]
    target_of = dict(zip(texts, np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32), strict=True))
    targets = Targets(texts, lambda asked: np.stack([target_of[text] for text in asked]))
    rows = torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]])
    has_score = name == "cosine_similarity"
    labels = torch.cat([SCORES[:, None], rows], dim=1) if has_score else rows
    loss = make_loss(name, model, pull=Pull(0.5, targets))
    assert isinstance(loss, JointLoss)
    vectors = torch.cat(embed(model)).detach().numpy()
    cosines = [
        vector @ target_of[text] / np.linalg.norm(target_of[text]) for text, vector in zip(texts, vectors, strict=True)
    ]
    plain = LOSS_CLASSES[name](model)(features(model), SCORES).item()
    assert loss(features(model), labels).item() == pytest.approx(plain + 0.5 * (1 - np.mean(cosines)), abs=1e-5)


def test_a_pull_moves_vectors_to_their_targets(model: Any, tmp_path: Path) -> None:
    other = load_base_model(str(make_tiny_model(tmp_path / "other", seed=1)), max_tokens=16)
    texts = [*COLUMNS[0], *COLUMNS[1]]
    loss = make_loss("cosine_similarity", model, pull=Pull(100.0, Targets(texts, other.encode)))
    labels = torch.tensor([[0.9, 0, 3], [0.4, 1, 4], [0.1, 2, 5]])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    distances = []
    for _ in range(5):
        optimizer.zero_grad()
        value = loss(features(model), labels)
        value.backward()
        optimizer.step()
        distances.append(value.item())
    assert distances[-1] < 0.7 * distances[0]


def test_each_target_is_asked_for_once() -> None:
    asked: list[list[str]] = []

    def encode(texts: Sequence[str]) -> np.ndarray:
        asked.append(list(texts))
        return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)

    targets = Targets(["a", "bb", "ccc"], encode)
    assert targets.take([2, 0, 2]).tolist() == [[3, 1], [1, 1], [3, 1]]
    assert targets.take([0, 1]).tolist() == [[1, 1], [2, 1]]
    assert targets.take([0, 1, 2]).tolist() == [[1, 1], [2, 1], [3, 1]]
    assert asked == [["ccc", "a"], ["bb"]]


def test_distillation_is_the_distance_to_the_teacher_and_trains_only_the_student(
    model: Any, tiny_model_path: Path
) -> None:
    texts = COLUMNS[:1]
    same = DistillLoss(model, load_base_model(str(tiny_model_path), max_tokens=16))
    assert same(features(model, texts), None).item() == pytest.approx(0, abs=1e-6)
    student = load_base_model(str(tiny_model_path), max_tokens=16, layers=1).eval()
    loss = DistillLoss(student, model)
    value = loss(features(model, texts), None)
    cosines = (student.encode(texts[0]) * model.encode(texts[0])).sum(axis=1)
    assert value.item() == pytest.approx(1 - cosines.mean(), abs=1e-5)
    value.backward()
    trained = {id(parameter) for parameter in loss.parameters()}
    assert trained == {id(parameter) for parameter in student.parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
