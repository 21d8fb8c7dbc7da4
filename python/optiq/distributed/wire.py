"""Values over a connection: what JSON can hold, with arrays in it. Tuples arrive as lists.

A message is the length of its head, the head, and the bytes of the arrays one after the other. The
head is JSON: the value, with a number in the place of each array, and their types and shapes.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

import mlx.core as mx
import numpy as np

_LENGTH = struct.Struct(">Q")
_ARRAY = "mx.array"  # the key of an array's number
_FLOATS = (mx.float16, mx.bfloat16, mx.float32)
_INTEGERS = (mx.uint8, mx.uint16, mx.uint32, mx.uint64, mx.int8, mx.int16, mx.int32, mx.int64)
_DTYPES = {str(dtype): dtype for dtype in (mx.bool_, *_INTEGERS, *_FLOATS)}


def send(peer: socket.socket, value: Any) -> None:
    """Raises OSError where the connection has ended."""
    arrays: list[mx.array] = []
    tree = _taken(value, arrays)
    mx.eval(arrays)
    specs = [[str(a.dtype), list(a.shape)] for a in arrays]
    head = json.dumps([tree, specs]).encode()
    peer.sendall(_LENGTH.pack(len(head)) + head)
    for array in arrays:
        if array.size:
            peer.sendall(np.asarray(array.reshape(-1).view(mx.uint8)).data)


def receive(peer: socket.socket) -> Any:
    """What the peer sends next. Raises OSError where the connection has ended."""
    (length,) = _LENGTH.unpack(read(peer, _LENGTH.size).data)
    tree, specs = json.loads(read(peer, length).tobytes())
    arrays = []
    for name, shape in specs:
        dtype = _DTYPES[name]
        size = int(np.prod(shape, dtype=np.int64)) * dtype.size
        data = mx.array(read(peer, size)) if size else mx.zeros(0, mx.uint8)
        arrays.append(data.view(dtype).reshape(shape))
    return _given(tree, arrays)


def read(peer: socket.socket, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """So many bytes that a peer sends. Raises ConnectionError at the end of the connection."""
    out = np.empty(size, np.uint8)
    view = out.data
    while len(view):
        n = peer.recv_into(view)
        if n == 0:
            raise ConnectionError("a rank has closed its connection")
        view = view[n:]
    return out


def _taken(value: Any, arrays: list[mx.array]) -> Any:
    """`value` with numbers for its arrays, which are added to `arrays`."""
    if isinstance(value, mx.array):
        arrays.append(value)
        return {_ARRAY: len(arrays) - 1}
    if isinstance(value, dict):
        return {key: _taken(item, arrays) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_taken(item, arrays) for item in value]
    return value


def _given(tree: Any, arrays: list[mx.array]) -> Any:
    if isinstance(tree, dict):
        if tree.keys() == {_ARRAY}:
            return arrays[tree[_ARRAY]]
        return {key: _given(item, arrays) for key, item in tree.items()}
    if isinstance(tree, list):
        return [_given(item, arrays) for item in tree]
    return tree
