"""Tier 2 on Linux: a zygote, and workers that lock themselves in with Landlock and seccomp."""

from __future__ import annotations

import contextlib
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

from ..errors import SandboxUnavailable
from . import bubblewrap, cpython
from .broker import Broker
from .child import Child, Exit
from .jail import wire
from .jail.zygote import PACKET
from .limits import Limits

_PATIENCE = 30.0  # seconds for a process to start on a busy machine


class Worker(Child):
    """A locked-in fork of the zygote."""

    def __init__(
        self, handle: int, pid: int, listener: int, report: socket.socket, *child: Any
    ) -> None:
        super().__init__(*child)
        self._handle = handle
        self._pid = pid
        self._report = report
        self._broker = Broker(listener, pid, self.work, self.limits)
        self.sources[listener] = self._answer
        self.sources[report.fileno()] = self._ended

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def pid(self) -> int | None:
        return self._pid

    def so_far(self) -> Exit:
        with contextlib.suppress(OSError, KeyError, ValueError):  # it is ending
            fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
            ticks = int(fields[11]) + int(fields[12])
            peak = int(_status(self._pid)["VmHWM"].split()[0]) * 1024
            return Exit(0, ticks / os.sysconf("SC_CLK_TCK"), peak)
        return super().so_far()

    def close(self) -> None:
        super().close()
        os.close(self._handle)
        os.close(self._broker.listener)
        self._report.close()

    def _answer(self) -> None:
        if not self._broker.answer():
            self.sources.pop(self._broker.listener)

    def _ended(self) -> None:
        """The zygote's report, or its silence where it has died itself."""
        self.sources.pop(self._report.fileno())
        data = self._report.recv(PACKET)
        self.exit = Exit(**json.loads(data)) if data else Exit(-signal.SIGKILL, 0.0, 0)


class KernelJail:
    """A zygote and the folder its workers have their work folders in; safe to use from threads.

    `namespaces`: None takes bubblewrap where it works, False does without, True insists.
    """

    def __init__(self, namespaces: bool | None = None) -> None:
        self.mechanisms: tuple[str, ...] = ()
        self.folder = Path(tempfile.mkdtemp(prefix="optiq-sandbox-")).resolve()
        self._tries = (True, False) if namespaces is None else (namespaces,)
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def spawn(self, work: Path, limits: Limits, peer: socket.socket | None = None) -> Worker:
        """A worker that is locked in and waits for its order over its channel."""
        control = self._zygote()
        with contextlib.ExitStack() as opened, contextlib.ExitStack() as given:
            out, out_end = _pipe(opened, given)
            err, err_end = _pipe(opened, given)
            channel, channel_end = _pair(socket.SOCK_STREAM, opened, given)
            report, report_end = _pair(socket.SOCK_SEQPACKET, opened, given)
            ends = [out_end, err_end, channel_end.fileno(), report_end.fileno()]
            ends += [peer.fileno()] if peer else []
            order = {"work": str(work), "limits": asdict(limits)}
            channel.settimeout(_PATIENCE)
            report.settimeout(_PATIENCE)
            try:
                socket.send_fds(control, [json.dumps(order).encode()], ends)
                given.close()
                _, handles, _, _ = socket.recv_fds(report, 1, 1)
                begun, listeners, _, _ = socket.recv_fds(channel, 1, 1)
                for descriptor in (*handles, *listeners):
                    opened.callback(os.close, descriptor)
                told = wire.first(channel, b"" if listeners else begun)
                if not handles or not listeners or "landlock" not in told:
                    raise SandboxUnavailable(f"no jail: {told.get('unlocked', 'no reason given')}")
                pid = _pid(handles[0])
                _verify(pid)
            except (OSError, EOFError) as error:
                raise SandboxUnavailable(f"no jail: {error}") from error
            opened.pop_all()
        return Worker(handles[0], pid, listeners[0], report, work, limits, out, err, channel)

    def close(self) -> None:
        """End the zygote, and with it every worker, and remove the folder."""
        if os.getpid() != self._owner:  # a fork of the process that they belong to
            return
        with self._lock:
            self._stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _zygote(self) -> socket.socket:
        """The control socket of a zygote that lives."""
        with self._lock:
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
                self.mechanisms = _mechanisms(hello["landlock"], wrapped)
                return ours
            ours.close()
            reasons.append(reason)
        raise SandboxUnavailable("no jail: " + "; ".join(reasons))

    def _launch(
        self, wrapped: bool, ours: socket.socket, theirs: socket.socket
    ) -> tuple[dict[str, Any] | None, str]:
        """(what the zygote says at its start or None, why there is none)."""
        runtime = cpython.readable()
        line = cpython.command("zygote", str(theirs.fileno()), json.dumps(runtime))
        if wrapped:
            visible = [*runtime, f"{cpython.HERE}/jail"]
            wrapping = bubblewrap.command(visible, str(self.folder), line)
            if wrapping is None:
                return None, "bubblewrap is not installed"
            line = wrapping
        process = subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=cpython.ENVIRONMENT,
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


def _mechanisms(landlock: int, wrapped: bool) -> tuple[str, ...]:
    kernel = (f"landlock {landlock}", "seccomp", "no capabilities", "rlimits", "watchdogs")
    return ("bubblewrap", *kernel) if wrapped else kernel


def _pid(handle: int) -> int:
    """The process id, in our namespace, of a process handle."""
    for line in Path(f"/proc/self/fdinfo/{handle}").read_text().splitlines():
        if line.startswith("Pid:"):
            return int(line.split()[1])
    raise SandboxUnavailable("the kernel does not tell the process of a handle")


def _status(pid: int) -> dict[str, str]:
    """What the kernel says about a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def _verify(pid: int) -> None:
    """Ask the kernel, not the worker, whether the worker is locked in."""
    status = _status(pid)
    held = {
        "capabilities": all(int(status[f"Cap{s}"], 16) == 0 for s in ("Inh", "Prm", "Eff", "Amb")),
        "no_new_privs": status["NoNewPrivs"] == "1",
        "seccomp": status["Seccomp"] == "2",
    }
    missing = [name for name, fine in held.items() if not fine]
    if missing:
        raise SandboxUnavailable(f"the worker is not locked in: {', '.join(missing)}")
