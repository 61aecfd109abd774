"""docs/data.md names every error message that the data modules can give."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
MODULES = ("columns", "dataset", "files", "leaks", "pairs", "profiles", "retrieval", "revisions", "tables")
ERRORS = ("DataError", "MissingFileError", "NotTrackedError")


def template(node: ast.expr) -> str:
    """A message with `…` where it differs from time to time."""
    if isinstance(node, ast.JoinedStr):
        return "".join(template(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return str(node.value) if isinstance(node, ast.Constant) else "…"


def longest_part(message: str) -> str:
    """What one can recognise a message by: its longest fixed words, if possible before the cure."""
    found = message.split(";")[0].replace(", for instance", "")
    parts = [part.split(": ")[0].strip(" ;:,()") for part in found.split("…")]
    longest = max(parts, key=len)
    return longest if len(longest) >= 8 else max((part.strip(" ;:,()") for part in message.split("…")), key=len)


def messages() -> list[str]:
    found = []
    for name in MODULES:
        tree = ast.parse((PROJECT / "flows" / "core" / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
                found.append(longest_part(template(node.args[0])))
    return [message for message in found if message]


@pytest.mark.parametrize("message", sorted(set(messages())))
def test_every_error_message_is_in_the_table(message: str) -> None:
    table = (PROJECT / "docs" / "data.md").read_text(encoding="utf-8").split("## Error messages")[1]
    assert message in table


def test_there_are_messages_to_look_for() -> None:
    assert len(messages()) > 50
