"""What Prefect and the model registry say about the training line, asked by their REST interfaces alone. Core layer.

Neither Prefect nor MLflow is imported: they would make a process that only asks ten times as large.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import httpx

from bentos.manifest import name_release
from flows import errors
from flows.core.history import STAMP, Act, find_promotion, read_acts
from flows.core.registry import CHAMPION
from flows.errors import EkibenError, ReleaseRefusedError, one_line

TIMEOUT_S = 5.0  # of one request
PATIENCE_S = 20.0  # for all requests of one look
PAGE = 200  # what Prefect answers at most
OVERDUE_S = 60.0  # a scheduled run that is behind by more is late, whether Prefect has marked it or not
OPEN = ("scheduled", "pending", "running", "paused", "cancelling")  # Prefect's types of states
ENDED = ("completed", "failed", "crashed", "cancelled")
LATE = "late"
REFUSED = "refused"  # a run that failed because a gate said no
REFUSALS = tuple(
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, ReleaseRefusedError)
)


class SourceError(EkibenError):
    """A server that does not answer, or not with what is understood."""


@dataclass(frozen=True, order=True)
class Key:
    """A deployment, by the names of its flow and its own; without the second: runs that somebody started by hand."""

    flow: str
    deployment: str = ""


@dataclass(frozen=True)
class Deployment:
    """What stands in Prefect to be run."""

    key: Key
    pool: str
    schedules: int  # active ones; none while it is paused
    created_at: float


@dataclass(frozen=True)
class Run:
    """One run of a flow; times in seconds since 1970, None for what has not happened."""

    key: Key
    state: str  # one of OPEN or ENDED, or LATE or REFUSED
    due_at: float | None
    started_at: float | None
    ended_at: float | None
    seconds: float


@dataclass(frozen=True)
class Pool:
    """A work pool and its workers."""

    name: str
    status: str  # ready, not_ready, paused
    workers: Mapping[str, int]  # online, offline -> how many
    heartbeat_at: float | None  # the newest


@dataclass(frozen=True)
class LineState:
    """What Prefect knows."""

    deployments: list[Deployment]
    runs: list[Run]  # open ones, and those that ended in the window
    last_ended: dict[Key, Run]
    last_success: dict[Key, Run]
    pools: list[Pool]


@dataclass(frozen=True)
class Champion:
    """The version that is in use."""

    model: str  # ekiben:3-1f2e3d4c
    version: str
    run_id: str
    space_id: str
    since: float | None  # None: its alias was moved by hand


@dataclass(frozen=True)
class RegistryState:
    """What the registry knows."""

    champion: Champion | None
    acts: list[Act]


class PrefectSource:
    """A Prefect server."""

    name = "prefect"

    def __init__(
        self,
        url: str,
        *,
        auth: str = "",
        key: str = "",
        window_s: float = 86_400.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Prepare a source; nothing is asked yet.

        Args:
            url: address of the API, such as `http://host:4200/api`.
            auth: `user:password`, as in PREFECT_API_AUTH_STRING; empty: none.
            key: of Prefect Cloud; empty: none.
            window_s: ended runs are counted when they ended so recently.
            transport: in place of the network, for tests.
        """
        user, _, password = auth.partition(":")
        self._server = _Server(url, (user, password) if auth else None, key, transport)
        self._window_s = window_s

    def ask(self) -> LineState:
        """Look at deployments, runs and pools.

        Raises:
            SourceError: the server does not answer as it should.
        """
        with self._server.looking():
            flows = {flow["id"]: flow["name"] for flow in self._list("flows/filter")}
            found = self._list("deployments/filter")
            keys = {each["id"]: Key(flows.get(each["flow_id"], ""), each["name"]) for each in found}
            now = time.time()

            def read(runs: Iterable[dict[str, Any]]) -> list[Run]:
                return [_to_run(run, keys.get(run["deployment_id"]) or Key(flows[run["flow_id"]]), now) for run in runs]

            after = datetime.fromtimestamp(now - self._window_s, tz=UTC).isoformat()
            ended = read(self._list("flow_runs/filter", flow_runs=_runs(ENDED, end_time={"after_": after})))
            last_ended = _newest(ended)
            last_success = _newest(run for run in ended if run.state == "completed")
            for deployment, key in keys.items():
                for known, states in ((last_ended, ENDED), (last_success, ("completed",))):
                    if key not in known:
                        only = _runs(states, deployment_id={"any_": [deployment]})
                        newest = self._ask("flow_runs/filter", flow_runs=only, sort="END_TIME_DESC", limit=1)
                        known.update(_newest(read(newest)))
            return LineState(
                deployments=[_to_deployment(each, keys[each["id"]]) for each in found],
                runs=[*read(self._list("flow_runs/filter", flow_runs=_runs(OPEN))), *ended],
                last_ended=last_ended,
                last_success=last_success,
                pools=[self._look_at(pool) for pool in self._list("work_pools/filter")],
            )

    def _look_at(self, pool: Mapping[str, Any]) -> Pool:
        workers = self._list(f"work_pools/{pool['name']}/workers/filter")
        states = [worker["status"].lower() for worker in workers]
        beats = [beat for worker in workers if (beat := _seconds(worker["last_heartbeat_time"])) is not None]
        return Pool(
            pool["name"],
            (pool["status"] or "unknown").lower(),
            {state: states.count(state) for state in ("online", "offline")},
            max(beats, default=None),
        )

    def _list(self, path: str, **body: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while len(page := self._ask(path, **body, limit=PAGE, offset=len(found))) == PAGE:
            found += page
        return found + page

    def _ask(self, path: str, **body: Any) -> list[dict[str, Any]]:
        content = self._server.ask("POST", f"/{path}", json=body)
        if not isinstance(content, list):
            raise SourceError(
                f"{self._server.url} answered {path} with something else than a list: is it Prefect's API?"
            )
        return content


class RegistrySource:
    """The registered model of an MLflow server."""

    name = "mlflow"

    def __init__(
        self,
        url: str,
        model_name: str,
        *,
        username: str = "",
        password: str = "",
        token: str = "",
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Prepare a source; nothing is asked yet.

        Args:
            url: address of the server.
            model_name: name of the registered model.
            username: to show; empty: that of the address, if any.
            password: of that user.
            token: in place of both.
            transport: in place of the network, for tests.
        """
        self._server = _Server(url, (username, password) if username else None, token, transport)
        self._model_name = model_name

    def ask(self) -> RegistryState:
        """Look at the champion and the history.

        Raises:
            SourceError: the server does not answer as it should.
        """
        with self._server.looking():
            model = self._get("registered-models/get", {"name": self._model_name}, part="registered_model")
            if model is None:
                return RegistryState(None, [])
            acts = read_acts({tag["key"]: tag["value"] for tag in model.get("tags", [])})
            aliases = {alias["alias"]: str(alias["version"]) for alias in model.get("aliases", [])}
            if (number := aliases.get(CHAMPION)) is None:
                return RegistryState(None, acts)
            query = {"name": self._model_name, "version": number}
            version = self._get("model-versions/get", query, part="model_version") or {}
            tags = {tag["key"]: tag["value"] for tag in version.get("tags", [])}
            run_id = version.get("run_id") or tags.get("run_id", "")
            promotion = find_promotion(acts, number)
            champion = Champion(
                model=f"{self._model_name}:{name_release(number, run_id)}",
                version=number,
                run_id=run_id,
                space_id=tags.get("space_id", ""),
                since=None if promotion is None else read_stamp(promotion.at),
            )
            return RegistryState(champion, acts)

    def _get(self, path: str, query: Mapping[str, str], *, part: str) -> dict[str, Any] | None:
        content = self._server.ask("GET", f"/api/2.0/mlflow/{path}", params=query, missing_is_none=True)
        if content is None:
            return None
        if not isinstance(content, dict) or not isinstance(found := content.get(part), dict):
            raise SourceError(f"{self._server.url} answered {path} without {part!r}: is it an MLflow server?")
        return found


class _Server:
    """An HTTP server that answers in JSON, and how long it may take."""

    def __init__(
        self, url: str, user: tuple[str, str] | None, token: str, transport: httpx.BaseTransport | None
    ) -> None:
        address = urlsplit(url)
        if user is None and address.username:
            user = (unquote(address.username), unquote(address.password or ""))
        host = address.netloc.rpartition("@")[2]
        self.url = urlunsplit((address.scheme, host, address.path.rstrip("/"), "", ""))
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(
            auth=None if token else user, headers=headers, timeout=TIMEOUT_S, transport=transport
        )
        self._until = 0.0

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Make one look: all of its requests together have `PATIENCE_S`, and whatever goes wrong is a SourceError."""
        self._until = time.monotonic() + PATIENCE_S
        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise SourceError(f"{self.url} cannot be reached: {type(error).__name__} {one_line(error)}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(
                f"{self.url} answered what is not understood: {type(error).__name__} {one_line(error)}"
            ) from error

    def ask(self, method: str, path: str, *, missing_is_none: bool = False, **request: Any) -> Any:
        """Send a request; return the content of the answer, None for a 404 when that is allowed."""
        if time.monotonic() > self._until:
            raise SourceError(f"{self.url} took longer than {PATIENCE_S:g} s")
        response = self._client.request(method, f"{self.url}{path}", **request)
        if (
            missing_is_none
            and response.status_code == httpx.codes.NOT_FOUND
            and "RESOURCE_DOES_NOT_EXIST" in response.text
        ):
            return None
        if response.status_code != httpx.codes.OK:
            raise SourceError(f"{self.url} answered {response.status_code} to {path}: {response.text[:200]}")
        return response.json()


def read_stamp(at: str) -> float:
    """The time of an act in seconds since 1970."""
    return datetime.strptime(at, STAMP).replace(tzinfo=UTC).timestamp()


def _runs(states: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """Prefect's filter for runs in these states that no other run has started."""
    types = [state.upper() for state in states]
    return {"parent_task_run_id": {"is_null_": True}, "state": {"type": {"any_": types}}, **more}


def _to_run(run: Mapping[str, Any], key: Key, now: float) -> Run:
    state = run["state_type"].lower()
    due_at = _seconds(run["next_scheduled_start_time"] or run["expected_start_time"])
    if state == "scheduled" and (run["state_name"] == "Late" or (due_at is not None and due_at < now - OVERDUE_S)):
        state = LATE
    if state == "failed" and any(name in ((run["state"] or {}).get("message") or "") for name in REFUSALS):
        state = REFUSED
    return Run(key, state, due_at, _seconds(run["start_time"]), _seconds(run["end_time"]), float(run["total_run_time"]))


def _to_deployment(found: Mapping[str, Any], key: Key) -> Deployment:
    active = [schedule for schedule in found["schedules"] if schedule["active"]]
    created_at = _seconds(found["created"])
    return Deployment(key, found["work_pool_name"] or "", 0 if found["paused"] else len(active), created_at or 0.0)


def _newest(runs: Iterable[Run]) -> dict[Key, Run]:
    """Of each deployment the run that ended last."""
    ended = sorted((run for run in runs if run.ended_at is not None), key=lambda run: run.ended_at or 0.0)
    return {run.key: run for run in ended}


def _seconds(moment: str | None) -> float | None:
    return None if moment is None else datetime.fromisoformat(moment).timestamp()
