"""Reading a JSON body: every value is checked once, and an error names the field.

A field that is null counts as absent. Fields that nobody asks for are ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from ...errors import RequestError

MAX_DEPTH = 100
MAX_VALUES = 500_000  # of a body, at any depth

_SURROGATE = re.compile("[\ud800-\udfff]")

T = TypeVar("T")


def read_json(body: bytes) -> Fields:
    """The object that a body holds. Raises RequestError."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8 (byte {error.start})") from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise RequestError(f"the body is nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:  # malformed, or a number of more digits than Python reads
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "a number is too long"
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise RequestError(f"the body is not JSON: {reason}{where}") from None
    _check_shape(value)
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, not {kind(value)}")
    return Fields(value)


def _refuse_constant(name: str) -> None:
    raise RequestError(f"the body is not JSON: {name} is not a number")


def _check_shape(value: object) -> None:
    """Bound depth and number of values, and refuse text that is not Unicode."""
    level, depth, seen = [value], 0, 0
    while level:
        if depth > MAX_DEPTH:
            raise RequestError(f"the body is nested more than {MAX_DEPTH} deep")
        seen += len(level)
        if seen > MAX_VALUES:
            raise RequestError(f"the body has more than {MAX_VALUES} values")
        inner: list[object] = []
        for item in level:
            if isinstance(item, str):
                if not item.isascii() and _SURROGATE.search(item):
                    raise RequestError("the body has half of a surrogate pair, which is not text")
            elif isinstance(item, dict):
                inner.extend(item)
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        level, depth = inner, depth + 1


def kind(value: object) -> str:
    """The type of a JSON value, for messages."""
    if value is None:
        return "null"
    names = {
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return names.get(type(value), "something else")


class Fields:
    """An object of the body; `path` is where it stands, such as `messages[2].content[0]`."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self.values = values
        self.path = path

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def where(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def wrong(self, name: str, reason: str) -> RequestError:
        """An error about one field; `reason` follows its name."""
        where = self.where(name)
        return RequestError(f"'{where}' {reason}", where)

    def required(self, name: str) -> Any:
        value = self.values.get(name)
        if value is None:
            raise self.wrong(name, "is required")
        return value

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.values.get(name)
        return default if value is None else self._typed(name, value, str, "a string")

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name)
        return default if value is None else self._typed(name, value, bool, "a boolean")

    def integer(self, name: str, low: int | None = None, high: int | None = None) -> int | None:
        value = self.values.get(name)
        if value is None:
            return None
        if type(value) is not int:
            raise self.wrong(name, f"must be an integer, not {kind(value)}")
        self._check_range(name, value, low, high)
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self.values.get(name)
        if value is None:
            return default
        if type(value) not in (int, float):
            raise self.wrong(name, f"must be a number, not {kind(value)}")
        self._check_range(name, value, low, high)
        return float(value)

    def one_of(self, name: str, choices: Sequence[str], default: str) -> str:
        value = self.text(name, default)
        assert value is not None
        if value not in choices:
            raise self.wrong(name, f"must be one of {', '.join(choices)}")
        return value

    def object(self, name: str) -> Fields | None:
        value = self.values.get(name)
        if value is None:
            return None
        return Fields(self._typed(name, value, dict, "an object"), self.where(name))

    def array(self, name: str, most: int) -> list[Any] | None:
        value = self.values.get(name)
        if value is None:
            return None
        items = self._typed(name, value, list, "an array")
        if len(items) > most:
            raise self.wrong(name, f"has {len(items)} entries; at most {most} are allowed")
        return items

    def objects(self, name: str, most: int) -> Iterator[Fields]:
        """The objects of an array, none if it is absent."""
        for i, item in enumerate(self.array(name, most) or []):
            place = f"{name}[{i}]"
            yield Fields(self._typed(place, item, dict, "an object"), self.where(place))

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A string, or an array of strings; none of them empty."""
        value = self.values.get(name)
        if value is None:
            return ()
        if isinstance(value, str):
            found = [value]
        else:
            for i, item in enumerate(self.array(name, most) or []):
                self._typed(f"{name}[{i}]", item, str, "a string")
            found = value
        if not all(found):
            raise self.wrong(name, "has an empty string")
        return tuple(found)

    def _typed(self, name: str, value: Any, wanted: type[T], words: str) -> T:
        if type(value) is not wanted:
            raise self.wrong(name, f"must be {words}, not {kind(value)}")
        return value

    def _check_range(self, name: str, value: float, low: float | None, high: float | None) -> None:
        if low is not None and value < low:
            raise self.wrong(name, f"is {value}; it must be at least {low:g}")
        if high is not None and value > high:
            raise self.wrong(name, f"is {value}; it must be at most {high:g}")
