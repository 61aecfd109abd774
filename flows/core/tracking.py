"""The runs in MLflow: parameters, metrics, data, plots and the model, written and read back. Core layer.

Every call names its run. MLflow's "active run" is bound to a thread, so code in another thread would silently write
into a second run; nothing here reads it or sets it.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from bentos.manifest import DataVersion
from flows.core.flavour import fetch_model, save_flavour
from flows.core.mlflow_client import plain_errors
from flows.core.registry import MODEL_ID_TAG, Registry, clean_name, clean_tags
from flows.errors import NothingReleasedError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from flows.settings import FlowSettings

MAX_PARAM_LENGTH = 500  # characters: what every MLflow server takes, and what its table can show
PARAMS_A_BATCH = 100
METRICS_A_BATCH = 1000
MODEL_NAME = "model"  # of the logged model within its run


@dataclass(frozen=True)
class RunRecord:
    """What MLflow knows about one run."""

    run_id: str
    name: str
    status: str  # RUNNING, FINISHED, FAILED, KILLED
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
    parent_run_id: str = ""  # of the study, when it is a trial of one


class Tracker(Registry):
    """Runs of one experiment, and the registry of the models that they made."""

    @plain_errors
    def start_run(
        self, name: str, *, parent_run_id: str | None = None, tags: Mapping[str, object] | None = None
    ) -> str:
        """Create a run and return its id; with a parent, MLflow shows it nested."""
        system_tags = {
            "mlflow.parentRunId": parent_run_id,
            "mlflow.source.name": "ekiben",
            "mlflow.source.type": "LOCAL",
            "mlflow.source.git.commit": (tags or {}).get("git_commit"),
        }
        run = self._client.create_run(
            self._experiment_id, run_name=name, tags=clean_tags({**system_tags, **(tags or {})})
        )
        return str(run.info.run_id)

    @plain_errors
    def end_run(self, run_id: str, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """Close a run."""
        self._client.set_terminated(run_id, status)

    @plain_errors
    def running_runs(self) -> list[RunRecord]:
        """Runs that were opened and not closed: at work, or left behind by a process that was killed."""
        found = self._client.search_runs([self._experiment_id], "attributes.status = 'RUNNING'")
        return [_to_record(run) for run in found]

    @plain_errors
    def set_tags(self, run_id: str, tags: Mapping[str, object]) -> None:
        """Set tags of a run; None values are left out.

        `primary_metric` and `data_md5` are what `best_version` goes by.
        """
        from mlflow.entities import RunTag

        self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in clean_tags(tags).items()])

    @plain_errors
    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Log parameters; sections (mappings or pydantic models) become dotted names, such as `train.learning_rate`.

        A value that is too long for MLflow is cut, and stands in full in the artifact `long_params.json`.
        """
        from mlflow.entities import Param

        flat = _flatten(params)
        too_long = {name: value for name, value in flat.items() if len(value) > MAX_PARAM_LENGTH}
        if too_long:
            self._client.log_dict(run_id, too_long, "long_params.json")
        entities = [Param(name, _shorten(value)) for name, value in flat.items()]
        for start in range(0, len(entities), PARAMS_A_BATCH):
            self._client.log_batch(run_id, params=entities[start : start + PARAMS_A_BATCH])

    @plain_errors
    def log_metrics(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        *,
        model_id: str | None = None,
        dataset: tuple[str, str] | None = None,
    ) -> None:
        """Log metrics of a run, and of its logged model and dataset when they are given.

        NaN and infinite values cannot be compared or drawn: they are left out and named in the tag `undefined_metrics`.

        Args:
            run_id: The run.
            metrics: Name -> value.
            model_id: From `log_model`.
            dataset: Name and digest, from `log_dataset`.
        """
        name, digest = dataset or (None, None)
        finite = {clean_name(key): float(value) for key, value in metrics.items() if math.isfinite(value)}
        self._log_points(
            run_id, [(key, value, 0) for key, value in finite.items()],
            model_id=model_id, dataset_name=name, dataset_digest=digest,
        )  # fmt: skip
        undefined = sorted(key for key, value in metrics.items() if not math.isfinite(value))
        if undefined:
            self.set_tags(run_id, {"undefined_metrics": ", ".join(undefined)})

    @plain_errors
    def log_curve(self, run_id: str, name: str, points: Sequence[tuple[int, float]]) -> None:
        """Log one metric at many steps at once: `points` are (step, value), such as the losses of a fit."""
        self._log_points(run_id, [(clean_name(name), value, step) for step, value in points if math.isfinite(value)])

    @plain_errors
    def metric_history(self, run_id: str, name: str) -> list[tuple[int, float]]:
        """All values of one metric as (step, value), by step; empty when it was never logged."""
        history = self._client.get_metric_history(run_id, clean_name(name))
        return sorted((metric.step, metric.value) for metric in history)

    def _log_points(self, run_id: str, points: Sequence[tuple[str, float, int]], **links: str | None) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        entities = [Metric(key, value, now_ms, step, **links) for key, value, step in points]
        for start in range(0, len(entities), METRICS_A_BATCH):
            self._client.log_batch(run_id, metrics=entities[start : start + METRICS_A_BATCH])

    @plain_errors
    def log_dataset(self, run_id: str, version: DataVersion, *, context: str) -> tuple[str, str]:
        """Record the data as an input of the run.

        Args:
            run_id: The run.
            version: Path, MD5 and revision of the data.
            context: What it was used for: `training`, `evaluation`.

        Returns:
            Name and digest, for `log_metrics(dataset=...)`.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        name = Path(version.path.split(" ")[0]).name or "data"
        # The source is kept as it was given: resolving it would need the data's own credentials.
        dataset = Dataset(
            name=name[:500], digest=version.md5[:36], source_type="local", source=json.dumps({"uri": version.path})
        )
        tags = [InputTag("mlflow.data.context", context)]
        if version.revision:
            tags.append(InputTag("data_rev", version.revision[:500]))
        self._client.log_inputs(run_id, [DatasetInput(dataset, tags)])
        return dataset.name, dataset.digest

    @plain_errors
    def log_json(self, run_id: str, name: str, content: Mapping[str, Any]) -> None:
        """Write `content` as the artifact `name` of the run."""
        self._client.log_dict(run_id, dict(content), name)

    @plain_errors
    def log_folder(self, run_id: str, folder: Path, *, to: str = "") -> None:
        """Upload the files of `folder` as artifacts of the run, below the artifact path `to`."""
        self._client.log_artifacts(run_id, str(folder), to or None)

    @plain_errors
    def log_model(self, run_id: str, model: SentenceTransformer, *, example: list[str]) -> str:
        """Store the model in MLflow's sentence-transformers flavour; return the id of the logged model.

        Args:
            run_id: The run that made it; its parameters are copied to the logged model.
            model: The model.
            example: A few texts, kept as input example; the signature is taken from their vectors.
        """
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        logged = self._client.create_logged_model(
            self._experiment_id, name=MODEL_NAME, source_run_id=run_id, params=self._client.get_run(run_id).data.params
        )
        status = LoggedModelStatus.FAILED
        try:
            with tempfile.TemporaryDirectory(prefix="ekiben-model-") as scratch:
                folder = Path(scratch) / MODEL_NAME
                save_flavour(model, folder, example, run_id=run_id, logged=logged)
                self._client.log_model_artifacts(logged.model_id, str(folder))
            status = LoggedModelStatus.READY
        finally:
            self._client.finalize_logged_model(logged.model_id, status)
        self._client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        self.set_tags(run_id, {MODEL_ID_TAG: logged.model_id})
        return str(logged.model_id)

    @plain_errors
    def find_run(self, run_id: str) -> RunRecord:
        """Read a run, of whatever experiment: a version stays when the setting of the experiment changes.

        Raises:
            NothingReleasedError: there is no such run.
        """
        return _to_record(self._client.get_run(run_id))

    @plain_errors
    def match_runs(self, prefix: str) -> list[RunRecord]:
        """Runs of the experiment, registered or not, whose id begins with `prefix` (hex digits), newest first."""
        if not re.fullmatch(r"[0-9a-f]+", prefix):
            return []
        found = self._client.search_runs([self._experiment_id], f"attributes.run_id LIKE '{prefix}%'")
        return [_to_record(run) for run in found]

    @plain_errors
    def download_model(self, run_id: str, to: Path) -> Path:
        """Fetch the model of a run into the folder `to`.

        Returns:
            The sentence-transformers folder, for `SentenceTransformer(path)`.

        Raises:
            NothingReleasedError: the run has no complete model.
        """
        return fetch_model(self._model_of(run_id), to, tracking_uri=self.uri)

    @plain_errors
    def download_artifact(self, run_id: str, name: str, to: Path) -> Path:
        """Fetch one artifact (a file or a folder) of a run into the folder `to`; return its path.

        Raises:
            NothingReleasedError: the run has no such artifact; the message lists what it has.
        """
        parent = name.rpartition("/")[0]
        known = [item.path for item in self._client.list_artifacts(run_id, parent or None)]
        if name not in known:
            listed = ", ".join(known) or "none"
            raise NothingReleasedError(f"run {run_id} has no artifact {name!r}; there are: {listed}")
        to.mkdir(parents=True, exist_ok=True)
        return Path(self._client.download_artifacts(run_id, name, str(to)))

    def _model_of(self, run_id: str) -> Any:
        outputs = self._client.get_run(run_id).outputs  # `log_model` links a model only when it is complete
        if not outputs or not outputs.model_outputs:
            raise NothingReleasedError(f"run {run_id} has no complete model; train again, or choose another run")
        return self._client.get_logged_model(outputs.model_outputs[-1].model_id)


def open_tracker(settings: FlowSettings) -> Tracker:
    """Connect to MLflow as the settings say.

    Raises:
        ParamsError: nothing answers at the address.
    """
    return Tracker(
        settings.mlflow_uri,
        experiment=settings.experiment,
        model_name=settings.model_name,
        artifact_root=settings.artifact_root,
    )


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in nested.items():
        name = clean_name(f"{prefix}{key}")
        if isinstance(value, BaseModel):
            value = value.model_dump(mode="json")
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{name}."))
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _shorten(value: str) -> str:
    return value if len(value) <= MAX_PARAM_LENGTH else f"{value[: MAX_PARAM_LENGTH - 3]}..."


def _to_record(run: Any) -> RunRecord:
    return RunRecord(
        run_id=run.info.run_id,
        name=run.info.run_name or "",
        status=run.info.status,
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
        tags={name: value for name, value in run.data.tags.items() if not name.startswith("mlflow.")},
        parent_run_id=run.data.tags.get("mlflow.parentRunId", ""),
    )
