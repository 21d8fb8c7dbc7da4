"""One jailed process as its host sees it: output, messages, limits, end."""

from __future__ import annotations

import os
import select
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from . import folder
from .jail import wire
from .limits import Limits, Result, Status, Usage

_TOLD = 2**16  # bytes that a process may say to its host; what it has to say is short
TICK = 0.02  # seconds between two looks at what no event tells of


@dataclass(frozen=True)
class Exit:
    """How a process ended: exit status or minus a signal; CPU seconds; peak bytes."""

    code: int
    cpu: float
    memory: int


class Capture:
    """Output of a stream up to `limit` bytes."""

    def __init__(self, descriptor: int, limit: int) -> None:
        self.descriptor = descriptor
        self.limit = limit
        self.data = bytearray()
        self.truncated = False

    def take(self, data: bytes) -> None:
        room = self.limit - len(self.data)
        self.data += data[:room]
        self.truncated |= len(data) > room

    def text(self) -> str:
        """What is no UTF-8 shows as an escape."""
        return self.data.decode(errors="backslashreplace")


class Child:
    """A process that is locked in already. A subclass knows how it is ended and watched."""

    def __init__(
        self, work: Path, limits: Limits, out: int, err: int, channel: socket.socket
    ) -> None:
        self.work = work
        self.limits = limits
        self.out, self.err = Capture(out, limits.output), Capture(err, limits.output)
        self.channel = channel
        self.inbox: list[dict[str, Any]] = []
        self.exit: Exit | None = None
        self.reason: tuple[Status, str] | None = None  # why we ended it
        self.sources: dict[int, Callable[[], None]] = {
            out: lambda: self._read(self.out),
            err: lambda: self._read(self.err),
            channel.fileno(): self._listen,
        }  # what to do when a descriptor is readable; one that has ended takes itself away
        self._messages = wire.Inbox(_TOLD)
        self._started = time.monotonic()

    def kill(self) -> None:
        """End the process now, whatever it does."""
        raise NotImplementedError

    def pid(self) -> int | None:
        """The process id here, for a look at its open files."""
        return None

    def tick(self) -> None:
        """Look at what no event tells of."""
        size, _ = folder.used(self.work, self.pid())
        if size > self.limits.disk:
            deep = f", or deeper than {folder.DEEPEST} folders" if size >= folder.TOO_DEEP else ""
            self.end("disk", f"the work folder is above {self.limits.disk} bytes{deep}")

    def end(self, status: Status, detail: str) -> None:
        """Kill the process for this reason; the first one counts."""
        if self.reason is None and self.exit is None:
            self.reason = (status, detail)
        self.kill()

    def send(self, message: Any) -> None:
        """Give a message to the process; it is ended if it does not take it in time."""
        try:
            data = wire.encode(message)
        except wire.WireError as error:
            raise UsageError(f"the code is too long: {error}") from None
        try:
            self.channel.settimeout(self.limits.wall)
            self.channel.sendall(data)
        except TimeoutError:
            self.end("timeout", "the process does not read its channel")
        except OSError:
            pass  # it has ended, and its end will be reported

    def _read(self, capture: Capture) -> None:
        data = os.read(capture.descriptor, 2**16)
        if not data:
            self.sources.pop(capture.descriptor)
        capture.take(data)
        if capture.truncated:
            self.end("output", f"more than {capture.limit} bytes of output")

    def _listen(self) -> None:
        try:
            data = self.channel.recv(2**16)
            self.inbox += [m for m in self._messages.feed(data) if isinstance(m, dict)]
        except (OSError, wire.WireError) as error:
            data = b""
            self.end("error", f"unreadable message from the process: {error}")
        if not data:
            self.sources.pop(self.channel.fileno())

    def so_far(self) -> Exit:
        """What the living process has used, where that can be seen."""
        return Exit(0, 0.0, 0)

    def usage(self) -> Usage:
        used = self.exit or self.so_far()
        return Usage(time.monotonic() - self._started, used.cpu, used.memory)

    @property
    def over(self) -> bool:
        """It has ended and all its output is here."""
        ends = (self.out.descriptor, self.err.descriptor, self.channel.fileno())
        return self.exit is not None and not any(d in self.sources for d in ends)

    def verdict(self) -> tuple[Status, str]:
        """(status, detail) of a process that has ended."""
        if self.reason is not None:
            return self.reason
        code = self.exit.code if self.exit else -signal.SIGKILL
        cpu = self.exit.cpu if self.exit else 0.0
        if code == -signal.SIGXCPU or (code == -signal.SIGKILL and cpu >= self.limits.cpu):
            return "timeout", f"more than {self.limits.cpu:g} s of CPU time"
        if code < 0:
            return "killed", f"ended by {signal.Signals(-code).name}"
        return self.told(code)

    def says(self, key: str) -> dict[str, Any] | None:
        """The first message with this key."""
        return next((m for m in self.inbox if key in m), None)

    def told(self, code: int) -> tuple[Status, str]:
        """(status, detail) of an exit status and what the process itself says about it."""
        if code == 0:
            return "ok", ""
        told = self.says("status") or {}
        detail = one_line(told.get("detail") or f"exit status {code}")
        if told.get("status") == "denied":
            return "denied", detail
        return ("memory" if told.get("status") == "memory" else "error"), detail

    def result(self, status: Status, detail: str, mechanisms: tuple[str, ...]) -> Result:
        out, err = self.out, self.err
        truncated = out.truncated or err.truncated
        return Result(status, out.text(), err.text(), truncated, self.usage(), mechanisms, detail)

    def restart(self) -> None:
        """Forget what came of the last snippet, before the next."""
        self.inbox.clear()
        self._messages = wire.Inbox(_TOLD)
        for capture in (self.out, self.err):
            capture.data.clear()
        self._started = time.monotonic()

    def drain(self) -> None:
        """Read what the process has written so far."""
        for capture in (self.out, self.err):
            while capture.descriptor in self.sources:
                if not select.select([capture.descriptor], [], [], 0)[0]:
                    break
                self._read(capture)

    def close(self) -> None:
        """Kill the process if it lives and let go of the descriptors."""
        self.kill()
        for capture in (self.out, self.err):
            os.close(capture.descriptor)
        self.channel.close()


def one_line(untrusted: object) -> str:
    """Text of a process as one short line, without characters that a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in str(untrusted)[:500])


def watch(children: Sequence[Child], until: Callable[[], bool], seconds: float) -> bool:
    """Serve the children until `until()`; False if that took more than `seconds`."""
    deadline = time.monotonic() + seconds
    next_tick = time.monotonic() + TICK
    with selectors.DefaultSelector() as selector:
        for child in children:
            for descriptor in child.sources:
                selector.register(descriptor, selectors.EVENT_READ, child)
        while not until():
            now = time.monotonic()
            if now >= deadline:
                return False
            if now >= next_tick:
                for child in children:
                    child.tick()
                next_tick = time.monotonic() + TICK
            for key, _ in selector.select(max(0.0, min(deadline, next_tick) - time.monotonic())):
                child = key.data
                child.sources[key.fd]()
                if key.fd not in child.sources:
                    selector.unregister(key.fd)
    return True
