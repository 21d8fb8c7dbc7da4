"""What a dispatch did, counted."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn

_BUFFERS = 31
# The order of `enum Operation` in rt/runtime.h, from 1 on.
SIMD_OPERATIONS = [
    "sum",
    "product",
    "min",
    "max",
    "and",
    "or",
    "xor",
    "prefix",
    "shuffle",
    "broadcast",
    "vote",
    "quad",
    "multiply",
    "barrier",
]
_TOTALS = [
    "threads",
    "threadgroups",
    "switches",
    "barriers",
    "simdgroup_barriers",
    "threadgroup_memory",
]
_BY_BUFFER = [
    "loads",
    "stores",
    "bytes_read",
    "bytes_written",
    "lines_read",
    "lines_read_by_threadgroups",
    "lines_written",
    "simdgroup_loads",
    "lines_of_loads",
]
_THREADGROUP = [
    "threadgroup_loads",
    "threadgroup_stores",
    "threadgroup_bytes_read",
    "threadgroup_bytes_written",
]


class RawCounters(ctypes.Structure):
    """Mirror of `struct Counters` in rt/runtime.h."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in _TOTALS),
        ("operations", ctypes.c_uint64 * 16),
        *((name, ctypes.c_uint64 * _BUFFERS) for name in _BY_BUFFER),
        *((name, ctypes.c_uint64) for name in _THREADGROUP),
        ("seconds", ctypes.c_double),
        ("error", ctypes.c_char * 8192),
    )


class _NotCounted:
    """Stands where the fast build has no figure; a zero would pass for one."""

    def _refuse(self, *_: object) -> NoReturn:
        raise ValueError("memory accesses are counted with mode='check' only")

    __getitem__ = __iter__ = __len__ = __int__ = __index__ = __add__ = __radd__ = _refuse
    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = _refuse
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "not counted"


@dataclass
class Counters:
    """Figures of one dispatch, or of several added with +. Lists have one entry a buffer index.

    Bytes are those of optimised x86 code: the compiler may load a value again, or merge loads.
    Compare kernels by ratios, and from the same compiler.
    """

    dispatches: int
    threads: int
    threadgroups: int
    barriers: int  # once a threadgroup, not once a thread
    simdgroup_barriers: int  # once a simdgroup; mem_none ones only in check mode
    operations: dict[str, int]  # of SIMD_OPERATIONS, once a simdgroup
    threadgroup_memory: int  # bytes, the most that a threadgroup had
    switches: int  # of fibers: what the emulator spent, not the GPU
    seconds: float  # on this processor: says nothing about a GPU
    loads: list[int]
    stores: list[int]
    bytes_read: list[int]
    bytes_written: list[int]
    lines_read: list[int]  # distinct 64-byte lines
    lines_read_by_threadgroups: list[int]  # the same, summed over threadgroups
    lines_written: list[int]
    simdgroup_loads: list[int]  # once a simdgroup, not once a lane
    lines_of_loads: list[int]  # distinct 64-byte lines of each of them, added up
    threadgroup_loads: int
    threadgroup_stores: int
    threadgroup_bytes_read: int
    threadgroup_bytes_written: int

    @classmethod
    def of(cls, raw: RawCounters, counted: bool) -> Counters:
        operations = dict(zip(SIMD_OPERATIONS, raw.operations[1:], strict=False))
        values = {name: getattr(raw, name) for name in (*_TOTALS, *_THREADGROUP, "seconds")}
        values |= {name: list(getattr(raw, name)) for name in _BY_BUFFER}
        if not counted:
            values |= dict.fromkeys((*_BY_BUFFER, *_THREADGROUP), _NotCounted())
        return cls(dispatches=1, operations=operations, **values)

    @property
    def simdgroup_operations(self) -> int:
        """All simdgroup functions, barriers apart."""
        return sum(n for name, n in self.operations.items() if name != "barrier")

    def without(self, buffer: int) -> Counters:
        """As if nothing had asked for this buffer."""
        lists = ((name, getattr(self, name)) for name in _BY_BUFFER)
        return replace(
            self,
            **{
                name: [*of[:buffer], 0, *of[buffer + 1 :]]
                for name, of in lists
                if isinstance(of, list)
            },
        )

    def __add__(self, other: Counters) -> Counters:
        return Counters(
            **{
                f.name: _add(f.name, getattr(self, f.name), getattr(other, f.name))
                for f in fields(self)
            }
        )


def _add(name: str, a: Any, b: Any) -> Any:
    if isinstance(a, _NotCounted):
        return a
    if isinstance(b, _NotCounted):
        return b
    if isinstance(a, dict):
        return {key: a[key] + b[key] for key in a}
    if isinstance(a, list):
        return [x + y for x, y in zip(a, b, strict=True)]
    return max(a, b) if name == "threadgroup_memory" else a + b
