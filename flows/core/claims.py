"""One process of a study at a time: who may measure an architecture, or finish the winner. Core layer."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from flows.core.processes import identify_process, is_alive
from flows.core.studies import OWNER

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage

CLAIM_LASTS_S = 1800  # a claim of another host, which cannot be asked whether the process still lives
CLAIM_POLL_S = 2.0
SINCE = "since"  # user attribute of a claim: when somebody first waited for it


@contextmanager
def claim(study: Study, name: str, *, wait: bool = True) -> Iterator[bool]:
    """Let one process at a time do what is called `name`; yield whether it is this one.

    An empty study of that name, beside `study`, is the token: to create one is what every storage does for a single
    process only. The claim of a process that is gone is taken over.

    Args:
        study: What they work on.
        name: What only one may do.
        wait: For the others to end; else it yields false while one of them is at it.
    """
    import optuna

    storage = study._storage
    while True:
        try:
            token = optuna.create_study(storage=storage, study_name=name)
        except optuna.exceptions.DuplicatedStudyError:
            if _drop_stale_claim(storage, name):
                continue
        else:
            break
        if not wait:
            yield False
            return
        time.sleep(CLAIM_POLL_S)
    token.set_user_attr(OWNER, identify_process())
    try:
        yield True
    finally:
        with suppress(KeyError):  # taken over: this process was not heard of for too long
            storage.delete_study(token._study_id)


def _drop_stale_claim(storage: BaseStorage, name: str) -> bool:
    """Remove a claim when its process is gone; return whether it may be tried for again at once."""
    import optuna

    try:
        token = optuna.load_study(study_name=name, storage=storage)
        owner, since = token.user_attrs.get(OWNER), token.user_attrs.get(SINCE)
        if since is None:
            token.set_user_attr(SINCE, time.time())  # by the clock of whoever waits
            since = time.time()
        unknown = owner is None or owner["host"] != socket.gethostname()
        gone: bool = time.time() - since > CLAIM_LASTS_S if unknown else not is_alive(owner)
        if gone:
            storage.delete_study(token._study_id)  # this one, not one that somebody has made since
    except KeyError:  # given back, or dropped by another process, just now
        return True
    return gone
