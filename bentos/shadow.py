"""A share of what is asked also goes to another version, which answers nobody: to see how its vectors would differ.

What is asked is answered first. Then, when no text waits and the shadow is not at work already, some texts of the
request go by the other version's bulk lane, whose threads stand back; everything else is dropped. Whatever happens to a
shadow, no caller waits for it or hears of it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from bentos.drift import Drift
from bentos.encoder import Encoder, Watch
from bentos.errors import ServeError
from bentos.observer import Observer
from bentos.schemas import DoorRequest
from bentos.settings import ServeSettings
from bentos.shelf import Shelf
from bentos.vectors import Vectors

MOST_TEXTS = 16  # of one request
TIME_LIMIT_S = 10.0
FIELD = "EKIBEN_SHADOW"
Outcome = Literal["compared", "dropped", "failed"]
logger = logging.getLogger("bentos")


class Shadow:
    """Belongs to the event loop."""

    def __init__(
        self,
        get_shelf: Callable[[], Shelf],
        settings: ServeSettings,
        observer: Observer | None = None,
        chance: random.Random | None = None,
    ) -> None:
        """Prepare the shadow of the version that the settings name.

        Args:
            get_shelf: the versions that are loaded.
            settings: which version, and what share of the requests.
            observer: told of cosines, overlaps, and of what was dropped.
            chance: chooses requests, and texts of long ones.
        """
        self._get_shelf = get_shelf
        self._name, self._share = settings.shadow, settings.shadow_share
        self._observer = observer or Observer()
        self._chance = chance or random.Random()
        self._task: asyncio.Task[None] | None = None
        self._drift: Drift | None = None
        self._outcomes: Counter[str] = Counter()
        self._problem: str | None = None

    def pick(self, encoder: Encoder) -> Watch | None:
        """By chance, what a request's vectors shall be shown to once they are computed; `encoder` answers it."""
        return partial(self._take, encoder) if self._chance.random() < self._share else None

    def describe(self) -> dict[str, Any]:
        """What was asked for and seen since the two versions have been the ones they are, by this worker."""
        return {
            "name": self._name,
            "share": self._share,
            "requests": {outcome: self._outcomes[outcome] for outcome in ("compared", "dropped", "failed")},
            "problem": self._problem,
            **(self._drift.describe() if self._drift is not None else {}),
        }

    async def stop(self) -> None:
        """Give up what is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _take(self, encoder: Encoder, request: DoorRequest, vectors: Vectors) -> None:
        """Begin with a request whose vectors have just been computed, or drop it."""
        texts = [text for field in request.text_fields() for text in field.texts]
        if not all(isinstance(text, str) for text in texts):
            return  # token ids are of one tokenizer only
        if encoder.waiting_texts or (self._task is not None and not self._task.done()):
            self._count("dropped")
            return
        rows = range(len(texts))
        chosen = list(rows) if len(texts) <= MOST_TEXTS else self._chance.sample(rows, MOST_TEXTS)
        self._task = asyncio.create_task(self._follow(encoder, request, chosen, vectors[chosen]), name="ekiben-shadow")

    async def _follow(self, encoder: Encoder, request: DoorRequest, rows: list[int], vectors: Vectors) -> None:
        try:
            shelf = self._get_shelf()
            if encoder is not shelf.live:
                return  # it was asked for by its name, or has just been replaced
            other = shelf.choose(FIELD, self._name)
            if other is encoder:
                self._problem = f"{self._name!r} is the live version itself"
                return
            if other.waiting_texts:
                return self._count("dropped")
            with shelf.holding(other):
                async with asyncio.timeout(TIME_LIMIT_S):
                    theirs = await other.embed_aside(request, rows)
                await self._compare(encoder, other, vectors, theirs)
        except TimeoutError:
            self._count("dropped")
        except ServeError as error:
            self._problem = error.message
            self._count("failed")
        except Exception as error:
            if self._problem != repr(error):
                logger.exception("the shadow of a request failed")
            self._problem = repr(error)
            self._count("failed")

    async def _compare(self, encoder: Encoder, other: Encoder, ours: Vectors, theirs: Vectors) -> None:
        drift = self._drift
        if drift is None or (drift.live, drift.other) != (encoder.manifest, other.manifest):
            drift = self._drift = Drift(encoder.box, other.box)
            self._outcomes.clear()
        comparison = await asyncio.to_thread(drift.compare, ours, theirs)
        drift.add(comparison, ours, theirs)
        self._problem = None
        self._observer.record_shadow_texts(other.manifest.tag, comparison.cosines, comparison.overlaps)
        self._count("compared")

    def _count(self, outcome: Outcome) -> None:
        self._outcomes[outcome] += 1
        self._observer.record_shadow(outcome)
