"""Which version each alias names, in a file beside the BentoML store: how servers on this machine learn of a release.

A release writes here what it has written into the registry before; a server that follows the local store reads it.

```
<BENTOML_HOME>/ekiben/<model name>.aliases.json
{"layout": 1, "aliases": {"champion": {"version": "3", "bento_version": "3-1f2e3d4c", "run_id": ..., "space_id": ...}}}
```
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bentos.errors import RegistryError

try:
    import fcntl
except ImportError:  # Windows: two writers at once are not kept apart there
    fcntl = None  # type: ignore[assignment]

FOLDER = "ekiben"  # in BentoML's home
LAYOUT = 1
ANEW = "release or roll back again to write it anew"


class Pointer(BaseModel):
    """The version that an alias names."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    version: str = Field(min_length=1, description="Registry version, `1`, `2`, ...")
    bento_version: str = Field(min_length=1, description="With the run's beginning, e.g. `3-1f2e3d4c`.")
    run_id: str = Field(min_length=1, description="MLflow run that trained it.")
    space_id: str = Field(min_length=1, description="Space of its vectors.")


def alias_path(home: Path, model_name: str) -> Path:
    """The file that holds the aliases of a model, in BentoML's home folder `home`."""
    return home / FOLDER / f"{model_name}.aliases.json"


def read_aliases(home: Path, model_name: str) -> dict[str, Pointer]:
    """Every alias of a model and the version that it names; empty while nothing was released here.

    Raises:
        RegistryError: when the file cannot be read, is not JSON, or is of an unknown layout.
    """
    path = alias_path(home, model_name)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RegistryError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise RegistryError(f"{path} is not JSON: {error}; {ANEW}") from None
    layout = raw.get("layout") if isinstance(raw, dict) else None
    if layout != LAYOUT or not isinstance(raw.get("aliases"), dict):
        raise RegistryError(
            f"{path} has layout {layout!r}; this version reads {LAYOUT}: update whichever is older, or {ANEW}"
        )
    try:
        return {alias: Pointer.model_validate(fields) for alias, fields in raw["aliases"].items()}
    except ValidationError as error:
        first = error.errors()[0]
        raise RegistryError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; {ANEW}") from None


def write_alias(home: Path, model_name: str, alias: str, pointer: Pointer | None) -> None:
    """Let `alias` name a version, or nothing (None); the other aliases stay. The file is replaced at once, whole.

    A file that cannot be understood is written anew, with this alias alone: it helps nobody, the registry knows all.

    Raises:
        OSError: when it cannot be written.
    """
    path = alias_path(home, model_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):
        try:
            aliases = read_aliases(home, model_name)
            if aliases.get(alias) == pointer:
                return
        except RegistryError:
            aliases = {}
        aliases.pop(alias, None)
        if pointer is not None:
            aliases[alias] = pointer
        content = {"layout": LAYOUT, "aliases": {name: aliases[name].model_dump() for name in sorted(aliases)}}
        replace_file(path, json.dumps(content, indent=2) + "\n")


def replace_file(path: Path, content: str, *, lasting: bool = True) -> None:
    """Put a file with new content in place of the old one, so that whoever reads finds either the one or the other.

    `lasting`: also when the machine loses its power; that takes a moment.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            os.chmod(temporary, 0o644)  # a server may run as another user
            file.write(content)
            file.flush()
            if lasting:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock `path`; the kernel lets go of it when the process ends, however it ends."""
    with path.open("ab") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def try_lock(path: Path) -> IO[bytes] | None:
    """Take the lock `path`, which is held until the file returned is closed; None when somebody else holds it."""
    file = path.open("ab")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file
