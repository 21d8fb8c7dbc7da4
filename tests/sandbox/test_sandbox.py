"""Programs and sessions at the process level: what they give back, and that it fails closed."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from optiq.errors import SandboxError, SandboxUnavailable, UsageError
from optiq.sandbox import Limits, Sandbox, bubblewrap, cpython, mechanisms
from optiq.sandbox.jail import linux
from optiq.sandbox.kernel_jail import KernelJail
from optiq.sandbox.processes import Processes
from tests.sandbox.conftest import open_descriptors
from tests.sandbox.levels import process_level

pytestmark = process_level()

LIMITS = Limits(wall=5, cpu=4, memory=256 * 2**20, output=10_000, files=20, threads=4)


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox(LIMITS) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def watched() -> Iterator[Processes]:
    """Without a file system for each work folder, as where the kernel allows no mounts."""
    processes = Processes(KernelJail(False, mounts=False), LIMITS)
    yield processes
    processes.close()


def test_a_program(box: Sandbox) -> None:
    result = box.run("import sys\nprint('out')\nprint('err', file=sys.stderr)")
    assert (result.status, result.stdout, result.stderr) == ("ok", "out\n", "err\n")
    assert not result.truncated
    assert {"seccomp", "no capabilities", "rlimits"} <= set(result.mechanisms)
    assert 0 < result.usage.wall < 5
    assert result.usage.memory is not None
    assert 2**20 < result.usage.memory < 2**28


@pytest.mark.parametrize(
    ("code", "status", "detail"),
    [
        ("1 / 0", "error", "ZeroDivisionError: division by zero"),
        ("def f(:", "error", "SyntaxError: invalid syntax (main.py, line 1)"),
        ("raise SystemExit", "ok", ""),
        ("raise SystemExit(3)", "error", "exit status 3"),
        ("raise SystemExit('no')", "error", "exit status 1"),
        ("import os; os._exit(0)", "ok", ""),
        ("open('/etc/hostname')", None, None),
        (
            "import os; os.fork()",
            "denied",
            "PermissionError: [Errno 1] the sandbox starts no processes; use threads",
        ),
        ("bytearray(10**9)", "memory", "MemoryError"),
        ("import os; os.kill(os.getpid(), 11)", "killed", "ended by SIGSEGV"),
        ("print('x' * 20000)", "output", "more than 10000 bytes of output"),
        ("'\0'", "error", None),
        ("raise ValueError('\\x1b[2J\\n' + 'x' * 9000)", "error", "ValueError:  [2J " + "x" * 383),
        ("'\udc80'", "error", None),
    ],
)
def test_the_end_of_a_program(
    box: Sandbox, code: str, status: str | None, detail: str | None
) -> None:
    result = box.run(code)
    assert result.status == status if status else result.status in ("error", "denied")
    if detail is not None:
        assert result.detail == detail


def test_the_traceback_is_the_programs_own(box: Sandbox) -> None:
    result = box.run("def f():\n    raise ValueError('no')\nf()")
    assert 'File "main.py", line 2, in f\n    raise ValueError' in result.stderr
    assert "worker.py" not in result.stderr


def test_time_is_bounded(box: Sandbox) -> None:
    with Sandbox(Limits(wall=0.3)) as quick:
        for code in ("import time; time.sleep(60)", "while True: pass"):
            start = time.monotonic()
            assert quick.run(code).status == "timeout"
            assert time.monotonic() - start < 5


def test_output_before_the_limit_is_kept(box: Sandbox) -> None:
    result = box.run("while True: print('y' * 99)")
    assert (result.status, result.truncated, len(result.stdout)) == ("output", True, 10_000)


def test_output_that_is_no_text(box: Sandbox) -> None:
    result = box.run("import os; os.write(1, b'a\\xff\\0')")
    assert (result.status, result.stdout) == ("ok", "a\\xff\0")


def test_files_come_along_and_go(box: Sandbox) -> None:
    files = {"a.txt": b"1", "data/b.bin": b"\0\xff", "helper.py": b"x = 7"}
    code = "import os, helper\nprint(helper.x, open('data/b.bin', 'rb').read(), os.listdir('.'))"
    result = box.run(code, files)
    assert result.stdout.startswith("7 b'\\x00\\xff' [")
    assert result.stdout.count("'") == 8
    assert [p.name for p in box._processes.jail.folder.iterdir()] == ["work"]


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "", "a\0b"])
def test_a_file_name_may_not_lead_out(box: Sandbox, name: str) -> None:
    with pytest.raises(UsageError, match="leads out of the work folder"):
        box.run("", {name: b""})


COUNTING = """
import os
made = 0
try:
    for i in range(100):
        with open(f"{i}", "w"): pass
        os.remove(f"{i}")        # what is gone does not count
    for i in range(100):
        with open(f"{i}", "w"): pass
        with open(f"{i}", "w"): pass    # nor does what is there; to the watcher, at the limit
        made += 1
except OSError as error:
    print(made, error.strerror)
"""


def test_a_file_limit_is_exact(box: Sandbox, watched: Processes) -> None:
    if "own file system" in box.run("").mechanisms:
        assert box.run(COUNTING).stdout == "20 No space left on device\n"
    assert watched.run(COUNTING, {}).stdout == "19 Disk quota exceeded\n"


def test_a_thread_limit_and_useful_threads(box: Sandbox) -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
import asyncio
with ThreadPoolExecutor(3) as pool: print(sum(pool.map(abs, range(-9, 9))))
async def main():
    await asyncio.sleep(0.01)
    return 5
print(asyncio.run(main()))
"""
    result = box.run(code)
    assert (result.stdout, result.stderr) == ("81\n5\n", "")


def test_the_library_works(box: Sandbox) -> None:
    code = """
import datetime, decimal, hashlib, json, random, re, sqlite3, statistics, subprocess, tempfile, zlib
import shutil, pathlib, uuid, urllib.parse, xml.etree.ElementTree, unittest, dataclasses, csv
with tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, "a").write_text("x")
    shutil.copyfile(f"{folder}/a", f"{folder}/b")
print(hashlib.md5(b"x").hexdigest()[:4], sqlite3.connect(":memory:").execute("select 1").fetchone())
"""
    result = box.run(code)
    assert (result.stdout, result.stderr) == ("9dd4 (1,)\n", "")


def test_nothing_of_the_caller_comes_along(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTIQ_TEST_TOKEN", "hidden")
    with Sandbox(LIMITS) as fresh:
        result = fresh.run("import os, sys; print(sorted(os.environ), sys.argv, sys.path)")
    assert "TOKEN" not in result.stdout
    assert "site-packages" not in result.stdout
    assert str(Path.cwd()) not in result.stdout


def test_runs_are_repeatable(box: Sandbox) -> None:
    code = "print(list({str(i) for i in range(50)}))"
    with Sandbox(LIMITS) as other:
        assert box.run(code).stdout == other.run(code).stdout


def test_threads_may_share_a_sandbox(box: Sandbox) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: box.run(f"print({i} ** 2)").stdout, range(40)))
    assert results == [f"{i**2}\n" for i in range(40)]


def test_code_beyond_a_message_is_refused(box: Sandbox) -> None:
    with pytest.raises(UsageError, match="too long"):
        box.run("#" * 2**24)
    assert box.run("#" * 2**23 + "\nprint(1)").stdout == "1\n"


def test_a_session_keeps_its_variables_and_files() -> None:
    with Sandbox(LIMITS) as fresh, fresh.session({"in.txt": b"hello"}) as session:
        made = session.run("x = open('in.txt').read()\nopen('out', 'w').write(x)")
        assert (made.status, "seccomp" in made.mechanisms) == ("ok", True)
        failed = session.run("print(x)\n1 / 0")
        assert (failed.status, failed.stdout) == ("error", "hello\n")
        assert 'File "<cell 2>", line 2' in failed.stderr
        assert session.run("print(open('out').read() + x)").stdout == "hellohello\n"
        assert session.run("raise SystemExit(2)").detail == "exit status 2"
        assert session.alive
        session.close()
        assert [p.name for p in fresh._processes.jail.folder.iterdir()] == ["work"]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import os; os._exit(0)", "ok"),
        ("import os; os.kill(os.getpid(), 9)", "killed"),
        ("import os; os.close(3)", "error"),
        ("import os; os.write(3, b'junk' * 100)", "error"),
        ("import os\nwhile True: os.write(3, b'\\0\\0\\0\\2{}' * 100)", "error"),
    ],
)
def test_a_session_ends_with_its_process(box: Sandbox, code: str, status: str) -> None:
    with box.session() as session:
        assert session.run(code).status == status
        assert not session.alive
        with pytest.raises(SandboxError, match="start another"):
            session.run("1")


def test_a_session_has_a_time_limit_for_each_snippet() -> None:
    with Sandbox(Limits(wall=0.4)) as sandbox, sandbox.session() as session:
        assert session.run("import time; time.sleep(0.25)").status == "ok"
        assert session.run("time.sleep(0.25)").status == "ok"
        assert session.run("time.sleep(9)").status == "timeout"
        assert session.alive
        assert session.run("while True:\n try: time.sleep(9)\n except: pass").status == "timeout"
        assert not session.alive


def test_without_bubblewrap_the_kernel_alone_holds() -> None:
    processes = Processes(KernelJail(False), LIMITS)
    try:
        result = processes.run("print(1)", {})
        assert (result.stdout, "bubblewrap" in result.mechanisms) == ("1\n", False)
    finally:
        processes.jail.close()


def test_a_missing_bubblewrap_fails_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda name: None)
    with Sandbox(LIMITS) as sandbox:
        assert "bubblewrap" not in sandbox.run("").mechanisms
    with (
        Sandbox(LIMITS, level="namespace") as sandbox,
        pytest.raises(SandboxUnavailable, match="bubblewrap is not installed"),
    ):
        sandbox.run("")


def test_a_bubblewrap_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object) -> list[str]:
        return ["/bin/sh", "-c", "echo 'setting up uid map: Permission denied' >&2; exit 1"]

    monkeypatch.setattr(bubblewrap, "command", refused)
    with (
        Sandbox(LIMITS, level="namespace") as sandbox,
        pytest.raises(SandboxUnavailable, match="uid map: Permission denied"),
    ):
        sandbox.run("")
    with Sandbox(LIMITS) as sandbox:
        assert sandbox.run("print(2)").stdout == "2\n"


@pytest.fixture
def altered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Processes]]:
    """Processes whose jail's code has another function in `linux.py`; the kernel alone holds."""
    made: list[Processes] = []

    def with_function(text: str) -> Processes:
        shutil.copytree(Path(cpython.HERE) / "jail", tmp_path / "jail")
        with (tmp_path / "jail" / "linux.py").open("a") as file:
            file.write(text)
        monkeypatch.setattr(cpython, "HERE", str(tmp_path))
        made.append(Processes(KernelJail(False), LIMITS))
        return made[0]

    yield with_function
    made[0].jail.close()


@pytest.mark.parametrize(
    ("step", "body"),
    [
        ("drop_privileges", "raise OSError('not here')"),
        ("limit", "raise OSError('not here')"),
        ("landlock", "raise OSError('not here')"),
        ("ask_host", "raise OSError('not here')"),
        ("filter_calls", "raise OSError('not here')"),
        ("drop_privileges", "pass"),
        ("filter_calls", "pass"),
    ],
)
def test_a_step_that_fails_or_is_left_out_runs_nothing(
    altered: Callable[..., Processes], step: str, body: str
) -> None:
    processes = altered(f"\n\ndef {step}(*arguments):\n    {body}\n")
    with pytest.raises(SandboxUnavailable, match=r"no jail|not locked in"):
        processes.run("print('ran')", {})


@pytest.mark.parametrize("version", [1, 2, 3, 5])
def test_older_kernels(altered: Callable[..., Processes], tmp_path: Path, version: int) -> None:
    """With the rights that Landlock had then; the filter refuses what it did not cover yet."""
    processes = altered(f"\n\ndef landlock_version():\n    return {version}\n")
    canary = tmp_path / "canary"
    canary.write_text("canary")
    code = f"""
import os
for attempt in (
    lambda: open({str(canary)!r}).read(),
    lambda: os.truncate({str(canary)!r}, 0),
    lambda: os.open({str(canary)!r}, os.O_RDONLY | os.O_TRUNC),
    lambda: os.open("given", os.O_RDONLY | os.O_TRUNC),
    lambda: os.rename({str(canary)!r}, "mine"),
):
    try: print("got", attempt())
    except OSError as error: assert error.errno in (1, 13, 18), error
with open("a", "w") as file: file.write("x")
os.rename("a", "b")
"""
    result = processes.run(code, {"given": b"x"})
    assert (result.status, result.stdout, result.stderr) == ("ok", "", "")
    assert f"landlock {version}" in result.mechanisms
    assert canary.read_text() == "canary"


def test_a_zygote_that_died_is_replaced(box: Sandbox) -> None:
    jail = box._processes.jail
    assert isinstance(jail, KernelJail)
    assert jail._process is not None
    jail._process.kill()
    jail._process.wait()
    assert box.run("print(3)").stdout == "3\n"


def test_closing_ends_processes_and_removes_folders() -> None:
    sandbox = Sandbox(LIMITS)
    session = sandbox.session()
    jail = sandbox._processes.jail
    assert isinstance(jail, KernelJail)
    assert jail._process is not None
    zygote = jail._process
    folder = jail.folder
    sandbox.close()
    assert zygote.poll() is not None
    assert not folder.exists()
    assert not session.alive
    with pytest.raises(SandboxError, match="start another"):
        session.run("1")
    session.close()
    with pytest.raises(SandboxError, match="closed"):
        sandbox.run("1")


def test_descriptors_do_not_leak(box: Sandbox) -> None:
    box.run("")
    before = open_descriptors()
    for _ in range(5):
        box.run("1")
        with box.session() as session:
            session.run("import os; os._exit(1)")
        box.judge("def f(x): return x", "def check(c): assert c(1) == 1", "f")
    assert open_descriptors() == before


@pytest.mark.parametrize("limit", [{"wall": 0}, {"memory": 1}, {"files": 10**6}, {"threads": 0}])
def test_limits_out_of_range(limit: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="is not between"):
        Limits(**limit)  # type: ignore[arg-type]


def test_unknown_levels_and_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="'none' is not one of interpreter, process, namespace"):
        Sandbox(level="none")  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SandboxUnavailable, match="win32"):
        Sandbox()


def test_the_doctor_tells_what_holds(box: Sandbox) -> None:
    found = {a.level: a for a in mechanisms.available()}
    assert list(found) == ["interpreter", "process", "namespace"]
    assert f"landlock {linux.landlock_version()}" in found["process"].mechanisms
    assert all(bool(a.mechanisms) != bool(a.reason) for a in found.values())
