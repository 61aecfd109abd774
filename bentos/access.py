"""Who may ask, and who may change what is served: keys, the routes that stay open, the web pages that may call.

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

from pydantic import SecretStr
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from bentos.errors import ForbiddenError, SettingsError, UnauthorizedError
from bentos.settings import ServeSettings

MIN_KEY_CHARS = 16
MAX_FILE_BYTES = 1_048_576
FINGERPRINT_CHARS = 8
CHECK_EVERY_S = 1.0  # how often the file's status is looked at
ADVICE = "`openssl rand -hex 24` makes a good one"
METRICS_PATH, INFO_PATH = "/metrics", "/models/info"
OPEN_PATHS = frozenset({"/", "/docs.json", "/health", "/healthz", "/livez", "/readyz", "/schema.json", "/ui"})
OPEN_FOLDERS = ("/static_content/", "/ui/")  # of the OpenAPI page and the playground
READABLE_HEADERS = (
    "Retry-After",
    "WWW-Authenticate",
    "X-Ekiben-Adapted-From",
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


class KeyRing:
    """The keys of one kind, from a variable, a file or both. Not for several threads: it belongs to the event loop."""

    def __init__(self, name: str, listed: SecretStr | None, path: Path | None) -> None:
        """Read the keys.

        Args:
            name: the variable that lists them; with `_FILE` behind it the one that names the file.
            listed: the keys themselves, separated by commas or line ends.
            path: the file.

        Raises:
            SettingsError: when the file cannot be read, or a source that is set holds no key, or a bad one.
        """
        self._source, self._path = f"{name}_FILE", path
        self._fixed: Digests = {}
        if listed is not None:
            self._fixed = _digest_keys(re.split(r"[,\n]", listed.get_secret_value()), name)
        self._stamp = None if path is None else _stamp(path, self._source)
        self._digests: Digests = self._fixed if path is None else {**self._fixed, **_read_keys(path, self._source)}
        self._looked_at = time.monotonic()
        self._problem: str | None = None

    def __bool__(self) -> bool:
        """Whether there is any key."""
        return bool(self._digests)

    def find(self, authorization: bytes | None, x_api_key: bytes | None) -> str | None:
        """The fingerprint of the key of this ring that a request shows in its headers, or None."""
        if self._path is not None and time.monotonic() - self._looked_at >= CHECK_EVERY_S:
            self._reload(self._path)
        found = None
        for shown in _shown_keys(authorization, x_api_key):
            digest = hashlib.sha256(shown).digest()
            for known, fingerprint in self._digests.items():  # all of them: the time says nothing about the keys
                if hmac.compare_digest(digest, known):
                    found = fingerprint
        return found

    def _reload(self, path: Path) -> None:
        """Read the file again when it has changed; while it is bad, the keys read before stay valid."""
        self._looked_at = time.monotonic()
        try:
            stamp = _stamp(path, self._source)
            if stamp == self._stamp:
                self._problem = None
                return
            self._digests = {**self._fixed, **_read_keys(path, self._source)}
        except SettingsError as error:
            if str(error) != self._problem:
                self._problem = str(error)
                logger.error("the keys stay as they were: %s", error)
            return
        self._stamp, self._problem = stamp, None
        logger.info("read %d keys of %s", len(self._digests), self._source)


class ApiKeys:
    """Which request may pass: the keys of callers, and those of who may change what is served."""

    def __init__(self, settings: ServeSettings) -> None:
        """Read both kinds of keys.

        Raises:
            SettingsError: when a file cannot be read, or a source that is set holds no key, or a bad one.
        """
        self._protect_metrics = settings.protect_metrics
        self._callers = KeyRing("EKIBEN_API_KEYS", settings.api_keys, settings.api_keys_file)
        self._admins = KeyRing("EKIBEN_ADMIN_KEYS", settings.admin_keys, settings.admin_keys_file)

    def is_open(self, path: str) -> bool:
        """Whether `path` answers without a key: health, documentation, playground, and metrics unless protected.

        What only admins may do is never open: `check_admin` is asked there.
        """
        if not self._callers or path in OPEN_PATHS or path.startswith(OPEN_FOLDERS):
            return True
        return path == METRICS_PATH and not self._protect_metrics

    def check(self, authorization: bytes | None, x_api_key: bytes | None, path: str = "") -> str | None:
        """Return the fingerprint of the key that a request shows in its headers; None when no keys are asked for.

        An admin's key opens /models/info too, where it can be seen what became of a load.

        Raises:
            UnauthorizedError: when it shows none, or one that is not known.
        """
        if not self._callers:
            return None
        found = self._callers.find(authorization, x_api_key)
        if found is None and path == INFO_PATH:
            found = self._admins.find(authorization, x_api_key)
        if found is None:
            raise _refuse(authorization, x_api_key, "API key")
        return found

    def check_admin(self, authorization: bytes | None, x_api_key: bytes | None) -> str:
        """Return the fingerprint of the admin key that a request shows in its headers.

        Raises:
            ForbiddenError: when the server has no admin keys, or the key shown is a caller's.
            UnauthorizedError: when the request shows no key, or one that is not known.
        """
        if not self._admins:
            raise ForbiddenError(
                "nobody may load models here: the server has no admin keys. Set EKIBEN_ADMIN_KEYS_FILE (or "
                f"EKIBEN_ADMIN_KEYS) and start it again; {ADVICE}"
            )
        if (found := self._admins.find(authorization, x_api_key)) is not None:
            return found
        if self._callers and self._callers.find(authorization, x_api_key) is not None:
            raise ForbiddenError(
                "the key shown is an API key, which may embed but not load models; send one of EKIBEN_ADMIN_KEYS or "
                "EKIBEN_ADMIN_KEYS_FILE"
            )
        raise _refuse(authorization, x_api_key, "admin key")


def _refuse(authorization: bytes | None, x_api_key: bytes | None, kind: str) -> UnauthorizedError:
    problem = f"no {kind}" if authorization is None and x_api_key is None else f"no {kind} that is known here"
    return UnauthorizedError(
        f"the request shows {problem}; send one as `Authorization: Bearer KEY` or as `X-API-Key: KEY`"
    )


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


def _read_keys(path: Path, source: str) -> Digests:
    """Read the file of keys that the variable `source` names.

    Raises:
        SettingsError: when it cannot be read or holds no key, or a bad one.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{source} ({path}) cannot be read: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise SettingsError(f"{source} ({path}) has more than {MAX_FILE_BYTES} bytes: it is not a key file")
    lines = content.decode("utf-8", errors="replace").splitlines()
    return _digest_keys([COMMENT.sub("", line) for line in lines], f"{source} ({path})")


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


def _stamp(path: Path, source: str) -> tuple[int, ...]:
    """What changes when the file does.

    Raises:
        SettingsError: when there is no such file.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise SettingsError(f"{source} ({path}) cannot be read: {error.strerror}") from None
    return (status.st_size, status.st_mtime_ns, status.st_ino)
