"""Back to the version before: aliases, this machine's stores, running servers, and what it means for indexes."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from bentos.aliases import read_aliases
from bentos.errors import NotReadyError
from bentos.manifest import Compat, Manifest, read_manifest, write_manifest
from flows.core.boxes import MANIFEST_TAG
from flows.core.history import Act, read_history
from flows.core.lunchbox import attach_compat
from flows.core.packing import hash_manifest, is_stored, store_model
from flows.core.promotion import carry_out
from flows.core.release_lock import ReleaseLock, list_holders
from flows.core.tracking import Tracker, open_tracker
from flows.errors import EkibenError, NothingReleasedError, ParamsError, ReleaseRaceError
from flows.rollback import rollback
from flows.settings import load_settings
from tests.flows.core.test_registry import aliases, register_run
from tests.serving import bento_home, copy_lunchbox

KEY = "k" * 24
pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    with bento_home(load_settings().bento_store_path) as home:
        yield home


@pytest.fixture
def tracker(home: Path) -> Tracker:
    return open_tracker(load_settings())


@pytest.fixture
def released(tracker: Tracker, home: Path, tiny_lunchbox_path: Path) -> list[Manifest]:
    """Versions 1, 2 and 3, released one after the other: 2 is breaking, 3 is to 2 by a map."""
    manifests = []
    for number, kind in enumerate((None, "breaking", "adapter"), start=1):
        manifests.append(release(tracker, home, tiny_lunchbox_path, number, kind, manifests[-1] if manifests else None))
    return manifests


def release(
    tracker: Tracker, home: Path, source: Path, number: int, kind: str | None, before: Manifest | None
) -> Manifest:
    """What a release leaves, without training, packing and building: the registry, box, model, Bento, artifacts."""
    run = register_run(tracker)
    box = copy_lunchbox(
        source,
        load_settings().lunchboxes_path / f"{run.version}-{run.run_id[:8]}",
        version=run.version,
        run_id=run.run_id,
    )
    manifest = read_manifest(box).model_copy(update={"space_id": f"{number:016x}"})
    write_manifest(box, manifest)
    if before is not None:
        compat = Compat.model_validate(
            {"kind": kind, "version": before.version, "tag": before.tag, "space_id": before.space_id, "figures": {}}
        )
        adapter = np.eye(manifest.dim, dtype=np.float32) if kind == "adapter" else None
        manifest = attach_compat(box, manifest, compat, adapter)
    store_model(box, manifest)
    bento = home / "bentos" / "ekiben" / manifest.bento_version
    bento.mkdir(parents=True)
    (bento / "bento.yaml").write_text(
        f"service: bentos.service:EmbeddingService\nname: ekiben\nversion: {manifest.bento_version}\n"
        "bentoml_version: 1.4.39\ncreation_time: '2026-11-23T10:04:44.834580+00:00'\n"
    )
    tracker.log_folder(run.run_id, box, to="lunchbox")
    tracker.log_folder(run.run_id, box, to="release")
    tags = {"bento_tag": manifest.tag, "space_id": manifest.space_id, MANIFEST_TAG: hash_manifest(box)}
    replaces = "" if before is None else before.version
    act = Act(at="", kind="release", version=run.version, replaces=replaces)
    with ReleaseLock(tracker, "a test") as lock:
        carry_out(tracker, lock, act, tags=tags, previous=replaces, home=home)
    return manifest


def pointed(home: Path) -> dict[str, str]:
    return {alias: pointer.version for alias, pointer in read_aliases(home, "ekiben").items()}


def latest(home: Path) -> str:
    return (home / "bentos" / "ekiben" / "latest").read_text()


def test_a_rollback_goes_to_what_was_recorded_with_a_reason_and_a_word_on_indexes(
    tracker: Tracker, home: Path, released: list[Manifest]
) -> None:
    assert latest(home) == released[2].bento_version
    result = rollback(reason="slow on  short queries")
    assert (result.version, result.left, result.unchanged) == ("2", "3", False)
    assert result.bento_tag == released[1].tag
    assert aliases(tracker) == pointed(home) == {"champion": "2", "previous": "1"}
    assert latest(home) == released[1].bento_version
    act = read_history(tracker)[-1]
    assert (act.kind, act.version, act.replaces, act.reason) == ("rollback", "2", "3", "slow on short queries")
    (index,) = result.indexes
    assert (index["version"], index["space_id"], index["matches"]) == ("3", released[2].space_id, False)
    assert "multiply them by the map" in str(index["advice"])
    assert list_holders(tracker) == []

    # Given again it stays, says the same, and adds nothing.
    again = rollback(reason="slow on short queries")
    assert (again.version, again.unchanged, again.indexes) == ("2", True, result.indexes)
    assert len(read_history(tracker)) == 4

    # For another reason it is no repetition, and going further back is to be said.
    with pytest.raises(
        ParamsError, match=r"'slow on short queries', went from version 3 to version 2.*--to 1 "
    ) as told:
        rollback(reason="still slow")
    assert (told.value.exit_code, act.time in str(told.value)) == (2, True)
    assert aliases(tracker)["champion"] == "2"
    assert len(read_history(tracker)) == 4

    # Further back when a version is named; what was left there was breaking.
    further = rollback(reason="still slow", to="v1")
    assert aliases(tracker) == pointed(home) == {"champion": "1"}
    assert [(index["version"], index["matches"]) for index in further.indexes] == [("2", False), ("3", False)]
    assert "no map between them holds" in str(further.indexes[0]["advice"])
    assert "never compared" in str(further.indexes[1]["advice"])

    with pytest.raises(ParamsError, match="it has replaced no champion"):
        rollback(reason="slower and slower")

    # And forward again.
    forward = rollback(reason="it was the network", to=released[2].tag)
    assert aliases(tracker) == pointed(home) == {"champion": "3", "previous": "2"}
    assert [index["version"] for index in forward.indexes] == ["1", "2"]


def test_after_one_that_was_named_and_interrupted_the_plain_one_goes_to_what_was_recorded(
    tracker: Tracker, released: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.core.promotion.Registry.set_version_tags", die)
    with pytest.raises(KeyboardInterrupt):
        rollback(reason="slow", to="1")
    monkeypatch.undo()
    assert (read_history(tracker)[-1].version, aliases(tracker)["champion"]) == ("1", "3")
    assert rollback(reason="slow").version == "2"
    assert aliases(tracker) == {"champion": "2", "previous": "1"}


@pytest.mark.parametrize("error", [EkibenError("MLflow is gone"), ConnectionError("reset by peer")])
def test_what_cannot_be_said_of_an_index_stops_no_rollback(
    error: Exception, tracker: Tracker, released: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The servers are told before anybody looks at old indexes."""
    monkeypatch.setenv("EKIBEN_ADMIN_KEY", KEY)
    with Server() as server:

        def fail(*_: object) -> None:
            assert len(server.asked) == 1
            raise error

        monkeypatch.setattr(Tracker, "download_artifact", fail)
        result = rollback(reason="a test", servers=[server.url])
    assert aliases(tracker)["champion"] == "2"
    assert set(result.servers.values()) == {"every worker serves it"}
    (index,) = result.indexes
    assert (index["version"], index["space_id"], index["matches"]) == ("3", "", False)
    assert f"It is unknown whether vectors made by version 3 match: {error}" in str(index["advice"])


def test_a_box_that_cannot_compute_here_is_told_on_one_line(
    tracker: Tracker, released: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise NotReadyError("the model cannot be loaded")

    monkeypatch.setattr("flows.core.boxes.open_lunchbox", fail)
    with pytest.raises(EkibenError, match="version 2 cannot be served any more: the model cannot be loaded; nothing"):
        rollback(reason="a test")
    assert aliases(tracker)["champion"] == "3"


def test_what_this_machine_has_lost_comes_back_from_the_run(
    tracker: Tracker, home: Path, released: list[Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = released[1]
    for folder in (load_settings().lunchboxes_path, home / "models" / "ekiben-model"):
        shutil.rmtree(folder / two.bento_version)
    rollback(reason="a test")
    assert is_stored(two)
    assert aliases(tracker)["champion"] == "2"


def test_an_altered_box_is_passed_over_and_a_version_without_any_stays_where_it_is(
    tracker: Tracker, home: Path, released: list[Manifest]
) -> None:
    two = released[1]
    for folder in (load_settings().lunchboxes_path, home / "models" / "ekiben-model"):
        (folder / two.bento_version / "tokenizer.json").write_text("{}")
    artifacts = Path(tracker._client.get_run(two.run_id).info.artifact_uri.removeprefix("file://"))
    canary = artifacts / "lunchbox" / "canary.json"
    before = canary.read_bytes()
    canary.write_text("{}")
    with pytest.raises(NothingReleasedError, match=r"whole.*tokenizer\.json.*canary\.json.*is not packed anew"):
        rollback(reason="a test")
    assert aliases(tracker) == {"champion": "3", "previous": "2"}
    assert len(read_history(tracker)) == 3
    canary.write_bytes(before)
    rollback(reason="a test")
    assert aliases(tracker)["champion"] == "2"
    assert is_stored(two)


def test_a_box_whose_vectors_are_not_what_they_were_is_not_served(
    tracker: Tracker, home: Path, released: list[Manifest]
) -> None:
    """Its files are as released, so only computing shows it: on a machine whose runtime computes otherwise."""
    two = released[1]
    for folder in (load_settings().lunchboxes_path, home / "models" / "ekiben-model"):
        shutil.rmtree(folder / two.bento_version)
    artifacts = Path(tracker._client.get_run(two.run_id).info.artifact_uri.removeprefix("file://"))
    box = artifacts / "lunchbox"
    canary = json.loads((box / "canary.json").read_text())
    canary["vectors"] = [[-value for value in vector] for vector in canary["vectors"]]
    content = json.dumps(canary)
    (box / "canary.json").write_text(content)
    from bentos.manifest import sha256_file

    files = read_manifest(box).files | {"canary.json": sha256_file(box / "canary.json")}
    write_manifest(box, read_manifest(box).model_copy(update={"files": files}))
    tracker.set_version_tags("2", {MANIFEST_TAG: hash_manifest(box)})
    with pytest.raises(EkibenError, match="version 2 cannot be served any more: the canary vectors are wrong"):
        rollback(reason="a test")
    assert aliases(tracker)["champion"] == "3"


def test_before_anything_was_released_there_is_nothing_to_roll_back(tracker: Tracker) -> None:
    with pytest.raises(NothingReleasedError, match="no champion"):
        rollback(reason="a test")
    register_run(tracker)
    with pytest.raises(NothingReleasedError, match="no champion"):
        rollback(reason="a test")


def test_the_first_version_leads_nowhere_and_an_unreleased_one_is_no_target(
    tracker: Tracker, home: Path, tiny_lunchbox_path: Path
) -> None:
    release(tracker, home, tiny_lunchbox_path, 1, None, None)
    register_run(tracker)
    with pytest.raises(NothingReleasedError, match="version 1 has replaced no champion"):
        rollback(reason="a test")
    with pytest.raises(NothingReleasedError, match=r"version 2 was never released.*ekiben release --run 2"):
        rollback(reason="a test", to="2")
    with pytest.raises(NothingReleasedError, match="there is no version '9'"):
        rollback(reason="a test", to="9")
    assert rollback(reason="a test", to="1").unchanged
    assert aliases(tracker) == {"champion": "1"}
    assert len(read_history(tracker)) == 1


def test_a_rollback_beside_a_release_is_told_to_wait(tracker: Tracker, released: list[Manifest]) -> None:
    with (
        ReleaseLock(tracker, "release of version 9"),
        pytest.raises(ReleaseRaceError, match="release of version 9"),
    ):
        rollback(reason="a test")
    assert aliases(tracker)["champion"] == "3"


class Server:
    """What a server says to POST /models/load, over HTTP; no other part of it."""

    def __init__(self, status: int = 200, body: object = None) -> None:
        self.asked: list[tuple[str, str, object]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, self.headers["Authorization"], content))
                answer = json.dumps(body if body is not None else {}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_running_servers_are_told_with_the_admin_key(
    tracker: Tracker, released: list[Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(f"# of the staging servers\n{KEY}  # ours\n")
    with Server() as one, Server() as two:
        result = rollback(reason="a test", servers=[one.url, f"{two.url}/"], admin_key_file=key_file)
    wanted = (f"/models/load/{released[1].bento_version}", f"Bearer {KEY}", {"live": True})
    assert one.asked == two.asked == [wanted]
    assert set(result.servers.values()) == {"every worker serves it"}


def test_a_server_that_does_not_change_over_is_named_and_the_command_can_be_given_again(
    tracker: Tracker, released: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EKIBEN_ADMIN_KEY", KEY)
    refusal = {"error": {"code": "version_refused", "message": "worker 2 has not loaded it"}}
    with Server() as good, Server(409, refusal) as bad:
        servers = [good.url, bad.url, "http://127.0.0.1:9"]
        with pytest.raises(EkibenError) as caught:
            rollback(reason="a test", servers=servers)
        message = str(caught.value)
        assert "2 of 3 servers do not serve it" in message
        assert f"{bad.url}: HTTP 409: worker 2 has not loaded it" in message
        assert "http://127.0.0.1:9: ConnectError" in message
        assert KEY not in message
        assert aliases(tracker)["champion"] == "2"  # that much was done
        again = rollback(reason="a test", servers=[good.url])
        assert (again.version, again.unchanged) == ("2", True)
        assert len(good.asked) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"reason": " "}, "--reason"),
        ({"reason": "x", "servers": ["http://127.0.0.1:3000"]}, "EKIBEN_ADMIN_KEY"),
        ({"reason": "x", "servers": ["localhost:3000"], "admin_key_file": "key"}, "no address of a server"),
        ({"reason": "x", "servers": ["http://host:abc"], "admin_key_file": "key"}, "no address of a server"),
        ({"reason": "x", "admin_key_file": "nowhere"}, "cannot be read"),
        ({"reason": "x", "admin_key_file": "empty"}, "holds no key"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_changed(
    arguments: dict[str, object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(ParamsError, match=said):
        rollback(**arguments)
