"""The one loop in which the host waits for jailed processes.

Nothing in here blocks on what such a process does: every end is non-blocking, every wait has a
deadline by the host's clock, and whatever arrives or fails ends in the child's `reason`.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import Protocol

TICK = 0.02  # seconds between two looks at what no event tells of
_IN, _OUT = select.POLLIN, select.POLLOUT


class Waited(Protocol):
    """A process that is waited for; see `Child`."""

    channel: socket.socket
    outgoing: bytearray
    sources: dict[int, Callable[[], object]]

    def guard(self, act: Callable[[], object]) -> bool: ...

    def tick(self) -> None: ...

    def flush(self) -> None: ...


def watch(children: Sequence[Waited], until: Callable[[], bool], deadline: float) -> bool:
    """Serve the children until `until()`; False where the deadline came first."""
    poll = select.poll()
    owners = {d: child for child in children for d in child.sources}
    for descriptor in owners:
        poll.register(descriptor, _IN)
    writing: set[int] = set()
    next_tick = time.monotonic() + TICK
    while True:
        for child in children:
            channel = child.channel.fileno()
            wanted = bool(child.outgoing) and channel in owners
            if wanted != (channel in writing):
                poll.modify(channel, _IN | _OUT if wanted else _IN)
                (writing.add if wanted else writing.discard)(channel)
        if until():
            return True
        now = time.monotonic()
        if now >= deadline:
            return False
        if now >= next_tick:
            for child in children:
                child.guard(child.tick)
            next_tick = time.monotonic() + TICK
            continue
        wait = max(0.0, min(deadline, next_tick) - now)
        for descriptor, event in poll.poll(wait * 1000):
            child = owners[descriptor]
            if event & _OUT:
                child.guard(child.flush)
            if event & ~_OUT and not child.guard(child.sources[descriptor]):
                child.sources.pop(descriptor, None)
            if descriptor not in child.sources:
                poll.unregister(descriptor)
                owners.pop(descriptor)
                writing.discard(descriptor)
