"""How a study is kept: opened, named, told its space, and cleared of trials whose process is gone. Core layer.

Only this module and search.py import optuna.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from flows.core.processes import identify_process, is_alive
from flows.errors import EkibenError, ParamsError, hide_password, one_line
from flows.params import DATA_ADDRESSES, DataParams, FloatRange, SearchSpace, TrainParams

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage

HEARTBEAT_S = 60  # of a running trial, in a database
GRACE_S = 300  # without a heartbeat, after which a trial counts as dead; long, since native code may hold the GIL
OWNER = "owner"  # user attribute: which process runs the trial
REASON = "reason"  # user attribute: why a trial was not finished

P = ParamSpec("P")
R = TypeVar("R")


def study_name(
    space: SearchSpace, objective: str, data_md5: str, base: TrainParams, preparation: DataParams | None = None
) -> str:
    """Name a study after everything that makes its values comparable.

    Optuna opens an existing study whatever it was made for: another space, objective, data, split or base must not
    meet it.

    Args:
        space: What may be chosen.
        objective: Metric on dev that is maximised.
        data_md5: Digest of the data.
        base: Parameters that the space does not vary.
        preparation: How the data are mapped and split; where they lie does not matter, `data_md5` says what they are.
    """
    prepared = (preparation or DataParams()).model_dump(mode="json", exclude=set(DATA_ADDRESSES))
    parts = [space.model_dump(mode="json"), objective, data_md5, base.model_dump(mode="json"), prepared]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return f"{objective}-{data_md5[:8]}-{digest[:10]}"


def open_study(storage: str | Path, *, name: str) -> Study:
    """Open the study `name`, or create it (maximising).

    Args:
        storage: A database URL, or the path of a journal file.
        name: From `study_name`.

    Raises:
        ParamsError: the storage cannot be opened.
    """
    import optuna
    import sqlalchemy

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with quiet_optuna():
            return optuna.create_study(
                storage=_open_storage(storage), study_name=name, direction="maximize", load_if_exists=True
            )
    except (OSError, ValueError, ImportError, sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        raise ParamsError(
            f"the study storage {hide_password(str(storage))} cannot be opened ({one_line(error)}): correct "
            "EKIBEN_STUDY_STORAGE, or unset it to use a journal file in Ekiben's home (move a damaged one away)"
        ) from error


def _open_storage(storage: str | Path) -> BaseStorage:
    import sqlalchemy
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if "://" not in str(storage):
        path = Path(storage)
        path.parent.mkdir(parents=True, exist_ok=True)
        mend_journal(path)
        return JournalStorage(JournalFileBackend(str(path)))
    url = sqlalchemy.make_url(str(storage))
    if url.get_backend_name() == "sqlite" and url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    return RDBStorage(str(storage), heartbeat_interval=HEARTBEAT_S, grace_period=GRACE_S)


def mend_journal(path: Path) -> None:
    """Cut off a last line that was written in part (a full disk, a power cut).

    Optuna would write its next entry onto that line, and never again be able to read the file.
    """
    from optuna.storages.journal import JournalFileSymlinkLock

    if not path.exists() or path.read_bytes()[-1:] in (b"", b"\n"):
        return
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()  # another process may be in the middle of that line
    try:
        whole, _, rest = path.read_bytes().rpartition(b"\n")
        if rest:
            os.truncate(path, len(whole) + 1 if whole else 0)
    finally:
        lock.release()


def sign_trial(trial: Trial) -> None:
    """Note on a trial which process runs it."""
    trial.set_user_attr(OWNER, identify_process())


def close_stale_trials(study: Study) -> int:
    """Mark running trials as failed when their process is gone; return how many.

    On this host the process itself is looked for; in a database also trials of other hosts are closed, when their
    heartbeat has stopped. Trials of living processes are left alone.
    """
    import optuna

    running = (optuna.trial.TrialState.RUNNING,)
    before = study.get_trials(deepcopy=False, states=running)
    for trial in before:
        owner = trial.user_attrs.get(OWNER)
        if owner is not None and not is_alive(owner):
            _close(study, trial.number)
    with quiet_optuna():
        optuna.storages.fail_stale_trials(study)  # does nothing for a journal, which has no heartbeat
    left = {trial.number for trial in study.get_trials(deepcopy=False, states=running)}
    return len([trial for trial in before if trial.number not in left])


def _close(study: Study, number: int) -> None:
    import optuna

    with suppress(optuna.exceptions.UpdateFinishedTrialError):  # another process may close it at the same moment
        study.tell(number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)


@contextmanager
def heartbeat(study: Study, trial: Trial) -> Iterator[None]:
    """Let a database know every minute that the trial is alive; a journal needs none."""
    import optuna
    import sqlalchemy

    storage: Any = study._storage
    if not hasattr(storage, "record_heartbeat"):
        yield
        return
    ended = threading.Event()

    def beat() -> None:
        while True:
            # A database that is away may be back at the next beat.
            with suppress(sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError):
                storage.record_heartbeat(trial._trial_id)
            if ended.wait(HEARTBEAT_S):
                return

    thread = threading.Thread(target=beat, name="ekiben-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Silence Optuna's warnings about features that it calls experimental, or meant for `Study.optimize`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def plain_study_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Let `function` raise our errors where Optuna or its database raises its own."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        import optuna
        import sqlalchemy

        try:
            return function(*args, **kwargs)
        except (optuna.exceptions.OptunaError, sqlalchemy.exc.SQLAlchemyError) as error:
            raise EkibenError(
                f"the study storage failed in {function.__name__} ({one_line(error)}): run the same command again, the "
                "study goes on"
            ) from error

    return wrapper


def to_distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Translate the space for Optuna: a list is a set of choices, a range is a range."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    distributions: dict[str, BaseDistribution] = {}
    for name in type(space).model_fields:
        choice = getattr(space, name)
        if isinstance(choice, FloatRange):
            distributions[name] = FloatDistribution(choice.low, choice.high, log=choice.log)
        else:
            distributions[name] = CategoricalDistribution(list(dict.fromkeys(choice)))
    return distributions


def values_inside(params: TrainParams, distributions: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """Those of the varied parameters whose value in `params` may also be drawn from the space."""
    from optuna.distributions import CategoricalDistribution

    inside = {}
    for name, distribution in distributions.items():
        value = getattr(params, name)
        if isinstance(distribution, CategoricalDistribution):
            known = value in distribution.choices
        else:
            known = distribution.low <= value <= distribution.high
        if known:
            inside[name] = value
    return inside


def suggest(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    """Let the sampler choose one parameter of a trial."""
    from optuna.distributions import CategoricalDistribution

    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
