from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bentos.aliases import read_aliases
from bentos.manifest import read_manifest
from flows.core.boxes import check_box, find_box
from flows.core.history import read_history
from flows.core.measuring import Measured, Serving, measure_bentos
from flows.core.packing import bento_exists, hash_manifest, is_stored
from flows.core.release_lock import list_holders
from flows.core.tracking import Tracker, open_tracker
from flows.core.verdicts import Report
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


def answers_well(candidate: Measured, rival: Measured | None, *, log: Path, home: Path) -> tuple[Serving, None]:
    """In place of the measurement, which starts servers for many seconds: it is tested in test_measuring.py."""
    assert bento_exists(candidate[0], home=home)
    assert is_stored(candidate[1], home=home)
    return Serving(p95_ms=5.0, texts_per_s=500.0, start_s=4.0, memory_mb=200.0, bytes_per_vector=128.0), None


def test_release_moves_the_champion_only_past_the_gates_and_is_harmless_to_repeat(
    data: DataParams,
    small_train: TrainParams,
    small_evaluate: EvaluateParams,
    any_gain: ReleaseParams,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    settings = load_settings()
    tracker = open_tracker(settings)
    first = train(data=data, train=small_train, evaluate=small_evaluate)

    # Refused: it is on record, once, and nothing else changes.
    for _ in range(2):
        with pytest.raises(ReleaseRefusedError, match=r"release\.min_gain"):
            release(run=first.run_id, release=ReleaseParams(min_gain=0.99))
        assert tracker.champion() is None
        assert tracker.version("1").tags["verdict"] == "refused"
        assert not any(settings.lunchboxes_path.glob("*"))
        (refusal,) = read_history(tracker)
        assert (refusal.kind, refusal.version) == ("refusal", "1")
        assert "quality" in refusal.gates
        kept = tracker.download_artifact(first.run_id, "release/gates.json", tmp_path / "kept")
        report = Report.from_json(kept.read_text())
        assert not report.passed
        assert tracker.find_run(first.run_id).tags["release_refusal"] == report.refusal

    # A dry run goes all the way and leaves nothing.
    state = registry_state(tracker), tracker.model_tags(), tracker.find_run(first.run_id)
    monkeypatch.setattr("flows.release.measure_bentos", answers_well)
    tried = release(run=first.run_id, release=any_gain, dry_run=True)
    assert tried.alias == ""
    assert tried.metrics["serve/p95_ms"] == 5.0
    assert {"parity", "latency"} <= {row["gate"] for row in tried.gates}
    assert (registry_state(tracker), tracker.model_tags(), tracker.find_run(first.run_id)) == state
    assert not any(settings.lunchboxes_path.glob("*"))
    assert not any(settings.staging_path.iterdir())
    assert not bento_exists(tried.bento_tag)
    assert list_holders(tracker) == []

    # Released: alias, tags and Bento lead to each other.
    shipped = release(run=first.run_id, release=any_gain)
    champion = tracker.champion()
    assert champion is not None
    assert champion.version == shipped.version == first.version
    assert champion.tags["bento_tag"] == shipped.bento_tag == f"ekiben:{first.version}-{first.run_id[:8]}"
    assert champion.tags["space_id"] == shipped.space_id
    assert champion.tags["verdict"] == "passed"
    assert champion.tags["replaces"] == shipped.replaces == ""
    assert read_aliases(settings.bento_store_path, "ekiben")["champion"].version == shipped.version
    assert tracker.find_run(first.run_id).tags["release_refusal"] == ""
    fetched = tracker.download_artifact(first.run_id, "lunchbox", tmp_path / "fetched")
    check_box(fetched, champion, champion.tags["manifest_sha256"])  # other machines find the whole box with the run
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
    assert [act.kind for act in read_history(tracker)] == ["refusal", "release", "refusal"]
    # What was packed for that is not taken for the champion's box, which the store still has.
    assert hash_manifest(find_box(tracker, champion, settings.lunchboxes_path)) == champion.tags["manifest_sha256"]
    lenient = {"precision": "int8", "int8_max_loss": 1.0, "int8_mean_cosine": 0.9, "int8_min_cosine": 0.5}
    small = release(run=None, release=any_gain.model_copy(update=lenient | {"int8_min_speedup": 0.001}))
    assert not small.unchanged
    assert small.metrics["serve/bytes_per_vector"] == 32 * 4
    assert [row["verdict"] for row in small.gates if row["gate"] == "int8"] == ["passed"]
    assert read_manifest(box).default_precision == "int8"
    assert (small.bento_tag, small.space_id) == (shipped.bento_tag, shipped.space_id)

    # The next version takes over; the old one is `previous`. Both are served and measured, out of the way.
    monkeypatch.setattr("flows.release.measure_bentos", measure_bentos)
    second = train(data=data, train=small_train.model_copy(update={"seed": 7}), evaluate=small_evaluate)
    newer = release(run=second.version, release=any_gain)
    assert newer.version == second.version
    assert tracker.version("champion").version == second.version
    assert tracker.version("previous").version == first.version
    assert newer.replaces == tracker.version("champion").tags["replaces"] == first.version
    assert newer.compat == tracker.version("champion").tags["compat"]
    assert tracker.version("champion").tags["compat_space_id"] == shipped.space_id
    assert {"champion", "compat"} <= {row["gate"] for row in newer.gates}
    card = (settings.lunchboxes_path / newer.bento_tag.partition(":")[2] / "MODEL_CARD.md").read_text()
    assert "latency" in card


def test_release_says_when_there_is_nothing_to_release(any_gain: ReleaseParams) -> None:
    with pytest.raises(NothingReleasedError, match="ekiben"):
        release(run=None, release=any_gain)
