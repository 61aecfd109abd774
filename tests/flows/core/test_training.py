from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from bentos.vectors import cosine_pairs, normalize
from flows.core import training
from flows.core.dataset import Part
from flows.core.evaluation import Encode
from flows.core.export import export_model
from flows.core.heads import note_nested_dims, read_nested_dims
from flows.core.models import load_base_model, load_saved_model
from flows.core.retrieval import Retrieval
from flows.core.training import (
    Fit,
    Progress,
    check_points,
    choose_losses,
    fit_model,
    make_architecture,
    make_encode,
    save_model,
)
from flows.errors import ParamsError, UnsupportedModelError
from flows.params import TrainParams
from tests.factories import make_tiny_model

TEXTS = ["a young child rides a horse", "the server is down again", "jazz"]
NO_PAIRS = pd.DataFrame(
    {"text_a": pd.Series(dtype=str), "text_b": pd.Series(dtype=str), "score": pd.Series(dtype=float)}
)
WORDS = [
    "cat",
    "dog",
    "horse",
    "piano",
    "guitar",
    "violin",
    "server",
    "code",
    "data",
    "station",
    "train",
    "lunch",
    "rice",
]


def make_pairs(rows: int = 40) -> Part:
    random = np.random.default_rng(0)
    first, second = (random.choice(WORDS, (rows, 3)) for _ in range(2))
    return Part(
        pd.DataFrame(
            {
                "text_a": [" ".join(words) for words in first],
                "text_b": [" ".join(words) for words in second],
                "score": random.uniform(0, 1, rows),
            }
        )
    )


def make_retrieval() -> Part:
    corpus = {f"d{row}": f"the {word} is good" for row, word in enumerate(WORDS)}
    queries = {f"q{row}": f"where is the {word}" for row, word in enumerate(WORDS)}
    return Part(NO_PAIRS, Retrieval(corpus, queries, {f"q{row}": {f"d{row}": 1.0} for row in range(len(WORDS))}))


def make_both() -> Part:
    return Part(make_pairs().pairs, make_retrieval().retrieval)


def make_params(model: Path, **changes: Any) -> TrainParams:
    quick = {"base_model": str(model), "steps": 4, "batch_size": 8, "learning_rate": 1e-3, "max_tokens": 32}
    return TrainParams(**quick | changes)


def get_embeddings(model: Any) -> np.ndarray:
    return model.transformers_model.get_input_embeddings().weight.detach().numpy()


@pytest.fixture(scope="module")
def fit(tiny_model_path: Path) -> Fit:
    return fit_model(make_pairs(), make_params(tiny_model_path))


def test_weights_move_and_frozen_embeddings_do_not(fit: Fit, tiny_model_path: Path) -> None:
    base = load_base_model(str(tiny_model_path), max_tokens=32)
    assert np.abs(base.encode(TEXTS) - fit.model.encode(TEXTS)).max() > 1e-3
    assert np.array_equal(get_embeddings(base), get_embeddings(fit.model))
    assert (fit.steps_done, fit.stopped_early, fit.loss_name) == (4, False, "cosine_similarity")
    assert [step for step, _ in fit.losses] == [1, 2, 3, 4]
    assert fit.seconds > 0
    assert not fit.model.training


def test_embeddings_move_when_not_frozen(fit: Fit, tiny_model_path: Path) -> None:
    thawed = fit_model(make_pairs(), make_params(tiny_model_path, freeze_embeddings=False))
    assert not np.array_equal(get_embeddings(thawed.model), get_embeddings(fit.model))


def test_the_same_seed_gives_the_same_vectors_and_another_seed_others(fit: Fit, tiny_model_path: Path) -> None:
    again = fit_model(make_pairs(), make_params(tiny_model_path))
    assert np.array_equal(again.model.encode(TEXTS), fit.model.encode(TEXTS))
    assert again.losses == fit.losses
    other = fit_model(make_pairs(), make_params(tiny_model_path, seed=7))
    assert not np.array_equal(other.model.encode(TEXTS), fit.model.encode(TEXTS))


def test_both_kinds_of_data_train_together_and_repeatably(tiny_model_path: Path) -> None:
    first, second = (fit_model(make_both(), make_params(tiny_model_path, steps=5)) for _ in range(2))
    assert first.loss_name == "cosine_similarity+multiple_negatives_ranking"
    assert first.steps_done == 5
    assert np.array_equal(first.model.encode(TEXTS), second.model.encode(TEXTS))


@pytest.mark.parametrize("loss", ["cosent", "angle"])
def test_pair_losses_train_by_name(loss: str, fit: Fit, tiny_model_path: Path) -> None:
    other = fit_model(make_pairs(), make_params(tiny_model_path, loss=loss, steps=2))
    assert other.loss_name == loss
    assert other.losses[0][1] != pytest.approx(fit.losses[0][1])


def test_retrieval_data_train_the_right_document_towards_its_query(tiny_model_path: Path) -> None:
    part = make_retrieval()
    params = make_params(tiny_model_path, steps=12, batch_size=16)
    fit = fit_model(part, params)
    assert fit.loss_name == "multiple_negatives_ranking"
    assert np.mean([loss for _, loss in fit.losses[-3:]]) < np.mean([loss for _, loss in fit.losses[:3]])


def test_fewer_distinct_texts_than_a_batch_still_train(tiny_model_path: Path) -> None:
    corpus = {f"d{row}": word for row, word in enumerate(WORDS)}
    qrels = {"q": dict.fromkeys(corpus, 1.0), "r": {"d0": 1.0}}
    part = Part(NO_PAIRS, Retrieval(corpus, {"q": "a query", "r": "another"}, qrels))
    assert fit_model(part, make_params(tiny_model_path, steps=3, batch_size=64)).steps_done == 3


def test_irrelevant_documents_are_not_trained_on(tiny_model_path: Path) -> None:
    part = make_retrieval()
    qrels = {query: relevances | {"d0": 0.0} for query, relevances in part.retrieval.qrels.items() if query != "q0"}
    with_zeros = Part(NO_PAIRS, Retrieval(part.retrieval.corpus, part.retrieval.queries, qrels))
    without = {query: {key: value for key, value in each.items() if value > 0} for query, each in qrels.items()}
    plain = Part(NO_PAIRS, Retrieval(part.retrieval.corpus, part.retrieval.queries, without))
    params = make_params(tiny_model_path, steps=2)
    assert fit_model(with_zeros, params).losses == fit_model(plain, params).losses


@pytest.mark.parametrize(
    ("part", "loss", "expected"),
    [
        (make_pairs(), "auto", {"pairs": "cosine_similarity"}),
        (make_pairs(), "angle", {"pairs": "angle"}),
        (make_retrieval(), "auto", {"retrieval": "multiple_negatives_ranking"}),
        (make_both(), "auto", {"pairs": "cosine_similarity", "retrieval": "multiple_negatives_ranking"}),
        (make_both(), "cosent", {"pairs": "cosent", "retrieval": "multiple_negatives_ranking"}),
        (make_both(), "multiple_negatives_ranking", {"retrieval": "multiple_negatives_ranking"}),
    ],
)
def test_each_kind_of_data_gets_its_loss(part: Part, loss: str, expected: dict[str, str]) -> None:
    assert choose_losses(part, loss) == expected


@pytest.mark.parametrize(
    ("part", "loss", "found"),
    [
        (make_retrieval(), "cosine_similarity", "needs scored pairs"),
        (make_retrieval(), "cosent", "needs scored pairs"),
        (make_pairs(), "multiple_negatives_ranking", "needs retrieval data"),
        (Part(NO_PAIRS), "auto", "nothing to train on"),
    ],
)
def test_a_loss_that_the_data_cannot_feed_is_refused(part: Part, loss: str, found: str, tiny_model_path: Path) -> None:
    with pytest.raises(ParamsError, match=found):
        fit_model(part, make_params(tiny_model_path, loss=loss))


def test_progress_is_told_after_every_step(tiny_model_path: Path) -> None:
    seen: list[Progress] = []
    fit = fit_model(make_pairs(), make_params(tiny_model_path), on_progress=seen.append)
    assert [(each.step, each.steps) for each in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [(each.step, each.loss) for each in seen] == list(fit.losses)
    assert [each.elapsed_s for each in seen] == sorted(each.elapsed_s for each in seen)


def test_the_time_budget_ends_the_fit_between_steps_and_keeps_what_was_trained(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: clock.seconds))

    def let_a_minute_pass(progress: Progress) -> None:
        clock.seconds += 60

    params = make_params(tiny_model_path, steps=50, max_minutes=2.5)
    fit = fit_model(make_pairs(), params, on_progress=let_a_minute_pass)
    base = load_base_model(str(tiny_model_path), max_tokens=32)
    assert (fit.steps_done, fit.stopped_early, len(fit.losses), fit.seconds) == (4, True, 4, 240)
    assert np.abs(fit.model.encode(TEXTS) - base.encode(TEXTS)).max() > 1e-3


def test_a_single_step_trains(tiny_model_path: Path) -> None:
    fit = fit_model(make_pairs(), make_params(tiny_model_path, steps=1, max_minutes=1e-6))
    base = load_base_model(str(tiny_model_path), max_tokens=32)
    assert (fit.steps_done, fit.stopped_early) == (1, False)
    assert np.abs(fit.model.encode(TEXTS) - base.encode(TEXTS)).max() > 1e-4


def test_an_error_while_reporting_progress_ends_the_fit(tiny_model_path: Path) -> None:
    def cancel(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_model(make_pairs(), make_params(tiny_model_path), on_progress=cancel)


def test_a_loss_that_is_no_number_is_refused_with_the_cure(tiny_model_path: Path) -> None:
    pairs = make_pairs().pairs
    with pytest.raises(ParamsError, match="diverged at step 1 of 4") as caught:
        fit_model(Part(pairs.assign(score=np.nan)), make_params(tiny_model_path))
    assert "lower train.learning_rate" in str(caught.value)


def test_layers_are_dropped_before_training_and_stay_dropped(tiny_model_path: Path, tmp_path: Path) -> None:
    fit = fit_model(make_pairs(), make_params(tiny_model_path, layers=1, steps=2))
    save_model(fit.model, tmp_path / "model")
    saved = load_saved_model(tmp_path / "model")
    assert len(saved.transformers_model.encoder.layer) == 1
    assert np.array_equal(saved.encode(TEXTS), fit.model.encode(TEXTS))


def test_a_saved_model_gives_the_same_vectors_and_replaces_the_old_one(
    fit: Fit, tiny_model_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "model"
    save_model(load_base_model(str(tiny_model_path), max_tokens=32), path)
    (path / "leftover").touch()
    save_model(fit.model, path)
    saved = load_saved_model(path)
    assert np.array_equal(saved.encode(TEXTS), fit.model.encode(TEXTS))
    assert saved.max_seq_length == 32
    assert [each.name for each in path.parent.iterdir()] == ["model"]
    assert not (path / "leftover").exists()


def test_a_failed_save_leaves_the_old_model_alone(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(fit.model, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(type(fit.model), "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(fit.model, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []


def test_saved_files_name_no_folder_of_this_machine_and_no_training_text(fit: Fit, tmp_path: Path) -> None:
    save_model(fit.model, tmp_path / "ours")
    fit.model.save(str(tmp_path / "with-card"))  # as MLflow saves it
    for path in tmp_path.rglob("*"):
        if path.suffix in {".json", ".md"} and path.name != "tokenizer.json":
            text = path.read_text(encoding="utf-8")
            assert str(tmp_path.parent) not in text, path
            assert make_pairs().pairs["text_a"][0] not in text, path


def test_vectors_do_not_depend_on_white_space_around_a_text(fit: Fit) -> None:
    encode = make_encode(fit.model, batch_size=2)
    vectors = encode(["jazz", "  jazz\n", *TEXTS])
    assert vectors.dtype == np.float32
    assert vectors.shape == (5, 32)
    assert np.allclose(vectors[0], vectors[1], atol=1e-6)
    assert encode([]).shape == (0, 32)


def test_a_default_prompt_is_trained_with_as_it_is_encoded_with(tmp_path: Path) -> None:
    plain = make_tiny_model(tmp_path / "plain")
    prompted = make_tiny_model(tmp_path / "prompted", prompts={"query": "find the "}, default_prompt="query")
    pairs = make_pairs()
    prefixed = Part(pairs.pairs.assign(**{name: "find the " + pairs.pairs[name] for name in ("text_a", "text_b")}))
    by_hand = fit_model(prefixed, make_params(plain, steps=1))
    by_prompt = fit_model(pairs, make_params(prompted, steps=1))
    unprompted = fit_model(pairs, make_params(plain, steps=1))
    assert by_prompt.losses == by_hand.losses
    assert by_prompt.losses != unprompted.losses


def embed_whole(model: Path) -> np.ndarray:
    return load_base_model(str(model), max_tokens=32).encode(TEXTS)


def mean_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(cosine_pairs(a, b).mean())


def test_a_model_that_lost_layers_first_learns_the_vectors_of_the_whole_one(tiny_model_path: Path) -> None:
    params = make_params(tiny_model_path, layers=1, steps=1, learning_rate=1e-8)
    cold = fit_model(make_pairs(), params.model_copy(update={"distill_steps": 0}))
    warm = fit_model(make_pairs(), params.model_copy(update={"distill_steps": 30}))
    whole = embed_whole(tiny_model_path)
    assert mean_cosine(warm.model.encode(TEXTS), whole) > mean_cosine(cold.model.encode(TEXTS), whole) + 0.01
    assert cold.distill_losses == ()
    assert [step for step, _ in warm.distill_losses] == list(range(1, 31))
    assert warm.distill_losses[-1][1] < warm.distill_losses[0][1]
    assert (warm.steps_done, [step for step, _ in warm.losses]) == (1, [1])  # counted apart
    assert np.array_equal(get_embeddings(warm.model), get_embeddings(cold.model))  # frozen there too


def test_distillation_gives_the_same_vectors_again(tiny_model_path: Path) -> None:
    params = make_params(tiny_model_path, layers=1, distill_steps=5, dimensions=16, steps=3)
    first, second = (fit_model(make_both(), params) for _ in range(2))
    assert np.array_equal(first.model.encode(TEXTS), second.model.encode(TEXTS))
    assert (first.losses, first.distill_losses) == (second.losses, second.distill_losses)


@pytest.mark.parametrize("changes", [{"layers": None}, {"layers": 2}, {"layers": 1, "distill_steps": 0}])
def test_nothing_is_distilled_into_a_whole_model_or_without_steps(
    changes: dict[str, Any], tiny_model_path: Path
) -> None:
    assert fit_model(make_pairs(), make_params(tiny_model_path, steps=1, **changes)).distill_losses == ()


def test_distillation_takes_at_most_half_of_the_time_budget(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    seen: list[Progress] = []

    def let_a_minute_pass(progress: Progress) -> None:
        clock.seconds += 60
        seen.append(progress)

    params = make_params(tiny_model_path, layers=1, distill_steps=50, steps=50, max_minutes=10)
    fit = fit_model(make_pairs(), params, on_progress=let_a_minute_pass)
    assert (len(fit.distill_losses), fit.steps_done, fit.stopped_early) == (6, 5, True)
    assert [each.distilling for each in seen] == [True] * 6 + [False] * 5
    assert [each.step for each in seen] == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5]


def test_dimensions_are_what_the_model_has_wherever_it_is_loaded(tiny_model_path: Path, tmp_path: Path) -> None:
    fit = fit_model(make_both(), make_params(tiny_model_path, dimensions=16))
    assert fit.model.encode(TEXTS).shape == (3, 16)
    assert fit.model.get_embedding_dimension() == 16
    save_model(fit.model, tmp_path / "model")
    plain = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert np.array_equal(plain.encode(TEXTS), fit.model.encode(TEXTS))
    assert plain.max_seq_length == 32


def get_head(model: Any) -> np.ndarray:
    return next(module for module in model if type(module).__name__ == "Dense").linear.weight.detach().numpy()


def test_the_head_starts_as_the_first_dimensions_and_is_trained(tiny_model_path: Path) -> None:
    still = fit_model(make_pairs(), make_params(tiny_model_path, dimensions=8, steps=1, learning_rate=1e-9))
    moved = fit_model(make_pairs(), make_params(tiny_model_path, dimensions=8, steps=10))
    assert still.model.encode(TEXTS) == pytest.approx(normalize(embed_whole(tiny_model_path)[:, :8]), abs=1e-4)
    assert np.abs(get_head(moved.model) - get_head(still.model)).max() > 1e-3


def test_smaller_dimensions_are_trained_along_and_named(tiny_model_path: Path) -> None:
    nested = fit_model(make_pairs(), make_params(tiny_model_path, dimensions=32, steps=1))
    assert read_nested_dims(nested.model) == (16,)
    assert read_nested_dims(fit_model(make_pairs(), make_params(tiny_model_path, steps=1)).model) == ()
    alone = fit_model(make_pairs(), make_params(tiny_model_path, dimensions=31, steps=1))
    assert read_nested_dims(alone.model) == ()


def test_a_base_model_that_promises_nested_dimensions_keeps_its_promise_only_when_they_are_trained(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    base = load_base_model(str(tiny_model_path))
    note_nested_dims(base, (16,))
    save_model(base, tmp_path / "base")
    assert read_nested_dims(fit_model(make_pairs(), make_params(tmp_path / "base", steps=1)).model) == ()


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"dimensions": 33}, r"train\.dimensions is 33"),
        ({"layers": 3}, r"train\.layers is 3"),
        ({"dimensions": 15, "loss": "angle"}, "even number"),
    ],
)
def test_an_impossible_shape_is_refused_before_training(
    changes: dict[str, Any], found: str, tiny_model_path: Path
) -> None:
    with pytest.raises(ParamsError, match=found):
        fit_model(make_pairs(), make_params(tiny_model_path, **changes), on_progress=lambda _: pytest.fail("trained"))


@pytest.mark.parametrize("changes", [{}, {"layers": 1, "dimensions": 16}])
def test_an_architecture_is_the_shape_of_what_training_makes(
    changes: dict[str, Any], tiny_model_path: Path, tmp_path: Path
) -> None:
    params = make_params(tiny_model_path, steps=1, distill_steps=1, **changes)
    untrained, trained = make_architecture(params), fit_model(make_pairs(), params).model
    assert not untrained.training
    for each in (untrained, trained):
        each.shapes = {name: tuple(tensor.shape) for name, tensor in each.state_dict().items()}
    assert untrained.shapes == trained.shapes
    assert untrained.max_seq_length == trained.max_seq_length == 32
    assert read_nested_dims(untrained) == read_nested_dims(trained)
    save_model(untrained, tmp_path / "model")
    export = export_model(tmp_path / "model", tmp_path)
    assert (export.dim, export.nested_dims) == (changes.get("dimensions", 32), ())


def test_a_shape_that_no_lunchbox_holds_is_refused_before_training(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "m", pooling="weightedmean")
    with pytest.raises(UnsupportedModelError, match="weightedmean"):
        make_architecture(make_params(path))


@given(st.integers(1, 200), st.integers(0, 20))
def test_checks_are_spread_evenly_and_never_on_the_last_step(steps: int, checks: int) -> None:
    points = check_points(steps, checks)
    assert all(0 < step < steps for step in points)
    assert list(points.values()) == sorted(set(points.values()))
    if steps > 2 * checks:
        assert list(points.values()) == list(range(1, checks + 1))
        assert all(abs(step - number * steps / (checks + 1)) <= 0.5 + 1e-9 for step, number in points.items())


def test_a_check_sees_the_model_so_far_and_changes_nothing(tiny_model_path: Path) -> None:
    seen: list[tuple[int, np.ndarray]] = []

    def look(number: int, encode: Encode) -> bool:
        seen.append((number, encode(TEXTS)))
        return False

    params = make_params(tiny_model_path, steps=6, dimensions=16)
    watched = fit_model(make_pairs(), params, on_check=look, checks=2)
    alone = fit_model(make_pairs(), params)
    assert [number for number, _ in seen] == [1, 2]
    assert not np.array_equal(seen[0][1], seen[1][1])
    assert seen[0][1].shape == (3, 16)
    assert np.array_equal(watched.model.encode(TEXTS), alone.model.encode(TEXTS))
    assert watched.losses == alone.losses
    assert (watched.hopeless, watched.steps_done) == (False, 6)
    half = fit_model(make_pairs(), make_params(tiny_model_path, steps=6, dimensions=16), checks=2)  # nobody asks
    assert half.losses == alone.losses


def test_a_check_ends_a_hopeless_fit(tiny_model_path: Path) -> None:
    fit = fit_model(
        make_pairs(), make_params(tiny_model_path, steps=9), on_check=lambda number, _: number == 2, checks=2
    )
    assert (fit.hopeless, fit.stopped_early, fit.steps_done) == (True, False, 6)
    assert not fit.model.training


def other_space(tmp_path: Path) -> Encode:
    return make_encode(load_base_model(str(make_tiny_model(tmp_path / "champion", seed=3)), max_tokens=32), 8)


@pytest.mark.parametrize("part", [make_pairs(), make_retrieval(), make_both()])
def test_an_anchor_keeps_the_model_near_the_more_the_heavier_it_weighs(
    part: Part, tiny_model_path: Path, tmp_path: Path
) -> None:
    champion = other_space(tmp_path)
    near = [
        mean_cosine(
            fit_model(part, make_params(tiny_model_path, steps=20, anchor_weight=weight), anchor=champion).model.encode(
                TEXTS
            ),
            champion(TEXTS),
        )
        for weight in (0.0, 0.5, 50.0)
    ]
    assert near[0] < near[1] < near[2]


def test_without_a_weight_or_a_champion_nothing_is_anchored(tiny_model_path: Path, tmp_path: Path) -> None:
    plain = fit_model(make_both(), make_params(tiny_model_path))
    unasked = fit_model(make_both(), make_params(tiny_model_path), anchor=other_space(tmp_path))
    alone = fit_model(make_both(), make_params(tiny_model_path, anchor_weight=3.0))
    assert plain.losses == unasked.losses == alone.losses
    assert np.array_equal(plain.model.encode(TEXTS), unasked.model.encode(TEXTS))


def test_an_anchored_head_starts_in_the_champions_space(tiny_model_path: Path) -> None:
    base = make_encode(load_base_model(str(tiny_model_path), max_tokens=32), 8)
    random = np.random.default_rng(0)
    rotation = np.linalg.qr(random.normal(size=(32, 32)))[0].astype(np.float32)

    def champion(texts: Sequence[str]) -> np.ndarray:
        return normalize(base(texts) @ rotation)[:, :32].astype(np.float32)

    params = make_params(tiny_model_path, dimensions=32, anchor_weight=1.0, steps=1, learning_rate=1e-9)
    fit = fit_model(make_pairs(200), params, anchor=champion)
    assert mean_cosine(fit.model.encode(TEXTS), champion(TEXTS)) > 0.99


def test_an_anchored_fit_gives_the_same_vectors_again(tiny_model_path: Path, tmp_path: Path) -> None:
    params = make_params(tiny_model_path, anchor_weight=1.0, steps=5)
    first, second = (fit_model(make_both(), params, anchor=other_space(tmp_path)) for _ in range(2))
    assert first.losses == second.losses
    assert np.array_equal(first.model.encode(TEXTS), second.model.encode(TEXTS))


def test_an_anchor_of_other_dimensions_is_refused_before_training(tiny_model_path: Path, tmp_path: Path) -> None:
    params = make_params(tiny_model_path, anchor_weight=1.0, dimensions=16)
    with pytest.raises(ParamsError, match=r"vectors have 32 dimensions.*model have 16.*train\.dimensions=32"):
        fit_model(make_pairs(), params, anchor=other_space(tmp_path), on_progress=lambda _: pytest.fail("trained"))


QUIET_FIT = """
import sys
from pathlib import Path
import pandas as pd
from flows.core.dataset import Part
from flows.core.training import fit_model, save_model
from flows.params import TrainParams
pairs = pd.DataFrame({"text_a": ["a b", "c", "d"], "text_b": ["e", "f", "g h"], "score": [0.1, 0.5, 0.9]})
params = TrainParams(base_model=sys.argv[1], steps=3, batch_size=2, max_tokens=16)
save_model(fit_model(Part(pairs), params).model, Path("saved"))
"""


def test_a_fit_prints_nothing_and_leaves_nothing_in_the_working_folder(tiny_model_path: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    here = tmp_path / "here"
    here.mkdir()
    environment = {name: value for name, value in os.environ.items() if "PROGRESS_BARS" not in name}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{QUIET_FIT}", str(tiny_model_path)],
        cwd=here,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(path.name for path in here.iterdir()) == ["saved"]
