"""Runs every attack in a sandbox and looks from outside at what it achieved.

    python -m tests.sandbox.campaign [namespace|kernel|watched]

takes bubblewrap, the kernel alone, or the kernel without a file system for each work folder. It
prints a JSON object {number: what succeeded}, empty if nothing did, and needs the standard library
and optiq.sandbox alone, so that an ordinary user can run it who has no other packages.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from optiq.sandbox import Limits, Sandbox, bubblewrap, kernel_jail
from optiq.sandbox.kernel_jail import KernelJail
from tests.sandbox.holding import holding
from tests.sandbox.programs import BOMBS, CHECK, FAKES, WRITTEN

PAYLOADS = (Path(__file__).parent / "payloads.py").read_text()
MB = 2**20
LIMITS = Limits(wall=4, cpu=1, memory=256 * MB, output=MB, disk=8 * MB, files=100, threads=8)
AT_ONCE = 9  # runs
LATE = 10.0  # seconds; the machine may be busy
Found = dict[int, str]


def sandbox(mode: str, limits: Limits = LIMITS) -> Sandbox:
    """One that insists on bubblewrap, or does without it, or without mounts at all."""
    if mode != "namespace":
        bubblewrap.command = lambda *arguments: None
    if mode == "watched":
        kernel_jail.KernelJail = partial(KernelJail, mounts=False)  # type: ignore[misc]
    return Sandbox(limits, level="namespace" if mode == "namespace" else "process")


class Targets:
    """What attacks aim at: files, sockets, a process, a word in the environment."""

    def __init__(self, folder: Path) -> None:
        self.word = secrets.token_hex(16)
        self.outside = folder / "outside"
        self.outside.mkdir()
        self.secret, self.canary = self.outside / "secret", self.outside / "canary"
        self.secret.write_text(self.word)
        self.canary.write_text("canary")
        os.utime(self.canary, (10**9, 10**9))
        self.canary.chmod(0o640)
        os.environ["OPTIQ_CANARY"] = self.word
        self.inherited = os.open(self.secret, os.O_RDONLY)
        os.set_inheritable(self.inherited, True)
        sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
        self.victim = subprocess.Popen(sleep, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(str(self.outside / "socket"))
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind("\0optiq-" + self.word)
        for listener in (self.tcp, self.unix, self.abstract):
            with contextlib.suppress(OSError):
                listener.listen()
        self.sockets = {22: self.tcp, 23: self.udp, 25: self.unix, 26: self.abstract}
        self.before = self.state()

    def for_payloads(self) -> dict[str, Any]:
        return {
            "word": self.word,
            "outside": str(self.outside),
            "secret": str(self.secret),
            "canary": str(self.canary),
            "home": str(Path.home()),
            "site": sysconfig.get_path("purelib"),
            "port": self.tcp.getsockname()[1],
            "udp": self.udp.getsockname()[1],
            "unix": str(self.outside / "socket"),
            "abstract": "optiq-" + self.word,
            "victim": self.victim.pid,
            "threads": LIMITS.threads,
        }

    def state(self) -> dict[str, Any]:
        """Everything an attack could have changed."""
        files = [self.canary, Path(os.__file__), Path(json.__file__)]
        stats = [f.stat() if f.exists() else None for f in files]
        changed = [(s.st_size, s.st_mtime_ns, s.st_mode, s.st_uid, s.st_nlink) for s in stats if s]
        return {
            "files": changed,
            "entries": sorted(p.name for p in self.outside.iterdir()),
            "content": self.canary.read_text() if self.canary.exists() else None,
            "host name": socket.gethostname(),
            "mounts": Path("/proc/self/mountinfo").read_text(),
            "left behind": [str(p) for p in LEFT_BEHIND if p.exists()],
            "victim lives": self.victim.poll() is None,
            "clock": round((time.time() - time.monotonic()) / 60),
        }

    def reached(self) -> Found:
        """Sockets of ours that something arrived at."""
        found = {}
        for number, s in self.sockets.items():
            s.setblocking(False)
            with contextlib.suppress(BlockingIOError, OSError):
                s.recv(1) if number == 23 else s.accept()
                found[number] = "arrived at our socket"
        return found

    def close(self) -> None:
        self.victim.kill()
        self.victim.wait()
        os.close(self.inherited)
        for s in self.sockets.values():
            s.close()
        os.environ.pop("OPTIQ_CANARY")


LEFT_BEHIND = [
    Path("/tmp/optiq-attack"),
    Path("/var/tmp/optiq-attack"),
    Path("/dev/shm/optiq-attack"),
    Path(sysconfig.get_path("purelib")) / "optiq-attack.pth",
    Path(os.__file__).parent / "optiq-attack.py",
]


@contextlib.contextmanager
def targets() -> Iterator[Targets]:
    with tempfile.TemporaryDirectory() as folder:
        made = Targets(Path(folder))
        try:
            yield made
        finally:
            made.close()


def access(box: Sandbox) -> tuple[Found, Found]:
    """Attacks on files, network and processes: (what succeeded, what could not be tried)."""
    with targets() as aims:
        result = box.run(f"{PAYLOADS}\ncampaign({aims.for_payloads()!r})\n")
        *rows, end = [json.loads(line) for line in result.stdout.splitlines()] or [[]]
        outcomes: dict[str, Found] = {"got": {}, "broken": {}, "refused": {}}
        for number, index, outcome, what in rows:
            outcomes[outcome][number] = f"attempt {index}: {what}"
        found, broken = outcomes["got"], outcomes["broken"]
        if end != "end":
            broken[0] = f"after {end}: {result.status} {result.detail} {result.stderr[-300:]}"
        if aims.word in result.stdout + result.stderr:
            found[2] = "the secret is in the output"
        time.sleep(0.3)  # for what is done late
        after = aims.state()
        for key, value in aims.before.items():
            if after[key] != value:
                found[0] = f"{key} changed: {value} -> {after[key]}"
        return found | aims.reached(), broken


def bombs(box: Sandbox) -> Found:
    """Attacks on resources: what was not held."""

    def drop(number: int) -> tuple[int, str]:
        code, held = BOMBS[number]
        start = time.monotonic()
        result = box.run(code)
        took = time.monotonic() - start
        wrong = []
        if result.status not in held:
            wrong.append(f"ended as {result.status}: {result.detail}")
        if took > LIMITS.wall + LATE:
            wrong.append(f"took {took:.1f} s")
        if max(len(result.stdout), len(result.stderr)) > LIMITS.output:
            wrong.append("too much output")
        if result.usage.memory > LIMITS.memory + 64 * MB:
            wrong.append(f"took {result.usage.memory} bytes")
        return number, "; ".join(wrong)

    with holding(box) as most, ThreadPoolExecutor(AT_ONCE) as pool:
        found = dict(pool.map(drop, BOMBS))
    if most["files"] > LIMITS.files:
        found[61] = f"{most['files']} files"
    # What is written within one look of the watcher is not held back.
    if most["bytes"] > (WRITTEN // 16 if most["watched"] else LIMITS.disk):
        found[60] = f"{most['bytes']} bytes"
    left = [p.name for p in box._processes.jail.folder.iterdir()]
    if left != ["work"]:
        found[60] = f"left behind: {left}"
    return {number: what for number, what in found.items() if what}


def fakes(box: Sandbox) -> Found:
    """Attacks on the verdict: candidates that are wrong and passed; and that a right one passes."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        verdicts = dict(
            zip(FAKES, pool.map(lambda c: box.judge(c, CHECK, "f"), FAKES.values()), strict=True)
        )
    found = {number: str(v) for number, v in verdicts.items() if v.passed}
    right = box.judge("def f(x): return x * x", CHECK, "f")
    if not right.passed:
        found[70] = f"the right candidate fails: {right}"
    first = box.run("import builtins, os\nbuiltins.mark = 1\nopen('left', 'w').close()")
    second = box.run("import builtins, os\nprint(hasattr(builtins, 'mark'), os.listdir('.'))")
    if (first.status, second.stdout) != ("ok", "False []\n"):
        found[79] = f"{first} {second}"
    return found


def campaign(mode: str) -> dict[str, Found]:
    with sandbox(mode) as box:
        found, broken = access(box)
        return {"succeeded": found | bombs(box) | fakes(box), "broken": broken}


if __name__ == "__main__":
    print(json.dumps(campaign(sys.argv[1])))
