"""Tier 1: pydantic-monty, an interpreter of a part of Python in worker processes of its own.

It has no file system, network or process to give away; what holds the code is the interpreter's
memory safety, not the kernel. Files are a folder in memory: what a snippet writes lasts for it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import SandboxError, SandboxUnavailable, UsageError
from . import folder
from .call import CANCELLED, Call
from .limits import Limits, OnOutput, Result, Status, Stream, Usage

_PLACE = "/work"
_SHOWN = 8000  # characters of a value


class Interpreter:
    """A pool of interpreters, started at the first use; safe to use from threads."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._pool: Any = None

    def run(
        self,
        code: str,
        files: Mapping[str, bytes],
        call: Call,
        args: Sequence[str],
        stdin: bytes,
    ) -> Result:
        if args or stdin:
            raise UsageError("level 'interpreter' has no arguments and no stdin; take 'process'")
        session = self.session(files, call.limits)
        try:
            return session.run(code, replace(call, limits=None))
        finally:
            session.close()

    def session(
        self, files: Mapping[str, bytes], limits: Limits | None = None
    ) -> InterpreterSession:
        limits = limits or self._limits
        folder.check(files, limits)
        return InterpreterSession(self._started(), files, limits)

    def close(self) -> None:
        with self._lock:
            if self._pool is not None:
                self._pool.__exit__(None, None, None)
                self._pool = None

    def _started(self) -> Any:
        with self._lock:
            if self._pool is None:
                monty = _monty()
                try:
                    pool = monty.Monty(request_timeout=self._limits.wall)
                    self._pool = pool.__enter__()
                except (OSError, monty.MontyError) as error:
                    raise SandboxUnavailable(f"pydantic-monty does not start: {error}") from error
            return self._pool


class InterpreterSession:
    """Snippets in one interpreter."""

    def __init__(self, pool: Any, files: Mapping[str, bytes], limits: Limits) -> None:
        monty = _monty()
        self._limits = limits
        self._mechanisms = (f"pydantic-monty {version('pydantic-monty')}",)
        self._stack = contextlib.ExitStack()
        self._alive = True
        self._output = _Output(0)
        checkout = pool.checkout(
            limits={
                "max_feed_duration_secs": min(limits.cpu, limits.wall),
                "max_memory": limits.memory,
                "max_total_sleep_secs": limits.wall,
            }
        )
        with contextlib.ExitStack() as stack:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="optiq-sandbox-")))
            inside = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, inside)
            folder.fill(inside, files)
            mount = monty.MountDir(
                host_path=place, virtual_path=_PLACE, memory_usage_limit=limits.disk
            )
            self._mount = stack.enter_context(mount)
            self._session = stack.enter_context(checkout)
            self._stack = stack.pop_all()

    @property
    def alive(self) -> bool:
        return self._alive

    def run(self, code: str, call: Call) -> Result:
        limits = call.limits or self._limits
        own = self._limits
        if replace(limits, output=own.output, returned=own.returned) != own:
            raise UsageError("a snippet of level 'interpreter' may have its own output limit alone")
        if not self._alive:
            raise SandboxError("the session has ended with its interpreter; start another")
        start = time.monotonic()
        output = _Output(limits.output, call.on_output)
        self._output = output
        with call.cancel.attached(output):
            status, detail, value = self._feed(code, output)
        if output.failure is not None:
            self._alive = False
            raise output.failure
        if output.cancelled:
            status, detail = "cancelled", output.cancelled
        elif output.truncated:
            status, detail = "output", f"more than {limits.output} bytes of output"
        # After a limit was hit the interpreter's state is not to be relied on.
        self._alive = status in ("ok", "error", "denied")
        usage = Usage(time.monotonic() - start, None, None)
        out, err = output.text["stdout"], output.text["stderr"]
        shown = None if value is None else repr(value)[:_SHOWN]
        return Result(
            status, out, err, output.truncated, usage, self._mechanisms, detail, value=shown
        )

    def list(self) -> dict[str, int]:
        raise UsageError("level 'interpreter' keeps no files; take level='process'")

    def read(self, name: str) -> bytes:
        raise UsageError("level 'interpreter' keeps no files; take level='process'")

    def write(self, files: Mapping[str, bytes]) -> None:
        raise UsageError("level 'interpreter' takes files at its start; take level='process'")

    def cancel(self) -> None:
        """At the next output; a snippet without any goes on to its limit of time."""
        self._output.cancelled = CANCELLED

    def close(self) -> None:
        self._stack.close()

    def _feed(self, code: str, output: _Output) -> tuple[Status, str, Any]:
        monty = _monty()
        try:
            value = self._session.feed_run(
                code, print_callback=output, mount=self._mount, cwd=_PLACE
            )
        except monty.MontyCrashedError as error:
            return ("timeout" if error.timed_out else "killed"), str(error), None
        except monty.MontyError as error:
            if hasattr(error, "display") and not output.stopped:
                output.add("stderr", error.display() + "\n")
            return _status(error.exception()), " ".join(str(error).split())[:500], None
        return "ok", "", value


class _Output:
    """What is printed, up to `limit` bytes of each stream."""

    def __init__(self, limit: int, hear: OnOutput | None = None) -> None:
        self.text: dict[Stream, str] = {"stdout": "", "stderr": ""}
        self.truncated = False
        self.cancelled = ""
        self.failure: Exception | None = None  # of the caller's function
        self._hear = hear
        self._room = dict.fromkeys(self.text, limit)

    @property
    def stopped(self) -> bool:
        return self.truncated or bool(self.cancelled) or self.failure is not None

    def __call__(self, stream: Stream, text: str) -> None:
        self.add(stream, text)
        if self.stopped:
            raise RuntimeError("stopped by the sandbox")

    def add(self, stream: Stream, text: str) -> None:
        data = text.encode(errors="replace")
        kept = data[: self._room[stream]]
        self._room[stream] -= len(kept)
        shown = kept.decode(errors="ignore")
        self.text[stream] += shown
        self.truncated |= len(kept) < len(data)
        try:
            if self._hear is not None and shown:
                self._hear(stream, shown)
        except Exception as error:
            self.failure = error


def _status(error: BaseException) -> Status:
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, TimeoutError):
        return "timeout"
    return "denied" if isinstance(error, PermissionError) else "error"


def _monty() -> Any:
    try:
        import pydantic_monty
    except ImportError:
        raise SandboxUnavailable(
            "level 'interpreter' needs pydantic-monty; pip install 'optiq-mlx[sandbox]'"
        ) from None
    return pydantic_monty
