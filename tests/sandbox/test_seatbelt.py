"""The macOS level, as far as it can be tested without a Mac: its profile's text, its watchdogs.

It was NEVER RUN on macOS. What a Mac has to show is in docs/sandbox-security.md.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from optiq.errors import SandboxUnavailable
from optiq.sandbox import Limits, Sandbox, cpython, seatbelt
from optiq.sandbox.loop import watch
from optiq.sandbox.seatbelt import SeatbeltJail, Watched

GOLDEN = r"""(version 1)
(deny default)
; the interpreter may be started, and start itself again as a framework build does; nothing may fork
(allow process-exec (subpath "/opt/homebrew/Cellar/python"))
(allow file-read* (subpath "/usr/lib") (subpath "/System/Library") (subpath "/System/Volumes/Preboot/Cryptexes") (subpath "/py/lib") (subpath "/here/jail") (subpath "/opt/homebrew/Cellar/python") (subpath "/opt/homebrew/opt")
    (literal "/dev/null") (literal "/dev/random") (literal "/dev/urandom"))
(allow file-read-metadata (literal "/") (literal "/System") (literal "/System/Volumes") (literal "/System/Volumes/Preboot") (literal "/here") (literal "/opt") (literal "/opt/homebrew") (literal "/opt/homebrew/Cellar") (literal "/py") (literal "/usr") (literal "/w \"q\\"))
(allow file-read* file-write* (subpath "/w \"q\\/1"))
(allow file-write-data (literal "/dev/null"))
(allow sysctl-read
    (sysctl-name "hw.activecpu") (sysctl-name "hw.logicalcpu") (sysctl-name "hw.ncpu")
    (sysctl-name "hw.pagesize") (sysctl-name "hw.pagesize_compat") (sysctl-name "hw.memsize")
    (sysctl-name "kern.osrelease") (sysctl-name "kern.ostype") (sysctl-name "kern.osversion")
    (sysctl-name "kern.version") (sysctl-name "kern.usrstack64") (sysctl-name "hw.machine"))
(allow signal (target self))
"""  # noqa: E501


def test_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpython, "HERE", "/here")
    text = seatbelt.profile('/w "q\\/1', ["/py/lib"], "/opt/homebrew/Cellar/python")
    assert text == GOLDEN


def test_the_profile_allows_nothing_more() -> None:
    text = seatbelt.profile("/work", ["/py/lib"], "/py")
    assert text.index("(deny default)") < text.index("(allow")
    assert text.count("(") == text.count(")")
    for word in ("network", "mach", "fork", "iokit", "file*", "ipc", "process*", 'subpath "/"'):
        assert f"({word}" not in text.replace("allow ", "(")
    with pytest.raises(SandboxUnavailable, match="cannot be named"):
        seatbelt.profile("/work\n(allow default)", [], "/py")


def test_it_is_the_process_level_of_macos_and_there_is_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    sandbox = Sandbox(level="process")
    assert isinstance(sandbox._processes.jail, SeatbeltJail)
    sandbox.close()
    with pytest.raises(SandboxUnavailable, match="namespace"):
        Sandbox(level="namespace")


@pytest.mark.skipif(sys.platform != "linux", reason="sandbox-exec exists on macOS")
def test_without_sandbox_exec_nothing_starts() -> None:
    jail = SeatbeltJail()
    try:
        with pytest.raises(SandboxUnavailable, match="sandbox-exec"):
            jail.spawn(Limits())
    finally:
        jail.close()


@pytest.mark.skipif(sys.platform != "linux", reason="stands in for a sandbox that is not there")
@pytest.mark.parametrize("told", [True, False])
def test_a_process_that_is_not_locked_in_gets_no_order(
    monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """The worker sees that it is free; and if it lied, the host asks the system."""
    monkeypatch.setattr(SeatbeltJail, "wrapping", lambda self, work: [])
    monkeypatch.setattr(SeatbeltJail, "confined", lambda self, pid: False)
    if told:
        monkeypatch.setattr(seatbelt.wire, "first", lambda channel: {"locked": True})
    jail = SeatbeltJail()
    try:
        reason = "the system says so" if told else "root folder can be listed"
        with pytest.raises(SandboxUnavailable, match=reason):
            jail.spawn(Limits())
    finally:
        jail.close()


def watched(work: Path, code: str, **limits: Any) -> Watched:
    """A program of ours, not in any jail, under the watchdogs."""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=work
    )
    assert process.stdout is not None
    assert process.stderr is not None
    out, err = os.dup(process.stdout.fileno()), os.dup(process.stderr.fileno())
    process.stdout.close()
    process.stderr.close()
    ours, theirs = socket.socketpair()
    theirs.close()
    inside = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    return Watched(process, work, inside, Limits(**limits), out, err, ours)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
@pytest.mark.parametrize(
    ("code", "limits", "footprint", "verdict"),
    [
        ("print('x')", {}, 0, ("ok", "")),
        ("raise SystemExit(3)", {}, 0, ("error", "exit status 3")),
        ("import time; time.sleep(60)", {}, 10**12, ("memory", "more than 536870912 bytes")),
        ("import time\nfor i in range(9): open(str(i), 'w')\ntime.sleep(60)", {"files": 5}, 0,
         ("disk", "more than 5 files")),
        ("import time\nopen('x', 'w').write('x' * 10**6)\ntime.sleep(60)", {"disk": 10**5}, 0,
         ("disk", "the work folder is above")),
    ],
)  # fmt: skip
def test_watchdogs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    limits: dict[str, Any],
    footprint: int,
    verdict: tuple[str, str],
) -> None:
    monkeypatch.setattr(seatbelt, "_footprint", lambda pid: footprint)
    child = watched(tmp_path, code, **limits)
    start = time.monotonic()
    assert watch([child], lambda: child.over, start + 30)
    assert time.monotonic() - start < 30
    status, detail = child.verdict()
    assert (status, detail.startswith(verdict[1])) == (verdict[0], True), detail
    assert child.exit is not None
    assert child.exit.memory > 2**20
    child.close()
