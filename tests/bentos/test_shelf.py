"""The versions in one process: which one a request gets, when the live one changes, when one leaves. Real models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from bentos.encoder import Encoder
from bentos.errors import NotReadyError, UnknownModelError
from bentos.lunchbox import open_lunchbox
from bentos.schemas import EncodeRequest
from bentos.settings import ServeSettings
from bentos.shelf import STARTING, Shelf

Test = Callable[[Shelf, Encoder, Encoder], Awaitable[None]]


@pytest.fixture
def run(tiny_lunchbox_path: Path, successor_path: Path) -> Callable[[Test], None]:
    """Run a test with version 1 live and version 2 on standby."""

    async def main(test: Test) -> None:
        shelf, settings = Shelf(), ServeSettings(threads=1)
        encoders = [Encoder(open_lunchbox(path), settings) for path in (tiny_lunchbox_path, successor_path)]
        for encoder in encoders:
            await encoder.start()
            shelf.add(encoder)
        shelf.flip(encoders[0].manifest.tag, time.monotonic())
        try:
            await asyncio.wait_for(test(shelf, *encoders), 30)
        finally:
            await shelf.stop()

    return lambda test: asyncio.run(main(test))


def tag(encoder: Encoder) -> str:
    return encoder.manifest.tag


async def embed(encoder: Encoder) -> None:
    await encoder.encode(EncodeRequest(texts=["bread"]))


async def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_an_empty_shelf_says_why() -> None:
    shelf = Shelf()
    with pytest.raises(NotReadyError, match=STARTING):
        _ = shelf.live
    shelf.refusal = "the model was altered"
    with pytest.raises(NotReadyError, match="the model was altered"):
        shelf.choose("model", None)
    assert shelf.encoders() == []


def test_a_version_can_be_asked_for_by_any_of_its_names(run: Callable[[Test], None]) -> None:
    async def test(shelf: Shelf, one: Encoder, two: Encoder) -> None:
        shelf.show(tag(two))
        shelf.aliases = {"champion": tag(one), "challenger": tag(two), "gone": "ekiben:9-12345678"}
        for encoder in (one, two):
            manifest = encoder.manifest
            names = [manifest.tag, manifest.bento_version, manifest.version, f"v{manifest.version}", manifest.run_id]
            assert {shelf.choose("model", name) for name in names} == {encoder}
        assert {shelf.choose("model", name) for name in (None, "ekiben", "champion")} == {one}
        assert shelf.choose("model", "challenger") is two
        for unknown in ("gone", "ekiben:3-12345678", "v9", ""):
            with pytest.raises(UnknownModelError, match=f"{tag(one)}.*{tag(two)}.*POST /models/load") as caught:
                shelf.choose("model_version", unknown)
            assert caught.value.details["field"] == "model_version"
            assert caught.value.details["loaded"] == [tag(one), tag(two)]

    run(test)


def test_a_version_on_standby_is_not_seen(run: Callable[[Test], None]) -> None:
    async def test(shelf: Shelf, one: Encoder, two: Encoder) -> None:
        assert shelf.encoders() == [one]
        with pytest.raises(UnknownModelError):
            shelf.choose("model", tag(two))
        shelf.show(tag(two))
        assert shelf.encoders() == [one, two]

    run(test)


def test_the_version_used_last_comes_after_the_live_one(run: Callable[[Test], None]) -> None:
    async def test(shelf: Shelf, one: Encoder, two: Encoder) -> None:
        shelf.show(tag(two))
        shelf.flip(tag(two), time.monotonic(), keep=[tag(one)])
        shelf.choose("model", "1")
        assert shelf.encoders() == [two, one]
        copy = shelf.find(tag(one))
        assert copy is not None
        before = copy.used_at
        await asyncio.sleep(0.02)
        with shelf.holding(one):
            pass
        assert copy.used_at == before, "to look at a version, as its canary does, is no use"
        shelf.choose("model", "1")
        assert copy.used_at > before

    run(test)


def test_the_alias_that_is_followed_means_the_live_version_until_the_next_one_is_here(
    run: Callable[[Test], None],
) -> None:
    async def test(shelf: Shelf, one: Encoder, two: Encoder) -> None:
        with pytest.raises(UnknownModelError):
            shelf.choose("model", "champion")
        shelf.followed = "champion"
        assert shelf.choose("model", "champion") is one, "before anybody has looked it up"
        shelf.aliases = {"champion": tag(one)}
        assert shelf.choose("model", "champion") is one
        shelf.aliases = {"champion": tag(two), "challenger": tag(two)}
        assert shelf.choose("model_version", "champion") is one
        assert shelf.known_aliases() == {"champion": one}
        with pytest.raises(UnknownModelError):
            shelf.choose("model", "challenger")
        at = time.monotonic() + 0.2
        shelf.flip(tag(two), at)
        assert shelf.choose("model", "champion") is one
        await asyncio.sleep(0.25)
        assert shelf.choose("model", "champion") is two
        assert shelf.known_aliases() == {"challenger": two, "champion": two}
        shelf.aliases = {"champion": tag(one)}  # another was loaded by hand
        assert shelf.choose("model", "champion") is two

    run(test)


def test_a_flip_happens_at_its_instant_however_late_the_event_loop_is(run: Callable[[Test], None]) -> None:
    async def test(shelf: Shelf, one: Encoder, two: Encoder) -> None:
        at = time.monotonic() + 0.2
        shelf.flip(tag(two), at)
        assert shelf.live is one
        while time.monotonic() < at - 0.05:
            assert shelf.live is one
        time.sleep(0.1)  # nothing else runs: no timer, no task
        assert shelf.live is two
        assert shelf.choose("model", None) is two

    run(test)


def test_a_flip_back_before_its_instant_is_none(run: Callable[[Test], None]) -> None:
    async def test(shelf: Shelf, one: Encoder, two: Encoder) -> None:
        shelf.flip(tag(two), time.monotonic() + 0.05)
        shelf.flip(tag(one), time.monotonic() + 0.05)
        await asyncio.sleep(0.1)
        assert shelf.live is one

    run(test)


def test_the_old_version_leaves_when_its_last_request_has_ended(run: Callable[[Test], None]) -> None:
    async def test(shelf: Shelf, one: Encoder, two: Encoder) -> None:
        with shelf.holding(one):
            shelf.flip(tag(two), time.monotonic())
            assert shelf.live is two
            with pytest.raises(UnknownModelError):
                shelf.choose("model", "1")
            await asyncio.sleep(0.2)
            await embed(one)  # it still answers
            assert [(copy.tag, copy.role) for copy in shelf.copies()] == [(tag(one), "leaving"), (tag(two), "live")]
        await wait_until(lambda: len(shelf.copies()) == 1)
        with pytest.raises(NotReadyError, match=f"{tag(one)} has left"), shelf.holding(one):
            pass
        await wait_until(lambda: not shelf._leaving)
        with pytest.raises(NotReadyError, match="has left this server"):
            one.box.engine.infer([[1, 2]])
        await embed(two)

    run(test)


def test_the_old_version_stays_when_it_is_kept(run: Callable[[Test], None]) -> None:
    async def test(shelf: Shelf, one: Encoder, two: Encoder) -> None:
        shelf.flip(tag(two), time.monotonic(), keep=[tag(one)])
        assert shelf.live is two
        assert shelf.choose("model", "1") is one
        await embed(one)

    run(test)


def test_the_live_version_and_the_next_one_cannot_be_made_to_leave(run: Callable[[Test], None]) -> None:
    async def test(shelf: Shelf, one: Encoder, two: Encoder) -> None:
        shelf.flip(tag(two), time.monotonic() + 0.05)
        for encoder in (one, two):
            shelf.retire(tag(encoder))
        shelf.retire("ekiben:9-12345678")
        assert shelf.tags() == [tag(one), tag(two)]
        await asyncio.sleep(0.1)
        await embed(shelf.live)

    run(test)


def test_a_version_may_come_back_while_its_old_copy_still_answers(
    run: Callable[[Test], None], tiny_lunchbox_path: Path
) -> None:
    async def test(shelf: Shelf, one: Encoder, two: Encoder) -> None:
        with shelf.holding(one):
            shelf.flip(tag(two), time.monotonic())
            assert shelf.live is two
            again = Encoder(open_lunchbox(tiny_lunchbox_path), ServeSettings(threads=1))
            await again.start()
            shelf.add(again)
            shelf.flip(tag(again), time.monotonic())
            assert shelf.live is again
            await embed(one)
            await embed(again)
        await wait_until(lambda: [copy.encoder for copy in shelf.copies()] == [again])
        await embed(shelf.choose("model", "1"))

    run(test)
