"""The front of the package: one sandbox, whatever holds the code."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Protocol, get_args

from ..errors import SandboxUnavailable, UsageError
from .call import Call, Cancel
from .limits import Limits, OnOutput, Result, Verdict
from .packages import Packages, find
from .waiting import awaited

Level = Literal["interpreter", "process", "namespace"]
NO_FILES: Mapping[str, bytes] = MappingProxyType({})


class _Session(Protocol):
    @property
    def alive(self) -> bool: ...

    def run(self, code: str, call: Call) -> Result: ...

    def list(self) -> dict[str, int]: ...

    def read(self, name: str) -> bytes: ...

    def write(self, files: Mapping[str, bytes]) -> None: ...

    def cancel(self) -> None: ...

    def close(self) -> None: ...


class Sandbox:
    """Runs untrusted Python under `limits`, held by at least what `level` names, or not at all.

    "process" (the default): full CPython and its standard library in a process that the kernel
    locks in; on Linux by Landlock and seccomp, and by bubblewrap too where that works; on macOS by
    seatbelt. "namespace": bubblewrap has to work. "interpreter": pydantic-monty, an interpreter of
    a part of Python without any access to the system, started faster.

    Where the level cannot be had, the first run raises SandboxUnavailable. The first run also
    starts what later ones are forked from; any number of threads may run code at a time.

    `packages`: names of installed packages, which programs may import with all they require, or a
    folder of packages. They are read-only. UsageError where one is not there.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        level: Level = "process",
        packages: Sequence[str] | Path = (),
    ) -> None:
        if level not in get_args(Level):
            raise UsageError(f"sandbox level {level!r} is not one of {', '.join(get_args(Level))}")
        self.limits = limits or Limits()
        self.level = level
        if level == "interpreter":
            if packages:
                raise UsageError("level 'interpreter' has no packages; take level='process'")
            from .interpreter import Interpreter

            self._interpreter: Interpreter | None = Interpreter(self.limits)
            close = self._interpreter.close
        else:
            from .processes import Processes

            self._interpreter = None
            self._processes = Processes(_jail(level, find(packages)), self.limits)
            close = self._processes.close
        self._close = weakref.finalize(self, close)

    def run(
        self,
        code: str,
        files: Mapping[str, bytes] = NO_FILES,
        *,
        args: Sequence[str] = (),
        stdin: bytes = b"",
        limits: Limits | None = None,
        on_output: OnOutput | None = None,
        cancel: Cancel | None = None,
    ) -> Result:
        """Run a program to its end, in a fresh process and a fresh work folder with `files`.

        `limits` stands in for the sandbox's. `on_output(stream, text)` is called as output
        arrives, in this thread. Whatever the code does is a Result. UsageError for files that the
        limits do not allow or whose names lead out of the folder.
        """
        call = Call(limits, on_output, cancel or Cancel())
        if self._interpreter is not None:
            return self._interpreter.run(code, files, call, args, stdin)
        return self._processes.run(code, files, call, args, stdin)

    async def run_async(
        self,
        code: str,
        files: Mapping[str, bytes] = NO_FILES,
        *,
        args: Sequence[str] = (),
        stdin: bytes = b"",
        limits: Limits | None = None,
        on_output: OnOutput | None = None,
    ) -> Result:
        """`run`, awaited. Cancelling the task ends the program."""

        def call(hear: OnOutput | None, cancel: Cancel) -> Result:
            return self.run(
                code,
                files,
                args=args,
                stdin=stdin,
                limits=limits,
                on_output=hear,
                cancel=cancel,
            )

        return await awaited(call, on_output)

    def judge(self, code: str, check: str, entry: str) -> Verdict:
        """Whether function `entry` of the untrusted `code` passes `check`, a trusted program.

        `check` defines `check(candidate)`, which calls the candidate and raises if it is not
        satisfied, as HumanEval's tests do. It runs in a jailed process of its own: arguments and
        results cross as plain data, the verdict comes over a descriptor that the code never had,
        with a nonce that is made after the code was imported. What a test uses beside the
        candidate (for HumanEval: the problem's prompt) belongs into `check`.
        """
        if self._interpreter is not None:
            raise UsageError("level 'interpreter' judges no tests; take level='process'")
        return self._processes.judge(code, check, entry)

    def session(
        self, files: Mapping[str, bytes] = NO_FILES, *, limits: Limits | None = None
    ) -> Session:
        """A process that keeps its variables and its work folder from one snippet to the next."""
        return Session((self._interpreter or self._processes).session(files, limits), self)

    def close(self) -> None:
        """End all processes, sessions too, and remove the work folders; from any thread."""
        self._close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Session:
    """Snippets that share variables and a work folder; made by `Sandbox.session`.

    A snippet that raises leaves the session alive, and so does one that is interrupted at a limit
    of time or output. One that ends the process ends the session: then `alive` is False and `run`
    raises SandboxError. Any thread may use a session; snippets of several wait for each other.
    """

    def __init__(self, session: _Session, sandbox: Sandbox) -> None:
        self._session = session
        self._sandbox = sandbox  # which would close with its last reference

    @property
    def alive(self) -> bool:
        return self._session.alive

    def run(
        self,
        code: str,
        *,
        limits: Limits | None = None,
        on_output: OnOutput | None = None,
        cancel: Cancel | None = None,
    ) -> Result:
        """Run one snippet. `usage.cpu` and `usage.memory` are of the session so far.

        `limits` may differ from the session's in `wall`, `cpu`, `output` and `returned`.
        """
        return self._session.run(code, Call(limits, on_output, cancel or Cancel()))

    async def run_async(
        self, code: str, *, limits: Limits | None = None, on_output: OnOutput | None = None
    ) -> Result:
        """`run`, awaited. Cancelling the task interrupts the snippet; the session goes on."""

        def call(hear: OnOutput | None, cancel: Cancel) -> Result:
            return self.run(code, limits=limits, on_output=hear, cancel=cancel)

        return await awaited(call, on_output)

    def list(self) -> dict[str, int]:
        """The files of the work folder, and their sizes in bytes."""
        return self._session.list()

    def read(self, name: str) -> bytes:
        """A file of the work folder; SandboxError where there is no such file."""
        return self._session.read(name)

    def write(self, files: Mapping[str, bytes]) -> None:
        """Put files into the work folder, over what is there under their names."""
        self._session.write(files)

    def cancel(self) -> None:
        """Interrupt the snippet that runs; from any thread."""
        self._session.cancel()

    def close(self) -> None:
        """End the session, and the snippet that runs; from any thread."""
        self._session.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _jail(level: Level, packages: Packages):  # type: ignore[no-untyped-def]
    if sys.platform == "linux":
        from .kernel_jail import KernelJail

        return KernelJail(True if level == "namespace" else None, packages=packages)
    if sys.platform == "darwin" and level == "process":
        from .seatbelt import SeatbeltJail

        return SeatbeltJail(packages)
    raise SandboxUnavailable(f"level {level!r} cannot be had on {sys.platform}")
