"""Every error that Ekiben raises on purpose.

EkibenError                  one line for the user: found, allowed, cure
├── InputError               exit code 2: something the user gave cannot be used
│   ├── DataError            the data files: missing, unreadable, malformed, leaking, too small
│   ├── ParamsError          parameters or settings
│   │   └── DivergedError    a fit whose loss is no number any more
│   ├── ModelNotFoundError   a base model that cannot be had on this machine
│   ├── UnsupportedModelError  a model with parts that a lunchbox cannot hold; a release refuses it, exit code 3
│   └── NothingReleasedError a version that does not exist (yet)
├── SmokeTestError           exit code 1: the built Bento did not answer as it must; a release refuses it, exit code 3
├── ReleaseRefusedError      exit code 3: a gate said no; nothing was changed
│   └── CertificationError   the exported model does not equal the trained one
└── ReleaseRaceError         exit code 4: another release is at work, or was quicker; nothing was changed

`one_line` and `hide_password` are for quoting the errors of others in ours.
"""

from __future__ import annotations

import re

MAX_MESSAGE_LENGTH = 400  # characters of a foreign message that are passed on


class EkibenError(Exception):
    """Base of all errors that are meant to be read by the user, as one line."""

    exit_code = 1


class InputError(EkibenError):
    """Something that the user gave cannot be used."""

    exit_code = 2


class DataError(InputError):
    """Data files that are missing, unreadable, malformed, leaking between splits or too small."""


class ParamsError(InputError):
    """Parameters or settings out of their allowed range, or unknown."""


class DivergedError(ParamsError):
    """A fit whose loss or gradient is no finite number any more: a study goes on without it, a single fit ends."""


class ModelNotFoundError(InputError):
    """A base model that is neither a folder, nor packaged, nor to be had from the hub."""


class UnsupportedModelError(InputError):
    """A model with parts that the export cannot reproduce, or too large for one file."""


class NothingReleasedError(InputError):
    """There is no such version, or none was released yet."""


class SmokeTestError(EkibenError):
    """The built Bento did not start, or answered something else than it must."""


class ReleaseRefusedError(EkibenError):
    """A gate refused the candidate. Nothing was changed."""

    exit_code = 3


class CertificationError(ReleaseRefusedError):
    """The exported model's vectors differ from those of sentence-transformers, or depend on their batch mates."""


class ReleaseRaceError(EkibenError):
    """Another release or rollback is at work, or was quicker: the champion is not the one that this one looked at."""

    exit_code = 4


def one_line(error: BaseException) -> str:
    """The message of a foreign error on one line, without passwords, cut to a readable length."""
    text = hide_password(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= MAX_MESSAGE_LENGTH else f"{text[:MAX_MESSAGE_LENGTH]}..."


def hide_password(text: str) -> str:
    """Replace `user:password@` in every address in `text` by `***@`, and the value of `?password=` by `***`."""
    text = re.sub(r"://[^/\s]*@", "://***@", text)
    return re.sub(r"([?&](?:password|passwd|pwd|token)=)[^&\s'\"]*", r"\1***", text, flags=re.IGNORECASE)
