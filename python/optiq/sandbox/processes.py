"""Tier 2: full CPython in jailed processes."""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from . import folder
from .call import Call
from .child import LAST, Child, one_line
from .limits import Limits, Result, Usage, Verdict, VerdictStatus
from .loop import watch
from .session import ProcessSession

_DAY = 86400.0
_MOMENT = 1.0  # seconds for a candidate that is gone to end
_LIMITS = ("timeout", "memory", "output", "disk", "killed")


class Jail(Protocol):
    """Where processes come from that are locked in before they get an order."""

    folder: Path

    @property
    def mechanisms(self) -> tuple[str, ...]: ...

    def spawn(self, limits: Limits, peer: socket.socket | None = None) -> Child: ...

    def close(self) -> None: ...


class Processes:
    """Programs, sessions and verdicts in processes of a jail; safe to use from threads."""

    def __init__(self, jail: Jail, limits: Limits) -> None:
        self.jail = jail
        self.limits = limits
        self._sessions: weakref.WeakSet[ProcessSession] = weakref.WeakSet()

    def run(
        self,
        code: str,
        files: Mapping[str, bytes],
        call: Call | None = None,
        args: Sequence[str] = (),
        stdin: bytes = b"",
    ) -> Result:
        call = call or Call()
        limits = call.limits or self.limits
        with self._child(limits, files) as child:
            child.begin(limits, call.on_output)
            with call.cancel.attached(child):
                child.heed()
                order = {"mode": "run", "code": code, "args": list(args)}
                child.send(order | ({"stdin": stdin.hex()} if stdin else {}))
                finish([child], child, time.monotonic() + limits.wall)
            said = child.says("code") or {}
            return child.result(child.verdict(), self.jail.mechanisms, child.exit_status, said)

    def session(self, files: Mapping[str, bytes], limits: Limits | None = None) -> ProcessSession:
        limits = limits or self.limits
        child = self._spawn(replace(limits, cpu=_DAY), files)  # the host counts for each snippet
        session = ProcessSession(child, limits, self.jail.mechanisms)
        self._sessions.add(session)
        return session

    def judge(self, code: str, check: str, entry: str) -> Verdict:
        """See `Sandbox.judge`. The test and its nonce go out once the candidate is imported."""
        start = time.monotonic()
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as stack:
            with ours, theirs:
                candidate = stack.enter_context(self._child(self.limits, {}, ours))
                tester = stack.enter_context(self._child(self.limits, {}, theirs))
            status, detail = self._outcome(candidate, tester, code, check, entry)
            both = [candidate, tester]
            for child in both:
                child.kill()
            ended = time.monotonic() + LAST  # for what they used
            watch(both, lambda: candidate.over and tester.over, ended)
            ends = [child.exit or child.so_far() for child in both]
            cpu, memory = sum(e.cpu for e in ends), max(e.memory for e in ends)
            usage = Usage(time.monotonic() - start, cpu, memory)
            return Verdict(status, detail, usage, self.jail.mechanisms)

    def close(self) -> None:
        """End all processes and remove what they had."""
        for session in list(self._sessions):
            session.close()
        self.jail.close()

    def _outcome(
        self, candidate: Child, tester: Child, code: str, check: str, entry: str
    ) -> tuple[VerdictStatus, str]:
        both = [candidate, tester]
        deadline = time.monotonic() + self.limits.wall
        candidate.send({"mode": "serve", "code": code, "entry": entry})
        _wait(both, candidate, "ready", deadline)
        if not candidate.says("ready"):
            finish(both, candidate, deadline)
            status, detail = candidate.verdict()
            if status == "ok":
                return "error", "the code ended the process instead of defining a function"
            return status, detail
        nonce = secrets.token_hex(16)
        tester.send({"mode": "check", "check": check, "entry": entry, "nonce": nonce})
        _wait(both, tester, "nonce", deadline)
        told = tester.says("nonce")
        if told is None or told["nonce"] != nonce:
            finish(both, tester, deadline)
            status, detail = tester.verdict()
            return (status, detail) if status in _LIMITS else ("failed", "the test gave no verdict")
        if told.get("passed") is True and candidate.reason is None:
            return "passed", ""
        gone = bool(told.get("gone"))  # then the candidate's end says more
        if gone and not watch(both, lambda: candidate.over, time.monotonic() + _MOMENT):
            return "failed", one_line(told.get("detail", ""))
        status, detail = candidate.verdict()
        if candidate.exit is not None and status in _LIMITS:
            return status, detail
        return "failed", one_line(told.get("detail", ""))

    @contextlib.contextmanager
    def _child(
        self, limits: Limits, files: Mapping[str, bytes], peer: socket.socket | None = None
    ) -> Iterator[Child]:
        """A process in a work folder of its own; both are gone afterwards."""
        child = self._spawn(limits, files, peer)
        try:
            yield child
        finally:
            child.close()

    def _spawn(
        self, limits: Limits, files: Mapping[str, bytes], peer: socket.socket | None = None
    ) -> Child:
        folder.check(files, limits)
        child = self.jail.spawn(limits, peer)
        try:
            folder.fill(child.folder, files)
        except BaseException:
            child.close()
            raise
        return child


def _wait(children: list[Child], child: Child, key: str, deadline: float) -> None:
    """Until `child` has sent a message with this key, or has ended, or time is up."""
    if not watch(children, lambda: child.over or child.says(key) is not None, deadline):
        child.end("timeout", f"more than {child.limits.wall:g} s")


def finish(children: list[Child], child: Child, deadline: float) -> None:
    """Until `child` has ended, by itself or at the deadline by us."""
    if not watch(children, lambda: child.over, deadline):
        child.end("timeout", f"more than {child.limits.wall:g} s")
        watch(children, lambda: child.over, time.monotonic() + LAST)
    child.look()
