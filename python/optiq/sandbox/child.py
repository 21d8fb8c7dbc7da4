"""One jailed process as its host sees it: output, messages, limits, end.

Everything in here runs in the thread that waits for the process (see loop.py). Another thread may
set `cancelled` and `closing`, and no more, so that no descriptor is used after it was closed.
"""

from __future__ import annotations

import codecs
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from . import folder
from .jail import wire
from .limits import Limits, OnOutput, Result, Status, Stream, Usage
from .loop import watch

LAST = 10.0  # seconds for a killed process to be reported as ended
_TOLD = 2**17  # bytes that a process may say to its host; what it has to say is short


@dataclass(frozen=True)
class Exit:
    """How a process ended: exit status or minus a signal; CPU seconds; peak bytes."""

    code: int
    cpu: float
    memory: int


class Capture:
    """Output of a stream up to `limit` bytes, told to `hear` as it arrives."""

    def __init__(self, stream: Stream, descriptor: int) -> None:
        self.stream = stream
        self.descriptor = descriptor
        os.set_blocking(descriptor, False)
        self.restart(0, None)

    def restart(self, limit: int, hear: OnOutput | None) -> None:
        self.limit = limit
        self.data = bytearray()
        self.truncated = False
        self._hear = hear
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def take(self, data: bytes) -> None:
        """Empty data is the end."""
        kept = data[: self.limit - len(self.data)]
        self.data += kept
        self.truncated |= len(data) > len(kept)
        if self._hear is not None:
            text = self._decoder.decode(kept, final=not data)
            if text:
                self._hear(self.stream, text)

    def text(self) -> str:
        """What is not UTF-8 shows as an escape."""
        return self.data.decode(errors="backslashreplace")


class Child:
    """A process that is locked in already. A subclass knows how it is ended and watched.

    `folder` is its open work folder; where `exact`, the kernel itself keeps that within limits.
    """

    exact = False
    gentle = False  # a limit is for the host to act on, who may interrupt first; else it kills

    def __init__(
        self, work: Path, folder: int, limits: Limits, out: int, err: int, channel: socket.socket
    ) -> None:
        self.work = work
        self.folder = folder
        self.limits = limits
        self.out, self.err = Capture("stdout", out), Capture("stderr", err)
        self.channel = channel
        channel.setblocking(False)
        self.outgoing = bytearray()
        self.inbox: list[dict[str, Any]] = []
        self.exit: Exit | None = None
        self.reason: tuple[Status, str] | None = None  # why we ended it
        self.overdue: tuple[Status, str] | None = None  # why it is to stop
        self.cancelled = ""  # why; set by any thread
        self.closing = False  # set by any thread
        self.cpu_until: float | None = None  # seconds of CPU at which to stop
        self.failure: Exception | None = None  # of a callback of the caller's
        self.sources: dict[int, Callable[[], object]] = {
            out: lambda: self._read(self.out),
            err: lambda: self._read(self.err),
            channel.fileno(): self._listen,
        }  # what to do when a descriptor is readable; one that has ended takes itself away
        self.begin(limits, None)

    def begin(self, limits: Limits, hear: OnOutput | None) -> None:
        """Forget what came of the last snippet, before the next."""
        self.limits = limits
        self.inbox.clear()
        self._messages = wire.Inbox(_TOLD)
        self.overdue = self.failure = None
        for capture in (self.out, self.err):
            capture.restart(limits.output, self._heard(hear))
        self._before: Mapping[str, folder.Found] = folder.files(self.folder)
        self._started = time.monotonic()

    def signal(self, number: int) -> None:
        """To the process alone; nothing where it is gone."""
        raise NotImplementedError

    def kill(self) -> None:
        """End the process now, whatever it does."""
        self.signal(signal.SIGKILL)

    def frozen(self) -> bool:
        """Whether every thread of the process has stopped."""
        return True

    def unlinked(self) -> int:
        """Bytes of its files that have no name any more."""
        return 0

    def so_far(self) -> Exit:
        """What the living process has used, where that can be seen."""
        return Exit(0, 0.0, 0)

    def guard(self, act: Callable[[], object]) -> bool:
        """Whether it went well. What goes wrong with a process is its end, not its host's."""
        try:
            act()
        except Exception as error:
            self.end("error", f"the process cannot be followed: {one_line(error)}")
            return False
        return True

    def tick(self) -> None:
        """Look at what no event tells of."""
        self.heed()
        if self.cpu_until is not None and self.so_far().cpu > self.cpu_until:
            self.stop("timeout", f"more than {self.limits.cpu:g} s of CPU time")
        self.look()

    def heed(self) -> None:
        """Stop where another thread asks for it."""
        if self.closing:
            self.end("cancelled", "the session was closed")
        if self.cancelled:
            self.stop("cancelled", self.cancelled)

    def look(self) -> None:
        """End it if its work folder is above the limit, where the kernel does not see to that."""
        if self.exact:
            return
        size, _ = folder.used(self.folder)
        size += self.unlinked()
        if size > self.limits.disk:
            endless = ", or cannot be counted" if size >= folder.ENDLESS else ""
            self.end("disk", f"the work folder is above {self.limits.disk} bytes{endless}")

    def stop(self, status: Status, detail: str) -> None:
        """A limit was hit; the first one counts."""
        if not self.gentle:
            self.end(status, detail)
        self.overdue = self.overdue or (status, detail)

    def end(self, status: Status, detail: str) -> None:
        """Kill the process for this reason; the first one counts."""
        if self.reason is None:
            self.reason = (status, detail)
        self.kill()

    def send(self, message: Any) -> None:
        """Give a message to the process, as far as it takes it; the loop sends the rest."""
        try:
            self.outgoing += wire.encode(message)
        except wire.WireError as error:
            raise UsageError(f"the code and its stdin are too long: {error}") from None
        self.flush()

    def flush(self) -> None:
        try:
            while self.outgoing:
                del self.outgoing[: self.channel.send(self.outgoing)]
        except BlockingIOError:
            pass
        except OSError:  # it has ended, and its end will be reported
            self.outgoing.clear()

    def _read(self, capture: Capture) -> bool:
        """Whether there was something to read; the process itself may have read it before."""
        try:
            data = os.read(capture.descriptor, 2**16)
        except BlockingIOError:
            return False
        if not data:
            self.sources.pop(capture.descriptor)
        capture.take(data)
        if capture.truncated:
            self.stop("output", f"more than {capture.limit} bytes of output")
        return bool(data)

    def _heard(self, hear: OnOutput | None) -> OnOutput | None:
        if hear is None:
            return None

        def safely(stream: Stream, text: str) -> None:
            try:
                if self.failure is None:
                    hear(stream, text)
            except Exception as error:
                self.failure = error
                self.stop("cancelled", "the caller's function for output failed")

        return safely

    def _listen(self) -> None:
        data = self._received()
        if data is None:
            return
        if not data:
            self.sources.pop(self.channel.fileno())
        try:
            self.inbox += [m for m in self._messages.feed(data) if isinstance(m, dict)]
        except wire.WireError as error:
            self.sources.pop(self.channel.fileno(), None)
            self.end("error", f"unreadable message from the process: {error}")

    def _received(self) -> bytes | None:
        """None: there is nothing yet; nothing: it has closed."""
        try:
            return self.channel.recv(2**16)
        except BlockingIOError:
            return None
        except OSError:
            return b""

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
        spent = not self.gentle and cpu >= self.limits.cpu
        if code == -signal.SIGXCPU or (code == -signal.SIGKILL and spent):
            return "timeout", f"more than {self.limits.cpu:g} s of CPU time"
        if code < 0:
            return "killed", f"ended by {_signal(-code)}"
        return self.told(code, self.says("code") or {})

    @property
    def exit_status(self) -> int | None:
        """Where the process ended by itself."""
        own = self.exit is not None and self.reason is None and self.exit.code >= 0
        return self.exit.code if own and self.exit else None

    def said(self, key: str, nonce: str) -> dict[str, Any] | None:
        """Its message with this key and the nonce of the snippet."""
        return next((m for m in self.inbox if m.get(key) == nonce), None)

    def says(self, key: str) -> dict[str, Any] | None:
        """The first message with this key."""
        return next((m for m in self.inbox if key in m), None)

    def told(self, code: int, said: Mapping[str, Any]) -> tuple[Status, str]:
        """(status, detail) of an exit status and what the process itself says about it."""
        if code == 0:
            return "ok", ""
        detail = one_line(said.get("detail")) or f"exit status {code}"
        status: Status = next((s for s in _TOLD_STATUS if s == said.get("status")), "error")
        return status, detail

    def result(
        self,
        ended: tuple[Status, str],
        mechanisms: tuple[str, ...],
        code: int | None,
        said: Mapping[str, Any],
    ) -> Result:
        """What came of it: (status, detail), exit status if it has one, what the process said."""
        if self.failure is not None:
            raise self.failure
        status, detail = ended
        value = said.get("value") if status == "ok" else None
        files, left_out = folder.changed(self.folder, self._before, self.limits.returned)
        return Result(
            status,
            self.out.text(),
            self.err.text(),
            self.out.truncated or self.err.truncated,
            self.usage(),
            mechanisms,
            detail,
            value=value if isinstance(value, str) else None,
            exit_status=code,
            files=files,
            left_out=left_out,
        )

    def usage(self) -> Usage:
        used = self.exit or self.so_far()
        return Usage(time.monotonic() - self._started, used.cpu, used.memory)

    def drain(self) -> None:
        """Read all that a process which has stopped has written, and what it still said."""
        for capture in (self.out, self.err):
            while capture.descriptor in self.sources and self._read(capture):
                pass
        while self._received():
            pass

    def close(self) -> None:
        """Kill the process if it lives, wait for its end and let go of the descriptors."""
        self.kill()
        watch([self], lambda: self.exit is not None, time.monotonic() + LAST)
        for descriptor in (self.out.descriptor, self.err.descriptor, self.folder):
            os.close(descriptor)
        self.channel.close()


_TOLD_STATUS: tuple[Status, ...] = ("denied", "memory", "disk")


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def one_line(untrusted: object) -> str:
    """Text of a process as one short line, without characters that a terminal would obey."""
    text = str(untrusted) if isinstance(untrusted, (str, Exception)) else ""
    return "".join(c if c.isprintable() else " " for c in text[:500])
