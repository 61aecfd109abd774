"""The shadow sees what is asked, and nobody who asks sees the shadow: real versions, one live, one beside it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bentos import shadow as shadow_module
from bentos.drift import FEWEST_TEXTS
from bentos.encoder import Encoder
from bentos.errors import OverloadedError
from bentos.lunchbox import Lunchbox
from bentos.metrics import ServeMetrics
from bentos.observer import Observer
from bentos.openai import EmbeddingsRequest
from bentos.schemas import EncodeRequest, RankRequest
from bentos.settings import ServeSettings
from bentos.shadow import MOST_TEXTS, Shadow
from bentos.shelf import Shelf
from bentos.vectors import cosine_pairs
from tests.bentos.shelves import make_map, make_shelf, open_shared

PATIENCE_S = 300.0  # on a machine that is busy with something else


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow_module, "TIME_LIMIT_S", PATIENCE_S)


@dataclass
class Ear(Observer):
    outcomes: list[str] = field(default_factory=list)
    texts: list[tuple[str, Sequence[float], Sequence[float]]] = field(default_factory=list)

    def record_shadow(self, outcome: str) -> None:
        self.outcomes.append(outcome)

    def record_shadow_texts(self, model: str, cosines: Sequence[float], overlaps: Sequence[float]) -> None:
        self.texts.append((model, cosines, overlaps))


@dataclass
class Stage:
    shelf: Shelf
    shadow: Shadow
    ear: Ear
    live: Encoder
    other: Encoder

    async def ask(self, *texts: str, encoder: Encoder | None = None) -> Any:
        """Ask as the frontend does."""
        encoder = encoder or self.live
        watch = self.shadow.pick(encoder)
        return (await encoder.encode(EncodeRequest(texts=list(texts)), None, watch))["embeddings"]

    async def settle(self) -> None:
        """Wait for the shadow at work."""
        while self.shadow._task is not None and not self.shadow._task.done():
            await asyncio.sleep(0.005)


@pytest.fixture(scope="module")
def boxes(tiny_lunchbox_path: Path, successor_path: Path) -> tuple[Lunchbox, Lunchbox]:
    return open_shared(tiny_lunchbox_path), open_shared(successor_path)


def play(
    boxes: tuple[Lunchbox, Lunchbox],
    use: Callable[[Stage], Awaitable[None]],
    *,
    share: float = 1.0,
    name: str = "challenger",
) -> None:
    """Version 1 is live, its successor is the challenger."""

    async def main() -> None:
        settings = ServeSettings(shadow=name, shadow_share=share)
        live, other = (Encoder(box, settings) for box in boxes)
        for encoder in (live, other):
            await encoder.start()
        shelf = make_shelf(live, other, aliases={"challenger": other.manifest.tag, "champion": live.manifest.tag})
        ear = Ear()
        shadow = Shadow(lambda: shelf, settings, ear, random.Random(7))
        try:
            await use(Stage(shelf, shadow, ear, live, other))
        finally:
            await shadow.stop()
            await shelf.stop()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_texts_are_compared_in_the_space_of_the_live_version(boxes: tuple[Lunchbox, Lunchbox]) -> None:
    async def use(stage: Stage) -> None:
        texts = [f"{number} trains" for number in range(FEWEST_TEXTS + 10)]
        for text in texts:
            await stage.ask(text)
            await stage.settle()
        old, new = boxes
        expected = cosine_pairs(old.engine.embed(texts), new.engine.embed(texts) @ make_map())
        told = stage.shadow.describe()
        assert (told["model"], told["beside"]) == (new.manifest.tag, old.manifest.tag)
        assert (told["relation"], told["texts"], told["problem"]) == ("mapped", len(texts), None)
        assert told["requests"] == {"compared": len(texts), "dropped": 0, "failed": 0}
        assert told["cosine"]["mean"] == pytest.approx(expected.mean(), abs=1e-4)
        assert told["overlap_at_10"]["values"] == 10
        assert stage.ear.outcomes == ["compared"] * len(texts)
        heard = [cosine for _, cosines, _ in stage.ear.texts for cosine in cosines]
        np.testing.assert_allclose(heard, expected, atol=1e-4)
        assert {model for model, *_ in stage.ear.texts} == {new.manifest.tag}

    play(boxes, use)


def test_nobody_waits_for_it_and_while_it_works_the_rest_is_dropped(boxes: tuple[Lunchbox, Lunchbox]) -> None:
    async def use(stage: Stage) -> None:
        gate, asked = asyncio.Event(), []

        async def slow(request: Any, rows: Sequence[int]) -> Any:
            asked.append(request)
            await gate.wait()
            raise OverloadedError("full")

        stage.other.embed_aside = slow  # type: ignore[method-assign]
        for number in range(20):
            await stage.ask(f"{number} trains")
        assert len(asked) == 1
        assert stage.ear.outcomes == ["dropped"] * 19
        with stage.shelf.holding(stage.other):
            pass
        stage.shelf.retire(stage.other.manifest.tag)
        await asyncio.sleep(0.15)
        assert stage.other in [copy.encoder for copy in stage.shelf.copies()], "it is held while it works"
        gate.set()
        await stage.settle()
        assert stage.ear.outcomes[-1] == "failed"

    play(boxes, use)


def test_it_is_dropped_when_others_wait(boxes: tuple[Lunchbox, Lunchbox], monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(stage: Stage) -> None:
        for busy in (stage.live, stage.other):
            with monkeypatch.context() as patch:
                patch.setattr(
                    Encoder, "waiting_texts", property(lambda encoder, busy=busy: 3 if encoder is busy else 0)
                )
                await stage.ask("bread")
                await stage.settle()
        assert stage.ear.outcomes == ["dropped", "dropped"]
        await stage.ask("bread")
        await stage.settle()
        assert stage.ear.outcomes[-1] == "compared"

    play(boxes, use)


@pytest.mark.parametrize("error", [OverloadedError("full"), RuntimeError("secret"), ValueError()])
def test_its_faults_are_told_and_hurt_nobody(
    boxes: tuple[Lunchbox, Lunchbox], error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def use(stage: Stage) -> None:
        async def fail(*_: Any) -> Any:
            raise error

        embed_aside, stage.other.embed_aside = stage.other.embed_aside, fail  # type: ignore[method-assign]
        for _ in range(3):
            rows = await stage.ask("bread")
            np.testing.assert_allclose(rows, boxes[0].engine.embed(["bread"]), atol=1e-5)
            await stage.settle()
        assert stage.ear.outcomes == ["failed"] * 3
        assert stage.shadow.describe()["problem"]
        stage.other.embed_aside = embed_aside  # type: ignore[method-assign]
        await stage.ask("bread")
        await stage.settle()
        assert stage.shadow.describe()["problem"] is None

    play(boxes, use)
    unexpected = [record for record in caplog.records if record.exc_info]
    assert len(unexpected) == (0 if isinstance(error, OverloadedError) else 1), "once, not for every request"


def test_it_gives_up_after_a_while(boxes: tuple[Lunchbox, Lunchbox], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow_module, "TIME_LIMIT_S", 0.05)

    async def use(stage: Stage) -> None:
        stage.other.embed_aside = lambda *_: asyncio.Event().wait()  # type: ignore[assignment, method-assign, return-value]
        await stage.ask("bread")
        await stage.settle()
        assert stage.ear.outcomes == ["dropped"]

    play(boxes, use)


def test_until_the_version_is_loaded_it_says_what_is_missing(boxes: tuple[Lunchbox, Lunchbox]) -> None:
    async def use(stage: Stage) -> None:
        await stage.ask("bread")
        await stage.settle()
        assert stage.ear.outcomes == ["failed"]
        assert "`EKIBEN_SHADOW` is 'next'" in stage.shadow.describe()["problem"]
        stage.shelf.aliases = {"next": stage.other.manifest.tag}
        await stage.ask("bread")
        await stage.settle()
        assert stage.ear.outcomes == ["failed", "compared"]

    play(boxes, use, name="next")


def test_the_live_version_is_not_compared_with_itself(boxes: tuple[Lunchbox, Lunchbox]) -> None:
    async def use(stage: Stage) -> None:
        await stage.ask("bread")
        await stage.settle()
        assert stage.ear.outcomes == []
        assert "is the live version itself" in stage.shadow.describe()["problem"]

    play(boxes, use, name="champion")


def test_only_what_the_live_version_answers_counts(boxes: tuple[Lunchbox, Lunchbox]) -> None:
    async def use(stage: Stage) -> None:
        await stage.ask("bread", encoder=stage.other)
        await stage.settle()
        assert stage.ear.outcomes == []
        watch = stage.shadow.pick(stage.live)
        first, *_, last = boxes[0].engine.tokenize(["bread"])[0].ids
        await stage.live.openai_embeddings(EmbeddingsRequest(input=[first, 100, last]), None, watch)
        await stage.settle()
        assert stage.ear.outcomes == [], "token ids belong to one tokenizer"

    play(boxes, use)


def test_of_a_long_request_some_texts_are_compared(boxes: tuple[Lunchbox, Lunchbox]) -> None:
    async def use(stage: Stage) -> None:
        documents = [f"{number} trains" for number in range(60)]
        watch = stage.shadow.pick(stage.live)
        await stage.live.rank(RankRequest(query="bread", documents=documents), None, watch)
        await stage.settle()
        ((_, cosines, _),) = stage.ear.texts
        assert len(cosines) == MOST_TEXTS
        old, new = boxes
        texts = ["bread", *documents]
        possible = cosine_pairs(old.engine.embed(texts), new.engine.embed(texts) @ make_map())
        assert all(np.abs(possible - cosine).min() < 1e-4 for cosine in cosines)

    play(boxes, use)


def test_it_begins_anew_when_a_version_changes(boxes: tuple[Lunchbox, Lunchbox]) -> None:
    async def use(stage: Stage) -> None:
        await stage.ask("bread")
        await stage.settle()
        tags = [encoder.manifest.tag for encoder in (stage.live, stage.other)]
        stage.shelf.flip(tags[1], time.monotonic(), keep=tags)
        stage.shelf.aliases = {"challenger": tags[0]}
        await stage.ask("milk", encoder=stage.other)
        await stage.settle()
        told = stage.shadow.describe()
        assert (told["model"], told["beside"], told["texts"]) == (tags[0], tags[1], 1)
        assert told["requests"] == {"compared": 1, "dropped": 0, "failed": 0}

    play(boxes, use)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_is_kept(boxes: tuple[Lunchbox, Lunchbox], share: float) -> None:
    async def use(stage: Stage) -> None:
        picked = sum(stage.shadow.pick(stage.live) is not None for _ in range(2000))
        assert abs(picked / 2000 - share) < 0.04

    play(boxes, use, share=share)


def test_the_figures_are_metrics_too(boxes: tuple[Lunchbox, Lunchbox]) -> None:
    metrics = ServeMetrics({"/encode"})
    metrics.record_shadow("compared")
    metrics.record_shadow_texts("ekiben:2-x", [0.97, 0.2], [0.3])
    read = metrics.registry.get_sample_value
    assert read("ekiben_shadow_requests_total", {"outcome": "compared"}) == 1
    assert read("ekiben_shadow_cosine_count", {"model": "ekiben:2-x"}) == 2
    assert read("ekiben_shadow_cosine_bucket", {"model": "ekiben:2-x", "le": "0.95"}) == 1
    assert read("ekiben_shadow_overlap_sum", {"model": "ekiben:2-x"}) == 0.3
