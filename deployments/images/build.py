"""Build the images with whichever of docker, podman and nerdctl is there: `python deployments/images/build.py --help`.

- `encoder`: the server, from a Bento of BentoML's store -> ekiben-encoder:<version of the Bento>
- `line`: Prefect server, worker, set-up, exporter, `ekiben` command -> ekiben-line:<version of the project>
- `mlflow`: MLflow with users, PostgreSQL and S3 -> ekiben-mlflow:<version of the project>

Each is also tagged `latest`. Options after `--` go to the engine's own `build`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LOCK = ROOT / "deployments" / "requirements.lock"
sys.path.insert(0, str(ROOT))  # a checkout works also where the project is not installed

ENGINES = ("docker", "podman", "nerdctl")
PROBE_TIMEOUT_S = 30.0
ENCODER_FILES = ("encoder.Dockerfile", "encoder-entrypoint.sh", "encoder-health.py")
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Recipe:
    """One image to build."""

    name: str  # e.g. `ekiben-encoder`
    version: str
    dockerfile: Path
    context: Path
    arguments: dict[str, str] = field(default_factory=dict)  # `--build-arg`


def main() -> None:
    """Build what the command line names."""
    arguments, options = read_command_line(sys.argv[1:])
    engine = find_engine(arguments.engine)
    revision = ask_git("rev-parse", "HEAD") or UNKNOWN
    for image in arguments.images or ["encoder"]:
        with RECIPES[image](arguments.bento, revision) as recipe:
            command = build_command(engine, recipe, options)
            tell(f"[image] {engine}: {recipe.name}:{recipe.version}")
            done = subprocess.run(command, check=False)
        if done.returncode != 0:
            fail(f"{engine} build of {recipe.name} ended with exit code {done.returncode}", done.returncode)
        tell(f"[image] {recipe.name}:{recipe.version}, also tagged latest")


def read_command_line(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the engine's own options after `--`."""
    own, options = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(
        prog="build.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help=f"{', '.join(RECIPES)}; default: encoder")
    parser.add_argument("--bento", metavar="TAG", help="Bento of the encoder, NAME:VERSION; default: the newest one")
    parser.add_argument("--engine", choices=ENGINES, help="default: the first of them that works")
    arguments = parser.parse_args(own)
    for image in arguments.images:
        if image not in RECIPES:
            parser.error(f"there is no image {image!r}: choose from {', '.join(RECIPES)}")
    return arguments, options


def find_engine(asked: str | None) -> str:
    """The name of an engine that is installed and answers."""
    said = []
    for engine in [asked] if asked else ENGINES:
        if shutil.which(engine) is None:
            said.append(f"{engine} is not installed")
            continue
        try:  # a client without its daemon is no engine
            probe = subprocess.run(
                [engine, "info"], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False
            )
            if probe.returncode == 0:
                return engine
            said.append(f"{engine} does not work: {(probe.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
        except subprocess.TimeoutExpired:
            said.append(f"{engine} does not answer")
    fail(
        "no container engine was found: "
        + "; ".join(said)
        + ". Install one of them (Debian, Ubuntu: `apt-get install podman`) or start Docker's service. "
        "The server also runs without: `bentoml serve ekiben:latest`"
    )


def build_command(engine: str, recipe: Recipe, options: list[str]) -> list[str]:
    """The engine's command line."""
    command = [engine, "build", "--file", str(recipe.dockerfile)]
    if engine == "podman":
        command += ["--format", "docker"]  # the other format has no HEALTHCHECK
    for tag in (recipe.version, "latest"):
        command += ["--tag", f"{recipe.name}:{tag}"]
    for name, value in recipe.arguments.items():
        command += ["--build-arg", f"{name}={value}"]
    return [*command, *options, str(recipe.context)]


@contextmanager
def encoder_recipe(tag: str | None, revision: str) -> Iterator[Recipe]:
    """Export the Bento with its model into a folder that is gone afterwards. The commit is the Bento's own."""
    with tempfile.TemporaryDirectory(prefix="ekiben-image-") as scratch:
        context = Path(scratch)
        info = export_bento(tag, context / "bento")
        pinned = (context / "bento" / "env" / "python" / "requirements.txt").read_text(encoding="utf-8")
        (context / "constraints.txt").write_text(constrain(LOCK.read_text(encoding="utf-8"), pinned), encoding="utf-8")
        for name in ENCODER_FILES:
            shutil.copy2(HERE / name, context)
        let_everybody_read(context)
        labels = info.get("labels") or {}
        yield Recipe(
            name="ekiben-encoder",
            version=info["version"],
            dockerfile=context / "encoder.Dockerfile",
            context=context,
            arguments={
                "TITLE": f"{info['name']}:{info['version']}",
                "VERSION": info["version"],
                "REVISION": labels.get("git_commit", UNKNOWN),
                "SPACE": labels.get("space_id", UNKNOWN),
                "RUN_ID": labels.get("run_id", UNKNOWN),
                "DATA_MD5": labels.get("data_md5", UNKNOWN),
            },
        )


def project_recipe(name: str) -> Callable[[str | None, str], Any]:
    """The recipe of an image that is made of the project itself."""

    @contextmanager
    def recipe(tag: str | None, revision: str) -> Iterator[Recipe]:
        version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
        changed = "-dirty" if ask_git("status", "--porcelain", "--untracked-files=no") else ""
        yield Recipe(
            name=f"ekiben-{name}",
            version=version,
            dockerfile=HERE / f"{name}.Dockerfile",
            context=ROOT,
            arguments={"VERSION": version, "REVISION": f"{revision}{changed}"},
        )

    return recipe


RECIPES: Mapping[str, Callable[[str | None, str], Any]] = {
    "encoder": encoder_recipe,
    "line": project_recipe("line"),
    "mlflow": project_recipe("mlflow"),
}


def export_bento(tag: str | None, to: Path) -> dict[str, Any]:
    """Copy a Bento of the store with its models into the folder `to`, and return what its bento.yaml says."""
    from flows.settings import FlowSettings

    settings = FlowSettings()
    # BentoML reads this when it is imported.
    os.environ["BENTOML_HOME"] = str(settings.bento_store_path)
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")
    import bentoml
    from bentoml.exceptions import BentoMLException

    wanted = tag or f"{settings.model_name}:latest"
    try:
        bentoml.bentos.export_bento(wanted, str(to), "folder")
    except BentoMLException as error:
        fail(
            f"no Bento {wanted} in {settings.bento_store_path}: {error}. `ekiben up` or `ekiben pipeline` makes one; "
            "BENTOML_HOME or EKIBEN_HOME names another store, --bento another Bento"
        )
    return dict(yaml.safe_load((to / "bento.yaml").read_text(encoding="utf-8")))


def constrain(lock: str, pinned: str) -> str:
    """The lines of the lock, without the packages that the Bento pins itself, perhaps to other versions."""
    own = {name for line in pinned.splitlines() if (name := package_of(line))}
    return "".join(f"{line}\n" for line in lock.splitlines() if (name := package_of(line)) and name not in own)


def package_of(line: str) -> str | None:
    """The package that a line of a requirements file is about, or None when it is a comment or an option."""
    try:
        return str(canonicalize_name(Requirement(line.partition(" #")[0].strip()).name))
    except InvalidRequirement:
        return None


def let_everybody_read(folder: Path) -> None:
    """Files keep their rights on their way into an image, where another user reads them."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o644))


def ask_git(*arguments: str) -> str:
    """What Git says about the project, or nothing."""
    try:
        answer = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def tell(message: str) -> None:
    """Say what happens."""
    sys.stderr.write(f"{message}\n")


def fail(message: str, code: int = 1) -> NoReturn:
    """End with one line."""
    sys.stderr.write(f"build.py: {message}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
