"""What an answer consists of, in the order in which it is written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """For the user."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class CallStart:
    """A call begins. It is a call only if its `CallEnd` follows: what turns out to be malformed has
    none, and is repeated as `Text`."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A fragment of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    """The call is complete: its arguments are a JSON object."""

    index: int


Part = Text | Reasoning | CallStart | CallArguments | CallEnd
