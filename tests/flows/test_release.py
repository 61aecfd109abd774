from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bentos.manifest import read_manifest
from flows.core.packing import bento_exists
from flows.core.tracking import Tracker, open_tracker
from flows.errors import NothingReleasedError, ReleaseRefusedError
from flows.params import DataParams, EvaluateParams, ReleaseParams, TrainParams
from flows.release import release
from flows.settings import load_settings
from flows.train import train
from tests.serving import bento_home

pytestmark = pytest.mark.usefixtures("prefect_server", "own_bento_home")


@pytest.fixture
def own_bento_home(tmp_path: Path) -> Iterator[None]:
    with bento_home(tmp_path / "bentoml"):
        yield


def registry_state(tracker: Tracker) -> list[tuple[str, tuple[str, ...], dict[str, str]]]:
    return [(item.version, item.aliases, item.tags) for item in tracker.versions()]


def test_release_moves_the_champion_only_past_the_gates_and_is_harmless_to_repeat(
    data: DataParams, small_train: TrainParams, small_evaluate: EvaluateParams, any_gain: ReleaseParams
) -> None:
    settings = load_settings()
    tracker = open_tracker(settings)
    first = train(data=data, train=small_train, evaluate=small_evaluate)

    # Refused: nothing changes.
    before = registry_state(tracker)
    with pytest.raises(ReleaseRefusedError, match=r"release\.min_gain"):
        release(run=first.run_id, release=ReleaseParams(min_gain=0.99))
    assert registry_state(tracker) == before
    assert tracker.champion() is None
    assert not any(settings.lunchboxes_path.glob("*"))

    # Released: alias, tags and Bento lead to each other.
    shipped = release(run=first.run_id, release=any_gain)
    champion = tracker.champion()
    assert champion is not None
    assert champion.version == shipped.version == first.version
    assert champion.tags["bento_tag"] == shipped.bento_tag == f"ekiben:{first.version}-{first.run_id[:8]}"
    assert champion.tags["space_id"] == shipped.space_id
    assert bento_exists(shipped.bento_tag)
    assert shipped.metrics["serve/bytes_per_vector"] == 32 * 4
    assert all(row["verdict"] == "passed" for row in shipped.gates)

    # Again: the same answer, and nothing moves.
    state = registry_state(tracker)
    again = release(run=None, release=any_gain)
    assert again.bento_tag == shipped.bento_tag
    assert again.unchanged
    assert registry_state(tracker) == state

    # Insisting on an int8 that cannot be certified is refused; with a lower bar it takes the place of fp32.
    box = settings.lunchboxes_path / f"{first.version}-{first.run_id[:8]}"
    with pytest.raises(ReleaseRefusedError, match=r"int8 is left out, fp32 serves.*release\.int8_min_speedup"):
        release(run=None, release=any_gain.model_copy(update={"precision": "int8", "int8_min_speedup": 1e6}))
    assert registry_state(tracker) == state
    assert read_manifest(box).default_precision == "fp32"
    lenient = {"precision": "int8", "int8_max_loss": 1.0, "int8_mean_cosine": 0.9, "int8_min_cosine": 0.5}
    small = release(run=None, release=any_gain.model_copy(update=lenient | {"int8_min_speedup": 0.001}))
    assert not small.unchanged
    assert small.metrics["serve/bytes_per_vector"] == 32 * 4
    assert [row["verdict"] for row in small.gates if row["gate"] == "int8"] == ["passed"]
    assert read_manifest(box).default_precision == "int8"
    assert (small.bento_tag, small.space_id) == (shipped.bento_tag, shipped.space_id)

    # The next version takes over; the old one is `previous`.
    second = train(data=data, train=small_train.model_copy(update={"seed": 7}), evaluate=small_evaluate)
    newer = release(run=second.version, release=any_gain)
    assert newer.version == second.version
    assert tracker.version("champion").version == second.version
    assert tracker.version("previous").version == first.version


def test_release_says_when_there_is_nothing_to_release(any_gain: ReleaseParams) -> None:
    with pytest.raises(NothingReleasedError, match="ekiben"):
        release(run=None, release=any_gain)
