"""What a run was made with, read back so that it can be looked at and made again: parameters, data, vectors.

Core layer, knows nothing about Prefect. A run says it in these artifacts; older ones lack some of them:

```
params.json          the sections `data`, `train`, `evaluate`, ... as they were given; a trial has its study's `data`
data.json            path, MD5 and revision of the data, MD5 by role (`files`), the working folder (`root`)
canary_vectors.json  `{"texts": [...], "vectors": [[...]]}`: of the model as the fit left it, trials that lost too
```
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bentos.manifest import DataVersion
from flows.core.dataset import read_data
from flows.core.edge_texts import CANARY_TEXTS
from flows.core.evaluation import Encode
from flows.core.files import local_path
from flows.core.tracking import RunRecord, Tracker
from flows.errors import DataError, InputError, NothingReleasedError, ParamsError
from flows.options import describe_validation, is_text
from flows.params import DataParams

PARAMS_FILE = "params.json"
LONG_PARAMS_FILE = "long_params.json"  # values that are too long for MLflow, see `Tracker.log_params`
DATA_FILE = "data.json"
VECTORS_FILE = "canary_vectors.json"
VECTOR_DIGITS = 7  # what a float32 holds
SECTIONS = ("data", "train", "evaluate")  # what a training takes
ADDRESSES = ("pairs", "dev", "test", "retrieval", "profiles", "judgements")


@dataclass(frozen=True)
class Recorded:
    """What a run was made with."""

    params: dict[str, dict[str, Any]]  # section -> name -> value, in the words of the commit that ran
    exact: bool  # from `params.json`; else parsed from the texts that MLflow shows
    files: dict[str, str]  # role -> MD5 of each data file; empty when the run does not say
    root: Path | None  # where relative addresses started


@dataclass(frozen=True)
class DataSight:
    """What stands at one of the places where the data of a run may be."""

    place: str  # for people: the addresses, and the revision when it was asked for
    params: DataParams | None  # with addresses that mean the same from any folder; None: only the path is known
    md5: str  # empty when it cannot be read
    problem: str  # why it is not the data; empty when it is

    @property
    def found(self) -> bool:
        """Whether these are the recorded data, byte for byte."""
        return not self.problem


def read_recorded(tracker: Tracker, run: RunRecord, *, or_study: bool = False) -> Recorded:
    """Read parameters and data facts of a training run or of a trial, and if asked of a study.

    Raises:
        InputError: the run is a study, or no training of Ekiben.
    """
    sections, exact = _read_sections(tracker, run)
    if "tune" in sections and not or_study:
        raise InputError(
            f"run {run.run_id} is a study, made of many trainings: give the run of one of its trials (nested below it "
            "in MLflow), or the version that it registered"
        )
    if "data" not in sections and run.parent_run_id:
        study, study_exact = _read_sections(tracker, tracker.find_run(run.parent_run_id))
        sections, exact = {**sections, "data": study.get("data", {})}, exact and study_exact
    missing = [name for name in ("data", "train") if not sections.get(name)]
    if missing:
        raise InputError(
            f"run {run.run_id} ({run.name or 'without a name'}) holds no {' and '.join(missing)} parameters: it is no "
            "training of Ekiben, or its parameters were deleted"
        )
    facts = read_json(tracker, run.run_id, DATA_FILE) or {}
    return Recorded(
        params={name: sections[name] for name in SECTIONS if name in sections},
        exact=exact,
        files=dict(facts.get("files") or {}),
        root=Path(facts["root"]) if facts.get("root") else None,
    )


def read_json(tracker: Tracker, run_id: str, name: str) -> dict[str, Any] | None:
    """Read a JSON artifact of a run; None when there is none, or it holds no object."""
    with tempfile.TemporaryDirectory() as scratch, suppress(NothingReleasedError, OSError, ValueError):
        content = json.loads(tracker.download_artifact(run_id, name, Path(scratch)).read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else None
    return None


def unflatten(flat: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Turn MLflow's dotted names and texts back into sections: the inverse of `Tracker.log_params`.

    A text is taken as it stands where the parameter is a text today, and read as JSON elsewhere. Names without a dot
    are copies for people, and left out. Lossy in one point: a `null` given as text counts as none.
    """
    sections: dict[str, dict[str, Any]] = {}
    for name, text in flat.items():
        section, *keys = name.split(".")
        if not keys:
            continue
        branch = sections.setdefault(section, {})
        for key in keys[:-1]:
            child = branch.setdefault(key, {})
            branch = child if isinstance(child, dict) else branch
        branch[keys[-1]] = _parse([section, *keys], text)
    return sections


def _parse(keys: list[str], text: str) -> Any:
    if is_text(keys):
        return None if text == "null" else text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _read_sections(tracker: Tracker, run: RunRecord) -> tuple[dict[str, dict[str, Any]], bool]:
    exact = read_json(tracker, run.run_id, PARAMS_FILE)
    if exact is not None:
        return exact, True
    return unflatten({**run.params, **(read_json(tracker, run.run_id, LONG_PARAMS_FILE) or {})}), False


def recorded_version(tags: Mapping[str, str]) -> DataVersion:
    """Which data the tags of a run or version name."""
    return DataVersion(
        path=tags.get("data_path", ""), md5=tags.get("data_md5", ""), revision=tags.get("data_rev") or None
    )


def look_for_data(
    recorded: Recorded, version: DataVersion, *, roots: Iterable[Path], commit: str = ""
) -> Iterator[DataSight]:
    """Look at each place where the data of a run may be, until they are found.

    First the files as they are now, below each root; then, when the run read no revision, the same files at the commit
    of its code: data that git or DVC keep beside the code may have changed since. A run that read a revision is read
    at that revision only.

    Args:
        recorded: What the run was made with.
        version: The data that it names.
        roots: Where relative addresses may start; the working folder of the run comes before them.
        commit: Commit of the code, or nothing.

    Raises:
        DataError: today's code does not understand the recorded data parameters.
    """
    given = {name: value for name, value in recorded.params["data"].items() if name in DataParams.model_fields}
    starts = [root for root in dict.fromkeys([recorded.root, *roots]) if root is not None]
    asked = version.revision or given.get("data_rev")
    seen = set()
    for revision in (asked,) if asked or not commit else (None, commit):
        for root in starts:
            try:
                params = DataParams.model_validate(anchor_addresses(given, root) | {"data_rev": revision})
            except ValidationError as error:
                raise DataError(f"the recorded data parameters cannot be used: {describe_validation(error)}") from None
            pointless = revision is not None and revision != asked and not _has_versions(params)
            if not pointless and params.model_dump_json() not in seen:
                seen.add(params.model_dump_json())
                sight = _look(params, recorded, version, root)
                yield sight
                if sight.found:
                    return


def anchor_addresses(data: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """The data parameters with every relative local address made absolute, starting at `root`."""
    return {
        name: str(path)
        if name in ADDRESSES and value is not None and (path := local_path(str(value), root=root)) is not None
        else value
        for name, value in data.items()
    }


def is_local(recorded: Recorded) -> bool:
    """Whether all data are files of this machine, so that looking at them costs no download."""
    addresses = [recorded.params["data"].get(name) for name in ADDRESSES]
    return all(local_path(address, root=Path()) is not None for address in addresses if address is not None)


def _has_versions(params: DataParams) -> bool:
    """Whether the files lie in a DVC repository, the only place that has old versions of them."""
    paths = [Path(value) for name in ADDRESSES if (value := getattr(params, name)) is not None]
    return all(any((parent / ".dvc").is_dir() for parent in path.parents) for path in paths)


def _look(params: DataParams, recorded: Recorded, version: DataVersion, root: Path) -> DataSight:
    place = " ".join(value for name in ADDRESSES if (value := getattr(params, name)) is not None)
    place += f" at revision {params.data_rev}" if params.data_rev else ""
    try:
        raw = read_data(params, root=root)
    except (DataError, ParamsError, OSError) as error:
        return DataSight(place, params, "", str(error))
    if raw.version.md5 == version.md5:
        return DataSight(place, params, raw.version.md5, "")
    changed = sorted(role for role in {*raw.files, *recorded.files} if raw.files.get(role) != recorded.files.get(role))
    named = f" ({', '.join(changed)} differ)" if recorded.files and len(recorded.files) > 1 else ""
    return DataSight(
        place, params, raw.version.md5, f"found md5 {raw.version.md5}, expected {version.md5 or 'one'}{named}"
    )


def embed_canary(encode: Encode) -> dict[str, Any]:
    """The canary texts and their vectors, for `canary_vectors.json`."""
    vectors = encode(CANARY_TEXTS)
    return {
        "texts": list(CANARY_TEXTS),
        "vectors": [[float(f"{value:.{VECTOR_DIGITS}g}") for value in vector] for vector in vectors.tolist()],
    }
