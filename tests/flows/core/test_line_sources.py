"""What is asked of Prefect and of the registry, and what is understood of their answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from flows.core.line_sources import Key, PrefectSource, RegistrySource, SourceError
from tests.flows.line_servers import DAY_S, Line, act, busy_line, serve_line

NIGHTLY = Key("pipeline", "nightly")
TRAIN = Key("train", "train")


@pytest.fixture
def line() -> Line:
    return busy_line()


@pytest.fixture
def url(line: Line) -> Iterator[str]:
    with serve_line(line) as url:
        yield url


def states(source: PrefectSource, key: Key) -> list[str]:
    return sorted(run.state for run in source.ask().runs if run.key == key)


def test_deployments_have_their_flow_pool_and_active_schedules(url: str) -> None:
    found = {each.key: (each.pool, each.schedules) for each in PrefectSource(f"{url}/api").ask().deployments}
    assert found == {NIGHTLY: ("local", 1), TRAIN: ("local", 0), Key("release", "release"): ("kubernetes", 0)}


def test_runs_are_the_open_ones_and_those_that_ended_in_the_window(url: str) -> None:
    source = PrefectSource(f"{url}/api")
    assert states(source, NIGHTLY) == ["completed", "scheduled"]
    assert states(source, TRAIN) == ["running", "running"]
    assert states(PrefectSource(f"{url}/api", window_s=3 * DAY_S), NIGHTLY) == ["completed", "completed", "scheduled"]


def test_the_last_run_is_found_however_long_ago_it_was(url: str) -> None:
    found = PrefectSource(f"{url}/api").ask()
    assert (found.last_ended[TRAIN].state, found.last_ended[TRAIN].seconds) == ("failed", 7.0)
    assert found.last_ended[NIGHTLY].seconds == 1234.5
    assert found.last_success[TRAIN].ended_at == pytest.approx(found.last_ended[TRAIN].ended_at - DAY_S, abs=5)


def test_runs_that_somebody_started_by_hand_have_no_deployment(url: str) -> None:
    assert states(PrefectSource(f"{url}/api"), Key("train")) == ["crashed"]


@pytest.mark.parametrize(
    ("ago_s", "name", "state"),
    [(-10, "", "scheduled"), (30, "", "scheduled"), (30, "Late", "late"), (300, "", "late")],
    ids=["to come", "just due", "marked by Prefect", "overdue"],
)
def test_a_run_is_late_when_prefect_says_so_or_it_is_long_overdue(
    line: Line, url: str, ago_s: float, name: str, state: str
) -> None:
    line.runs.clear()
    line.run(line.deployments[0]["id"], "SCHEDULED", ago_s=ago_s, name=name)
    assert states(PrefectSource(f"{url}/api"), NIGHTLY) == [state]


def test_a_refused_release_is_told_from_a_failed_run(line: Line, url: str) -> None:
    line.run(
        line.deployments[0]["id"],
        "FAILED",
        ago_s=1,
        message="Flow run encountered an exception: flows.errors.ReleaseRefusedError: gate quality",
    )
    assert PrefectSource(f"{url}/api").ask().last_ended[NIGHTLY].state == "refused"


def test_more_runs_than_one_page_holds_are_all_read(line: Line, url: str) -> None:
    for _ in range(401):
        line.run(line.deployments[0]["id"], "COMPLETED", ago_s=10)
    assert states(PrefectSource(f"{url}/api"), NIGHTLY).count("completed") == 402


def test_pools_have_their_workers_and_the_newest_heartbeat(url: str) -> None:
    local, kubernetes = PrefectSource(f"{url}/api").ask().pools
    assert (local.status, local.workers) == ("ready", {"online": 1, "offline": 1})
    assert local.heartbeat_at is not None
    assert (kubernetes.status, kubernetes.workers) == ("not_ready", {"online": 0, "offline": 0})
    assert kubernetes.heartbeat_at is None


def test_the_champion_has_its_bento_tag_its_space_and_its_day(url: str) -> None:
    found = RegistrySource(url, "ekiben").ask()
    assert found.champion is not None
    assert (found.champion.model, found.champion.version) == ("ekiben:3-0123abcd", "3")
    assert found.champion.space_id == "cafe0123cafe0123"
    assert found.champion.since == pytest.approx(time.time() - 7000, abs=60)
    assert [entry.kind for entry in found.acts] == ["release", "release", "refusal"]


def test_a_champion_whose_alias_was_moved_by_hand_has_no_day(line: Line, url: str) -> None:
    line.release("4", "f" * 32, "s", dict([act("release", "3", ago_s=10)]))
    found = RegistrySource(url, "ekiben").ask()
    assert found.champion is not None
    assert found.champion.since is None


def test_before_the_first_release_there_is_no_champion(line: Line, url: str) -> None:
    line.model = None
    assert RegistrySource(url, "ekiben").ask().champion is None
    line.model = {"name": "ekiben"}  # MLflow leaves out what is empty
    assert RegistrySource(url, "ekiben").ask().champion is None


Make = Callable[[str, str], PrefectSource | RegistrySource]
PREFECT: Make = lambda url, user: PrefectSource(f"{url}/api", auth=user)  # noqa: E731
REGISTRY: Make = lambda url, user: RegistrySource(  # noqa: E731
    url, "ekiben", username=user.partition(":")[0], password=user.partition(":")[2]
)


@pytest.mark.parametrize("make", [PREFECT, REGISTRY], ids=["prefect", "mlflow"])
class TestBoth:
    def test_the_user_is_shown(self, make: Make, line: Line, url: str) -> None:
        line.user = "ana:a:b"
        assert make(url, "ana:a:b").ask()
        with pytest.raises(SourceError, match="401"):
            make(url, "ana:wrong").ask()

    def test_the_user_may_be_in_the_address(self, make: Make, line: Line, url: str) -> None:
        line.user = "ana:p@ss"
        assert make(url.replace("://", "://ana:p%40ss@"), "").ask()

    def test_an_error_of_the_server_is_told(self, make: Make, line: Line, url: str) -> None:
        line.broken = True
        with pytest.raises(SourceError, match="500"):
            make(url, "").ask()

    def test_a_server_that_is_away_is_told_without_the_password(self, make: Make, line: Line, url: str) -> None:
        with pytest.raises(SourceError, match="cannot be reached") as told:
            make("http://ana:geheim@127.0.0.1:9", "").ask()
        assert "geheim" not in str(told.value)


@pytest.mark.parametrize(
    "answer", ['{"detail": []}', "<html>", "[1]", '[{"id": 1}]'], ids=["dict", "page", "1", "keys"]
)
def test_what_is_not_understood_is_one_kind_of_error(answer: str) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text=answer))
    with pytest.raises(SourceError):
        PrefectSource("http://host/api", transport=transport).ask()
    with pytest.raises(SourceError):
        RegistrySource("http://host", "ekiben", transport=transport).ask()
