"""@flow rollback: target > its box and Bento, verified > aliases > this machine > running servers > old indexes.

The target is what was recorded when the champion was released. Given twice, a rollback stays where it is: it goes
further back only when a version is named. So whatever interrupts it, the same command may be given again. One for
another reason, right after one that was carried through, is no repetition: it is told where the last one went.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel

from bentos.manifest import Manifest
from flows.core.boxes import check_vectors, find_box
from flows.core.folders import scratch_folder
from flows.core.history import Act, read_history, shorten_reason
from flows.core.indexes import Match, match_indexes, served_since
from flows.core.packing import put_back
from flows.core.promotion import carry_out
from flows.core.registry import Release
from flows.core.release_lock import ReleaseLock
from flows.core.servers import Answer, check_servers, load_everywhere
from flows.core.tracking import Tracker, open_tracker
from flows.errors import EkibenError, NothingReleasedError, ParamsError, one_line
from flows.progress import say
from flows.settings import PROJECT_ROOT, FlowSettings, export_environment, load_settings


class RollbackResult(BaseModel):
    """Which version is served again, and what that means for indexes and servers."""

    version: str
    run_id: str
    bento_tag: str
    space_id: str
    left: str  # version that was champion; the same one when it was not
    unchanged: bool  # it was the champion already
    indexes: list[dict[str, object]]  # of versions that were champion since: do they match?
    servers: dict[str, str]  # address -> what it said


@flow(name="rollback")
def rollback(
    reason: str, to: str | None = None, servers: list[str] | None = None, admin_key_file: Path | None = None
) -> RollbackResult:
    """Make an earlier version the champion again, for servers that follow it and for those that are named.

    Args:
        reason: Why: it stands in the history, and by it a rollback that is given twice is known.
        to: The version to go back to; without it, the one that the champion has replaced.
        servers: Addresses of servers that follow no alias: each is told to load the version. The others find out.
        admin_key_file: File on the machine of the run whose first line is the key for `servers`; without it, the key is
            EKIBEN_ADMIN_KEY.
    """
    settings = load_settings()
    export_environment(settings)
    key = read_key(settings, admin_key_file)
    urls = servers or []
    check_servers(urls, key)
    if not reason.strip():
        raise ParamsError("a rollback needs a reason: --reason 'wrong answers to short queries'")
    tracker = open_tracker(settings)
    with ReleaseLock(tracker, f"rollback to {to}" if to else "rollback") as lock:
        champion = tracker.champion()
        if champion is None:
            raise NothingReleasedError("nothing was released yet: there is no champion to roll back")
        target = tracker.version(find_target(tracker, champion, to, reason))
        history = read_history(tracker)
        since = served_since(history, target.version, champion.version)
        manifest = restore(tracker, target, settings)
        move(tracker, lock, champion, target, manifest, reason, settings)
        answers = tell(urls, manifest, key or "")
        matches = match_indexes(tracker, manifest, since)
        for match in matches:
            say(f"[rollback] {match.advice}")
    failed = [f"{answer.url}: {answer.said}" for answer in answers if not answer.done]
    if failed:
        raise EkibenError(
            f"{manifest.tag} is the champion, but {len(failed)} of {len(answers)} servers do not serve it: "
            f"{'; '.join(failed)}. Give the same command again when they can be reached"
        )
    return _result(champion, target, manifest, matches, answers)


def find_target(tracker: Tracker, champion: Release, to: str | None, reason: str) -> str:
    """The version to go back to: the one that is named, or what the champion has replaced.

    Args:
        tracker: Where versions and history are.
        champion: The champion.
        to: The version that was named; None: none.
        reason: By it a command that is given twice is known.

    Raises:
        NothingReleasedError: none is recorded, or the one that is named was never released.
        ParamsError: the champion came by a rollback for another reason, and none is named.
    """
    if to is None:
        newest = next((act for act in reversed(read_history(tracker)) if act.moves_champion), None)
        if newest is not None and newest.kind == "rollback" and champion.version == newest.version:
            if newest.reason != shorten_reason(reason):
                raise ParamsError(_say_where(newest, champion))
            return newest.version  # the same command once more: it ends in the same place
        to = champion.tags.get("replaces", "")
        if not to:
            raise NothingReleasedError(
                f"version {champion.version} has replaced no champion, so nothing is recorded to go back to; "
                "`ekiben history` shows what was released, `ekiben rollback --to VERSION` goes there"
            )
    target = tracker.version(to)
    if not target.tags.get("bento_tag"):
        raise NothingReleasedError(
            f"version {target.version} was never released, so nothing is known to hold for it; "
            f"`ekiben release --run {target.version}` asks the gates"
        )
    return target.version


@task(cache_policy=NO_CACHE)
def restore(tracker: Tracker, target: Release, settings: FlowSettings) -> Manifest:
    """Make sure that the target's box is whole and computes what it must, and that model and Bento are in the store.

    Raises:
        NothingReleasedError: its box is nowhere to be found.
        EkibenError: its vectors are not what they were.
    """
    box = find_box(tracker, target, settings.lunchboxes_path)
    manifest = check_vectors(box, target)
    with scratch_folder(settings.staging_path, "rollback") as scratch:
        if put_back(box, manifest, root=PROJECT_ROOT, staging=scratch / "bentoml"):
            say(f"[rollback] {manifest.tag} was not in the Bento store any more: it is there again")
    return manifest


@task(cache_policy=NO_CACHE)
def move(
    tracker: Tracker,
    lock: ReleaseLock,
    champion: Release,
    target: Release,
    manifest: Manifest,
    reason: str,
    settings: FlowSettings,
) -> None:
    """Write the history, then the aliases, then this machine's alias file."""
    act = Act(
        at="",
        kind="rollback",
        version=target.version,
        replaces=champion.version,
        reason=reason,
        tag=manifest.tag,
        space_id=manifest.space_id,
    )
    previous = target.tags.get("replaces", "")
    carry_out(tracker, lock, act, tags={}, previous=previous, home=settings.bento_store_path)
    how = " already" if champion.version == target.version else f", in place of version {champion.version}"
    say(f"[rollback] {manifest.tag} is the champion{how}")


@task(cache_policy=NO_CACHE)
def tell(servers: Sequence[str], manifest: Manifest, admin_key: str) -> list[Answer]:
    """Have the servers load the version, and wait until all their workers serve it."""
    answers = load_everywhere(servers, manifest.bento_version, admin_key)
    for answer in answers:
        say(f"[rollback] {answer.url}: {answer.said}")
    return answers


def read_key(settings: FlowSettings, path: Path | None) -> str | None:
    """The admin key: the first line of a file, or EKIBEN_ADMIN_KEY.

    Raises:
        ParamsError: the file cannot be read, or is empty.
    """
    if path is None:
        return settings.admin_key.get_secret_value() if settings.admin_key else None
    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(f"--admin-key-file {path} cannot be read: {one_line(error)}") from None
    key = next((line for line in lines if line), None)
    if key is None:
        raise ParamsError(f"--admin-key-file {path} holds no key: put one into its first line")
    return key


def _say_where(last: Act, champion: Release) -> str:
    """Where the last rollback went, when and why, and how to go further back."""
    before = champion.tags.get("replaces", "")
    cure = (
        f"`ekiben rollback --to {before} --reason ...` goes further back, to what it had replaced"
        if before
        else "it has replaced no champion: `ekiben history` shows what else was released, and `ekiben rollback --to "
        "VERSION` goes there"
    )
    return (
        f"the last rollback, of {last.time} because of {last.reason!r}, went from version {last.replaces} to version "
        f"{last.version}, which is the champion; this one has another reason, and nothing was changed. {cure}"
    )


def _result(
    champion: Release, target: Release, manifest: Manifest, matches: Sequence[Match], answers: Sequence[Answer]
) -> RollbackResult:
    return RollbackResult(
        version=target.version,
        run_id=target.run_id,
        bento_tag=manifest.tag,
        space_id=manifest.space_id,
        left=champion.version,
        unchanged=champion.version == target.version,
        indexes=[match.as_json() for match in matches],
        servers={answer.url: answer.said for answer in answers},
    )
