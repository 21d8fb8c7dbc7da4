"""Tier 2 on macOS: a process under seatbelt, watched from outside.

NEVER RUN: there was no Mac to run it on. What is tested, on Linux, is the text of the profile and
the worker's side without the sandbox around it. A start that is not locked in is refused.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import SandboxError, SandboxUnavailable
from . import cpython, folder
from .child import Child, Exit
from .jail import wire
from .limits import Limits
from .packages import NO_PACKAGES, Packages

_PATIENCE = 30.0
_SYSTEM = ("/usr/lib", "/System/Library", "/System/Volumes/Preboot/Cryptexes")
_PROFILE = """\
(version 1)
(deny default)
; the interpreter may be started, and start itself again as a framework build does; nothing may fork
(allow process-exec {programs})
(allow file-read* {runtime}
    (literal "/dev/null") (literal "/dev/random") (literal "/dev/urandom"))
(allow file-read-metadata {parents})
(allow file-read* file-write* (subpath {work}))
(allow file-write-data (literal "/dev/null"))
(allow sysctl-read
    (sysctl-name "hw.activecpu") (sysctl-name "hw.logicalcpu") (sysctl-name "hw.ncpu")
    (sysctl-name "hw.pagesize") (sysctl-name "hw.pagesize_compat") (sysctl-name "hw.memsize")
    (sysctl-name "kern.osrelease") (sysctl-name "kern.ostype") (sysctl-name "kern.osversion")
    (sysctl-name "kern.version") (sysctl-name "kern.usrstack64") (sysctl-name "hw.machine"))
(allow signal (target self))
"""


def profile(work: str, readable: Sequence[str], prefix: str) -> str:
    """The seatbelt profile: all is denied but reading the runtime and using the work folder."""
    paths = [*_SYSTEM, *readable, cpython.HERE + "/jail", prefix]
    if prefix.startswith("/opt/homebrew/"):  # libraries of its own, such as OpenSSL
        paths.append("/opt/homebrew/opt")
    parents = {str(p) for path in (*paths, work) for p in Path(path).parents}
    return _PROFILE.format(
        programs=f"(subpath {_quote(prefix)})",
        runtime=" ".join(f"(subpath {_quote(path)})" for path in dict.fromkeys(paths)),
        parents=" ".join(f"(literal {_quote(path)})" for path in sorted(parents)),
        work=_quote(work),
    )


def _quote(path: str) -> str:
    """A path as a string of the profile's language."""
    if any(ord(c) < 32 for c in path):
        raise SandboxUnavailable(f"path {path!r} cannot be named in a profile")
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'


class Watched(Child):
    """A process that its host waits for itself; memory and files are looked at every tick."""

    def __init__(self, process: subprocess.Popen[bytes], *child: Any) -> None:
        super().__init__(*child)
        self._process = process

    def signal(self, number: int) -> None:
        if self.exit is None:  # then nobody has waited for it, and the number is still its own
            os.kill(self._process.pid, number)

    def tick(self) -> None:
        super().tick()
        self._reap(os.WNOHANG)

    def look(self) -> None:
        super().look()
        _, entries = folder.used(self.folder)
        if entries > self.limits.files:
            self.end("disk", f"more than {self.limits.files} files")
        if _footprint(self._process.pid) > self.limits.memory:
            self.end("memory", f"more than {self.limits.memory} bytes of memory")

    def close(self) -> None:
        super().close()
        folder.remove(self.work)

    def _reap(self, options: int) -> None:
        if self.exit is not None:
            return
        pid, status, used = os.wait4(self._process.pid, options)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            self._process.returncode = code
            peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            self.exit = Exit(code, used.ru_utime + used.ru_stime, peak)


class SeatbeltJail:
    """A process of its own for every run, since a sandbox cannot be narrowed after a fork."""

    mechanisms = ("seatbelt", "rlimits", "watchdogs")

    def __init__(self, packages: Packages = NO_PACKAGES) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="optiq-sandbox-")).resolve()
        self._path, self._visible = packages.lay(self.folder / "packages")

    def spawn(self, limits: Limits, peer: socket.socket | None = None) -> Watched:
        """A process that waits for its order over its channel."""
        if not self.folder.exists():
            raise SandboxError("the sandbox is closed; make another")
        work = Path(tempfile.mkdtemp(dir=self.folder))
        ours, theirs = socket.socketpair()
        numbers = [theirs.fileno(), peer.fileno() if peer else -1]
        order = json.dumps({"work": str(work), "limits": asdict(limits), "path": self._path})
        try:
            process = subprocess.Popen(
                [*self.wrapping(work), *cpython.command("alone", *map(str, numbers), order)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=cpython.environment(),
                cwd="/",
                pass_fds=[n for n in numbers if n >= 0],
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            folder.remove(work)
            raise SandboxUnavailable(f"no jail: {error}") from error
        finally:
            theirs.close()
        assert process.stdout is not None
        assert process.stderr is not None
        out, err = os.dup(process.stdout.fileno()), os.dup(process.stderr.fileno())
        process.stdout.close()
        process.stderr.close()
        inside = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
        child = Watched(process, work, inside, limits, out, err, ours)
        ours.settimeout(_PATIENCE)
        try:
            told = wire.first(ours)
            if not told.get("locked") or not self.confined(process.pid):
                raise SandboxUnavailable(f"no jail: {told.get('unlocked', 'the system says so')}")
        except (OSError, EOFError, wire.WireError) as error:
            child.close()  # then there is an end to what it says
            reason = child.err.text().strip()
            raise SandboxUnavailable(f"no jail: {reason or error}") from error
        except SandboxUnavailable:
            child.close()
            raise
        ours.setblocking(False)
        return child

    def wrapping(self, work: Path) -> list[str]:
        """What a command line is put behind."""
        prefix = os.path.realpath(sys.base_prefix)
        readable = [*cpython.readable(), *self._visible]
        return ["/usr/bin/sandbox-exec", "-p", profile(str(work), readable, prefix)]

    def confined(self, pid: int) -> bool:
        """Whether the system says that a process is in a sandbox."""
        return bool(ctypes.CDLL(None).sandbox_check(pid, None, 0) == 1)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _footprint(pid: int) -> int:
    """Bytes of memory that macOS charges to a process."""
    if sys.platform != "darwin":
        return 0
    usage = ctypes.create_string_buffer(256)  # struct rusage_info_v0
    if ctypes.CDLL(None).proc_pid_rusage(pid, 0, usage):
        return 0
    return int(struct.unpack_from("=Q", usage.raw, 16 + 7 * 8)[0])
