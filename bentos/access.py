"""Who may ask: API keys, the routes that stay open, and the web pages that may call from a browser.

A key is held as its SHA-256 digest only, so that no log, dump or error message can show it.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from bentos.errors import SettingsError, UnauthorizedError
from bentos.settings import ServeSettings

MIN_KEY_CHARS = 16
MAX_FILE_BYTES = 1_048_576
FINGERPRINT_CHARS = 8
CHECK_EVERY_S = 1.0  # how often the file's status is looked at
ADVICE = "`openssl rand -hex 24` makes a good one"
METRICS_PATH = "/metrics"
OPEN_PATHS = frozenset({"/", "/docs.json", "/health", "/healthz", "/livez", "/readyz", "/schema.json", "/ui"})
OPEN_FOLDERS = ("/static_content/", "/ui/")  # of the OpenAPI page and the playground
READABLE_HEADERS = (
    "Retry-After",
    "WWW-Authenticate",
    "X-Ekiben-Dtype",
    "X-Ekiben-Model",
    "X-Ekiben-Shape",
    "X-Ekiben-Space",
    "X-Ekiben-Total-Tokens",
    "X-Ekiben-Truncated",
    "X-Request-Id",
)
PREFLIGHT_AGE_S = 600
BEARER = re.compile(rb"bearer +", re.IGNORECASE)
COMMENT = re.compile(r"(?:^|\s)#.*")
logger = logging.getLogger("bentos")

Digests = Mapping[bytes, str]  # SHA-256 of a key -> its fingerprint, for logs and metrics


class ApiKeys:
    """The keys that callers may show. Not for several threads: it belongs to the event loop."""

    def __init__(self, settings: ServeSettings) -> None:
        """Read the keys.

        Raises:
            SettingsError: when the file cannot be read, or a source that is set holds no key, or a bad one.
        """
        self._protect_metrics = settings.protect_metrics
        self._path = settings.api_keys_file
        self._fixed: Digests = {}
        if settings.api_keys is not None:
            lines = re.split(r"[,\n]", settings.api_keys.get_secret_value())
            self._fixed = _digest_keys(lines, "EKIBEN_API_KEYS")
        self._stamp = None if self._path is None else _stamp(self._path)
        self._digests: Digests = self._fixed if self._path is None else {**self._fixed, **_read_keys(self._path)}
        self._looked_at = time.monotonic()
        self._problem: str | None = None

    def is_open(self, path: str) -> bool:
        """Whether `path` answers without a key: health, documentation, playground, and metrics unless protected."""
        if not self._digests or path in OPEN_PATHS or path.startswith(OPEN_FOLDERS):
            return True
        return path == METRICS_PATH and not self._protect_metrics

    def check(self, authorization: bytes | None, x_api_key: bytes | None) -> str | None:
        """Return the fingerprint of the key that a request shows in its headers; None when no keys are asked for.

        Raises:
            UnauthorizedError: when it shows none, or one that is not known.
        """
        if not self._digests:
            return None
        if self._path is not None and time.monotonic() - self._looked_at >= CHECK_EVERY_S:
            self._reload(self._path)
        found = None
        for shown in _shown_keys(authorization, x_api_key):
            digest = hashlib.sha256(shown).digest()
            for known, fingerprint in self._digests.items():  # all of them: the time says nothing about the keys
                if hmac.compare_digest(digest, known):
                    found = fingerprint
        if found is None:
            problem = "no API key" if authorization is None and x_api_key is None else "no API key that is known here"
            raise UnauthorizedError(
                f"the request shows {problem}; send one as `Authorization: Bearer KEY` or as `X-API-Key: KEY`"
            )
        return found

    def _reload(self, path: Path) -> None:
        """Read the file again when it has changed; while it is bad, the keys read before stay valid."""
        self._looked_at = time.monotonic()
        try:
            stamp = _stamp(path)
            if stamp == self._stamp:
                self._problem = None
                return
            self._digests = {**self._fixed, **_read_keys(path)}
        except SettingsError as error:
            if str(error) != self._problem:
                self._problem = str(error)
                logger.error("the API keys stay as they were: %s", error)
            return
        self._stamp, self._problem = stamp, None
        logger.info("read %d API keys", len(self._digests))


def add_cors(app: ASGIApp, settings: ServeSettings) -> ASGIApp:
    """Let the web pages of `cors_origins` call `app` with any header of theirs, but without cookies."""
    origins = [origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()]
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],  # OpenAI's browser client alone sends a dozen of its own
        expose_headers=READABLE_HEADERS,
        max_age=PREFLIGHT_AGE_S,
    )


def _shown_keys(authorization: bytes | None, x_api_key: bytes | None) -> Iterator[bytes]:
    """Both headers count: a proxy may use `Authorization` for itself."""
    if authorization is not None and (scheme := BEARER.match(authorization)):
        yield authorization[scheme.end() :].strip()
    if x_api_key is not None:
        yield x_api_key.strip()


def _read_keys(path: Path) -> Digests:
    """Read a file of keys.

    Raises:
        SettingsError: when it cannot be read or holds no key, or a bad one.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"EKIBEN_API_KEYS_FILE ({path}) cannot be read: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise SettingsError(f"EKIBEN_API_KEYS_FILE ({path}) has more than {MAX_FILE_BYTES} bytes: it is not a key file")
    lines = content.decode("utf-8", errors="replace").splitlines()
    return _digest_keys([COMMENT.sub("", line) for line in lines], f"EKIBEN_API_KEYS_FILE ({path})")


def _digest_keys(lines: list[str], source: str) -> Digests:
    """Digest the keys of `lines`, blank ones left out.

    Raises:
        SettingsError: when there is none, or a bad one; the message says where it stands, but not what it is.
    """
    digests: dict[bytes, str] = {}
    for number, key in enumerate((line.strip() for line in lines), start=1):
        if not key:
            continue
        if not re.fullmatch(r"[!-~]+", key):
            raise SettingsError(f"{source}: key {number} holds a blank or a character that is not ASCII; {ADVICE}")
        if len(key) < MIN_KEY_CHARS:
            raise SettingsError(
                f"{source}: key {number} has {len(key)} characters; at least {MIN_KEY_CHARS} are needed: {ADVICE}"
            )
        digest = hashlib.sha256(key.encode()).digest()
        digests[digest] = digest.hex()[:FINGERPRINT_CHARS]
    if not digests:
        raise SettingsError(f"{source} is set but holds no key; put one in ({ADVICE}), or unset it")
    return digests


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when the file does.

    Raises:
        SettingsError: when there is no such file.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise SettingsError(f"EKIBEN_API_KEYS_FILE ({path}) cannot be read: {error.strerror}") from None
    return (status.st_size, status.st_mtime_ns, status.st_ino)
