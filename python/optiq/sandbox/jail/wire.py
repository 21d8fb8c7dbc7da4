"""Messages between processes that do not trust each other: length-prefixed JSON, no pickle.

A message is a 4-byte big-endian length and that many bytes of JSON. Values of a candidate's call
cross as trees (`pack`, `unpack`): what arrives is made of exact built-in types, so that nothing of
the sender's classes, such as an `__eq__` that is always true, comes with them.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from typing import Any

MOST = 16 * 2**20  # bytes of one message; what a jail sends beyond it ends the jail
_LENGTH = struct.Struct(">I")
_PLAIN = 2**53  # whole numbers below it are JSON's own


class WireError(Exception):
    """What arrived is not a message."""


class Opaque:
    """Stands for a value that cannot cross; equal to nothing but itself."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return f"<{self.kind}>"


def encode(message: Any) -> bytes:
    """The bytes of one message."""
    data = json.dumps(message).encode()
    if len(data) > MOST:
        raise WireError(f"a message of {len(data)} bytes is above {MOST}")
    return _LENGTH.pack(len(data)) + data


def send(descriptor: int, message: Any) -> None:
    """Write one message, whole."""
    write(descriptor, encode(message))


def receive(descriptor: int) -> Any:
    """Read one message; EOFError where the other end has closed."""
    (length,) = _LENGTH.unpack(_exactly(descriptor, _LENGTH.size))
    if length > MOST:
        raise WireError(f"a message of {length} bytes is above {MOST}")
    return decode(_exactly(descriptor, length))


def _exactly(descriptor: int, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        more = os.read(descriptor, min(length - len(data), 2**16))
        if not more:
            raise EOFError
        data += more
    return bytes(data)


def write(descriptor: int, data: bytes) -> None:
    """All of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def decode(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WireError(f"no JSON: {error}") from None


def first(channel: socket.socket, begun: bytes = b"") -> dict[str, Any]:
    """The first message of a process that then waits; some bytes of it may have been read."""
    inbox = Inbox()
    messages = inbox.feed(begun)
    while not messages:
        data = channel.recv(2**12)
        if not data:
            raise EOFError("it has ended")
        messages = inbox.feed(data)
    return dict(messages[0])


class Inbox:
    """Bytes as they arrive, taken apart into messages; no more than `most` of them."""

    def __init__(self, most: int = MOST) -> None:
        self._pending = bytearray()
        self._most = self._left = most

    def feed(self, data: bytes) -> list[Any]:
        self._left -= len(data)
        if self._left < 0:
            raise WireError("too much to read")
        self._pending += data
        messages = []
        while len(self._pending) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._pending)
            if length > self._most:
                raise WireError(f"a message of {length} bytes is above {self._most}")
            end = _LENGTH.size + length
            if len(self._pending) < end:
                break
            messages.append(decode(bytes(self._pending[_LENGTH.size : end])))
            del self._pending[:end]
        return messages


def pack(value: Any) -> Any:
    """A value as a JSON tree; subclasses become their base. TypeError for what has no form."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, int):
        number = int.__index__(value)
        return number if abs(number) < _PLAIN else {"int": hex(number)}
    if isinstance(value, list):
        return [pack(item) for item in list.__iter__(value)]
    if isinstance(value, tuple):
        return {"tuple": [pack(item) for item in tuple.__iter__(value)]}
    if isinstance(value, dict):
        return {"dict": [[pack(k), pack(v)] for k, v in dict.items(value)]}
    if isinstance(value, frozenset):
        return {"frozenset": [pack(item) for item in frozenset.__iter__(value)]}
    if isinstance(value, set):
        return {"set": [pack(item) for item in set.__iter__(value)]}
    if isinstance(value, (bytes, bytearray)):
        return {type(value).__name__: bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [pack(n) for n in (value.start, value.stop, value.step)]}
    if hasattr(type(value), "__next__"):
        return {"iterator": [pack(item) for item in value]}
    raise TypeError(f"a value of type {type(value).__name__} cannot cross between processes")


_MAKERS: dict[str, Any] = {
    "int": lambda v: int(v, 16),
    "tuple": lambda v: tuple(map(unpack, v)),
    "dict": lambda v: {unpack(key): unpack(item) for key, item in v},
    "set": lambda v: set(map(unpack, v)),
    "frozenset": lambda v: frozenset(map(unpack, v)),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda v: complex(*v),
    "range": lambda v: range(*map(unpack, v)),
    "iterator": lambda v: iter(list(map(unpack, v))),
    "opaque": lambda v: Opaque(str(v)),
}


def unpack(tree: Any) -> Any:
    """The value of a tree from an untrusted sender; WireError where it is not one."""
    if isinstance(tree, list):
        return [unpack(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    try:
        ((kind, content),) = tree.items()
        return _MAKERS[kind](content)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise WireError(f"no value: {type(error).__name__}: {error}") from None
