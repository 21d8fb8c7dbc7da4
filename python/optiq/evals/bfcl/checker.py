"""The AST check of BFCL's "simple" category, rule for rule as bfcl-eval 2026.3.23 applies it.

A parameter's possible answers are a list of alternatives; "" among them says that it may be left
out. Types are exact (`True` is not an integer), but an integer passes for a float. Strings compare
without case, spaces and ,./-_*^ and with one kind of quote. A value of the type of the possible
answers instead of the declared one is taken for a variable, compared as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from reprlib import repr as short
from typing import Any

from ...chat.calls import Call

_TYPES: dict[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
_IGNORED = re.compile(r"[ ,./\-_*^]")


def check(
    function: Mapping[str, Any],
    possible_answer: Mapping[str, Mapping[str, Sequence[Any]]],
    calls: Sequence[Call],
) -> str | None:
    """None if `calls` is the one right call, else one line that says what is wrong.

    `function` is an entry of a case's "function" list (BFCL's own type names), `possible_answer`
    the entry of its "ground_truth". Source: `ast_checker` with language Python, category simple.
    """
    if len(calls) != 1:
        return f"{len(calls)} calls instead of one"
    (call,) = calls
    if call.name != function["name"]:
        return f"calls {call.name!r}, not {function['name']!r}"
    (possible,) = possible_answer.values()  # its key may differ from the function's name
    for name in function["parameters"].get("required", []):
        if name not in call.arguments:
            return f"required parameter {name!r} is missing"
    declared = function["parameters"]["properties"]
    for name, value in call.arguments.items():
        if name not in declared or name not in possible:
            return f"unexpected parameter {name!r}"
        if reason := _check_value(declared[name], possible[name], value):
            return f"parameter {name!r}: {reason}"
    for name, alternatives in possible.items():
        if name not in call.arguments and "" not in alternatives:
            return f"parameter {name!r} is missing and not optional"
    return None


def _check_value(schema: Mapping[str, Any], alternatives: Sequence[Any], value: Any) -> str | None:
    kind, inner = schema["type"], None
    expected = _TYPES[kind]
    if expected is list:
        inner = _TYPES[schema["items"]["type"]]
    if kind == "tuple" and type(value) is tuple:
        value = list(value)
    if kind == "float" and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            return "too large for a float"

    actual, answered = type(value), _type_of(alternatives)
    if actual is expected:
        if inner is not None and not any(_items_fit(a, inner, value) for a in alternatives):
            return f"items are not {inner.__name__}: {short(value)}"
        is_variable = answered not in (None, expected)
    elif actual is answered:
        is_variable = True
    else:
        return f"{actual.__name__} instead of {kind}: {short(value)}"

    if is_variable:
        right = value in alternatives
    elif expected is dict:
        right = any(_same_dict(a, value) for a in alternatives if a != "")
    elif expected is list and inner is dict:
        right = any(_same_dicts(a, value) for a in alternatives)
    elif expected is str:
        right = _normal(value) in [_normal(a) for a in alternatives if type(a) is str]
    elif expected is list:
        right = _normal_items(value) in [_normal_items(a) for a in alternatives]
    else:
        right = value in alternatives
    return None if right else f"{short(value)} is not among {short(alternatives)}"


def _type_of(alternatives: Sequence[Any]) -> type | None:
    """Type of the first alternative that is a value; None if there is none."""
    return next((type(a) for a in alternatives if a != ""), None)


def _items_fit(alternative: Any, inner: type, value: list[Any]) -> bool:
    """Whether every item has the declared type, or that of the items of `alternative`."""
    if type(alternative) is not list:
        return True
    return all(type(item) in (inner, _type_of(alternative)) for item in value)


def _normal(value: Any) -> Any:
    """A string as it is compared; anything else as it is."""
    if type(value) is not str:
        return value
    return _IGNORED.sub("", value).lower().replace("'", '"')


def _normal_items(values: Sequence[Any]) -> list[Any]:
    return [_normal(value) for value in values]


def _same_dict(alternative: Mapping[str, Sequence[Any]], value: Mapping[str, Any]) -> bool:
    """`alternative` lists the right values of each key; "" among them makes the key optional."""
    return all(
        key in alternative and _normal(item) in _normal_items(alternative[key])
        for key, item in value.items()
    ) and all(key in value or "" in allowed for key, allowed in alternative.items())


def _same_dicts(alternative: Sequence[Any], value: Sequence[Any]) -> bool:
    return len(alternative) == len(value) and all(
        a != "" and _same_dict(a, v) for a, v in zip(alternative, value, strict=True)
    )
