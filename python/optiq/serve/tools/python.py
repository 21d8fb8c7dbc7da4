"""The Python that the server runs for a model, in the sandbox: one session for a conversation."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from ...errors import OverloadedError, RequestError, SandboxError, UsageError
from ...sandbox import Limits, Result, Sandbox, Session
from ..asked import Interpreter
from ..runs import Ran

NAME = "python"
CODE = "code"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": (
            "Runs Python 3 in a sandbox without network. Variables and files stay for the whole "
            "conversation. Shows what is printed and the value of the last expression. Files in "
            "the working folder and open figures of matplotlib are given to the user."
        ),
        "parameters": {
            "type": "object",
            "properties": {CODE: {"type": "string", "description": "The program"}},
            "required": [CODE],
        },
    },
}
LIMITS = Limits(wall=30.0, cpu=30.0, memory=2**30, output=64 * 2**10, returned=8 * 2**20)
MOST_SESSIONS = 16
MOST_TOLD = 8000  # characters of each of stdout, stderr and the value
IDLE_SECONDS = 1200.0  # after which a session may go


PACKAGES = ("numpy", "pandas", "matplotlib")


def open_tool(packages: tuple[str, ...] | None = None) -> Python:
    """The tool, with these packages to import; by default those of PACKAGES that are installed.

    Raises SandboxUnavailable, UsageError.
    """
    if packages is None:
        packages = tuple(name for name in PACKAGES if find_spec(name) is not None)
    sandbox = Sandbox(LIMITS, packages=packages)
    try:
        return Python(sandbox)
    except BaseException:
        sandbox.close()
        raise


@dataclass
class _Container:
    """A session, and who uses it."""

    session: Session | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    used: float = field(default_factory=time.monotonic)
    files: Mapping[str, bytes] = field(default_factory=dict)  # to be put there at the next run


class Python:
    """Sessions of the sandbox by the names of their containers. Belongs to one event loop."""

    def __init__(
        self, sandbox: Sandbox, most: int = MOST_SESSIONS, limits: Limits = LIMITS
    ) -> None:
        """Raises SandboxUnavailable where the sandbox cannot hold a program."""
        self._sandbox, self._most, self._limits = sandbox, most, limits
        self._containers: OrderedDict[str, _Container] = OrderedDict()
        sandbox.run("0")

    def open(self, asked: Interpreter) -> str:
        """The container that is asked for, or a new one, with these files. Raises RequestError for
        a name that is not known, OverloadedError."""
        container = asked.container
        if container is None:
            container = next((c for c in reversed(asked.seen) if c in self._containers), None)
        if container is None:
            self._make_room()
            container = f"cntr_{secrets.token_hex(24)}"
            self._containers[container] = _Container()
        self.put(container, asked.files)
        return container

    def put(self, container: str, files: Mapping[str, bytes]) -> None:
        """Files that are there when the next program runs. Raises RequestError."""
        known = self._find(container)
        known.files = {**known.files, **files}

    async def run(self, identity: str, container: str, code: str) -> Ran:
        """Whatever the program does is told, and ends nothing but itself."""
        known = self._find(container)
        async with known.lock:
            note = ""
            try:
                if known.session is None or not known.session.alive:
                    note = "" if known.session is None else "[the interpreter was started anew]\n"
                    known.session = await asyncio.to_thread(
                        self._sandbox.session, limits=self._limits
                    )
                files, known.files = known.files, {}
                if files:
                    await asyncio.to_thread(known.session.write, files)
                result = await known.session.run_async(code)
            except (SandboxError, UsageError) as error:
                return Ran(identity, container, code, "", f"[{error}]", True, {})
            finally:
                known.used = time.monotonic()
        stdout, stderr = _output(result)
        return Ran(
            identity, container, code, note + stdout, stderr, result.status != "ok", result.files
        )

    async def files(self, container: str) -> dict[str, int]:
        """Names and sizes of the files in a container."""
        session = self._find(container).session
        return await asyncio.to_thread(session.list) if session and session.alive else {}

    async def read(self, container: str, name: str) -> bytes:
        """A file. Raises RequestError."""
        session = self._find(container).session
        try:
            if session is None:
                raise SandboxError(f"there is no file {name!r}")
            return await asyncio.to_thread(session.read, name)
        except (SandboxError, UsageError) as error:
            raise RequestError(str(error)) from None

    def close(self) -> None:
        self._sandbox.close()

    def _find(self, container: str) -> _Container:
        known = self._containers.get(container)
        if known is None:
            raise RequestError(
                f"the container {container[:60]!r} is not there, or no longer; leave it out for a "
                "new one",
                "container",
            )
        self._containers.move_to_end(container)
        known.used = time.monotonic()
        return known

    def _make_room(self) -> None:
        """Sessions that nobody has used for long go, and the oldest where there are too many."""
        idle = [name for name, known in self._containers.items() if not known.lock.locked()]
        old = time.monotonic() - IDLE_SECONDS
        gone = [name for name in idle if self._containers[name].used < old]
        if len(self._containers) - len(gone) >= self._most:
            gone = gone or idle[:1]
            if not gone:
                raise OverloadedError("all interpreters are busy", 5)
        for name in gone:
            session = self._containers.pop(name).session
            if session is not None:
                session.close()


def _output(result: Result) -> tuple[str, str]:
    stdout, stderr = _shortened(result.stdout), _shortened(result.stderr)
    if result.value is not None and result.value != "None":
        stdout += f"{_line_end(stdout)}{_shortened(result.value)}\n"
    if result.truncated:
        stdout += f"{_line_end(stdout)}[more output was dropped]\n"
    if result.files:
        stdout += f"{_line_end(stdout)}[files: {', '.join(sorted(result.files))}]\n"
    if result.status not in ("ok", "error"):
        stderr += f"{_line_end(stderr)}[{result.status}: {result.detail}]\n"
    return stdout, stderr


def _shortened(text: str) -> str:
    """Without its middle, where it would fill the model's context."""
    if len(text) <= MOST_TOLD:
        return text
    half = MOST_TOLD // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"


def _line_end(text: str) -> str:
    return "" if not text or text.endswith("\n") else "\n"
