"""Answers to a BFCL case: right ones, and each way of being nearly right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from optiq.evals.bfcl import Call


def variants(
    function: dict[str, Any], possible: dict[str, dict[str, list[Any]]]
) -> list[list[Call]]:
    """Lists of calls, the first of them right where anything is."""
    (alternatives,) = possible.values()
    name = function["name"]
    right = {
        parameter: _first(values)
        for parameter, values in alternatives.items()
        if _first(values) != ""
    }
    needed = {p: v for p, v in right.items() if "" not in alternatives[p]}
    found = [[Call(name, right)], [Call(name, needed)], [Call(name, dict(reversed(right.items())))]]
    found += [[Call(name, arguments)] for arguments in _changes(right, alternatives)]
    found += [[Call(other, right)] for other in (name.upper(), name.replace(".", "_"), f"{name}s")]
    return [*found, [], [Call(name, right)] * 2, [Call(name, {})]]


def _changes(right: dict[str, Any], alternatives: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    yield right | {"not_a_parameter": 1}
    for parameter, values in alternatives.items():
        yield {p: v for p, v in right.items() if p != parameter}
        for value in values:
            yield right | {parameter: _first([value])}
        for value in _near(right.get(parameter, "")):
            yield right | {parameter: value}


def _first(values: list[Any]) -> Any:
    """A right value: in dictionaries, every key has a list of alternatives of its own."""
    value = values[0] if values[0] != "" or len(values) == 1 else values[1]
    if isinstance(value, dict):
        return {key: _first(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_first([item]) if isinstance(item, dict) else item for item in value]
    return value


def _near(value: Any) -> Iterator[Any]:
    """Other types, and small changes within the type."""
    yield from (None, "", [value], {"value": value}, True, 0, 1.5, str(value), [], {})
    if isinstance(value, (int, float)):
        yield from (value + 1, -value, float(value), int(value), bool(value), f"{value} ", 10**400)
    elif isinstance(value, str):
        yield from (value.upper(), f" {value}.", value.replace(" ", "_"), value.replace(" ", "-"))
        yield from (f"{value}!", f"'{value}'", f'"{value}"', f"{value} more", f"*{value}^/,")
    elif isinstance(value, list):
        yield from (value[::-1], value[1:], [*value, *value], [value], tuple(value))
        for item in value[:1]:
            yield from ([changed, *value[1:]] for changed in _near(item))
    elif isinstance(value, dict):
        yield from (value | {"more": 1}, dict(reversed(value.items())))
        for key, item in value.items():
            yield {k: v for k, v in value.items() if k != key}
            yield from (value | {key: changed} for changed in _near(item))
