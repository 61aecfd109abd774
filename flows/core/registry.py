"""The model registry: versions, their aliases, what a reference means, and what else it can keep. Core layer.

`Tracker` in tracking.py builds on `Registry` and adds the runs.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bentos.manifest import name_release
from flows.core.mlflow_client import is_server, open_client, plain_errors
from flows.errors import NothingReleasedError, ParamsError

CHAMPION = "champion"
CHALLENGER = "challenger"
PREVIOUS = "previous"
LATEST = "latest"
MIN_PREFIX_LENGTH = 6  # of a run id
MAX_TAG_LENGTH = 5000  # characters, allowed for run and version tags by every MLflow store
PRIMARY_METRIC_TAG = "primary_metric"
DATA_MD5_TAG = "data_md5"
MODEL_ID_TAG = "model_id"


@dataclass(frozen=True)
class Release:
    """One version in the registry."""

    version: str
    run_id: str
    aliases: tuple[str, ...]
    tags: dict[str, str]
    created_at: str  # ISO 8601, UTC


class Registry:
    """The versions of one registered model, and the experiment that their runs are in."""

    def __init__(self, uri: str, *, experiment: str, model_name: str, artifact_root: Path | None = None) -> None:
        """Connect, and create the experiment on first use.

        Args:
            uri: Tracking server (`http://...`) or database (`sqlite:///...`).
            experiment: Name of the experiment that holds the runs.
            model_name: Name of the registered model.
            artifact_root: Folder for the artifacts of a new experiment in a database; a server decides by itself.

        Raises:
            ParamsError: nothing answers at `uri`, or the experiment was deleted.
        """
        self.uri = uri
        self.experiment = experiment
        self.model_name = model_name
        self._client = open_client(uri)
        self._experiment_id = self._open_experiment(None if is_server(uri) else artifact_root)

    @plain_errors
    def _open_experiment(self, artifact_root: Path | None) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            location = None if artifact_root is None else (artifact_root / self.experiment).resolve().as_uri()
            try:
                return str(self._client.create_experiment(self.experiment, artifact_location=location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._client.get_experiment_by_name(self.experiment)  # another process was quicker
        if found.lifecycle_stage != "active":
            raise ParamsError(
                f"the MLflow experiment {self.experiment!r} was deleted; restore it with `mlflow experiments restore "
                f"--experiment-id {found.experiment_id}` or choose another name with EKIBEN_EXPERIMENT"
            )
        return str(found.experiment_id)

    @plain_errors
    def register(self, run_id: str, model_id: str) -> str:
        """Make the logged model a version of the registered model; return its number.

        A run has one version: registering it again only names the model anew. Whatever interrupts it, the next call
        ends in the same state.
        """
        tags = {"run_id": run_id, MODEL_ID_TAG: model_id}
        for release in self.versions():
            if release.run_id == run_id:
                self.set_version_tags(release.version, tags)
                self._link_model(model_id, release.version)
                return release.version
        self._create_registered_model()
        # With a database, MLflow would resolve `models:/` through the process-wide tracking URI, not the client's.
        source = (
            f"models:/{model_id}" if is_server(self.uri) else self._client.get_logged_model(model_id).artifact_location
        )
        created = self._client.create_model_version(
            self.model_name, source, run_id=run_id, model_id=model_id, tags=tags
        )
        self._link_model(model_id, str(created.version))
        return str(created.version)

    def _create_registered_model(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(self.model_name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _link_model(self, model_id: str, version: str) -> None:
        # The tag by which MLflow's UI leads from a logged model to its versions.
        links = [{"name": self.model_name, "version": int(version)}]
        self._client.set_logged_model_tags(model_id, {"mlflow.modelVersions": json.dumps(links)})

    @plain_errors
    def versions(self) -> list[Release]:
        """All versions, newest first; empty before the first registration."""
        aliases = self._aliases()
        if aliases is None:
            return []
        found: list[Any] = []
        token: str | None = None
        while True:
            page = self._client.search_model_versions(f"name = '{self.model_name}'", page_token=token)
            found.extend(page)
            token = page.token
            if not token:
                break
        releases = [_to_release(version, aliases) for version in found]
        return sorted(releases, key=lambda release: int(release.version), reverse=True)

    def _aliases(self) -> dict[str, str] | None:
        from mlflow.exceptions import MlflowException

        try:
            aliases = self._client.get_registered_model(self.model_name).aliases
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return {alias: str(version) for alias, version in aliases.items()}

    def champion(self) -> Release | None:
        """The version that is in use, None before the first release."""
        return next((release for release in self.versions() if CHAMPION in release.aliases), None)

    def version(self, ref: str) -> Release:
        """Find the version that `ref` means.

        Args:
            ref: `3`, `v3`, `champion`, `previous`, `latest`, a Bento tag (`ekiben:3-1f2e3d4c`, `3-1f2e3d4c`), or a run
                id or a prefix of one (6 characters or more).

        Raises:
            NothingReleasedError: nothing, or more than one version, is meant; the message lists what there is.
        """
        releases = self.versions()
        if not releases:
            raise NothingReleasedError(
                f"there is no version {ref!r}: no model {self.model_name!r} was registered yet; "
                "`ekiben train` or `ekiben pipeline` makes the first one"
            )
        found = _match(ref.strip().removeprefix(f"{self.model_name}:"), releases)
        if len(found) == 1:
            return found[0]
        known = ", ".join(_describe(release) for release in releases[:10])
        more = f" and {len(releases) - 10} older ones" if len(releases) > 10 else ""
        problem = "several versions match" if found else "there is no version"
        raise NothingReleasedError(f"{problem} {ref!r} of {self.model_name!r}; there are {known}{more}")

    @plain_errors
    def best_version(self) -> Release:
        """The version whose run has the highest primary metric on dev.

        Scores can only be compared on the same data, so only versions of the newest version's data are considered.

        Raises:
            NothingReleasedError: no version of that data has its metric.
        """
        releases = self.versions()
        if not releases:
            raise NothingReleasedError(
                f"no model {self.model_name!r} was registered yet; `ekiben train` or `ekiben pipeline` makes the first"
            )
        # Oldest first: of equal ones the oldest wins, so that nothing moves without need.
        runs = [(release, self._client.get_run(release.run_id).data) for release in reversed(releases)]
        wanted = runs[-1][1].tags.get(DATA_MD5_TAG)
        scored = [
            (score, release)
            for release, run in runs
            if run.tags.get(DATA_MD5_TAG) == wanted
            and (score := run.metrics.get(f"dev/{run.tags.get(PRIMARY_METRIC_TAG)}")) is not None
        ]
        if not scored:
            raise NothingReleasedError(
                f"no version of {self.model_name!r} was scored on the data with MD5 {wanted}; "
                f"there are {', '.join(_describe(release) for release in releases[:10])}: name one of them"
            )
        return max(scored, key=lambda pair: pair[0])[1]

    @plain_errors
    def set_version_tags(self, version: str, tags: Mapping[str, object]) -> None:
        """Set tags of a version; None values are left out."""
        for name, value in clean_tags(tags).items():
            self._client.set_model_version_tag(self.model_name, version, name, value)

    @plain_errors
    def set_alias(self, alias: str, version: str | None) -> None:
        """Let an alias name a version, or nothing. Written only where it says something else."""
        before = (self._aliases() or {}).get(alias)
        if version is None and before is not None:
            self._client.delete_registered_model_alias(self.model_name, alias)
        elif version is not None and before != version:
            self._client.set_registered_model_alias(self.model_name, alias, version)

    @plain_errors
    def model_tags(self) -> dict[str, str]:
        """The tags of the registered model itself; empty before the first registration."""
        from mlflow.exceptions import MlflowException

        try:
            return dict(self._client.get_registered_model(self.model_name).tags)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise

    @plain_errors
    def set_model_tag(self, name: str, value: str) -> None:
        """Set a tag of the registered model itself."""
        self._client.set_registered_model_tag(self.model_name, name, value)

    # --- names that only one can take: a registered model without versions, which is what release_lock.py is made of

    @plain_errors
    def claim(self, name: str, tags: Mapping[str, str], *, description: str) -> bool:
        """Take a name that is free, with all its tags at once; False when it is taken."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name, dict(tags), description)
        except MlflowException as error:
            if error.error_code == "RESOURCE_ALREADY_EXISTS":
                return False
            raise
        return True

    @plain_errors
    def claims(self, prefix: str) -> dict[str, dict[str, str]]:
        """The names that begin so, and their tags."""
        found: dict[str, dict[str, str]] = {}
        token: str | None = None
        while True:
            page = self._client.search_registered_models(f"name LIKE '{prefix}%'", page_token=token)
            found |= {model.name: dict(model.tags) for model in page if model.name.startswith(prefix)}
            token = page.token
            if not token:
                return found

    def note_claim(self, name: str, tag: str, value: str) -> bool:
        """Set a tag of a name that was taken; False when nobody has it any more."""
        try:
            self._set_claim_tag(name, tag, value)
        except NothingReleasedError:
            return False
        return True

    @plain_errors
    def _set_claim_tag(self, name: str, tag: str, value: str) -> None:
        self._client.set_registered_model_tag(name, tag, value)

    def unclaim(self, name: str) -> None:
        """Give a name free, if anybody has it."""
        with contextlib.suppress(NothingReleasedError):
            self._delete_claim(name)

    @plain_errors
    def _delete_claim(self, name: str) -> None:
        self._client.delete_registered_model(name)


def clean_tags(tags: Mapping[str, object]) -> dict[str, str]:
    """Bring tags into the form that MLflow takes: valid names, text values of limited length, nothing for None."""
    return {clean_name(name): str(value)[:MAX_TAG_LENGTH] for name, value in tags.items() if value is not None}


def clean_name(name: str) -> str:
    """Replace what MLflow refuses in names of metrics, params and tags; `ndcg@10` becomes `ndcg_at_10`."""
    return re.sub(r"[^\w\-. /:]", "_", name.replace("@", "_at_"))[:250]


def _to_release(version: Any, aliases: Mapping[str, str]) -> Release:
    number = str(version.version)
    return Release(
        version=number,
        run_id=version.run_id or version.tags.get("run_id", ""),
        aliases=tuple(sorted(alias for alias, target in aliases.items() if target == number)),
        tags=dict(version.tags),
        created_at=datetime.fromtimestamp(version.creation_timestamp / 1000, tz=UTC).isoformat(timespec="seconds"),
    )


def _match(ref: str, releases: list[Release]) -> list[Release]:
    """All releases (newest first) that `ref` may mean; an exact meaning wins over a prefix of a run id."""
    if ref == LATEST:
        return releases[:1]
    exact = [release for release in releases if ref in release.aliases or ref.removeprefix("v") == release.version]
    if exact:
        return exact
    number, dash, run = ref.partition("-")
    if dash and run:
        return [release for release in releases if release.version == number and release.run_id.startswith(run)]
    if len(ref) >= MIN_PREFIX_LENGTH:
        return [release for release in releases if release.run_id.startswith(ref.lower())]
    return []


def _describe(release: Release) -> str:
    aliases = f" ({', '.join(release.aliases)})" if release.aliases else ""
    return f"{name_release(release.version, release.run_id)}{aliases}"
