"""The rules of BFCL's AST check, one by one. tests/peers compares with bfcl-eval at large."""

from __future__ import annotations

from typing import Any

import pytest

from optiq.evals.bfcl import Call, check

FUNCTION = {
    "name": "f",
    "parameters": {
        "type": "dict",
        "properties": {
            "n": {"type": "integer"},
            "x": {"type": "float"},
            "s": {"type": "string"},
            "b": {"type": "boolean"},
            "l": {"type": "array", "items": {"type": "string"}},
            "m": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            "t": {"type": "tuple", "items": {"type": "float"}},
            "d": {"type": "dict", "properties": {}},
            "ld": {"type": "array", "items": {"type": "dict"}},
            "v": {"type": "integer"},
        },
        "required": ["n"],
    },
}
POSSIBLE: dict[str, dict[str, list[Any]]] = {
    "f": {
        "n": [3, 4],
        "x": ["", 2.0],
        "s": ["", "New York, NY", "NYC"],
        "b": ["", True],
        "l": ["", ["A b", "c"]],
        "m": ["", [[1, 2], [3]]],
        "t": ["", [1.0, 2.0]],
        "d": ["", {"k": ["One", 1], "o": ["", "x"]}],
        "ld": ["", [{"k": [1]}, {"k": ["A"]}]],
        "v": ["", "count"],
    }
}

RIGHT: list[dict[str, Any]] = [
    {"n": 3},
    {"n": 4},
    {"x": 2.0},
    {"x": 2},
    {"s": "new york ny"},
    {"s": "N.Y.C."},
    {"s": ""},  # "" that stands for "left out" is also a value: so does bfcl-eval
    {"b": True},
    {"l": ["a-b", "C"]},
    {"m": [[1, 2], [3]]},
    {"t": (1.0, 2.0)},
    {"t": [1.0, 2.0]},
    {"d": {"k": "one"}},
    {"d": {"o": "X", "k": 1}},
    {"ld": [{"k": 1}, {"k": "a"}]},
    {"v": "count"},
]
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"n": 5}, "'n': 5 is not among"),
    ({"n": 3.0}, "float instead of integer"),
    ({"n": "3"}, "str instead of integer"),
    ({"n": True}, "bool instead of integer"),
    ({"x": "2.0"}, "str instead of float"),
    ({"x": True}, "bool instead of float"),
    ({"x": 10**400}, "too large"),
    ({"s": "New Jersey"}, "not among"),
    ({"s": 1}, "int instead of string"),
    ({"b": 1}, "int instead of boolean"),
    ({"b": False}, "not among"),
    ({"l": ["c", "A b"]}, "not among"),
    ({"l": ["A b"]}, "not among"),
    ({"l": "A b"}, "str instead of array"),
    ({"l": ("A b", "c")}, "tuple instead of array"),
    ({"m": [[1, 2]]}, "not among"),
    ({"d": {"k": "two"}}, "not among"),
    ({"d": {"k": 1, "z": 1}}, "not among"),
    ({"d": {"o": "x"}}, "not among"),
    ({"ld": [{"k": 1}]}, "not among"),
    ({"ld": [{"k": "a"}, {"k": 1}]}, "not among"),
    ({"v": "Count"}, "not among"),
    ({"v": 1}, "not among"),
    ({"z": 1}, "unexpected parameter 'z'"),
]


@pytest.mark.parametrize("arguments", RIGHT, ids=str)
def test_right(arguments: dict[str, Any]) -> None:
    assert check(FUNCTION, POSSIBLE, [Call("f", {"n": 3} | arguments)]) is None


@pytest.mark.parametrize(("arguments", "reason"), WRONG, ids=str)
def test_wrong(arguments: dict[str, Any], reason: str) -> None:
    found = check(FUNCTION, POSSIBLE, [Call("f", {"n": 3} | arguments)])
    assert found is not None
    assert reason in found
    assert "\n" not in found


def test_which_function_and_how_often() -> None:
    call = Call("f", {"n": 3})
    assert check(FUNCTION, POSSIBLE, []) == "0 calls instead of one"
    assert check(FUNCTION, POSSIBLE, [call, call]) == "2 calls instead of one"
    assert check(FUNCTION, POSSIBLE, [Call("F", {"n": 3})]) == "calls 'F', not 'f'"


def test_what_may_be_left_out() -> None:
    assert "required parameter 'n'" in str(check(FUNCTION, POSSIBLE, [Call("f", {})]))
    answers = {"f": POSSIBLE["f"] | {"x": [2.0]}}  # not required by the schema, but by the answer
    assert "'x' is missing" in str(check(FUNCTION, answers, [Call("f", {"n": 3})]))
