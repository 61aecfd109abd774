"""An engine that can build and run images on this machine, and the image that they begin with.

Podman keeps all of it in one folder (EKIBEN_TEST_CACHE, default ~/.cache/ekiben-tests): no image of the developer's own
is seen, replaced or left behind. Where python:3.11-slim cannot be pulled, a stand-in is made of the same Debian's
packages, once: it is not the real one, but everything beside it is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

BASES = ("docker.io/library/python:3.11-slim", "docker.io/library/python:3.11-slim-bookworm")
PULL_TIMEOUT_S = 300
STANDIN_TIMEOUT_S = 1800
MIRROR = "http://deb.debian.org/debian"
PACKAGES = "ca-certificates,python3,python3-venv,python3-pip"
CERTIFICATES = Path("etc/ssl/certs/ca-certificates.crt")
OWN_CERTIFICATES = Path("usr/local/share/ca-certificates")
# Machines that are containers themselves may allow no more than this.
CONFINED = """[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
netns = "host"
[engine]
runtime = "runc"
"""


class NoEngineError(Exception):
    """No image can be run here; says why."""


@dataclass
class Engine:
    """podman or docker, with what it needs in its environment."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *arguments: str, check: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run one command of the engine."""
        done = subprocess.run(
            [self.name, *arguments],
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done

    def inspect(self, name: str) -> dict[str, Any]:
        """What the engine knows of an image or a container."""
        return json.loads(self.run("inspect", name).stdout)[0]  # type: ignore[no-any-return]

    def shell(self, image: str, script: str) -> str:
        """What a shell script prints in a container of the image, run by root."""
        words = ["run", "--rm", "--network=none", "--user=0:0", "--entrypoint=sh", image, "-c", script]
        return self.run(*words).stdout


@dataclass
class Container:
    """A running server."""

    engine: Engine
    name: str
    url: str

    def wait_ready(self, timeout: float = 120) -> float:
        """Wait for /readyz and return the seconds that it took."""
        begun = time.monotonic()
        while True:
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return time.monotonic() - begun
            except httpx.TransportError:
                pass
            state = self.state()
            assert state["Running"], self.logs()
            assert time.monotonic() - begun < timeout, self.logs()
            time.sleep(0.02)

    def state(self) -> dict[str, Any]:
        return self.engine.inspect(self.name)["State"]  # type: ignore[no-any-return]

    def logs(self) -> str:
        done = self.engine.run("logs", self.name, check=False)
        return done.stdout + done.stderr

    def processes(self) -> list[psutil.Process]:
        """The container's processes, as this machine sees them."""
        first = psutil.Process(self.state()["Pid"])
        return [first, *first.children(recursive=True)]

    def remove(self) -> None:
        """End it, and take its volumes away."""
        self.engine.run("rm", "--force", "--volumes", self.name, check=False)


def find_engine(cache: Path) -> Engine:
    """An engine that runs a container of the base image.

    Raises:
        NoEngineError: there is none.
    """
    reasons = []
    for name in ("podman", "docker"):
        if shutil.which(name) is None:
            reasons.append(f"{name} is not installed")
            continue
        for engine in [Engine(name, environment) for environment in _environments(name, cache)]:
            try:
                get_base(engine, cache)
                tried = engine.run("run", "--rm", "--network=host", BASES[0], "true", check=False)
            except (NoEngineError, subprocess.TimeoutExpired) as error:
                reasons.append(f"{name}: {error}")
                break
            if tried.returncode == 0:
                return engine
            reasons.append(f"{name} runs nothing: {' '.join(tried.stderr.split())[-200:]}")
    raise NoEngineError("; ".join(reasons))


def get_base(engine: Engine, cache: Path) -> None:
    """Have the base image under the names that the Dockerfiles use.

    Raises:
        NoEngineError: it can neither be pulled nor made.
    """
    if all(engine.run("image", "inspect", base, check=False).returncode == 0 for base in BASES):
        return
    pulled = [engine.run("pull", "--quiet", base, check=False, timeout=PULL_TIMEOUT_S) for base in BASES]
    if all(each.returncode == 0 for each in pulled):
        return
    reason = " ".join(pulled[0].stderr.split())[-200:]
    if engine.name != "podman":  # its store is not ours
        raise NoEngineError(f"{BASES[0]} cannot be pulled: {reason}")
    if shutil.which("debootstrap") is None or os.geteuid() != 0:
        raise NoEngineError(f"{BASES[0]} cannot be pulled ({reason}), nor made: that takes root and debootstrap")
    archive = make_standin(cache)
    settings = [f"--change=ENV {name}=/{CERTIFICATES}" for name in ("SSL_CERT_FILE", "PIP_CERT")]
    engine.run("import", *settings, "--change", 'CMD ["python3"]', str(archive), BASES[0])
    engine.run("tag", *BASES)


def make_standin(cache: Path) -> Path:
    """A Debian of the base image's release with its Python and this machine's certificates, as a tar file."""
    archive = cache / "standin.tar"
    if archive.is_file():
        return archive
    root, log = cache / "standin", cache / "standin.log"
    if root.exists():  # cut short
        _remove(root)
    with log.open("w") as output:
        made = subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(root), MIRROR],
            stdout=output,
            stderr=output,
            timeout=STANDIN_TIMEOUT_S,
            check=False,
        )
    if made.returncode != 0:
        raise NoEngineError(f"debootstrap failed: {log.read_text()[-200:]}")
    (root / "usr/bin/python").symlink_to("python3")
    for mark in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        mark.unlink()
    for certificate in (Path("/") / OWN_CERTIFICATES).glob("*.crt"):  # of a proxy on the way to the packages
        (root / OWN_CERTIFICATES).mkdir(parents=True, exist_ok=True)
        shutil.copy(certificate, root / OWN_CERTIFICATES)
    if (Path("/") / CERTIFICATES).is_file():
        shutil.copy(Path("/") / CERTIFICATES, root / CERTIFICATES)
    for package in root.glob("var/cache/apt/archives/*.deb"):
        package.unlink()
    partial = archive.with_suffix(".part")
    subprocess.run(["tar", "-C", str(root), "-cf", str(partial), "."], check=True)
    partial.rename(archive)
    _remove(root)
    return archive


def _environments(name: str, cache: Path) -> list[Mapping[str, str]]:
    """What to try the engine with: as it is set up here, then with fewer demands on the machine."""
    if name != "podman":
        return [{}]
    storage = cache / "storage.conf"
    storage.write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{cache / "store"}"\nrunroot = "{cache / "run"}"\n',
        encoding="utf-8",
    )
    confined = cache / "containers.conf"
    confined.write_text(CONFINED, encoding="utf-8")
    own = {"CONTAINERS_STORAGE_CONF": str(storage)}
    return [own, own | {"CONTAINERS_CONF": str(confined)}]


def _remove(root: Path) -> None:
    """Delete what debootstrap made, unless the kernel's own folders are still mounted in it."""
    mounted = [
        mount.mountpoint for mount in psutil.disk_partitions(all=True) if mount.mountpoint.startswith(f"{root}/")
    ]
    if mounted:
        raise NoEngineError(f"{mounted} is mounted: unmount it, then delete {root}")
    subprocess.run(["rm", "-rf", "--one-file-system", str(root)], check=True)
