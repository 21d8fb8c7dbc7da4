"""Tier 2 on Linux: a zygote, and workers that lock themselves in with Landlock and seccomp."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import SandboxError, SandboxUnavailable
from . import bubblewrap, cpython, folder
from .broker import Broker
from .child import Child, Exit, one_line
from .jail import wire
from .jail.zygote import PACKET, Setup
from .limits import Limits
from .own_files import OwnFiles
from .packages import NO_PACKAGES, Packages

_PATIENCE = 30.0  # seconds for a process to start on a busy machine


class Worker(Child):
    """A locked-in fork of the zygote."""

    def __init__(
        self,
        handle: int,
        pid: int,
        listener: int,
        report: socket.socket,
        exact: bool,
        packages: str,
        *child: Any,
    ) -> None:
        super().__init__(*child)
        self.exact = exact
        self._handle = handle
        self._pid = pid
        self._report = report
        report.setblocking(False)
        own = OwnFiles(self.work, self.folder, packages)
        self._broker = Broker(listener, pid, own, self.limits)
        self.sources[listener] = self._answer
        self.sources[report.fileno()] = self._ended

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, number)

    def frozen(self) -> bool:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{self._pid}/task"):
                if _state(f"/proc/{self._pid}/task/{task}")[0] not in b"TtZX":
                    return False
        return True

    def unlinked(self) -> int:
        return folder.unlinked(self.work, self._pid)

    def so_far(self) -> Exit:
        with contextlib.suppress(OSError, KeyError, ValueError, IndexError):  # it is ending
            fields = _state(f"/proc/{self._pid}")
            ticks = int(fields[11]) + int(fields[12])
            peak = int(_status(self._pid)[b"VmHWM"].split()[0]) * 1024
            return Exit(0, ticks / os.sysconf("SC_CLK_TCK"), peak)
        return super().so_far()

    def close(self) -> None:
        super().close()
        os.close(self._handle)
        os.close(self._broker.listener)
        self._report.close()
        if not self.exact:
            folder.remove(self.work)

    def _answer(self) -> None:
        if not self._broker.answer():
            self.sources.pop(self._broker.listener)

    def _ended(self) -> None:
        """The zygote's report, or its silence where it has died itself."""
        try:
            data = self._report.recv(PACKET)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.sources.pop(self._report.fileno())
        self.exit = Exit(**json.loads(data)) if data else Exit(-signal.SIGKILL, 0.0, 0)


class KernelJail:
    """A zygote and the folder its workers have their work folders in; safe to use from threads.

    `namespaces`: None takes bubblewrap where it works, False does without, True insists. `mounts`:
    each work folder is a file system of its own, where the kernel allows that.
    """

    def __init__(
        self,
        namespaces: bool | None = None,
        mounts: bool = True,
        packages: Packages = NO_PACKAGES,
    ) -> None:
        self.mechanisms: tuple[str, ...] = ()
        self.folder = Path(tempfile.mkdtemp(prefix="optiq-sandbox-")).resolve()
        self._place = self.folder / "work"  # where each worker mounts its own
        self._place.mkdir()
        self._preload = packages.preload
        self._path, visible = packages.lay(self.folder / "packages")
        self._readable = [*cpython.readable(), *visible]
        self._tries = (True, False) if namespaces is None else (namespaces,)
        self._mounts = mounts
        self._mounting = False
        self._owner = os.getpid()
        self._closed = False
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def spawn(self, limits: Limits, peer: socket.socket | None = None) -> Worker:
        """A worker that is locked in and waits for its order over its channel."""
        control = self._zygote()
        with contextlib.ExitStack() as opened, contextlib.ExitStack() as given:
            work = self._place
            if not self._mounting:
                work = Path(tempfile.mkdtemp(dir=self.folder))
                opened.callback(folder.remove, work)
            try:
                out, out_end = _pipe(opened, given)
                err, err_end = _pipe(opened, given)
                channel, channel_end = _pair(socket.SOCK_STREAM, opened, given)
                report, report_end = _pair(socket.SOCK_SEQPACKET, opened, given)
                ends = [out_end, err_end, channel_end.fileno(), report_end.fileno()]
                ends += [peer.fileno()] if peer else []
                order = {"work": str(work), "limits": asdict(limits)}
                channel.settimeout(_PATIENCE)
                report.settimeout(_PATIENCE)
                socket.send_fds(control, [json.dumps(order).encode()], ends)
                given.close()
                said, handles, _, _ = socket.recv_fds(report, 1000, 1)
                for descriptor in handles:
                    opened.callback(os.close, descriptor)
                if not handles:
                    raise OSError(one_line(said.decode() or "the zygote has ended"))
                begun, passed, _, _ = socket.recv_fds(channel, 1, 2)
                for descriptor in passed:
                    opened.callback(os.close, descriptor)
                told = wire.first(channel, b"" if passed else begun)
                if len(passed) != 2 or "landlock" not in told:
                    raise SandboxUnavailable(f"no jail: {told.get('unlocked', 'no reason given')}")
                pid = _pid(handles[0])
                _verify(pid)
            except (OSError, EOFError) as error:
                few = isinstance(error, OSError) and error.errno == errno.EMFILE
                fix = "; each session takes 7 descriptors, raise ulimit -n" if few else ""
                raise SandboxUnavailable(f"no jail: {error}{fix}") from error
            opened.pop_all()
        listener, inside = passed
        child = (work, inside, limits, out, err, channel)
        return Worker(handles[0], pid, listener, report, self._mounting, self._path, *child)

    def close(self) -> None:
        """End the zygote, and with it every worker, and remove the folder."""
        if os.getpid() != self._owner:  # a fork of the process that they belong to
            return
        with self._lock:
            self._closed = True
            self._stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _zygote(self) -> socket.socket:
        """The control socket of a zygote that lives."""
        with self._lock:
            if self._closed:
                raise SandboxError("the sandbox is closed; make another")
            if self._process is not None and self._process.poll() is not None:
                self._stop()
            return self._control or self._start()

    def _start(self) -> socket.socket:
        reasons = []
        for wrapped in self._tries:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                hello, reason = self._launch(wrapped, ours, theirs)
            if hello is not None:
                self._control = ours
                self._mounting = hello["mounting"]
                self.mechanisms = _mechanisms(hello["landlock"], wrapped, self._mounting)
                return ours
            ours.close()
            reasons.append(reason)
        raise SandboxUnavailable("no jail: " + "; ".join(reasons))

    def _launch(
        self, wrapped: bool, ours: socket.socket, theirs: socket.socket
    ) -> tuple[dict[str, Any] | None, str]:
        """(what the zygote says at its start or None, why there is none)."""
        place = str(self._place) if self._mounts else ""
        setup = Setup(self._readable, place, wrapped, self._path, list(self._preload))
        line = cpython.command("zygote", str(theirs.fileno()), json.dumps(asdict(setup)))
        if wrapped:
            visible = [*self._readable, f"{cpython.HERE}/jail"]
            wrapping = bubblewrap.command(visible, str(self.folder), line)
            if wrapping is None:
                return None, "bubblewrap is not installed"
            line = wrapping
        process = subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=cpython.environment(self.folder / "fonts" if self._preload else None),
            cwd="/",
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()  # so that its end is an end of file here
        ours.settimeout(_PATIENCE)
        assert process.stderr is not None
        with process.stderr as stderr:
            try:
                hello = ours.recv(PACKET)
            except OSError:
                hello = b""
            if hello:
                self._process = process
                return json.loads(hello), ""
            process.kill()
            reason = stderr.read().decode(errors="replace").strip().rpartition("\n")[2][:300]
        process.wait()
        return None, reason or "the zygote ended without a word"

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()  # at which the zygote ends
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


_Stack = contextlib.ExitStack


def _pipe(ours: _Stack, theirs: _Stack) -> tuple[int, int]:
    read, write = os.pipe()
    ours.callback(os.close, read)
    theirs.callback(os.close, write)
    return read, write


def _pair(kind: int, ours: _Stack, theirs: _Stack) -> tuple[socket.socket, socket.socket]:
    one, other = socket.socketpair(socket.AF_UNIX, kind)
    return ours.enter_context(one), theirs.enter_context(other)


def _mechanisms(landlock: int, wrapped: bool, mounting: bool) -> tuple[str, ...]:
    kernel = (f"landlock {landlock}", "seccomp", "no capabilities", "rlimits")
    work = "own file system" if mounting else "watchdogs"
    return (*(["bubblewrap"] if wrapped else []), *kernel, work)


def _pid(handle: int) -> int:
    """The process id, in our namespace, of a process handle."""
    for line in Path(f"/proc/self/fdinfo/{handle}").read_text().splitlines():
        if line.startswith("Pid:"):
            return int(line.split()[1])
    raise SandboxUnavailable("the kernel does not tell the process of a handle")


def _status(pid: int) -> dict[bytes, bytes]:
    """What the kernel says about a process; its name, which comes first, may be anything."""
    lines = Path(f"/proc/{pid}/status").read_bytes().split(b"\n")
    return dict(line.split(b":\t", 1) for line in lines if b":\t" in line)  # the last counts


def _state(process: str) -> list[bytes]:
    """The fields of `stat` after the name, which may be anything: first the state."""
    return Path(f"{process}/stat").read_bytes().rpartition(b")")[2].split()


def _verify(pid: int) -> None:
    """Ask the kernel, not the worker, whether the worker is locked in."""
    status = _status(pid)
    held = {
        "capabilities": not any(
            int(status[b"Cap" + s], 16) for s in (b"Inh", b"Prm", b"Eff", b"Amb")
        ),
        "no_new_privs": status[b"NoNewPrivs"] == b"1",
        "seccomp": _filters(status) >= _filters(_status(os.getpid())) + 2,
    }
    missing = [name for name, fine in held.items() if not fine]
    if missing:
        raise SandboxUnavailable(f"the worker is not locked in: {', '.join(missing)}")


def _filters(status: dict[bytes, bytes]) -> int:
    return int(status[b"Seccomp_filters"])
