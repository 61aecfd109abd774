"""Throw-away environments for the servers that Ekiben is compared with: made with uv once, kept below `.bench/envs`."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)
UV = Path(sys.executable).with_name("uv")
STAMP = "packages.txt"
LIST_VERSIONS = (
    "import json; from importlib.metadata import distributions as found;"
    "print(json.dumps({d.metadata['Name'].lower(): d.version for d in found()}))"
)


def make_environment(folder: Path, packages: Sequence[str]) -> Path:
    """Make the environment `folder`/<hash of `packages`>, unless it is there, and return its Python.

    Raises:
        subprocess.CalledProcessError: when uv cannot install the packages; it has said why on stderr.
    """
    wanted = "\n".join(packages)
    environment = folder / hashlib.sha256(wanted.encode()).hexdigest()[:12]
    python = environment / "bin" / "python"
    if (environment / STAMP).is_file():
        return python
    logger.info("installing %s into %s", ", ".join(packages), environment)
    shutil.rmtree(environment, ignore_errors=True)
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, environment], check=True)
    install = [str(UV), "pip", "install", "--quiet", "--python", str(python), *_torch_source(), *packages]
    subprocess.run(install, check=True)
    (environment / STAMP).write_text(wanted, encoding="utf-8")
    return python


def list_versions(python: Path, names: Sequence[str]) -> dict[str, str]:
    """Versions of the packages `names` that the environment of `python` has."""
    found = json.loads(subprocess.run([python, "-c", LIST_VERSIONS], check=True, capture_output=True).stdout)
    return {name: found[name] for name in names if name in found}


def _torch_source() -> list[str]:
    """Say where torch for CPU comes from: pip's folder of local wheels when one is set, else PyTorch's own index."""
    pip = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    links = subprocess.run(pip, capture_output=True, text=True, check=False).stdout.strip()
    return ["--find-links", links] if links else ["--torch-backend", "cpu"]
