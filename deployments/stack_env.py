"""Write the .env of docker-compose.yml: a random secret for each that is missing; what is there stays as it is.

    python deployments/stack_env.py [PATH]

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
from pathlib import Path

HEADER = """\
# Secrets and addresses of docker-compose.yml. Not for git. Whoever reads this file owns the stack.
# `make stack-env` adds what is missing and changes nothing that is here; docs/operations.md says how a key is changed.
"""
SECRETS = {
    "POSTGRES_PASSWORD": "of PostgreSQL's superuser",
    "MLFLOW_DB_PASSWORD": "of MLflow's databases",
    "PREFECT_DB_PASSWORD": "of Prefect's database",
    "OPTUNA_DB_PASSWORD": "of Optuna's database",
    "S3_ACCESS_KEY": "of the S3 server: its one identity",
    "S3_SECRET_KEY": "",
    "MLFLOW_ADMIN_PASSWORD": "of MLflow's user `admin`, for people",
    "MLFLOW_LINE_PASSWORD": "of MLflow's user `line`: the flows",
    "MLFLOW_ENCODER_PASSWORD": "of MLflow's user `encoder`, who only reads",
    "MLFLOW_SECRET_KEY": "signs MLflow's forms",
    "PREFECT_PASSWORD": "of Prefect's user `ekiben`",
    "EKIBEN_API_KEYS": "what callers of the encoder show; several are separated by commas",
    "EKIBEN_ADMIN_KEY": "for POST /models/load",
    "GRAFANA_PASSWORD": "of Grafana's user `admin`",
}
OPTIONS = """\

# --- with their defaults; take the # away to change one
#STACK_BIND=127.0.0.1        # address that the ports are bound to; put a proxy with TLS before anything wider
#STACK_HOST=localhost        # name under which browsers reach MLflow, by its port or through a proxy
#PREFECT_PUBLIC_URL=http://localhost:4200    # address under which browsers reach Prefect
#ENCODER_PORT=3000
#MLFLOW_PORT=5000
#PREFECT_PORT=4200
#PROMETHEUS_PORT=9090
#GRAFANA_PORT=3001
#ENCODER_VERSION=latest      # tag of the image ekiben-encoder
#EKIBEN_REGISTRY=            # such as ghcr.io/your-team/ : where the images come from, when they are not built here
#SERVER_CPUS=1               # of PostgreSQL, S3, MLflow and Prefect each; memory is about 16 GiB in all at most
#WORKER_CPUS=2
#WORKER_MEMORY=6g
#ENCODER_CPUS=2
#ENCODER_MEMORY=2g
#PROMETHEUS_RETENTION=30d
#EKIBEN_NOTIFY_URL=          # webhook that is told of failed runs
#EKIBEN_ACCESS_LOG=false     # true: the encoder logs each request, with who asked
#EKIBEN_WORK_POOL=           # kubernetes: runs are jobs of a cluster; docker: containers; empty: processes of `worker`
#EKIBEN_LINE_IMAGE=          # of those jobs, such as registry.example.com/ekiben/ekiben-line:0.1.0
# --- an S3 of your own; its buckets must exist, and .dvc/config must name the one of the data
#COMPOSE_FILE=docker-compose.yml:deployments/compose.external-s3.yml
#S3_DATA_BUCKET=ekiben
#S3_ENDPOINT=https://s3.example.com
#S3_REGION=us-east-1
#S3_MLFLOW_BUCKET=mlflow
"""
LEAST_CHARACTERS = 16
IDENTITIES = ("S3_ACCESS_KEY",)  # a name rather than a secret: may be short
MISREAD = re.compile(r"[\s$#'\"\\]")  # by compose: variables, remarks, quotes
# Those of databases become parts of addresses.
PLAIN = re.compile(r"[A-Za-z0-9_.~-]*")


def read_names(text: str) -> dict[str, str]:
    """The variables that a .env sets."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line and not line.lstrip().startswith("#"))
    return {name.strip(): value.strip() for name, _, value in pairs}


def complete(text: str) -> str:
    """The text of a .env with every secret in it; lines that are there stay byte for byte.

    Raises:
        ValueError: a secret is there, but empty or too short, or has characters that would be read as something else.
    """
    known = read_names(text)
    chosen = [name for name in SECRETS if name in known]
    weak = [name for name in chosen if len(known[name]) < (1 if name in IDENTITIES else LEAST_CHARACTERS)]
    if weak:
        raise ValueError(
            f"{', '.join(weak)} is shorter than {LEAST_CHARACTERS} characters: take the line out to have one made, "
            "or give a longer one"
        )
    if odd := [name for name in chosen if name.endswith("_DB_PASSWORD") and not PLAIN.fullmatch(known[name])]:
        raise ValueError(f"{', '.join(odd)} may hold letters, digits and _ . ~ - only: it becomes part of an address")
    if odd := [name for name in chosen if MISREAD.search(known[name])]:
        raise ValueError(
            f"{', '.join(odd)} holds a blank or one of $ # ' \" \\: docker compose would read that as something else; "
            "take the line out to have one made"
        )
    lines = []
    for name, meaning in SECRETS.items():
        if name not in known:
            lines += [f"# {meaning}"] if meaning else []
            lines.append(f"{name}={secrets.token_hex(20)}")
    new = "".join(f"{line}\n" for line in lines)
    if not text:
        return HEADER + new + OPTIONS
    return text + ("" if text.endswith("\n") or not new else "\n") + new


def write_env(path: Path) -> list[str]:
    """Complete the file, readable by its owner only; returns the names that were added.

    Raises:
        ValueError: a secret cannot be used.
        OSError: the file cannot be read or written.
    """
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    after = complete(before)
    added = sorted(set(read_names(after)) - set(read_names(before)))
    if added:
        part = path.with_name(f"{path.name}.part")
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(after)
        part.replace(path)
    path.chmod(0o600)
    return added


def main(arguments: list[str]) -> int:
    """Write the file and say what was added."""
    path = Path(arguments[0] if arguments else ".env")
    try:
        added = write_env(path)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{path}: {error}\n")
        return 2
    sys.stdout.write(f"{path}: added {', '.join(added)}\n" if added else f"{path}: complete\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
