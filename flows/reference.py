"""Write docs/configuration.md, docs/openapi.json and .env.example from the code: `make docs`, checked by a test.

`python -m flows.reference --check` says whether the files are current and changes nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from bentos.apidoc import build_document
from bentos.settings import ServeSettings
from flows.params import Params
from flows.settings import PROJECT_ROOT, FlowSettings

INTRO = """\
# Configuration

<!-- Written by `make docs` from the params and settings classes: change those, not this page. -->

One value has one home:

- **What a run is** (data, training, search, gates): *parameters*. From a YAML file (`--params FILE`, ready-made ones in
  `deployments/params/`), then `--set section.key=value`, then the data options of the command; later wins. Prefect
  shows the same fields as a form.
- **Where it runs** (folders, addresses): *settings* of the flows, from the environment or `--home`.
- **How hard it serves** (limits, threads): *settings* of the server, from the environment of `bentoml serve`.
"""
TOOLS = {
    "PREFECT_API_URL": "Record runs on that Prefect server; without it each command starts a temporary one.",
    "PREFECT_API_AUTH_STRING": "`user:password` of that server, when it asks for one.",
    "PREFECT_HOME": "Prefect's own folder; default: `prefect` in the home folder.",
    "AWS_ACCESS_KEY_ID": "Credentials for `s3://` data and the DVC remote `store`, with `AWS_SECRET_ACCESS_KEY`.",
    "AWS_SECRET_ACCESS_KEY": "See `AWS_ACCESS_KEY_ID`.",
    "AWS_ENDPOINT_URL_S3": "An S3-compatible server instead of AWS; DVC, fsspec and MLflow all follow it.",
    "HF_TOKEN": "Access to private base models on the model hub.",
    "HF_HUB_OFFLINE": "`1`: never ask the model hub.",
    "UV_TORCH_BACKEND": "For `make setup`: `cpu` fetches torch without CUDA on a Linux machine without GPU.",
}
ENV_INTRO = """\
# Settings with their defaults. Copy the lines you want to change into your shell, a service file or compose.
# Prefect reads a file named .env in the working directory by itself: put no PREFECT_API_URL there unless you mean it.
"""
BOUNDS: dict[type, str] = {Ge: ">=", Gt: ">", Le: "<=", Lt: "<"}


def write_configuration() -> str:
    """Render docs/configuration.md."""
    lines = [INTRO, "## Parameters of a run\n"]
    for name, section in Params():
        lines += [f"### `{name}`\n", f"{_first_line(section)}\n", *_params_table(name, section), ""]
    lines += ["## Settings of the flows and of the `ekiben` command\n", *_settings_table(FlowSettings), ""]
    lines += ["## Settings of the server\n", *_settings_table(ServeSettings), ""]
    lines += ["## Variables of the other tools\n", "| variable | meaning |", "| --- | --- |"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in TOOLS.items()]
    return "\n".join(lines) + "\n"


def write_env_example() -> str:
    """Render .env.example."""
    lines = [ENV_INTRO]
    for title, settings in (("flows and the ekiben command", FlowSettings), ("server", ServeSettings)):
        lines.append(f"# --- {title}")
        for name, field in settings.model_fields.items():
            default = "" if field.default is None else field.default
            lines += [f"# {field.description}", f"#{_variable(settings, name, field)}={default}", ""]
    lines.append("# --- other tools")
    for name, meaning in TOOLS.items():
        lines += [f"# {meaning}", f"#{name}=", ""]
    return "\n".join(lines).rstrip() + "\n"


def write_openapi() -> str:
    """Render docs/openapi.json: what a server with the default settings says of itself before it knows its model."""
    document = build_document(ServeSettings.model_construct())
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def pages() -> dict[Path, str]:
    """Every generated file with its content."""
    return {
        PROJECT_ROOT / "docs" / "configuration.md": write_configuration(),
        PROJECT_ROOT / "docs" / "openapi.json": write_openapi(),
        PROJECT_ROOT / ".env.example": write_env_example(),
    }


def stale_pages() -> list[Path]:
    """The generated files that differ from what the classes say."""
    return [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def _params_table(prefix: str, section: BaseModel) -> Iterator[str]:
    yield "| parameter | default | allowed | meaning |"
    yield "| --- | --- | --- | --- |"
    yield from _params_rows(prefix, section)


def _params_rows(prefix: str, section: BaseModel) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        default = getattr(section, name)
        if isinstance(default, BaseModel):
            yield from _params_rows(f"{prefix}.{name}", default)
        else:
            yield _row(f"{prefix}.{name}", default, field)


def _settings_table(settings: type[BaseSettings]) -> Iterator[str]:
    yield "| variable | default | allowed | meaning |"
    yield "| --- | --- | --- | --- |"
    for name, field in settings.model_fields.items():
        yield _row(_variable(settings, name, field), field.default, field)


def _row(name: str, default: Any, field: FieldInfo) -> str:
    shown = "" if default in (None, {}) else f"`{default}`"
    return f"| `{name}` | {shown} | {_allowed(field)} | {_cell(field.description or '')} |"


def _allowed(field: FieldInfo) -> str:
    choices = get_args(field.annotation)
    if choices and all(isinstance(choice, str) for choice in choices):
        return ", ".join(f"`{choice}`" for choice in choices)
    bounds = [
        f"{sign} {getattr(item, kind.__name__.lower())}"
        for item in field.metadata
        for kind, sign in BOUNDS.items()
        if isinstance(item, kind)
    ]
    return ", ".join(bounds)


def _variable(settings: type[BaseSettings], name: str, field: FieldInfo) -> str:
    if isinstance(field.validation_alias, str):
        return field.validation_alias
    return f"{settings.model_config.get('env_prefix', '')}{name}".upper()


def _first_line(section: BaseModel) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> int:
    """Write the pages, or with `--check` only say which are stale."""
    if "--check" in sys.argv[1:]:
        stale = stale_pages()
        for path in stale:
            sys.stderr.write(f"{path.relative_to(PROJECT_ROOT)} is not current: run `make docs`\n")
        return 1 if stale else 0
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
