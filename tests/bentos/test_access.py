"""API keys: which are known, which routes need none, reloading, and that no key is ever shown. CORS in a real app."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from starlette.responses import PlainTextResponse

from bentos import access
from bentos.access import ApiKeys, add_cors
from bentos.errors import ForbiddenError, SettingsError, UnauthorizedError
from bentos.settings import ServeSettings

FIRST, SECOND, THIRD = "first-key-0123456789", "second-key-012345678", "third-key-0123456789"


def make_keys(*keys: str, **settings: Any) -> ApiKeys:
    return ApiKeys(ServeSettings(api_keys=",".join(keys), **settings))


def key_file(folder: Path, text: str) -> Path:
    path = folder / "keys.txt"
    path.write_text(text, encoding="utf-8")
    return path


def accepts(keys: ApiKeys, key: str) -> bool:
    try:
        return keys.check(None, key.encode()) is not None
    except UnauthorizedError:
        return False


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_without_keys_everybody_may_ask() -> None:
    keys = ApiKeys(ServeSettings())
    assert keys.check(None, None) is None
    assert keys.check(b"Bearer whatever", None) is None
    assert keys.is_open("/encode")


@pytest.mark.parametrize("separator", [",", "\n", " , ", ",\n"])
def test_several_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, separator: str) -> None:
    monkeypatch.setenv("EKIBEN_API_KEYS", FIRST + separator + SECOND)
    keys = ApiKeys(ServeSettings())
    assert not keys.is_open("/encode")
    assert accepts(keys, FIRST)
    assert accepts(keys, SECOND)
    assert not accepts(keys, FIRST + separator + SECOND)


@pytest.mark.parametrize(
    ("authorization", "x_api_key"),
    [
        (f"Bearer {SECOND}", None),
        (f"bearer  {SECOND} ", None),
        (None, SECOND),
        ("Basic dXNlcjpwYXNz", SECOND),
        (f"Bearer {THIRD}", SECOND),
        (f"Bearer {SECOND}", THIRD),
    ],
)
def test_a_key_is_known_in_either_header(authorization: str | None, x_api_key: str | None) -> None:
    keys = make_keys(FIRST, SECOND)
    shown = [header and header.encode() for header in (authorization, x_api_key)]
    assert keys.check(*shown) == make_keys(SECOND).check(None, SECOND.encode())


@pytest.mark.parametrize(
    ("authorization", "x_api_key", "problem"),
    [
        (None, None, "the request shows no API key; send one"),
        (b"", b"", "no API key that is known"),
        (b"Bearer", None, "no API key that is known"),
        (b"Bearer ", None, "no API key that is known"),
        (THIRD.encode(), None, "no API key that is known"),
        (f"Basic {FIRST}".encode(), None, "no API key that is known"),
        (f"Bearer {FIRST[:-1]}".encode(), None, "no API key that is known"),
        (f"Bearer {FIRST}x".encode(), None, "no API key that is known"),
        (f"Bearer {FIRST} {FIRST}".encode(), None, "no API key that is known"),
        (None, FIRST.upper().encode(), "no API key that is known"),
        (None, b"\xff\x00", "no API key that is known"),
    ],
)
def test_anything_else_is_refused_without_being_repeated(
    authorization: bytes | None, x_api_key: bytes | None, problem: str
) -> None:
    with pytest.raises(UnauthorizedError) as refused:
        make_keys(FIRST, SECOND).check(authorization, x_api_key)
    error = refused.value
    assert (error.status, error.code) == (401, "unauthorized")
    assert problem in error.message
    assert "Authorization: Bearer KEY" in error.message
    assert "X-API-Key: KEY" in error.message
    assert "key-0123" not in error.message.lower()


def test_fingerprints_tell_keys_apart_and_do_not_show_them() -> None:
    keys = make_keys(FIRST, SECOND)
    fingerprints = {keys.check(None, key.encode()) for key in (FIRST, SECOND)}
    assert len(fingerprints) == 2
    for fingerprint in fingerprints:
        assert fingerprint is not None
        assert len(fingerprint) == 8
        assert fingerprint not in FIRST + SECOND


@pytest.mark.parametrize("path", ["/", "/health", "/livez", "/readyz", "/metrics", "/docs.json", "/ui", "/ui/app.js"])
def test_health_metrics_and_documentation_are_open(path: str) -> None:
    assert make_keys(FIRST).is_open(path)


@pytest.mark.parametrize("path", ["/encode", "/v1/models", "/unknown", "/uix", "/health/x", "/metrics/x", ""])
def test_everything_else_is_not(path: str) -> None:
    assert not make_keys(FIRST).is_open(path)


def test_metrics_can_be_protected() -> None:
    keys = make_keys(FIRST, protect_metrics=True)
    assert not keys.is_open("/metrics")
    assert keys.is_open("/readyz")


# --- the file


def test_keys_of_the_file_and_of_the_environment_add_up(tmp_path: Path) -> None:
    path = key_file(tmp_path, f"# ours\n\n{FIRST}  # the shop\n  {SECOND}\r\nwith#a-hash-01234567\n")
    keys = ApiKeys(ServeSettings(api_keys_file=path, api_keys=THIRD))
    assert all(accepts(keys, key) for key in (FIRST, SECOND, THIRD, "with#a-hash-01234567"))
    assert not accepts(keys, "the shop")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read: No such file"),
        ("", "holds no key"),
        ("# nothing\n\n", "holds no key"),
        (f"{FIRST}\nshort\n", "key 2 has 5 characters; at least 16 are needed: `openssl rand"),
        ("Schlüssel-0123456789", "key 1 holds a blank or a character that is not ASCII"),
        ("two words 0123456789", "key 1 holds a blank"),
        ("x" * 2_000_000, "more than 1048576 bytes"),
    ],
)
def test_a_bad_file_is_refused_at_the_start(tmp_path: Path, content: str | None, problem: str) -> None:
    path = tmp_path / "keys.txt" if content is None else key_file(tmp_path, content)
    with pytest.raises(SettingsError) as refused:
        ApiKeys(ServeSettings(api_keys_file=path))
    assert problem in str(refused.value)
    assert "EKIBEN_API_KEYS_FILE" in str(refused.value)


@pytest.mark.parametrize("value", ["", " , \n", "short", "two words 0123456789"])
def test_bad_keys_in_the_environment_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("EKIBEN_API_KEYS", value)
    with pytest.raises(SettingsError, match="EKIBEN_API_KEYS") as refused:
        ApiKeys(ServeSettings())
    assert not value.strip(" ,\n") or value not in str(refused.value)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = key_file(tmp_path, FIRST)
    keys = ApiKeys(ServeSettings(api_keys_file=path, api_keys=THIRD))
    key_file(tmp_path, SECOND)
    assert wait_until(lambda: accepts(keys, SECOND))
    assert not accepts(keys, FIRST)
    assert accepts(keys, THIRD)


def test_while_the_file_is_bad_the_keys_stay_and_one_error_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(access, "CHECK_EVERY_S", 0)
    path = key_file(tmp_path, FIRST)
    keys = ApiKeys(ServeSettings(api_keys_file=path))
    for damage in (path.unlink, lambda: key_file(tmp_path, "# empty"), lambda: key_file(tmp_path, "short")):
        caplog.clear()
        damage()
        for _ in range(3):
            assert accepts(keys, FIRST)
            assert not accepts(keys, "")
        assert [record.levelno for record in caplog.records] == [logging.ERROR]
        assert "the keys stay as they were: EKIBEN_API_KEYS_FILE" in caplog.text
    key_file(tmp_path, SECOND)
    assert accepts(keys, SECOND)
    assert not accepts(keys, FIRST)


def test_the_file_is_looked_at_once_a_second_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "CHECK_EVERY_S", 3600)
    keys = ApiKeys(ServeSettings(api_keys_file=key_file(tmp_path, FIRST)))
    key_file(tmp_path, SECOND)
    assert accepts(keys, FIRST)


# --- admins

ADMIN = "an-admin-key-0123456789"


def is_admin(keys: ApiKeys, key: str) -> bool:
    try:
        return keys.check_admin(f"Bearer {key}".encode(), None) == keys.check_admin(None, key.encode())
    except (ForbiddenError, UnauthorizedError):
        return False


def test_admins_and_callers_have_keys_of_their_own() -> None:
    keys = make_keys(FIRST, admin_keys=f"{ADMIN},{THIRD}")
    assert [is_admin(keys, key) for key in (ADMIN, THIRD, FIRST, SECOND)] == [True, True, False, False]
    assert [accepts(keys, key) for key in (FIRST, ADMIN, THIRD)] == [True, False, False]
    with pytest.raises(ForbiddenError, match="an API key, which may embed but not load models"):
        keys.check_admin(None, FIRST.encode())
    for shown, problem in ((None, "shows no admin key"), (SECOND.encode(), "no admin key that is known here")):
        with pytest.raises(UnauthorizedError, match=problem):
            keys.check_admin(None, shown)


def test_without_admin_keys_nobody_is_one_and_it_is_told_how_to_have_some() -> None:
    for keys in (ApiKeys(ServeSettings()), make_keys(FIRST)):
        for shown in (None, FIRST.encode(), b""):
            with pytest.raises(ForbiddenError, match=r"Set EKIBEN_ADMIN_KEYS_FILE \(or EKIBEN_ADMIN_KEYS\).*openssl"):
                keys.check_admin(None, shown)


def test_admin_keys_alone_close_nothing() -> None:
    keys = ApiKeys(ServeSettings(admin_keys=ADMIN))
    assert keys.is_open("/encode")
    assert keys.check(None, None) is None


def test_an_admin_may_see_what_became_of_a_load() -> None:
    keys = make_keys(FIRST, admin_keys=ADMIN)
    assert not keys.is_open("/models/info")
    for key in (FIRST, ADMIN):
        assert keys.check(None, key.encode(), "/models/info")
    for path in ("/encode", "/models/info/", "/v1/models"):
        with pytest.raises(UnauthorizedError):
            keys.check(None, ADMIN.encode(), path)


def test_a_changed_file_of_admin_keys_is_read_again_and_a_bad_one_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(access, "CHECK_EVERY_S", 0)
    path = key_file(tmp_path, ADMIN)
    keys = make_keys(FIRST, admin_keys_file=path)
    assert is_admin(keys, ADMIN)
    key_file(tmp_path, f"{SECOND} # the new one")
    assert [is_admin(keys, key) for key in (ADMIN, SECOND)] == [False, True]
    key_file(tmp_path, "short")
    assert is_admin(keys, SECOND)
    assert "the keys stay as they were: EKIBEN_ADMIN_KEYS_FILE" in caplog.text
    for source in ({"admin_keys_file": path}, {"admin_keys": "short"}, {"admin_keys": ""}):
        with pytest.raises(SettingsError, match="EKIBEN_ADMIN_KEYS"):
            ApiKeys(ServeSettings(**source))


# --- no key is ever shown


def test_no_key_shows_in_settings_messages_or_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    canary = "CANARY-0123456789"
    monkeypatch.setattr(access, "CHECK_EVERY_S", 0)
    monkeypatch.setenv("EKIBEN_API_KEYS", canary)
    monkeypatch.setenv("EKIBEN_API_KEYS_FILE", str(key_file(tmp_path, canary + "-file")))
    monkeypatch.setenv("EKIBEN_ADMIN_KEYS", canary + "-admin")
    caplog.set_level(logging.DEBUG)
    settings = ServeSettings()
    keys = ApiKeys(settings)
    shown = [repr(settings), str(settings.model_dump()), settings.model_dump_json(), repr(keys), str(vars(keys))]
    key_file(tmp_path, f"{canary} {canary}")
    assert accepts(keys, canary)
    for headers in ((f"Bearer {canary}x".encode(), None), (canary.encode(), b"CANARY")):
        with pytest.raises(UnauthorizedError) as refused:
            keys.check(*headers)
        with pytest.raises(UnauthorizedError) as unknown:
            keys.check_admin(b"Bearer " + canary.encode() + b"-of-nobody", None)
        shown += [repr(unknown.value), unknown.value.message]
        shown += [repr(refused.value), refused.value.message, str(refused.value.details)]
    monkeypatch.setenv("EKIBEN_MAX_TEXTS", "0")
    with pytest.raises(ValidationError) as invalid:
        ServeSettings()
    shown += [str(invalid.value), caplog.text]
    assert "stay as they were" in caplog.text
    assert not [text for text in shown if "CANARY" in text]


# --- CORS


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse("hello", headers={"X-Request-Id": "1"})(scope, receive, send)


def ask(method: str, origin: str | None, origins: str, **headers: str) -> httpx.Response:
    async def main() -> httpx.Response:
        app = add_cors(hello, ServeSettings(cors_origins=origins))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:  # type: ignore[arg-type]
            return await client.request(
                method, "/encode", headers={**({"origin": origin} if origin else {}), **headers}
            )

    return asyncio.run(main())


def test_without_origins_nothing_is_added() -> None:
    assert add_cors(hello, ServeSettings()) is hello


@pytest.mark.parametrize("origins", ["https://app.example.com", "http://localhost:5173, https://app.example.com", "*"])
def test_a_browser_may_send_its_headers_and_read_ours(origins: str) -> None:
    wanted = "authorization,content-type,x-api-key,x-ekiben-timeout-ms,x-request-id,x-stainless-os"
    preflight = ask(
        "OPTIONS",
        "https://app.example.com",
        origins,
        **{"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": wanted},
    )
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] in {"https://app.example.com", "*"}
    assert set(wanted.split(",")) <= {
        name.strip().lower() for name in preflight.headers["access-control-allow-headers"].split(",")
    }
    answer = ask("POST", "https://app.example.com", origins)
    assert answer.text == "hello"
    readable = answer.headers["access-control-expose-headers"].lower().split(", ")
    assert {"x-request-id", "retry-after", "x-ekiben-space", "x-ekiben-shape", "x-ekiben-adapted-from"} <= set(readable)
    assert "access-control-allow-credentials" not in answer.headers


def test_other_origins_and_plain_clients_get_no_permission() -> None:
    for origin in ("https://evil.example.com", None):
        answer = ask("POST", origin, "https://app.example.com")
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("origins", ["app.example.com", "https://app.example.com/", "https://a.b/path", "ftp://a.b"])
def test_what_is_no_origin_is_refused(origins: str) -> None:
    with pytest.raises(ValidationError, match="is not an origin; give scheme and host"):
        ServeSettings(cors_origins=origins)
