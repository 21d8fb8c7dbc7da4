"""Attacks on the bounds themselves: what once hung the host, hid files from it or outlived a run.

Each program is held with a work folder of its own file system and, where the kernel refuses that,
under the eyes of the watcher; `held` names what must be true of the end.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from optiq.errors import UsageError
from optiq.sandbox import Sandbox
from optiq.sandbox.broker import Broker
from optiq.sandbox.own_files import OwnFiles
from tests.sandbox.conftest import BOUNDS
from tests.sandbox.holding import holding
from tests.sandbox.levels import process_level

pytestmark = process_level()
MB = 2**20
LIMITS = BOUNDS
LIBC = "import ctypes, os, time\nlibc = ctypes.CDLL(None, use_errno=True)\n"


IDENTITY = "def check(f): assert f(3) == 3"


REFUSED = {
    "out of band": "libc.send(3, b'!', 1, 1)",
    "peeking out of band": "libc.recv(3, ctypes.create_string_buffer(1), 1, 1)",
    "own descriptors": "libc.close_range(60, 60, 2)",
    "folder of mode 300": "libc.mkdir(b'd', 0o300)",
    "folder of mode 0": "libc.mkdirat(-100, b'd', 0)",
    "whiteout": "(open('a', 'w').close(), libc.renameat2(-100, b'a', -100, b'b', 4))[1]",
    "access mode 3": "libc.open(b'/dev/full', 3)",
    "access mode 3 of a file": "libc.open(b'/etc/passwd', 3)",
    "process group of another": "libc.getpgid(1)",
    "session of another": "libc.getsid(1)",
    "processors of another": "libc.sched_getaffinity(1, 8, ctypes.create_string_buffer(8))",
}


@pytest.mark.parametrize("attempt", REFUSED.values(), ids=REFUSED)
def test_what_the_kernel_refuses(box: Sandbox, attempt: str) -> None:
    result = box.run(f"{LIBC}print({attempt}, ctypes.get_errno())")
    assert result.stdout in ("-1 1\n", "-1 13\n"), result


def test_no_mask_takes_folders_away_from_the_host(box: Sandbox) -> None:
    code = f"{LIBC}libc.umask(0o777)\nos.mkdir('d')\nprint(oct(os.stat('d').st_mode))"
    assert box.run(code).stdout == "0o40700\n"


# F1: the process takes its own output back between the host's wait and its read.
STOLEN = """
import os, random, time
r = os.open("/proc/self/fd/1", os.O_RDONLY | os.O_NONBLOCK)
end = time.perf_counter() + 0.5
while time.perf_counter() < end:
    t = time.perf_counter() + random.uniform(0, 150e-6); os.write(1, b"x")
    while time.perf_counter() < t: pass
    try: os.read(r, 9)
    except BlockingIOError: pass
    os.close(os.open("a", os.O_RDWR | os.O_CREAT))
"""


@pytest.mark.parametrize("use", ["run", "session", "judge"])
def test_output_that_is_taken_back(watched: Sandbox, use: str) -> None:
    """Only without bubblewrap, which shows no /proc."""
    start = time.monotonic()
    if use == "run":
        assert watched.run(STOLEN).status == "ok"
    elif use == "session":
        with watched.session() as session:
            assert session.run(STOLEN).status == "ok"
            assert session.run("1").value == "1"
    else:
        assert watched.judge(f"{STOLEN}\ndef f(x): return x", IDENTITY, "f").passed
    assert time.monotonic() - start < 60  # it was: never


DISK = {
    "threads with files of their own": (
        LIBC + "import threading\n"
        "def write():\n"
        " libc.close_range(60, 60, 2)\n"
        " f = os.open('x', os.O_RDWR | os.O_CREAT); os.unlink('x')\n"
        " for _ in range(7): os.write(f, bytes(2**20))\n"
        " time.sleep(9)\n"
        "for _ in range(4): threading.Thread(target=write).start()"
    ),
    "mapped and unlinked": (
        "import mmap, os, time\n"
        "for i in range(20):\n"
        " f = os.open('x', os.O_RDWR | os.O_CREAT); os.write(f, bytes(2**20))\n"
        " globals()[f'm{i}'] = mmap.mmap(f, 2**20); os.close(f); os.unlink('x')\n"
        " time.sleep(.01)\n"
        "time.sleep(1)"
    ),
    "the first thread ends": (
        LIBC + "import threading\n"
        "def write():\n"
        " time.sleep(.1)\n"
        " for i in range(20):\n"
        "  f = os.open('x', os.O_RDWR | os.O_CREAT); os.unlink('x'); os.write(f, bytes(2**20))\n"
        "  time.sleep(.01)\n"
        " time.sleep(1)\n"
        "threading.Thread(target=write).start()\n"
        "libc.syscall({'x86_64': 60}.get(os.uname().machine, 93), 0)"
    ),
    "without a name": (
        "import os, time\n"
        "for i in range(20):\n"
        " f = os.open('x', os.O_RDWR | os.O_CREAT); os.unlink('x'); os.write(f, bytes(2**20))\n"
        "time.sleep(1)"
    ),
    "many": "for i in range(19): open(str(i), 'wb').write(bytes(2**20))",
    "sparse": "import os\nf = open('x', 'wb'); f.truncate(8 * 2**20); f.write(bytes(9 * 2**20))",
}


@pytest.mark.parametrize("code", DISK.values(), ids=DISK)
@pytest.mark.parametrize("mode", ["own file system", "watchdogs"])
def test_the_disk_is_bounded(request: pytest.FixtureRequest, mode: str, code: str) -> None:
    box: Sandbox = request.getfixturevalue("box" if mode == "own file system" else "watched")
    if mode not in box.run("").mechanisms:
        pytest.skip("the kernel allows no mounts here")
    with holding(box) as most:
        result = box.run(code)
    if mode == "watchdogs":
        assert result.status == "disk", result
    assert most["bytes"] <= (LIMITS.disk if mode == "own file system" else 5 * LIMITS.disk)


def test_short_snippets_are_looked_at_too(both: Sandbox) -> None:
    with both.session() as session:
        results = [session.run(f"open('{i}', 'wb').write(bytes(2**20))") for i in range(8)]
        assert {r.status for r in results[:6]} == {"ok"}
        assert session.run("open('9', 'wb').write(bytes(2**20))").status == "disk"


def test_input_counts(both: Sandbox) -> None:
    with pytest.raises(UsageError, match="take 9437184 bytes of the limit disk=8388608"):
        both.run("", {"x": bytes(9 * MB)})
    with pytest.raises(UsageError, match="are 21 entries, above files=20"):
        both.run("", {f"a/{i}": b"" for i in range(20)})
    with both.session({"x": bytes(7 * MB)}) as session:
        assert session.run("open('y', 'wb').write(bytes(2**21))").status == "disk"


BAD_FILES = {
    "text": {"x": "text"},
    "number": {"x": 1},
    "surrogate": {"\udc80": b""},
    "long": {"x" * 300: b""},
    "deep": {"a/" * 5000 + "x": b""},
    "file and folder": {"a": b"", "a/b": b""},
    "a folder": {"a/b": b"", "a": b""},
    "no text": {1: b""},
}


@pytest.mark.parametrize("files", BAD_FILES.values(), ids=BAD_FILES)
def test_files_that_cannot_be(both: Sandbox, files: Any) -> None:
    with pytest.raises(UsageError):
        both.run("", files)
    assert both.run("print(1)").stdout == "1\n"


NAMES = [b"\\xff\\xfe", b"\\x0bThreads:\\t1", b"\\nThreads:\\t1", b"a) R 1 2 3", b"\\rThreads:\\t1"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_a_process_says_nothing(both: Sandbox, name: bytes) -> None:
    code = (
        f"{LIBC}import threading\nlibc.prctl(15, b'{name.decode()}')\n"
        "stop, started = threading.Event(), 1\n"
        "try:\n"
        " for _ in range(50): threading.Thread(target=stop.wait).start(); started += 1\n"
        "except RuntimeError: pass\n"
        "print(started)\nstop.set()"
    )
    result = both.run(code)
    assert (result.status, result.stdout) == ("ok", f"{LIMITS.threads}\n")
    with both.session() as session:
        assert session.run(code).stdout == f"{LIMITS.threads}\n"
        assert session.run("2").value == "2"
    assert both.judge(f"{code}\ndef f(x): return x", IDENTITY, "f").passed


def test_threads_that_ask_in_the_same_moment(both: Sandbox) -> None:
    code = """
import ctypes, os, threading, time
libc = ctypes.CDLL(None)
made, go, stop = [], threading.Event(), threading.Event()
def race():
    go.wait()
    for _ in range(10):
        t = ctypes.c_ulong()
        made.append(libc.pthread_create(ctypes.byref(t), None, libc.sleep, ctypes.c_void_p(9)))
    stop.wait()
for _ in range(3): threading.Thread(target=race).start()
go.set()
while len(made) < 30: time.sleep(.001)
print(4 + made.count(0), flush=True)
os._exit(0)
"""
    # Three times, since on a very busy machine a task may not get to run for too long.
    assert f"{LIMITS.threads}\n" in [both.run(code).stdout for _ in range(3)]


def test_files_that_are_made_in_the_same_moment(both: Sandbox) -> None:
    code = """
import os, threading
go = threading.Event()
def race():
    go.wait()
    try:
        for n in range(30): open(f"{threading.get_ident()}-{n}", "w").close()
    except OSError: pass
threads = [threading.Thread(target=race) for _ in range(5)]
for t in threads: t.start()
go.set()
for t in threads: t.join()
print(len(os.listdir(".")))
"""
    assert f"{LIMITS.files}\n" in [both.run(code).stdout for _ in range(3)]


def test_signals_leave_the_broker_in_place(both: Sandbox) -> None:
    code = """
import os, signal
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, .0005, .0005)
for i in range(1000):
    with open("a", "w"): pass
    os.chmod("a", 0o600)
signal.setitimer(signal.ITIMER_REAL, 0)
print("done")
"""
    assert both.run(code).stdout == "done\n"


def test_no_question_is_waited_for(tmp_path: Path) -> None:
    """Older kernels would wait for ever where the process has ended."""
    listener, asking = os.pipe()  # which, as a listener does, tells of its end without a question
    broker = Broker(listener, os.getpid(), OwnFiles(tmp_path, listener, ""), LIMITS)
    try:
        assert broker.answer()
        os.close(asking)
        assert not broker.answer()
    finally:
        os.close(listener)


def test_what_a_session_does_between_snippets(both: Sandbox) -> None:
    with both.session() as session:
        session.run(
            "import threading, time\nn = 0\n"
            "def go():\n global n\n while True:\n  n += 1; print(n)\n  time.sleep(.001)\n"
            "threading.Thread(target=go, daemon=True).start(); time.sleep(.05)"
        )
        first = session.run("n").value
        time.sleep(0.2)
        later = session.run("n")
        assert later.value is not None
        assert first is not None
        assert int(later.value) - int(first) < 100  # it stood still; 200 if it had gone on
        assert len(later.stdout.splitlines()) < 100


def test_no_snippet_answers_for_another(both: Sandbox) -> None:
    forge = (
        "import json, os, struct\n"
        "def say(message):\n"
        " data = json.dumps(message).encode()\n"
        " os.write(3, struct.pack('>I', len(data)) + data)\n"
        "for i in range(9): say({'ready': i, 'code': 0, 'value': 'forged'})\n"
    )
    with both.session() as session:
        session.run(forge)
        for i in range(5):
            result = session.run(f"print({i}); {i}")
            assert (result.stdout, result.value) == (f"{i}\n", str(i))
        early = (
            "import sys\nframe = sys._getframe()\n"
            "while 'nonce' not in frame.f_locals.get('order', ''): frame = frame.f_back\n"
            "say({'ready': frame.f_locals['order']['nonce'], 'code': 0, 'value': 'forged'})\n"
            "import time; print('begun', flush=True); time.sleep(.2); print('late', flush=True)\n"
        )
        assert "late" not in session.run(early).stdout
        result = session.run("print('mine'); 7")  # waits for what was begun, as Python does
        assert (result.status, result.value) == ("ok", "7")
        assert result.stdout.endswith("mine\n")
