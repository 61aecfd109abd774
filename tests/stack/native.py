"""The services of docker-compose.yml as processes of this machine: same commands, same variables, no containers.

Every service has an address of its own in 127.0.0.0/8, so that all keep the ports that the file gives them; its name in
an address becomes that number. Paths of a container become folders below one root. What an image would bring comes from
packages: PostgreSQL and Prometheus of the system, `weed`, `mlflow`, `prefect` and `bentoml` of the virtual environment.
A process gets the variables of its service and nothing else of this one's environment.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pathspec
import yaml

from tests.processes import family_of, kill
from tests.stack.compose import Service

POSTGRES_FOLDERS = [Path("/usr/lib/postgresql") / str(version) / "bin" for version in range(18, 13, -1)]
HEALTH_TIMEOUT_S = 20.0
START_TIMEOUT_S = 240.0
CA_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")


def find_missing() -> list[str]:
    """Programs that the stack needs and that are not here."""
    search = _search_path()
    return [
        name
        for name in ("weed", "postgres", "initdb", "psql", "prometheus", "curl", "wget", "git")
        if shutil.which(name, path=search) is None
    ]


@dataclass
class Native:
    """A service as processes."""

    service: Service
    argv: list[str]
    environment: dict[str, str]
    health: list[str]
    cwd: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start it; `wait_healthy` says when it works."""
        assert not self.is_running, f"{self.service.name} runs already"
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.argv, cwd=self.cwd, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )

    def run(self) -> None:
        """Run a one-shot service to its end."""
        self.start()
        assert self.process is not None
        code = self.process.wait(timeout=START_TIMEOUT_S)
        assert code == 0, f"{self.service.name} ended with {code}:\n{self.tail()}"

    def is_healthy(self) -> bool:
        """What the health check of the compose file says."""
        try:
            done = subprocess.run(
                self.health,
                cwd=self.cwd,
                env=self.environment,
                capture_output=True,
                timeout=HEALTH_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def wait_healthy(self) -> float:
        """Wait for the health check; returns the seconds that it took."""
        begun = time.monotonic()
        while not self.is_healthy():
            assert self.is_running, f"{self.service.name} ended:\n{self.tail()}"
            assert time.monotonic() < begun + START_TIMEOUT_S, f"{self.service.name} is not healthy:\n{self.tail()}"
            time.sleep(0.5)
        return time.monotonic() - begun

    def stop(self) -> float:
        """End it as `docker stop` does: SIGTERM to the process, then SIGKILL to what is left; returns the seconds."""
        return self._end(signal.SIGTERM, grace_s=30)

    def kill(self) -> None:
        """End it as a power cut does: SIGKILL to the process and all its children at once."""
        self._end(signal.SIGKILL, grace_s=0)

    def _end(self, how: signal.Signals, *, grace_s: float) -> float:
        if self.process is None:
            return 0.0
        begun = time.monotonic()
        family = family_of(self.process.pid)
        if how is signal.SIGKILL:
            kill(family)
        elif self.is_running:
            self.process.send_signal(how)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=grace_s)
            kill(family)
        self.process.wait(timeout=30)
        self.process = None
        return time.monotonic() - begun

    def tail(self, characters: int = 4000) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-characters:] if self.log.exists() else ""


@dataclass
class NativeStack:
    """All services of a compose file below one folder."""

    services: Mapping[str, Service]
    root: Path  # that the user postgres may enter
    project: Path  # the checkout in which ./ of the file is found
    app: Path  # what the image of the line has at /app
    bento_tag: str
    bento_home: Path
    number: int = 0  # of stacks that run side by side
    natives: dict[str, Native] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pid = os.getpid()
        net = f"127.{64 + pid % 64}.{(pid // 64 + self.number) % 250 + 1}"
        self.addresses = {name: f"{net}.{number}" for number, name in enumerate(self.services, start=10)}
        for name in self.services:
            if name in COMMANDS:
                self.natives[name] = self._make(name)

    def __getitem__(self, name: str) -> Native:
        return self.natives[name]

    def url(self, name: str, port: int) -> str:
        """The address of a service as this machine reaches it."""
        return f"http://{self.addresses[name]}:{port}"

    def localize(self, text: str, name: str) -> str:
        """What a text of the service `name` means on this machine."""
        text = self.name_addresses(text, name)
        folders = {**self.services[name].volumes, "/tmp": f"{name}-tmp"}
        targets = "|".join(map(re.escape, sorted(folders, key=len, reverse=True)))
        return re.sub(rf"(?<![\w/.-])({targets})(?![\w-])", lambda match: str(self._folder(folders[match[1]])), text)

    def name_addresses(self, text: str, name: str) -> str:
        """The text with an address of this machine for every service that it names, and for `name` itself."""
        for other, address in self.addresses.items():
            text = re.sub(rf"(?<![\w.-]){re.escape(other)}:(?=\*|\d{{2,5}}(?!\w))", f"{address}:", text)
        text = text.replace("-ip=s3", f"-ip={self.addresses['s3']}")
        for itself in ("0.0.0.0", "127.0.0.1", "localhost"):
            text = text.replace(itself, self.addresses[name])
        return text

    def start(self, *names: str) -> dict[str, float]:
        """Start services one after the other, each when it is healthy; returns the seconds of each."""
        took = {}
        for name in names:
            self[name].start()
            took[name] = self[name].wait_healthy()
        return took

    def stop(self) -> None:
        """End all that runs, the last one first."""
        for native in reversed(list(self.natives.values())):
            native.stop()

    def _folder(self, source: str) -> Path:
        folder = self.project / source if source.startswith(".") else self.root / "volumes" / source
        if not source.startswith("."):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _make(self, name: str) -> Native:
        service = self.services[name]
        command = [self.localize(part, name) for part in service.command]
        home = self.root / "homes" / name
        home.mkdir(parents=True, exist_ok=True)
        environment = {key: self.localize(value, name) for key, value in service.environment.items()}
        machine = {key: os.environ[key] for key in CA_VARIABLES if key in os.environ}
        machine |= {"PATH": _search_path(), "HOME": str(home), "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"}
        machine["TMPDIR"] = str(self._folder(f"{name}-tmp"))
        if service.image.startswith("ekiben-line"):
            machine["PYTHONPATH"] = str(self.app)  # the image has the project installed from there
        if name == "encoder":
            machine["BENTOML_HOME"] = str(self.bento_home)
        health = [self.localize(part, name) for part in service.health]
        argv = COMMANDS[name](self, command)
        log = self.root / f"{name}.log"
        return Native(service, argv, machine | environment, health, self.app, log)


# --- what an image's entrypoint makes of the command


def _postgres(stack: NativeStack, command: list[str]) -> list[str]:
    data = stack._folder(stack.services["postgres"].volumes["/var/lib/postgresql"]) / "data"
    listen = ["-c", f"listen_addresses={stack.addresses['postgres']}", "-c", "unix_socket_directories="]
    return _as_postgres([*command, "-D", str(data), *listen])


def _prometheus(stack: NativeStack, command: list[str]) -> list[str]:
    """The image reads its files from a mount: here they are copied, with the addresses of this machine."""
    source = stack.services["prometheus"].volumes["/etc/prometheus"]
    copy = stack.root / "prometheus"
    shutil.copytree(stack._folder(source), copy, dirs_exist_ok=True)
    configuration = yaml.safe_load((copy / "prometheus.yml").read_text())
    for job in configuration["scrape_configs"]:
        for look_up in job.pop("dns_sd_configs", []):  # the names of services stand in no DNS here
            targets = [f"{name}:{look_up['port']}" for name in look_up["names"]]
            job.setdefault("static_configs", []).append({"targets": targets})
    text = stack.localize(yaml.safe_dump(configuration), "prometheus")
    (copy / "prometheus.yml").write_text(text.replace("/etc/prometheus", str(copy)))
    return ["prometheus", *(part.replace(str(stack._folder(source)), str(copy)) for part in command)]


COMMANDS = {
    "postgres": _postgres,
    "s3": lambda _, command: ["weed", *command],
    "mlflow": lambda stack, command: [
        sys.executable,
        str(stack.app / "deployments" / "images" / "mlflow-entrypoint.py"),
        *command,
    ],
    "prefect": lambda _, command: command,
    "setup": lambda _, command: command,
    "worker": lambda _, command: command,
    "line-exporter": lambda _, command: command,
    "encoder": lambda stack, command: ["bentoml", command[0], stack.bento_tag, *command[1:]],
    "prometheus": _prometheus,
}


def copy_image_files(checkout: Path, to: Path) -> Path:
    """Copy what `COPY . /app` of the line's image brings: what .dockerignore lets through, and no repository."""
    ignored = pathspec.PathSpec.from_lines("gitwildmatch", (checkout / ".dockerignore").read_text().splitlines())
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=checkout, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if not ignored.match_file(name):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(checkout / name, to / name)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True
    ).stdout
    (to / "REVISION").write_text(commit)
    return to


def make_database(stack: NativeStack) -> None:
    """Do what PostgreSQL's image does with an empty volume: initdb, then the scripts of the mounted folder."""
    service = stack.services["postgres"]
    data = stack._folder(service.volumes["/var/lib/postgresql"]) / "data"
    environment = stack["postgres"].environment
    password = stack.root / "postgres-password"
    password.write_text(environment["POSTGRES_PASSWORD"])
    password.chmod(0o644)
    data.parent.chmod(0o777)
    subprocess.run(
        _as_postgres(
            ["initdb", "-D", str(data), "-U", "postgres", "-A", "scram-sha-256", f"--pwfile={password}", "--no-sync"]
        ),
        env=environment,
        cwd="/",
        check=True,
        capture_output=True,
    )
    password.unlink()
    stack["postgres"].cwd = Path("/")
    stack["postgres"].start()
    client = {"PGHOST": stack.addresses["postgres"], "PGPASSWORD": environment["POSTGRES_PASSWORD"]}
    deadline = time.monotonic() + 60
    while subprocess.run(
        ["psql", "-U", "postgres", "-c", ""], env=environment | client, capture_output=True
    ).returncode:
        assert stack["postgres"].is_running, stack["postgres"].tail()
        assert time.monotonic() < deadline, stack["postgres"].tail()
        time.sleep(0.2)
    for script in sorted(stack._folder(service.volumes["/docker-entrypoint-initdb.d"]).glob("*.sh")):
        subprocess.run([str(script)], env=environment | client, check=True)


@contextmanager
def ended(stack: NativeStack) -> Iterator[NativeStack]:
    """The stack, of which nothing runs any more when the block ends."""
    try:
        yield stack
    finally:
        stack.stop()


def _as_postgres(argv: list[str]) -> list[str]:
    """PostgreSQL refuses to run as root: there it gets the system's user `postgres`."""
    program = shutil.which(argv[0], path=_search_path()) or argv[0]
    if os.geteuid():
        return [program, *argv[1:]]
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", program, *argv[1:]]


def _search_path() -> str:
    folders = [Path(sys.executable).parent, *(folder for folder in POSTGRES_FOLDERS if folder.is_dir())]
    return os.pathsep.join([*map(str, folders), os.environ.get("PATH", os.defpath)])
