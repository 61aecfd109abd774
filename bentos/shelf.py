"""The versions that are loaded in this process: which one is live, which stand beside it, who still uses which.

A version comes as `standby`, which no request sees. It is then shown beside the live one, or takes its place at an
instant that all workers of the server share. A version that leaves takes no new request, finishes those that hold it,
and only then gives its memory back. All methods belong to the event loop; what loads a version is in loading.py, and
what decides that one comes or goes, for all workers at once, in swaps.py.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from bentos.encoder import Encoder
from bentos.errors import NotReadyError, UnknownModelError
from bentos.loading import unload_version
from bentos.rules import list_names

Role = Literal["live", "beside", "standby", "leaving"]
STARTING = "the model is still loading"
logger = logging.getLogger("bentos")


@dataclass(eq=False)
class Copy:
    """One version in this process."""

    encoder: Encoder
    role: Role = "standby"
    memory_mb: float = 0.0  # about; see loading.py
    holders: int = 0  # requests that use it now
    used_at: float = field(default_factory=time.monotonic)  # when a request last chose it
    problem: str | None = None  # what the last look at it found wrong

    @property
    def tag(self) -> str:
        """Its name, e.g. `ekiben:3-1f2e3d4c`."""
        return self.encoder.manifest.tag


class Hold:
    """While the block runs, the version does not leave. A generator would cost each request three times as much."""

    __slots__ = ("_copy",)

    def __init__(self, copy: Copy) -> None:
        self._copy = copy

    def __enter__(self) -> Copy:
        self._copy.holders += 1
        return self._copy

    def __exit__(self, *_: object) -> None:
        self._copy.holders -= 1


@dataclass(frozen=True)
class _Flip:
    """A change of the live version, agreed on and yet to come."""

    copy: Copy
    at: float  # by `time.monotonic()`, which all processes of a machine share
    keep: Collection[str]  # tags of those that stay; the one that was live leaves unless it is among them


class Shelf:
    """The versions of one model in this process."""

    def __init__(self) -> None:
        self.refusal = STARTING  # why there is no live version, while there is none
        self.aliases: Mapping[str, str] = {}  # alias -> tag, as the registry was last seen
        self.followed: str | None = None  # alias that the live version follows
        self._copies: dict[str, Copy] = {}  # tag -> copy, without those that leave
        self._by_encoder: dict[Encoder, Copy] = {}
        self._by_name: Mapping[str, Copy] | None = None  # None: to be made again
        self._live: Copy | None = None
        self._flip: _Flip | None = None
        self._leaving: dict[Copy, asyncio.Task[None]] = {}

    # --- what requests ask

    @property
    def live(self) -> Encoder:
        """The version that answers requests that name none.

        Raises:
            NotReadyError: when there is none; says why.
        """
        if self._flip is not None:
            self.turn()
        if self._live is None:
            raise NotReadyError(self.refusal)
        return self._live.encoder

    def choose(self, name_of_field: str, name: str | None) -> Encoder:
        """The version that a request asks for in a field; the live one when it asks for none.

        Args:
            name_of_field: the request's field, for the error.
            name: the model's name (the live version), an alias, a tag such as `ekiben:3-1f2e3d4c`, `3-1f2e3d4c`, `3`,
                `v3`, or a run id. The alias that is followed means the live version as long as the one that it names
                now is not here: before it was looked up, while it is fetched, or when it was refused.

        Raises:
            UnknownModelError: when no such version is loaded; lists those that are.
            NotReadyError: when no version is live.
        """
        live = self.live
        copy = self._by_encoder[live]
        if name is not None:
            found = self._named().get(self.aliases.get(name, name))
            if found is not None:
                copy = found
            elif name != self.followed:
                raise self._unknown(name_of_field, name)
        copy.used_at = time.monotonic()
        return copy.encoder

    def known_aliases(self) -> dict[str, Encoder]:
        """Every alias that a request may name, and what it means."""
        named = {copy.tag: copy.encoder for copy in self._visible()}
        known = {alias: named[tag] for alias, tag in self.aliases.items() if tag in named}
        if self.followed is not None and self._live is not None:
            known.setdefault(self.followed, self._live.encoder)
        return dict(sorted(known.items()))

    def _named(self) -> Mapping[str, Copy]:
        """Every name, without the aliases, and what it means; a name of several versions means the live one."""
        if self._by_name is None:
            copies = reversed(self._visible())
            self._by_name = {name: copy for copy in copies for name in list_names(copy.encoder.manifest)}
        return self._by_name

    def _unknown(self, name_of_field: str, name: str) -> UnknownModelError:
        loaded = [copy.tag for copy in self._visible()]
        return UnknownModelError(
            f"`{name_of_field}` is {name[:200]!r}, but {' and '.join(loaded)} is served here; leave `{name_of_field}` "
            "out for the live version, name one that is served (GET /models/info lists all their names), or have it "
            "loaded beside it by POST /models/load/{version} with an admin key",
            field=name_of_field,
            loaded=loaded,
        )

    def holding(self, encoder: Encoder) -> Hold:
        """Keep a version that was just chosen from leaving before the block ends.

        Raises:
            NotReadyError: when it has left since it was chosen.
        """
        copy = self._by_encoder.get(encoder)
        if copy is None:
            raise NotReadyError(f"{encoder.manifest.tag} has left this server; send the request again")
        return Hold(copy)

    def encoders(self) -> list[Encoder]:
        """Every version that requests may choose: the live one first, then the one used last."""
        return [copy.encoder for copy in self._visible()]

    def copies(self) -> list[Copy]:
        """Every version in memory, those that no request sees included."""
        if self._flip is not None:
            self.turn()
        return list(self._by_encoder.values())

    def _visible(self) -> list[Copy]:
        if self._flip is not None:
            self.turn()
        seen = [copy for copy in self._copies.values() if copy.role in ("live", "beside")]
        return sorted(seen, key=lambda copy: (copy.role != "live", -copy.used_at))

    # --- how versions come and go

    def tags(self) -> list[str]:
        """The versions that are here and stay, those on standby included."""
        return list(self._copies)

    def find(self, tag: str) -> Copy | None:
        """The copy of a version, unless it is leaving or not there."""
        return self._copies.get(tag)

    def add(self, encoder: Encoder, *, memory_mb: float = 0.0) -> Copy:
        """Put a started version on the shelf, on standby."""
        copy = Copy(encoder, memory_mb=memory_mb)
        self._copies[copy.tag] = self._by_encoder[encoder] = copy
        self._by_name = None
        return copy

    def show(self, tag: str) -> None:
        """Let requests choose a version that is on standby."""
        copy = self._copies[tag]
        if copy.role == "standby":
            copy.role = "beside"
            self._by_name = None

    def flip(self, tag: str, at: float, *, keep: Collection[str] = ()) -> None:
        """Make a version the live one at an instant (`time.monotonic()`); the one before leaves, unless it is kept.

        The instant holds for every request, however late the event loop comes to look at the clock: `live` looks.
        """
        copy = self._copies[tag]
        self._flip = None if copy is self._live else _Flip(copy, at, keep)
        self.turn()

    def turn(self) -> None:
        """Carry out the flip whose time has come."""
        flip = self._flip
        if flip is None or time.monotonic() < flip.at:
            return
        self._flip = None
        before, self._live = self._live, flip.copy
        flip.copy.role = "live"
        self._by_name = None
        if before is not None:
            before.role = "beside"
            if before.tag not in flip.keep:
                self.retire(before.tag)

    def retire(self, tag: str) -> None:
        """Let a version leave once the last request that holds it has ended, unless it is live, or about to be."""
        copy = self._copies.get(tag)
        if copy is None or copy is self._live or (self._flip is not None and copy is self._flip.copy):
            return
        del self._copies[tag]
        copy.role = "leaving"
        self._by_name = None
        self._leaving[copy] = asyncio.get_running_loop().create_task(
            self._see_off(copy),
            name=f"ekiben-leave-{tag}",
            context=contextvars.Context(),  # not that of a request which happened to come at the time
        )

    async def _see_off(self, copy: Copy) -> None:
        while copy.holders:
            await asyncio.sleep(0.05)
        self._by_encoder.pop(copy.encoder, None)
        await unload_version(copy.encoder)
        self._leaving.pop(copy, None)
        logger.info("%s has left", copy.tag)

    async def stop(self) -> None:
        """Finish the batches in flight of all versions, and end their threads."""
        self._flip = None
        for task in self._leaving.values():
            task.cancel()
        for copy in list(self._by_encoder.values()):
            await copy.encoder.stop()
