"""Tier 1: pydantic-monty, an interpreter of a part of Python in worker processes of its own.

It has no file system, network or process to give away; what holds the code is the interpreter's
memory safety, not the kernel. Files are a folder in memory: what a snippet writes lasts for it.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import SandboxError, SandboxUnavailable
from . import folder
from .limits import Limits, Result, Status, Usage

_PLACE = "/work"


class Interpreter:
    """A pool of interpreters, started at the first use; safe to use from threads."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._pool: Any = None

    def run(self, code: str, files: Mapping[str, bytes]) -> Result:
        session = self.session(files)
        try:
            return session.run(code)
        finally:
            session.close()

    def session(self, files: Mapping[str, bytes]) -> InterpreterSession:
        return InterpreterSession(self._started(), files, self._limits)

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
        checkout = pool.checkout(
            limits={
                "max_feed_duration_secs": min(limits.cpu, limits.wall),
                "max_memory": limits.memory,
                "max_total_sleep_secs": limits.wall,
            }
        )
        with contextlib.ExitStack() as stack:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="optiq-sandbox-")))
            folder.fill(place, files)
            mount = monty.MountDir(
                host_path=place, virtual_path=_PLACE, memory_usage_limit=limits.disk
            )
            self._mount = stack.enter_context(mount)
            self._session = stack.enter_context(checkout)
            self._stack = stack.pop_all()

    @property
    def alive(self) -> bool:
        return self._alive

    def run(self, code: str) -> Result:
        if not self._alive:
            raise SandboxError("the session has ended with its interpreter; start another")
        start = time.monotonic()
        output = _Output(self._limits.output)
        status, detail = self._feed(code, output)
        if output.truncated:
            status, detail = "output", f"more than {self._limits.output} bytes of output"
        # After a limit was hit the interpreter's state is not to be relied on.
        self._alive = status in ("ok", "error", "denied")
        usage = Usage(time.monotonic() - start, None, None)
        out, err = output.text["stdout"], output.text["stderr"]
        return Result(status, out, err, output.truncated, usage, self._mechanisms, detail)

    def close(self) -> None:
        self._stack.close()

    def _feed(self, code: str, output: _Output) -> tuple[Status, str]:
        monty = _monty()
        try:
            self._session.feed_run(code, print_callback=output, mount=self._mount, cwd=_PLACE)
        except monty.MontyCrashedError as error:
            return ("timeout" if error.timed_out else "killed"), str(error)
        except monty.MontyError as error:
            if hasattr(error, "display"):
                output("stderr", error.display() + "\n")
            return _status(error.exception()), " ".join(str(error).split())[:500]
        return "ok", ""


class _Output:
    """What is printed, up to `limit` bytes of each stream."""

    def __init__(self, limit: int) -> None:
        self.text = {"stdout": "", "stderr": ""}
        self.truncated = False
        self._room = dict.fromkeys(self.text, limit)

    def __call__(self, stream: str, text: str) -> None:
        data = text.encode(errors="replace")
        kept = data[: self._room[stream]]
        self._room[stream] -= len(kept)
        self.text[stream] += kept.decode(errors="ignore")
        if len(kept) < len(data):
            self.truncated = True
            raise RuntimeError("output limit")


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
