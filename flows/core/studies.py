"""How a study is kept: opened, named, told its space, and cleared of trials whose process is gone. Core layer.

Only this module, claims.py and search.py import optuna.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from flows.core.processes import identify_process, is_alive
from flows.errors import EkibenError, ParamsError, hide_password, one_line
from flows.params import DATA_ADDRESSES, DataParams, FloatRange, SearchSpace, TrainParams

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

HEARTBEAT_S = 60  # of a running trial, in a database
GRACE_S = 300  # without a heartbeat, after which a trial counts as dead; long, since native code may hold the GIL
SQLITE_WAIT_S = 120  # for other processes' writes: SQLite lets one process write at a time
TABLE_TRIES = 10
ARCHITECTURE = ("base_model", "layers", "dimensions", "max_tokens", "precision")  # parameters that make it
MAX_KEY_LENGTH = 400  # characters; a database's column holds 512
OWNER = "owner"  # user attribute: which process runs the trial
REASON = "reason"  # user attribute: why a trial was not finished

P = ParamSpec("P")
R = TypeVar("R")


def study_name(
    space: SearchSpace,
    objectives: Sequence[str],
    data_md5: str,
    base: TrainParams,
    preparation: DataParams | None = None,
    *,
    conditions: Sequence[str] = (),
) -> str:
    """Name a study after everything that makes its values comparable.

    Optuna opens an existing study whatever it was made for: other directions, another space, data, split, base or
    machine must not meet it. Budget of time, policy and limits of cost are left out: they choose among the same values.

    Args:
        space: What may be chosen.
        objectives: Metric on dev that is maximised, then the costs that are minimised, in their order.
        data_md5: Digest of the data.
        base: Parameters that the space does not vary.
        preparation: How the data are mapped and split; where they lie does not matter, `data_md5` says what they are.
        conditions: What else the values depend on, such as the machine that costs are measured on.
    """
    prepared = (preparation or DataParams()).model_dump(mode="json", exclude=set(DATA_ADDRESSES))
    parts = [
        space.model_dump(mode="json"),
        list(objectives),
        data_md5,
        base.model_dump(mode="json"),
        prepared,
        list(conditions),
    ]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return f"{'+'.join(objectives)}-{data_md5[:8]}-{digest[:10]}"


def name_architecture(params: TrainParams) -> str:
    """Name what the cost of serving depends on: a key under which a study keeps its figures."""
    name = f"cost of {json.dumps({name: getattr(params, name) for name in ARCHITECTURE})}"
    return name if len(name) <= MAX_KEY_LENGTH else f"cost of {hashlib.sha256(name.encode()).hexdigest()}"


def open_study(storage: str | Path, *, name: str, costs: int = 0) -> Study:
    """Open the study `name`, or create it: the first value is maximised, the others are minimised.

    Args:
        storage: A database URL, or the path of a journal file.
        name: From `study_name`.
        costs: How many values are minimised.

    Raises:
        ParamsError: the storage cannot be opened, or holds a study of this name with other directions.
    """
    import optuna
    import sqlalchemy

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    directions = ["maximize", *["minimize"] * costs]
    try:
        with quiet_optuna():
            study = optuna.create_study(
                storage=_open_storage(storage), study_name=name, directions=directions, load_if_exists=True
            )
    except (OSError, ValueError, ImportError, sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        raise ParamsError(
            f"the study storage {hide_password(str(storage))} cannot be opened ({one_line(error)}): correct "
            "EKIBEN_STUDY_STORAGE, or unset it to use a journal file in Ekiben's home (move a damaged one away)"
        ) from error
    found = [direction.name.lower() for direction in study.directions]
    if found != directions:  # Optuna takes no notice
        raise ParamsError(
            f"the study {name} in {hide_password(str(storage))} has the directions {', '.join(found)}, not "
            f"{', '.join(directions)}: something else has written it; remove it, or choose another storage"
        )
    return study


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
    options: dict[str, Any]
    if url.get_backend_name() == "sqlite" and url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        options = {"connect_args": {"timeout": SQLITE_WAIT_S}}
    else:
        options = {"pool_pre_ping": True}  # a trial may take an hour: a database hangs up on who says nothing
    for attempt in range(TABLE_TRIES):
        try:
            return RDBStorage(str(storage), options, heartbeat_interval=HEARTBEAT_S, grace_period=GRACE_S)
        except sqlalchemy.exc.SQLAlchemyError as error:
            # Two processes that open a new database make the same tables; who comes second finds them made.
            if attempt + 1 == TABLE_TRIES or not re.search(
                "already exists|duplicate|unique", str(error), re.IGNORECASE
            ):
                raise
            time.sleep(0.2 * (attempt + 1))
    raise AssertionError("unreachable")


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
    heartbeat has stopped. A trial that nobody has signed within `GRACE_S` of its draw was left by a process that was
    killed in between. Trials of living processes are left alone.
    """
    import optuna

    running = (optuna.trial.TrialState.RUNNING,)
    before = study.get_trials(deepcopy=False, states=running)
    for trial in before:
        owner = trial.user_attrs.get(OWNER)
        if _was_left(trial) if owner is None else not is_alive(owner):
            _close(study, trial.number)
    with quiet_optuna():
        optuna.storages.fail_stale_trials(study)  # does nothing for a journal, which has no heartbeat
    left = {trial.number for trial in study.get_trials(deepcopy=False, states=running)}
    return len([trial for trial in before if trial.number not in left])


def _was_left(trial: FrozenTrial) -> bool:
    """Whether a running trial that nobody has signed is too old to be signed any more; one is, within milliseconds."""
    drawn_at = trial.datetime_start  # Optuna's: local time, without a zone
    return drawn_at is not None and (datetime.now() - drawn_at).total_seconds() > GRACE_S


def _close(study: Study, number: int) -> None:
    import optuna

    with suppress(optuna.exceptions.UpdateFinishedTrialError):  # another process may close it at the same moment
        study.tell(number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)


def make_sampler(seed: int, startup_trials: int) -> BaseSampler:
    """Return Optuna's TPE, seeded anew for each trial by its number.

    After a restart the draws go on as without it, and processes that draw at the same moment draw different trials.

    Args:
        seed: Of the study.
        startup_trials: So many are drawn by chance before the finished ones say where to look.
    """
    from optuna.samplers import BaseSampler, TPESampler

    class Sampler(BaseSampler):  # type: ignore[misc] # optuna is not followed by mypy
        inner: BaseSampler

        def before_trial(self, study: Study, trial: FrozenTrial) -> None:
            own_seed = (seed * 1_000_003 + trial.number) % 2**32
            self.inner = TPESampler(seed=own_seed, n_startup_trials=startup_trials)
            self.inner.before_trial(study, trial)

        def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> Any:
            return self.inner.infer_relative_search_space(study, trial)

        def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Any) -> Any:
            return self.inner.sample_relative(study, trial, search_space)

        def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
            return self.inner.sample_independent(study, trial, param_name, param_distribution)

    return Sampler()


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


def trial_state(name: str) -> Any:
    """Optuna's state of that name: COMPLETE, PRUNED, FAIL, RUNNING or WAITING."""
    from optuna.trial import TrialState

    return TrialState[name]


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


def only_value(distribution: BaseDistribution) -> Any:
    """The value of a distribution that has no other (`single()`)."""
    from optuna.distributions import CategoricalDistribution

    return distribution.choices[0] if isinstance(distribution, CategoricalDistribution) else distribution.low


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
