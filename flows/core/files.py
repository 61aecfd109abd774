"""From an address to bytes: local paths, any fsspec address, or a local path at a DVC revision.

Core layer, knows nothing about Prefect. What the user can cure becomes a `DataError` of one line; trouble that may pass
(timeouts, resets, 5xx) stays an `OSError`, so that the caller can try again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from flows.core.revisions import NotTrackedError, committed_at, read_at_revision
from flows.errors import DataError, one_line

LOCAL_PROTOCOLS = (None, "file", "local")
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
PASSING_STATUS = (408, 425, 429)


class MissingFileError(DataError):
    """There is no file at the address."""


def local_path(address: str, *, root: Path) -> Path | None:
    """The path that a local address stands for (relative ones start at `root`), or None for any other address."""
    from fsspec.core import split_protocol

    protocol, path = split_protocol(address)
    if protocol not in LOCAL_PROTOCOLS:
        return None
    try:
        return root / Path(path).expanduser()
    except RuntimeError:  # `~somebody` who is no user here: then it is a name like any other
        return root / Path(path)


def read_bytes(address: str, *, root: Path, revision: str | None = None) -> bytes:
    """Read one file.

    Args:
        address: a local path or any address that fsspec knows.
        root: where relative local paths start.
        revision: a git revision of the DVC repository around a local path; None reads what is there now.

    Raises:
        MissingFileError: there is no such file (at that revision).
        DataError: a folder, an unknown kind of address, a missing package, no permission.
        OSError: trouble on the network that may pass.
    """
    path = local_path(address, root=root)
    if revision is not None:
        if path is None:
            raise DataError(
                f"{address} is not a local path, so there is no revision {revision!r} of it: give a file in a "
                "DVC repository, or leave out --data-rev"
            )
        try:
            return read_at_revision(path, revision, root=root)
        except NotTrackedError as error:
            raise MissingFileError(str(error)) from None
        except (DataError, OSError):
            raise
        except Exception as error:  # from the filesystem of a DVC remote
            raise _translate(address, error) from error
    return _read_remote(address) if path is None else _read_local(path)


def modified_at(address: str, *, root: Path, revision: str | None = None) -> datetime | None:
    """When a file that was just read was last written, in UTC; None when nobody says. Never fails.

    A local file has the time of its last change on this machine, which a fresh clone or `dvc pull` sets anew. At a
    revision it is the time of the commit that last changed it, up to that revision. Of other addresses it is what the
    filesystem says, over HTTP the header `Last-Modified`.
    """
    path = local_path(address, root=root)
    try:
        if path is None:
            return _ask_remote(address)
        if revision is not None:
            return committed_at(path, revision, root=root)
        return datetime.fromtimestamp(path.stat().st_mtime, tz=UTC)
    except Exception:  # filesystems raise what they like, and no run fails for want of a date
        return None


def _ask_remote(address: str) -> datetime | None:
    from fsspec.core import url_to_fs

    filesystem, path = url_to_fs(address)
    try:
        said = filesystem.modified(path)
    except NotImplementedError:
        said = parsedate_to_datetime(filesystem.info(path)["Last-Modified"])
    if isinstance(said, int | float):
        return datetime.fromtimestamp(said, tz=UTC)
    return None if not isinstance(said, datetime) else said.replace(tzinfo=said.tzinfo or UTC).astimezone(UTC)


def _read_local(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(f"there is no file {path}: {_cure_missing(path)}") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; give one file in it") from None
    except PermissionError:
        raise DataError(f"{path} must not be read by this user: change its permissions") from None
    except (OSError, ValueError) as error:  # too long a name, a null byte in it, a broken disk: nothing that passes
        raise DataError(f"{str(path)!r} cannot be read: {error}") from None


def _cure_missing(path: Path) -> str:
    for parent in path.parents:
        pointer = parent / f"{path.relative_to(parent).parts[0]}.dvc"
        if pointer.is_file():
            return f"it is tracked by {pointer}, `dvc pull` fetches it"
    return "check the path, or `dvc pull` it when DVC tracks it"


def _read_remote(address: str) -> bytes:
    from fsspec.core import url_to_fs

    try:
        filesystem, path = url_to_fs(address)
        content = filesystem.cat_file(path)
    except FileNotFoundError:
        raise MissingFileError(f"there is no file {address}: check the address") from None
    except IsADirectoryError:
        raise DataError(f"{address} is a folder; give one file in it") from None
    except PermissionError as error:
        raise DataError(f"{address} must not be read with these credentials ({one_line(error)}): check them") from None
    except ImportError as error:
        protocol = address.split("://", 1)[0]
        package = PACKAGES.get(protocol, f"the fsspec package for {protocol}://")
        raise DataError(
            f"{address} needs a package that is not installed ({one_line(error)}): pip install {package}"
        ) from None
    except Exception as error:  # every filesystem brings its own errors; here they become ours or an OSError
        raise _translate(address, error) from error
    return bytes(content)


def _translate(address: str, error: Exception) -> Exception:
    name = type(error).__name__
    if "Protocol not known" in str(error):
        return DataError(
            f"{address} is no known kind of address: use a path, s3://, hf://, https:// or another of fsspec's"
        )
    if "Credential" in name:
        return DataError(
            f"{address} needs credentials ({one_line(error)}): set AWS_PROFILE or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true for a public bucket"
        )
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int) and 400 <= status < 500 and status not in PASSING_STATUS:
        return DataError(f"{address} was refused with HTTP status {status}: check the address and who may read it")
    if isinstance(error, ValueError) or name == "ParamValidationError":  # botocore's, of a bucket's name
        return DataError(f"{address} is not an address that can be read: {one_line(error)}")
    return OSError(f"{address} could not be read: {name}: {one_line(error)}")


def md5_of(content: bytes) -> str:
    """MD5 of a file's content in hex, equal to the `md5` that DVC writes for the file."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def md5_of_files(md5s: Mapping[str, str]) -> str:
    """One MD5 for all files: that of the file when it is one, else of the sorted list of [role, md5] as JSON.

    Args:
        md5s: role of the file (`pairs`, `test`, `retrieval/corpus.jsonl`, ...) -> its MD5. Roles instead of paths, so
            that the same data has the same MD5 on every machine.
    """
    if len(md5s) == 1:
        return next(iter(md5s.values()))
    return md5_of(json.dumps(sorted(md5s.items())).encode())
