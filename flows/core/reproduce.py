"""Make a run again in a clean checkout of its commit, and measure how far the new vectors are from the recorded ones.

Core layer, knows nothing about Prefect. The rebuild is that commit's own `train` command in a process and a home folder
of its own: nothing of it reaches the registry, the Bento store or the working tree.

plan_rebuild > rebuild (checkout.py) > compare
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from bentos.errors import LunchboxError
from bentos.manifest import read_manifest, verify_files
from bentos.vectors import Vectors, cosine_pairs
from flows.core.checkout import Answer, Choice, check_out, choose_interpreter, prove_code, run_apart
from flows.core.edge_texts import CANARY_TEXTS
from flows.core.provenance import DIRTY, Commit, find_commit, git_commit
from flows.core.recorded import (
    ADDRESSES,
    VECTORS_FILE,
    DataSight,
    Recorded,
    look_for_data,
    read_json,
    read_recorded,
    recorded_version,
)
from flows.core.tracking import RunRecord, Tracker
from flows.errors import DataError, EkibenError, InputError, NothingReleasedError
from flows.settings import apart_environment

OWN_TEXTS_ARTIFACT = "evaluation/own_texts.json"
CANARY_ARTIFACT = "release/canary.json"
COMPARED_METRICS = ("eval/", "dev/", "base/", "base_dev/", "gain/")
ENCODE_BATCH = 32  # texts


@dataclass(frozen=True)
class Plan:
    """All that a rebuild needs, found and checked before anything is built."""

    run: RunRecord
    params: dict[str, dict[str, Any]]  # as recorded, with the addresses of this machine
    repository: Path
    commit: Commit
    data: DataSight
    anchor_box: Path | None  # lunchbox of the champion that the run was kept near to
    notes: tuple[str, ...]  # why the rebuild may differ, one sentence each


@dataclass(frozen=True)
class Rebuilt:
    """A run that was made again, and how."""

    tracker: Tracker  # of the scratch folder
    run: RunRecord
    environment: Literal["here", "fresh"]
    code: Path  # the checkout that it ran
    seconds: float  # of the command
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """How far the rebuilt model is from the recorded one."""

    run_id: str
    commit: str
    data: str  # where they were read
    environment: str  # `here` or `fresh`
    code: str
    seconds: float
    vectors_of: str  # what the recorded vectors came from; empty when there are none
    texts: int
    min_cosine: float | None
    mean_cosine: float | None
    max_difference: float | None  # largest absolute difference of a component; 0.0: the same numbers
    wanted_cosine: float
    metrics: dict[str, tuple[float, float]]  # name -> (recorded, rebuilt)
    notes: tuple[str, ...]

    @property
    def reproduced(self) -> bool:
        """Whether the new vectors are as near to the recorded ones as asked."""
        return self.min_cosine is not None and self.min_cosine >= self.wanted_cosine  # NaN is not

    def as_json(self) -> dict[str, Any]:
        """All fields, ready for `json.dumps`."""
        return asdict(self) | {"reproduced": self.reproduced}


def plan_rebuild(
    tracker: Tracker,
    run: RunRecord,
    *,
    repository: Path,
    roots: Sequence[Path],
    find_box: Callable[[str], Path | None],
) -> Plan:
    """Find the commit, the parameters and the data of a run.

    Args:
        tracker: Where the run is.
        run: A training, or a trial of a study.
        repository: Folder of the git repository that has the code.
        roots: Where relative addresses may start, besides the run's own working folder; absolute.
        find_box: From a Bento tag to the lunchbox on this machine, for a run that was kept near a champion.

    Raises:
        InputError: the run is no training, or its commit or the champion that it was kept near is not here.
        DataError: the data are gone or have changed; says what was found at each place, and what was expected.
    """
    recorded = read_recorded(tracker, run)
    said = run.tags.get("git_commit", "")
    if not said:
        raise InputError(
            f"run {run.run_id} recorded no commit (no git working tree, or git did not answer): its code is not known"
        )
    commit = find_commit(repository, said)
    if commit is None:
        raise InputError(
            f"commit {said.removesuffix(DIRTY)} of run {run.run_id} is not in {repository}: `git fetch --all` "
            "there, or name a clone that has it with --repository"
        )
    version = recorded_version(run.tags)
    seen = list(look_for_data(recorded, version, roots=roots, commit=commit.sha))
    if not seen or not seen[-1].found:
        looked = "; ".join(f"{sight.place}: {sight.problem}" for sight in seen)
        raise DataError(
            f"the data of run {run.run_id} (path {version.path}, md5 {version.md5}) are not here as they were: "
            f"{looked}. Bring that version back (`dvc checkout`, `dvc pull`, a backup), or say with --data-root where "
            "relative paths start"
        )
    return Plan(
        run=run,
        params=_localise(recorded, seen[-1], roots),
        repository=repository,
        commit=commit,
        data=seen[-1],
        anchor_box=_find_anchor(run, recorded, find_box),
        notes=tuple(_doubts(run, recorded, dirty=said.endswith(DIRTY))),
    )


def rebuild(plan: Plan, scratch: Path, *, environment: Choice, say: Callable[[str], None]) -> Rebuilt:
    """Check the commit out and train again with its code.

    Args:
        plan: What `plan_rebuild` found.
        scratch: An empty folder; everything is made in it.
        environment: See `choose_interpreter`.
        say: Takes each line of progress.

    Raises:
        InputError: the checkout cannot be set up.
        EkibenError: the code of the commit failed, or it was not the code that ran, or not the data.
    """
    code = check_out(plan.repository, plan.commit.sha, scratch / "checkout")
    say(f"[reproduce] {plan.commit.sha[:12]} ({plan.commit.subject}) is checked out in {code}")
    home = scratch / "home"
    home.mkdir()
    variables = apart_environment(home, code, anchor_box=plan.anchor_box)
    lock = plan.run.tags.get("lock_sha256", "")
    kind, python, notes = choose_interpreter(code, lock, environment, variables, say)
    prove_code(python, code, variables)

    params = scratch / "params.yaml"
    params.write_text(yaml.safe_dump(plan.params, allow_unicode=True), encoding="utf-8")
    command = [str(python), "-P", "-m", "flows", "train", "--params", str(params), "--home", str(home), "--json"]
    say(f"[reproduce] data: {plan.data.place} (md5 {plan.data.md5[:12]}); environment: {kind}; training again")
    started = time.monotonic()
    answer = run_apart(command, variables=variables, scratch=scratch, say=lambda line: _pass_on(line, say))
    seconds = time.monotonic() - started
    if answer.code != 0:
        raise EkibenError(
            f"the code of commit {plan.commit.sha[:12]} did not train run {plan.run.run_id} again, exit code "
            f"{answer.code}: {answer.last_words} (its own command's words, given the parameters that the run recorded; "
            "--keep leaves checkout and log to look at)"
        )
    tracker = Tracker(f"sqlite:///{home / 'mlflow.db'}", experiment="ekiben", model_name="ekiben")
    rebuilt = _find_rebuilt(tracker, answer, plan)
    notes += _check_origin(plan, rebuilt, code)
    return Rebuilt(tracker, rebuilt, kind, code, seconds, tuple(notes))


def compare(plan: Plan, tracker: Tracker, rebuilt: Rebuilt, scratch: Path, *, wanted_cosine: float) -> Comparison:
    """Put the recorded vectors and metrics beside the rebuilt ones.

    Args:
        plan: What was rebuilt.
        tracker: Where the recorded run is.
        rebuilt: How it came out.
        scratch: For the two models; without folders `rebuilt` and `recorded`.
        wanted_cosine: Smallest cosine of old and new vector that counts as reproduced.

    Raises:
        EkibenError: the vectors have another number of dimensions.
    """
    from flows.core.models import load_saved_model
    from flows.core.training import make_encode

    run, notes = plan.run, [*plan.notes, *rebuilt.notes]
    source, texts, recorded = recorded_vectors(tracker, run.run_id, scratch / "recorded")
    cosines = difference = None
    if texts:
        model = load_saved_model(rebuilt.tracker.download_model(rebuilt.run.run_id, scratch / "rebuilt"))
        if source == CANARY_ARTIFACT:  # a lunchbox's canary texts have no prompt before them
            model.default_prompt_name = None
        vectors = make_encode(model, ENCODE_BATCH)(texts)
        if vectors.shape != recorded.shape:
            raise EkibenError(
                f"run {run.run_id} is not reproduced: the recorded vectors have {recorded.shape[1]} dimensions, the "
                f"rebuilt ones {vectors.shape[1]}"
            )
        cosines = cosine_pairs(vectors.astype(np.float64), recorded.astype(np.float64))
        cosines = np.where((vectors == recorded).all(axis=1), 1.0, cosines)  # not a hair less, by rounding
        difference = float(np.abs(vectors - recorded).max())
    else:
        notes.append("the run kept neither its model nor any vector, so only metrics can be compared")
    names = [name for name in run.metrics if name.startswith(COMPARED_METRICS) and name in rebuilt.run.metrics]
    return Comparison(
        run_id=run.run_id,
        commit=plan.commit.sha,
        data=plan.data.place,
        environment=rebuilt.environment,
        code=str(rebuilt.code),
        seconds=round(rebuilt.seconds, 1),
        vectors_of=source,
        texts=len(texts),
        min_cosine=None if cosines is None else float(cosines.min()),
        mean_cosine=None if cosines is None else float(cosines.mean()),
        max_difference=difference,
        wanted_cosine=wanted_cosine,
        metrics={name: (run.metrics[name], rebuilt.run.metrics[name]) for name in sorted(names)},
        notes=tuple(notes),
    )


def recorded_vectors(tracker: Tracker, run_id: str, scratch: Path) -> tuple[str, list[str], Vectors]:
    """What a recorded model says to some texts: where that comes from, the texts, float32 (texts, dim).

    From the model in MLflow, over canary texts and texts of its own test set; else from the vectors of canary texts
    that the run kept, or its release. A run that kept nothing gives no texts.
    """
    from flows.core.models import load_saved_model
    from flows.core.training import make_encode

    with suppress(NothingReleasedError):
        encode = make_encode(load_saved_model(tracker.download_model(run_id, scratch)), ENCODE_BATCH)
        texts = list(dict.fromkeys([*CANARY_TEXTS, *_own_texts(tracker, run_id, scratch)]))
        return "the model in MLflow", texts, encode(texts)
    for name in (VECTORS_FILE, CANARY_ARTIFACT):
        kept = read_json(tracker, run_id, name)
        if kept is not None:
            vectors = kept.get("other_precisions", {}).get("fp32", kept["vectors"])
            return name, list(kept["texts"]), np.asarray(vectors, dtype=np.float32)
    return "", [], np.empty((0, 0), dtype=np.float32)


def _own_texts(tracker: Tracker, run_id: str, scratch: Path) -> list[str]:
    try:
        texts = json.loads(tracker.download_artifact(run_id, OWN_TEXTS_ARTIFACT, scratch).read_text(encoding="utf-8"))
    except (NothingReleasedError, ValueError):
        return []
    return [str(text) for text in texts]


def _doubts(run: RunRecord, recorded: Recorded, *, dirty: bool) -> Iterator[str]:
    """Why the rebuild may differ from what the run was."""
    if dirty:
        yield "the working tree differed from the commit when the run was made; what is rebuilt is the commit"
    if not recorded.exact:
        yield "the run is older than params.json, so its parameters are read from the texts that MLflow shows"
    steps, done = recorded.params["train"].get("steps"), run.metrics.get("train/steps_done")
    if isinstance(steps, int) and done is not None and done < steps:
        yield (
            f"the fit ended after {done:.0f} of {steps} steps, by its time budget or as hopeless; a rebuild may end "
            "elsewhere"
        )
    if run.status != "FINISHED":
        yield f"the run ended as {run.status}"


def _localise(recorded: Recorded, data: DataSight, roots: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The recorded parameters, with the addresses of this machine: the rebuild has another working folder."""
    assert data.params is not None
    found = {name: value for name in ADDRESSES if (value := getattr(data.params, name)) is not None}
    revision = {"data_rev": data.params.data_rev} if data.params.data_rev else {}
    train = dict(recorded.params["train"])
    folders = [root / str(train.get("base_model", "")) for root in [recorded.root, *roots] if root is not None]
    folder = next((folder for folder in folders if train.get("base_model") and folder.is_dir()), None)
    if folder is not None:
        train["base_model"] = str(folder)
    return {**recorded.params, "data": {**recorded.params["data"], **found, **revision}, "train": train}


def _find_anchor(run: RunRecord, recorded: Recorded, find_box: Callable[[str], Path | None]) -> Path | None:
    tag = run.tags.get("anchor", "")
    if not recorded.params["train"].get("anchor_weight") or not tag:
        return None
    box = find_box(tag)
    problem = "is not on this machine"
    if box is not None:
        try:
            verify_files(box, read_manifest(box))
            return box
        except LunchboxError as error:
            problem = f"is not whole: {error}"
    raise InputError(
        f"run {run.run_id} was kept near {tag} (train.anchor_weight), whose lunchbox {problem}; `ekiben release --run "
        f"{tag}` packs it again, `bentoml models import` brings it from elsewhere"
    )


def _pass_on(line: str, say: Callable[[str], None]) -> None:
    """Hand on what the stages of the training say, and not the closing screen, which invites to release the rebuild."""
    if line.lstrip().startswith("[") or ": step " in line:
        say(line)


def _find_rebuilt(tracker: Tracker, answer: Answer, plan: Plan) -> RunRecord:
    run_id = answer.result.get("run_id")
    if not isinstance(run_id, str):
        raise EkibenError(
            f"the command of commit {plan.commit.sha[:12]} ended well, but its last line does not say which run it made"
        )
    return tracker.find_run(run_id)


def _check_origin(plan: Plan, rebuilt: RunRecord, code: Path) -> list[str]:
    """The rebuilt run must name the code and the data of the recorded one; what else is to be said.

    Raises:
        EkibenError: it was made by other code, or of other data.
    """
    commit = rebuilt.tags.get("git_commit", "")
    if commit.removesuffix(DIRTY) != plan.commit.sha:
        raise EkibenError(f"the rebuilt run says that commit {commit or 'unknown'} made it, not {plan.commit.sha}")
    found, expected = (run.tags.get("data_md5") for run in (rebuilt, plan.run))
    if found != expected:
        raise EkibenError(
            f"the rebuilt run read data with md5 {found}, the recorded one {expected}: the files changed meanwhile, or "
            "that commit counts otherwise"
        )
    clean = commit == git_commit(code) == plan.commit.sha
    return [] if clean else ["a tracked file of the checkout was changed by its own set-up or training"]
