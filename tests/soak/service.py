"""The service with words that break it, served from its source by the soak alone: no Bento holds this module.

A text that begins with one of the `SPELLS` ends, hangs or fails the thread that computes it. What happened goes into
the file that SOAK_EVENTS names, one JSON object a line, with the time of the machine's monotonic clock.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bentos.batcher import Batcher
from bentos.engine import Engine
from bentos.service import EmbeddingService as EmbeddingService  # what is served
from tests.soak.spells import DIE_ALWAYS, DIE_ONCE, FAIL, HANG_ONCE, SPELLS, TELL

EVENTS = Path(os.environ["SOAK_EVENTS"])
HANG_S = float(os.environ["SOAK_HANG_S"])

_infer, _start = Engine.infer, Batcher.start
_lock = threading.Lock()
_met: set[tuple[int, ...]] = set()
_prefixes: dict[tuple[int, ...], str] = {}
_batchers: list[Batcher] = []


def note(what: str, **more: Any) -> None:
    with _lock, EVENTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"at": time.monotonic(), "what": what, **more}) + "\n")


def infer(self: Engine, token_ids: Sequence[Sequence[int]], **options: Any) -> Any:
    if not _prefixes:
        for text, spell in zip(self.tokenize(SPELLS), SPELLS, strict=True):
            _prefixes[tuple(text.ids[:-1])] = spell  # without the special token at the end
    with _lock:  # once: the others of the batch are met as well, whoever ends it
        spelt = [(spell, ids, ids not in _met) for ids in map(tuple, token_ids) if (spell := _find_spell(ids))]
        _met.update(ids for _, ids, _ in spelt)
    for spell, _ids, is_new in spelt:
        _obey(spell, is_new)
        if spell == HANG_ONCE and is_new:
            break  # by now the thread is given up: nobody hears what more it does
    return _infer(self, token_ids, **options)


def _find_spell(ids: tuple[int, ...]) -> str | None:
    return next((spell for prefix, spell in _prefixes.items() if ids[: len(prefix)] == prefix), None)


def _obey(spell: str, is_new: bool) -> None:
    if spell == TELL:
        (batcher,) = _batchers
        note(spell, admitted_tokens=dict(batcher._tokens), in_flight=len(batcher._in_flight))
    elif spell == FAIL:
        raise RuntimeError("a text of the soak")
    elif spell == DIE_ALWAYS or (spell == DIE_ONCE and is_new):
        note(spell)
        raise SystemExit
    elif spell == HANG_ONCE and is_new:
        (batcher,) = _batchers
        lane = threading.current_thread().name.removeprefix("ekiben-")
        note(spell, lane=lane, threads=batcher._limits.threads)
        time.sleep(HANG_S)


def start(self: Batcher) -> None:
    _batchers.append(self)
    _start(self)


Engine.infer = infer  # type: ignore[method-assign, assignment]
Batcher.start = start  # type: ignore[method-assign]
