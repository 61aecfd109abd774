"""Moving the aliases in the one order that leaves no gap. Core layer.

First the history, then the version's tags, `previous`, `champion`, and then this machine. The champion's alias is what
servers follow, so it is written last of all in the registry, and not before the lock and the champion have been looked
at again. What is kept for this machine alone (the alias file beside the BentoML store, `latest` in it) comes after, and
is put right by every later call.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bentos.aliases import Pointer, read_aliases, write_alias
from bentos.errors import RegistryError
from bentos.manifest import name_release
from flows.core.history import Act, begin_act, now, read_history
from flows.core.packing import point_latest
from flows.core.registry import CHALLENGER, CHAMPION, PREVIOUS, Registry, Release
from flows.core.release_lock import ReleaseLock
from flows.errors import ReleaseRaceError

MIRRORED = (PREVIOUS, CHALLENGER, CHAMPION)


def carry_out(
    registry: Registry, lock: ReleaseLock, act: Act, *, tags: Mapping[str, object], previous: str, home: Path
) -> Act:
    """Make the version of `act` the champion (or the challenger); return the act as the history has it.

    Interrupted anywhere and repeated, it ends in the same state, with one entry in the history.

    Args:
        registry: Where the versions are.
        lock: The release lock, held.
        act: What is done; `replaces` is the champion that was looked at: it must still be that one.
        tags: What the version is to carry.
        previous: Version that a rollback from the new champion leads to; empty: none. Not used for a challenger.
        home: BentoML's home folder.

    Raises:
        ReleaseRaceError: the champion is another one by now, or the lock is lost; the champion's alias is untouched.
    """
    chosen = registry.version(act.version)
    lock.check()
    if _check_champion(registry, act) == act.version:  # all that is left is to put right what comes after the alias
        done = [item.at for item in read_history(registry) if item.moves_champion and item.version == act.version]
        act = act.model_copy(update={"at": done[-1] if done else now()})  # without one it was moved by hand
        promoted_at = chosen.tags.get("promoted_at", act.time)
    else:
        act = begin_act(registry, act)
        promoted_at = act.time
    if act.kind == "release":
        tags = {**tags, "replaces": act.replaces, "promoted_at": promoted_at}
    registry.set_version_tags(act.version, tags)
    if act.moves_champion:
        registry.set_alias(PREVIOUS, previous or None)
        if CHALLENGER in chosen.aliases:
            registry.set_alias(CHALLENGER, None)
    lock.check()
    _check_champion(registry, act)
    registry.set_alias(CHAMPION if act.moves_champion else CHALLENGER, act.version)
    mirror_aliases(registry, home)
    return act


def mirror_aliases(registry: Registry, home: Path) -> None:
    """Tell this machine what the registry's aliases say: the alias file, and `latest` in the BentoML store."""
    pointers = _pointers(registry)
    for alias in MIRRORED:
        write_alias(home, registry.model_name, alias, pointers.get(alias))
    if CHAMPION in pointers:
        point_latest(registry.model_name, pointers[CHAMPION].bento_version, home)


def find_differences(registry: Registry, home: Path) -> list[str]:
    """What this machine's alias file says otherwise than the registry: one clause each, empty when all is well."""
    expected = _pointers(registry)
    try:
        found = read_aliases(home, registry.model_name)
    except RegistryError as error:
        return [str(error)]
    if not found:  # nothing was released from this machine
        return []
    return [
        f"{alias} is {_name(found.get(alias))} there and {_name(expected.get(alias))} in the registry"
        for alias in MIRRORED
        if found.get(alias) != expected.get(alias)
    ]


def _check_champion(registry: Registry, act: Act) -> str:
    """The champion's version, empty when there is none; it must be the one that `act` replaces, or the new one."""
    found = registry.champion()
    champion = "" if found is None else found.version
    if champion == act.replaces or (champion == act.version and act.moves_champion):
        return champion
    expected = f"version {act.replaces}" if act.replaces else "none"
    raise ReleaseRaceError(
        f"another one was quicker: the champion was {expected} when version {act.version} was compared with it, and is "
        f"version {champion or 'none'} now. Nothing was changed; run the same command again to compare with that one"
    )


def _pointers(registry: Registry) -> dict[str, Pointer]:
    return {
        alias: _point_to(release)
        for release in registry.versions()
        for alias in MIRRORED
        if alias in release.aliases and release.tags.get("space_id")
    }


def _point_to(release: Release) -> Pointer:
    return Pointer(
        version=release.version,
        bento_version=name_release(release.version, release.run_id),
        run_id=release.run_id,
        space_id=release.tags["space_id"],
    )


def _name(pointer: Pointer | None) -> str:
    return "nothing" if pointer is None else f"version {pointer.version}"
