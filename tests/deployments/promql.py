"""What a PromQL expression asks for: enough of a reader to compare it with what is exposed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan", "by", "without", "on", "ignoring"}
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
RANGE = re.compile(r"\[[^\]]*\]")
GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
SELECTOR = re.compile(r"(?<![\w:.$])([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?(?!\s*\(|[\w:])")
MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")


@dataclass(frozen=True)
class Query:
    """Metrics with the labels that are matched, and the labels by which is grouped or joined."""

    selected: dict[str, frozenset[str]]
    grouped: frozenset[str]


def read_query(expression: str) -> Query:
    """Read an expression."""
    text = RANGE.sub("", STRING.sub('""', expression))
    grouped = {label.strip() for names in GROUPING.findall(text) for label in names.split(",") if label.strip()}
    selected: dict[str, frozenset[str]] = {}
    for name, matchers in _selectors(GROUPING.sub(" ", text)):
        selected[name] = selected.get(name, frozenset()) | frozenset(MATCHER.findall(matchers or ""))
    return Query(selected, frozenset(grouped))


def _selectors(text: str) -> Iterator[tuple[str, str]]:
    for name, matchers in SELECTOR.findall(text):
        if name not in WORDS:
            yield name, matchers


def find_faults(expression: str, exposed: dict[str, set[str]]) -> list[str]:
    """What an expression asks for that is not exposed: metrics, and labels that they do not have."""
    query = read_query(expression)
    faults = [f"no metric {name}" for name in query.selected if name not in exposed]
    known = {name: labels for name, labels in exposed.items() if name in query.selected}
    for name, labels in query.selected.items():
        faults += [f"{name} has no label {label}" for label in sorted(labels - known.get(name, labels))]
    somewhere = set().union(*known.values())
    faults += [f"nothing there has the label {label}" for label in sorted(query.grouped - somewhere)]
    return faults
