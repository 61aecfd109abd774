"""From command line options to checked parameters: `--params FILE`, then `--set section.key=value`, then the data.

Knows nothing about Prefect; every mistake is a `ParamsError` in one line.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from flows.errors import ParamsError, one_line
from flows.params import DataParams, Params

NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)  # the latter two: a date like 2026-13-45, brackets in brackets


def load_params(file: Path | None, assignments: Sequence[str], data: Mapping[str, str | None]) -> Params:
    """Merge a params file, `section.key=value` assignments and data options (later wins) into checked parameters.

    Raises:
        ParamsError: a file that cannot be read, an unknown name, or a value out of bounds.
    """
    raw: dict[str, Any] = {} if file is None else _read_file(file)
    for assignment in assignments:
        _assign(raw, assignment)
    given = {name: value for name, value in data.items() if value is not None}
    for name, value in given.items():
        _put(raw, ["data", name], value, source=f"--{name.replace('_', '-')}")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise ParamsError(describe_validation(error)) from None


def has_data(data: DataParams) -> bool:
    """Tell whether any data was named."""
    return any((data.pairs, data.dev, data.test, data.retrieval, data.profiles, data.judgements))


def describe_validation(error: ValidationError) -> str:
    """Put a pydantic error into one line: where, what was found, what is allowed."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{where} is not a parameter{_suggest(where)}")
        else:
            lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')} (found {item['input']!r})")
    return "; ".join(lines)


def _read_file(file: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"no params file {file}; ready-made ones are in deployments/params/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(f"cannot read the params file {file}: {error}") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{file} is not YAML: {one_line(error)}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ParamsError(
            f"{file} holds a {type(raw).__name__}; it must map sections ({', '.join(_sections())}) to values"
        )
    return {name: values for name, values in raw.items() if values is not None}  # all its lines commented out


def _assign(raw: dict[str, Any], assignment: str) -> None:
    path, separator, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not separator or len(keys) < 2 or not all(keys):
        raise ParamsError(f"--set takes section.key=value, e.g. train.steps=120; found {assignment!r}")
    _put(raw, keys, _text(text) if is_text(keys) else _value(path, text), source=f"--set {path}")


def _put(raw: dict[str, Any], keys: Sequence[str], value: object, *, source: str) -> None:
    branch = raw
    for key in keys[:-1]:
        child = branch.setdefault(key, {})
        if not isinstance(child, dict):
            raise ParamsError(f"{source}: {key} holds a value, not a group of parameters")
        branch = child
    branch[keys[-1]] = value


def is_text(keys: Sequence[str]) -> bool:
    """Whether the parameter is a text, which is taken as it stands: a template's braces are YAML, a commit a number."""
    field, *rest = keys
    kind: Any = Params.model_fields[field].annotation if field in Params.model_fields else None
    for key in rest:
        if isinstance(kind, type) and issubclass(kind, BaseModel) and key in kind.model_fields:
            kind = kind.model_fields[key].annotation
        else:
            kind = get_args(kind)[1] if get_origin(kind) is dict else None
    return kind is str or set(get_args(kind)) == {str, type(None)}


def _text(text: str) -> object:
    """A text as given, without the quotes that YAML would want; nothing and `null` mean none."""
    text = text.strip()
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    if quoted:
        with contextlib.suppress(*NOT_YAML):
            return yaml.safe_load(text)
    return None if text in ("", "null", "~") else text


def _value(path: str, text: str) -> object:
    try:
        value = yaml.safe_load(text)
    except NOT_YAML:
        raise ParamsError(f"--set {path}: {text!r} is not a YAML value") from None
    return _number(value) if isinstance(value, str) else value


def _number(text: str) -> str | float:
    """YAML 1.1 reads `2e-5` as text; people mean the number."""
    try:
        return float(text) if "e" in text.lower() else text
    except ValueError:
        return text


def parameter_names(model: type[BaseModel] = Params, prefix: str = "") -> list[str]:
    """List every parameter as `section.key`."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += parameter_names(field.annotation, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _sections() -> list[str]:
    return list(Params.model_fields)


def _suggest(name: str) -> str:
    close = difflib.get_close_matches(name, parameter_names(), n=1)
    return (
        f"; did you mean {close[0]}?"
        if close
        else f"; the sections are {', '.join(_sections())}, see docs/configuration.md"
    )
