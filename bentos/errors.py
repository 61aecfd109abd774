"""Every error that the server answers on purpose, each with its code and HTTP status.

ServeError
├── UnauthorizedError     401  no key, or one that is not known
├── ForbiddenError        403  the key may not do this
├── InvalidRequestError   422  the body is JSON but not what the route takes
├── MalformedBodyError    400  the body is not JSON, or not UTF-8
├── UnsupportedMediaError 415  the body is declared as something else than JSON
├── MethodNotAllowedError 405  the route takes another method
├── NotAcceptableError    406  the answer cannot be written in what `Accept` asks for
├── TooLargeError         413  more bytes, texts, characters or tokens than one request or text may have
├── TextTooLongError      422  a text is longer than the model takes, and `on_overflow` is `error`
├── UnknownModelError     404  the version that was asked for is not served here
├── SpaceMismatchError    409  the caller expects vectors of another space
├── BusyError             409  another version is being loaded
├── RefusedVersionError   422  a version failed its checks: it is not served
│   └── NoRoomError            it is too large to stand beside the live one
├── IncompleteLoadError   504  not every worker has the version that was to be loaded
├── OverloadedError       429  the queue is full
├── DeadlineExceededError 504  the request took longer than it was given
└── NotReadyError         503  the model did not load, or its vectors are wrong
LunchboxError             a lunchbox that is incomplete, altered or of an unknown layout
RegistryError             what holds aliases and versions cannot be reached, read, or does not have what is asked for
SettingsError             the settings ask for something that cannot be had
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ServeError(Exception):
    """Base of the errors that become `{"error": {"code", "message", "details"?}}`."""

    code = "internal"
    status = 500

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


class UnauthorizedError(ServeError):
    """The request shows no key, or one that is not known."""

    code = "unauthorized"
    status = 401


class ForbiddenError(ServeError):
    """The request may not do this with the key that it shows, or nobody may."""

    code = "forbidden"
    status = 403


class InvalidRequestError(ServeError):
    """The body is JSON but not what the route takes."""

    code = "invalid_request"
    status = 422


class MalformedBodyError(ServeError):
    """The body is not JSON, or not UTF-8."""

    code = "malformed_body"
    status = 400


class UnsupportedMediaError(ServeError):
    """The body is declared as something else than JSON."""

    code = "unsupported_media_type"
    status = 415


class MethodNotAllowedError(ServeError):
    """The route takes another method."""

    code = "method_not_allowed"
    status = 405


class NotAcceptableError(ServeError):
    """The answer cannot be written in any media type that the caller accepts."""

    code = "not_acceptable"
    status = 406


class TooLargeError(ServeError):
    """More bytes, texts, characters or tokens than one request or text may have."""

    code = "too_large"
    status = 413


class TextTooLongError(ServeError):
    """A text is longer than the model takes, and the request asked for an error instead of truncation."""

    code = "text_too_long"
    status = 422


class UnknownModelError(ServeError):
    """The version that was asked for is not served here."""

    code = "unknown_model"
    status = 404


class SpaceMismatchError(ServeError):
    """The caller expects vectors of another space than those made here."""

    code = "space_mismatch"
    status = 409


class BusyError(ServeError):
    """Another version is being loaded: one at a time."""

    code = "busy"
    status = 409


class RefusedVersionError(ServeError):
    """A version failed its checks in some worker, so that none serves it; the one before goes on."""

    code = "version_refused"
    status = 422

    def __init__(self, tag: str, reason: str, workers: Mapping[str, object] | None = None, cure: str = "") -> None:
        """Say which version, why, which workers have found it (`details.workers`), and what would change it."""
        workers = workers or {"done": [], "failed": {}, "missing": []}
        cure = cure or "What was served before goes on"
        super().__init__(f"{tag} was refused: {reason}. {cure}", model=tag, reason=reason, workers=workers)
        self.reason = reason


class NoRoomError(RefusedVersionError):
    """A version is too large to stand beside the live one; it may still become the live one."""


class IncompleteLoadError(ServeError):
    """Not every worker had the version in time; `details.workers` names those that have it, failed, or are missing."""

    code = "load_incomplete"
    status = 504


class OverloadedError(ServeError):
    """The queue is full: try again after a moment."""

    code = "overloaded"
    status = 429


class DeadlineExceededError(ServeError):
    """The time that the request was given passed before its vectors were there."""

    code = "timeout"
    status = 504


class NotReadyError(ServeError):
    """The model did not load, or its vectors are wrong."""

    code = "not_ready"
    status = 503


class LunchboxError(Exception):
    """A lunchbox that is incomplete, altered or of an unknown layout."""


class RegistryError(Exception):
    """What holds aliases and versions cannot be reached or read, or does not have what is asked for."""


class SettingsError(Exception):
    """The settings ask for something that cannot be had: the server must not start."""
