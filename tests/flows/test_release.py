from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bentos.aliases import read_aliases
from bentos.manifest import Manifest, read_manifest, sha256_file
from flows.core.boxes import check_box
from flows.core.history import read_history
from flows.core.measuring import Measured, Serving, measure_bentos
from flows.core.packing import bento_exists, is_stored, stage_bento
from flows.core.release_lock import list_holders
from flows.core.tracking import Tracker, open_tracker
from flows.core.verdicts import Report
from flows.errors import (
    NothingReleasedError,
    ParamsError,
    ReleaseRefusedError,
    SmokeTestError,
    UnsupportedModelError,
)
from flows.params import DataParams, EvaluateParams, ReleaseParams, TrainParams
from flows.release import release
from flows.rollback import rollback
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


def tracker_artifacts(tracker: Tracker, run_id: str) -> Path:
    return Path(tracker._client.get_run(run_id).info.artifact_uri.removeprefix("file://"))


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
    # Asked anew: the data are a moment older, and the run has more metrics.
    verdicts = [[(row["gate"], row["verdict"], row["threshold"]) for row in found.gates] for found in (again, shipped)]
    assert verdicts[0] == verdicts[1]
    assert registry_state(tracker) == state

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


def test_whatever_refuses_is_a_verdict_with_a_report_on_record(
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
    box = settings.lunchboxes_path / f"{first.version}-{first.run_id[:8]}"
    shown: list[str] = []
    monkeypatch.setattr("flows.release.create_markdown_artifact", lambda markdown, **_: shown.append(markdown))

    def refuse(match: str, **params: object) -> Report:
        with pytest.raises(ReleaseRefusedError, match=match):
            release(run="1", release=any_gain.model_copy(update=params))
        kept = tracker.download_artifact(first.run_id, "release/gates.json", tmp_path / str(len(shown)))
        report = Report.from_json(kept.read_text())
        assert not report.passed
        assert shown[-1] == report.to_markdown()
        newest = read_history(tracker)[-1]
        assert (newest.kind, newest.version) == ("refusal", "1")
        assert newest.gates == [verdict.gate for verdict in report.verdicts if not verdict.passed]
        assert tracker.champion() is None
        return report

    # A release ends where it is refused, and says what was not asked; a dry run asks everything and leaves nothing.
    early = refuse(r"release\.min_gain", min_gain=0.99)
    assert early.not_asked == ("parity", "batch_invariance", "int8", "latency", "throughput", "start", "memory")
    before = tracker.model_tags(), registry_state(tracker)
    monkeypatch.setattr("flows.release.measure_bentos", answers_well)
    with pytest.raises(ReleaseRefusedError, match="quality: "):
        release(run="1", release=any_gain.model_copy(update={"min_gain": 0.99}), dry_run=True)
    assert "| parity | passed |" in shown[-1]
    assert "| memory | passed |" in shown[-1]
    assert "Not asked" not in shown[-1]
    assert (tracker.model_tags(), registry_state(tracker)) == before
    assert not box.exists()

    def cannot_export(*_: object, **__: object) -> None:
        raise UnsupportedModelError("the module Router has no counterpart")

    with monkeypatch.context() as patch:
        patch.setattr("flows.release.pack_lunchbox", cannot_export)
        report = refuse("certificate: the module Router has no counterpart")
    assert report.not_asked == ("int8", "latency", "throughput", "start", "memory")

    # From here on there is a box, whose card says what refused it.
    refuse(r"int8 is left out, fp32 serves.*release\.int8_min_speedup", precision="int8", int8_min_speedup=1e6)
    assert read_manifest(box).default_precision == "fp32"
    assert "**int8**: set release.precision" in (box / "MODEL_CARD.md").read_text()

    def does_not_answer(*_: object, **__: object) -> None:
        raise SmokeTestError("ekiben:1: the header X-Ekiben-Space is 'x'")

    monkeypatch.setattr("flows.release.measure_bentos", does_not_answer)
    refuse("answers: ekiben:1: the header X-Ekiben-Space is 'x'")
    assert "X-Ekiben-Space is 'x'" in (box / "MODEL_CARD.md").read_text()
    check_box(box, tracker.version("1"))

    # With a lower bar int8 takes the place of fp32; and no longer when it was released with the other one.
    monkeypatch.setattr("flows.release.measure_bentos", answers_well)
    lenient = {"precision": "int8", "int8_max_loss": 1.0, "int8_mean_cosine": 0.9, "int8_min_cosine": 0.5}
    small = release(run="1", release=any_gain.model_copy(update=lenient | {"int8_min_speedup": 0.001}))
    assert [row["verdict"] for row in small.gates if row["gate"] == "int8"] == ["passed"]
    assert read_manifest(box).default_precision == "int8"
    with pytest.raises(ParamsError, match="was released with int8, and a released version does not change"):
        release(run="1", release=any_gain.model_copy(update={"precision": "fp32"}))
    assert release(run="1", release=any_gain).unchanged  # by other limits of int8


@pytest.mark.slow
def test_a_released_version_is_released_again_with_the_files_that_it_had(
    data: DataParams,
    small_train: TrainParams,
    small_evaluate: EvaluateParams,
    any_gain: ReleaseParams,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = load_settings()
    tracker = open_tracker(settings)
    monkeypatch.setattr("flows.release.measure_bentos", answers_well)
    for seed in (42, 7, 9):
        train(data=data, train=small_train.model_copy(update={"seed": seed}), evaluate=small_evaluate)
    one, two = (release(run=version, release=any_gain) for version in "12")
    bentoml, boxes = settings.bento_store_path, settings.lunchboxes_path

    def files() -> dict[str, str]:
        places = (boxes, bentoml / "models" / "ekiben-model", tracker_artifacts(tracker, one.run_id) / "lunchbox")
        own = ("latest", "model.yaml")  # BentoML's
        found = (path for place in places for path in place.rglob("*") if path.name not in own)
        return {str(path): sha256_file(path) for path in found if path.is_file()}

    before = files()
    tags = tracker.version("1").tags

    # A version that was champion before meets the champion of now, even if that one cannot be served beside it.
    def fail_for_the_rival(box: Path, manifest: Manifest, *, root: Path, home: Path) -> str:
        if manifest.version == "2":
            raise shutil.Error([("one", "two", "Input/output error")])
        return stage_bento(box, manifest, root=root, home=home)

    with monkeypatch.context() as patch:
        patch.setattr("flows.release.stage_bento", fail_for_the_rival)
        again = release(run="1", release=any_gain)
    assert (again.replaces, again.unchanged, again.metrics["serve/p95_ms"]) == ("2", False, 5.0)
    assert again.compat in ("identical", "compatible", "adapter", "breaking")
    assert files() == before
    now = tracker.version("1").tags
    assert (now["replaces"], now["compat"], now["compat_space_id"]) == ("2", again.compat, two.space_id)
    assert now["manifest_sha256"] == tags["manifest_sha256"]
    assert read_history(tracker)[-1].compat == again.compat
    repeated = release(run="1", release=any_gain)
    assert (repeated.unchanged, repeated.metrics, repeated.compat) == (True, {}, again.compat)

    # Whatever the stores have lost comes back from the run.
    shutil.rmtree(bentoml / "bentos" / "ekiben"), shutil.rmtree(bentoml / "models" / "ekiben-model")
    shutil.rmtree(boxes)
    assert release(run="1", release=any_gain).unchanged
    assert bento_exists(one.bento_tag)
    own = {path: digest for path, digest in before.items() if one.bento_tag.partition(":")[2] in path}
    assert len(own) > 10
    assert own.items() <= files().items()

    # What a rollback has left does not come back by itself.
    rollback(reason="slow on short queries")
    assert tracker.version("champion").version == "2"
    with pytest.raises(ReleaseRefusedError, match=r"rolled back: a rollback to version 2 has left it.*short queries"):
        release(run="1", release=any_gain)
    assert tracker.version("1").tags["verdict"] == "passed"
    assert release(run="1", release=any_gain.model_copy(update={"allow_rolled_back": True})).replaces == "2"

    # A champion whose box is lost refuses, unless nothing is asked of the comparison with it.
    for place in (boxes, bentoml / "models" / "ekiben-model"):
        shutil.rmtree(place / one.bento_tag.partition(":")[2])
    shutil.rmtree(tracker_artifacts(tracker, one.run_id) / "lunchbox")
    with pytest.raises(ReleaseRefusedError, match=r"champion: unknown: the lunchbox of version 1 .*champion_margin=-2"):
        release(run="3", release=any_gain.model_copy(update={"champion_margin": -0.5}))
    three = release(run="3", release=any_gain)
    assert (three.replaces, three.compat) == ("1", "breaking")
    compat = read_manifest(boxes / three.bento_tag.partition(":")[2]).compat
    assert compat is not None
    assert (compat.space_id, "nothing could be measured" in compat.reason) == (one.space_id, True)


def test_release_says_when_there_is_nothing_to_release(any_gain: ReleaseParams) -> None:
    with pytest.raises(NothingReleasedError, match="ekiben"):
        release(run=None, release=any_gain)
