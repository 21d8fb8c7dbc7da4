"""Tier 2: full CPython in jailed processes."""

from __future__ import annotations

import contextlib
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from ..errors import SandboxError
from . import folder
from .child import Child, one_line, watch
from .limits import Limits, Result, Usage, Verdict, VerdictStatus

_LAST = 10.0  # seconds for a killed process to be reported as ended
_MOMENT = 1.0  # seconds for a candidate that is gone to end
_LIMITS = ("timeout", "memory", "output", "disk", "killed")


class Jail(Protocol):
    """Where processes come from that are locked in before they get an order."""

    folder: Path

    @property
    def mechanisms(self) -> tuple[str, ...]: ...

    def spawn(self, work: Path, limits: Limits, peer: socket.socket | None = None) -> Child: ...

    def close(self) -> None: ...


class Processes:
    """Programs, sessions and verdicts in processes of a jail; safe to use from threads."""

    def __init__(self, jail: Jail, limits: Limits) -> None:
        self.jail = jail
        self.limits = limits

    def run(self, code: str, files: Mapping[str, bytes]) -> Result:
        with self._child(files) as child:
            child.send({"mode": "run", "code": code})
            _finish([child], child, time.monotonic() + self.limits.wall)
            return child.result(*child.verdict(), self.jail.mechanisms)

    def session(self, files: Mapping[str, bytes]) -> ProcessSession:
        return ProcessSession(self, files)

    def judge(self, code: str, check: str, entry: str) -> Verdict:
        """See `Sandbox.judge`. The test and its nonce go out once the candidate is imported."""
        start = time.monotonic()
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as stack:
            with ours, theirs:
                candidate = stack.enter_context(self._child({}, ours))
                tester = stack.enter_context(self._child({}, theirs))
            status, detail = self._outcome(candidate, tester, code, check, entry)
            both = [candidate, tester]
            for child in both:
                child.kill()
            watch(both, lambda: candidate.over and tester.over, _LAST)  # for what they used
            ends = [child.exit or child.so_far() for child in both]
            cpu, memory = sum(e.cpu for e in ends), max(e.memory for e in ends)
            usage = Usage(time.monotonic() - start, cpu, memory)
            return Verdict(status, detail, usage, self.jail.mechanisms)

    def _outcome(
        self, candidate: Child, tester: Child, code: str, check: str, entry: str
    ) -> tuple[VerdictStatus, str]:
        both = [candidate, tester]
        deadline = time.monotonic() + self.limits.wall
        candidate.send({"mode": "serve", "code": code, "entry": entry})
        _wait(both, candidate, "ready", deadline)
        if not candidate.says("ready"):
            _finish(both, candidate, deadline)
            status, detail = candidate.verdict()
            if status == "ok":
                return "error", "the code ended the process instead of defining a function"
            return status, detail
        nonce = secrets.token_hex(16)
        tester.send({"mode": "check", "check": check, "entry": entry, "nonce": nonce})
        _wait(both, tester, "nonce", deadline)
        told = tester.says("nonce")
        if told is None or told["nonce"] != nonce:
            _finish(both, tester, deadline)
            status, detail = tester.verdict()
            return (status, detail) if status in _LIMITS else ("failed", "the test gave no verdict")
        if told.get("passed") is True and candidate.reason is None:
            return "passed", ""
        if told.get("gone"):  # then the candidate's end says more
            _finish(both, candidate, time.monotonic() + _MOMENT)
        status, detail = candidate.verdict()
        if candidate.exit is not None and status in _LIMITS:
            return status, detail
        return "failed", one_line(told.get("detail", ""))

    @contextlib.contextmanager
    def _child(
        self, files: Mapping[str, bytes], peer: socket.socket | None = None
    ) -> Iterator[Child]:
        """A process in a work folder of its own; both are gone afterwards."""
        if not self.jail.folder.exists():
            raise SandboxError("the sandbox is closed; make another")
        child = None
        work = Path(tempfile.mkdtemp(dir=self.jail.folder))
        try:
            folder.fill(work, files)
            child = self.jail.spawn(work, self.limits, peer)
            yield child
        finally:
            if child is not None:
                child.close()
            folder.remove(work)


class ProcessSession:
    """Snippets in one namespace of one process; its work folder lives as long."""

    def __init__(self, processes: Processes, files: Mapping[str, bytes]) -> None:
        self._limits = processes.limits
        self._jail = processes.jail
        self._stack = contextlib.ExitStack()
        self._child = self._stack.enter_context(processes._child(files))
        self._child.send({"mode": "session"})
        _wait([self._child], self._child, "ready", time.monotonic() + _LAST)

    @property
    def alive(self) -> bool:
        return self._child.exit is None and self._child.reason is None

    def run(self, code: str) -> Result:
        child = self._child
        if not self.alive:
            raise SandboxError("the session has ended with its process; start another")
        child.restart()
        deadline = time.monotonic() + self._limits.wall
        child.send({"code": code})
        _wait([child], child, "ready", deadline)
        told = child.says("ready")
        if told is None:
            _finish([child], child, deadline)
            status, detail = child.verdict()
        else:
            child.drain()
            failed = told.get("code")
            status, detail = child.reason or child.told(failed if isinstance(failed, int) else 1)
        return child.result(status, detail, self._jail.mechanisms)

    def close(self) -> None:
        self._stack.close()


def _wait(children: list[Child], child: Child, key: str, deadline: float) -> None:
    """Until `child` has sent a message with this key, or has ended, or time is up."""
    left = deadline - time.monotonic()
    if not watch(children, lambda: child.over or child.says(key) is not None, left):
        child.end("timeout", f"more than {child.limits.wall:g} s")


def _finish(children: list[Child], child: Child, deadline: float) -> None:
    """Until `child` has ended, by itself or at the deadline by us."""
    if not watch(children, lambda: child.over, deadline - time.monotonic()):
        child.end("timeout", f"more than {child.limits.wall:g} s")
        watch(children, lambda: child.over, _LAST)
