"""What a model asked for: calls, or the reason why none could be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """One call. Values keep the type they were written with: 1, 1.0, True and "1" all differ."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class ParseError:
    """Why an answer has no readable call; a value, since models write such answers all day."""

    reason: str

    def __str__(self) -> str:
        return self.reason


class Unreadable(Exception):
    """Inside the parser: the text is not a call, for the reason given."""
