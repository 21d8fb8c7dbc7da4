"""What an agent needs of a sandbox: files out, packages, values, pictures, streams, cancelling."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from optiq.errors import SandboxError, UsageError
from optiq.sandbox import Cancel, Limits, Sandbox
from tests.sandbox.conftest import BOUNDS, open_descriptors
from tests.sandbox.levels import process_level

pytestmark = process_level()
LIMITS = BOUNDS


def test_files_come_out(both: Sandbox) -> None:
    code = """
import os
os.mkdir("d"); open("d/new.bin", "wb").write(b"\\xff" * 5)
open("given", "w").write("same size"); open("untouched").read()
os.symlink("/etc/passwd", "link"); open(".hidden", "w").write("x"); open("empty", "w").close()
"""
    result = both.run(code, {"given": b"SAME SIZE", "untouched": b"1"})
    assert result.files == {"d/new.bin": b"\xff" * 5, "given": b"same size", "empty": b""}
    assert result.left_out == ()
    coded = json.loads(json.dumps(result.to_json()))
    assert coded["files"]["d/new.bin"] == "//////8="


def test_files_that_come_out_are_bounded(both: Sandbox) -> None:
    code = "open('a', 'wb').write(bytes(600)); open('b', 'wb').write(bytes(600)); open('c', 'w')"
    result = both.run(code, limits=replace(LIMITS, returned=1000))
    assert (set(result.files), result.left_out) == ({"a", "c"}, ("b",))


def test_files_come_out_of_what_was_killed(both: Sandbox) -> None:
    code = "open('a', 'w').write('kept')\nimport os; os.abort()"
    result = both.run(code)
    assert (result.status, result.files) == ("killed", {"a": b"kept"})


def test_a_session_gives_and_takes_files(both: Sandbox) -> None:
    with both.session({"in.csv": b"1,2"}) as session:
        assert session.run("open('in.csv').read()").files == {}
        assert session.run("open('out', 'w').write('x' * 9)").files == {"out": b"x" * 9}
        session.write({"d/more": b"12", "in.csv": b"3"})
        assert session.list() == {"d/more": 2, "in.csv": 1, "out": 9}
        assert session.read("d/more") == b"12"
        assert session.run("open('d/more').read() + open('in.csv').read()").value == "'123'"
        session.run("import os; os.symlink('/etc', 'etc'); os.symlink('/etc/passwd', 'p')")
        for name in ("etc/passwd", "p", "nothing", "../x", "/etc/passwd", "", "d"):
            with pytest.raises(SandboxError, match="cannot be read"):
                session.read(name)
        session.run("os.symlink('/tmp', 'lead')")
        with pytest.raises(UsageError, match="cannot be written"):
            session.write({"lead/optiq-attack": b"x"})
        with pytest.raises(UsageError, match="cannot be written"):
            session.write({"p": b"x"})
        with pytest.raises(UsageError, match="leads out"):
            session.write({"../x": b""})
        session.write({"large": bytes(6 * 2**20)})
        with pytest.raises(UsageError, match="above the limit disk"):
            session.write({"larger": bytes(3 * 2**20)})
        assert session.run("1").status == "ok"
    with pytest.raises(SandboxError, match="closed"):
        session.list()


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("1 + 1", "2"),
        ("x = 5\nx", "5"),
        ("'text'", "'text'"),
        ("None", None),
        ("x = 5", None),
        ("print(1)", None),
        ("", None),
        ("[1,\n 2]  # comment\n", "[1, 2]"),
        ("await __import__('asyncio').sleep(0, 7)", "7"),
        ("import asyncio\nx = await asyncio.sleep(0, 8)\nx", "8"),
        ("'x' * 10**5", "'" + "x" * 7999 + "..."),
        ("1" + " + 1" * 2500, None),  # deeper than a tree of objects may be
    ],
)
def test_the_value_of_the_last_expression(box: Sandbox, code: str, value: str | None) -> None:
    assert box.run(code).value == value
    with box.session() as session:
        result = session.run(code)
        assert (result.status, result.value, result.exit_status) == ("ok", value, 0)


def test_a_value_that_cannot_be_shown(box: Sandbox) -> None:
    result = box.run("class A:\n def __repr__(self): 1 / 0\nA()")
    assert (result.status, result.value) == ("error", None)
    assert result.detail == "ZeroDivisionError: division by zero"


def test_programs_do_not_inherit_the_future(box: Sandbox) -> None:
    assert box.run("def f(x: Missing): pass").detail.startswith("NameError")
    assert box.run("from __future__ import annotations\ndef f(x: Missing): pass").status == "ok"
    check = "def check(f): assert f(1) == 1"
    assert not box.judge("def f(x: Missing): return x", check, "f").passed


def test_arguments_stdin_and_exit_status(both: Sandbox) -> None:
    code = "import sys\nprint(sys.argv, input(), sys.stdin.read())\nsys.exit(7)"
    result = both.run(code, args=("-a", "b c"), stdin=b"first\nsecond\n\xc3\xa9")
    assert result.stdout == "['main.py', '-a', 'b c'] first second\né\n"
    assert (result.status, result.exit_status) == ("error", 7)
    assert both.run("import os; os._exit(0)").exit_status == 0
    assert both.run("import os; os.abort()").exit_status is None
    assert both.run("import os; print(os.read(0, 9))").stdout == "b''\n"
    assert both.run("import os; print(len(os.read(0, 10**7)))", stdin=bytes(5 * 2**20)).stdout == (
        "5242880\n"
    )


ORDINARY = {
    "shutil.copy": "shutil.copy('a', 'b')",
    "shutil.copy2": "shutil.copy2('a', 'b')",
    "shutil.copytree": "os.mkdir('d'); shutil.copy('a', 'd'); shutil.copytree('d', 'e')",
    "os.chmod": "os.chmod('a', 0o640); assert os.stat('a').st_mode & 0o777 == 0o640",
    "os.fchmod": "f = open('a'); os.fchmod(f.fileno(), 0o600)",
    "os.utime": "os.utime('a', (1, 2)); assert os.stat('a').st_mtime == 2",
    "os.utime of a descriptor": "f = open('a'); os.utime(f.fileno()); os.stat('a').st_mtime > 1e9",
    "Path.touch": "pathlib.Path('a').touch()",
    "os.readlink": "os.symlink('a', 'l'); assert os.readlink('l') == 'a'",
    "Path.resolve": "os.symlink('a', 'l'); assert Path('l').resolve() == Path('a').resolve()",
    "in a folder": "os.mkdir('d'); os.chdir('d'); open('x', 'w'); os.chmod('../a', 0o600)",
    "by a folder": "d = os.open('.', os.O_RDONLY); os.chmod('a', 0o600, dir_fd=d)",
    "zoneinfo": "zoneinfo.ZoneInfo('Europe/Berlin')",
    "mimetypes": "assert mimetypes.guess_type('a.png')[0] == 'image/png'",
    "getpass.getuser": "assert getpass.getuser() == 'sandbox'",
    "tempfile": "import tempfile\nwith tempfile.TemporaryDirectory() as d: open(d + '/x', 'w')",
    "zipfile": "shutil.make_archive('z', 'zip', '.')",
    "sqlite3": "import sqlite3\nc = sqlite3.connect('db'); c.execute('create table t (x)')",
    "logging": "import logging\nlogging.basicConfig(filename='log'); logging.error('x')",
}


@pytest.mark.parametrize("code", ORDINARY.values(), ids=ORDINARY)
def test_ordinary_calls_work_on_own_files(both: Sandbox, code: str) -> None:
    imports = "import getpass, mimetypes, os, pathlib, shutil, zoneinfo\nfrom pathlib import Path\n"
    result = both.run(f"{imports}{code}", {"a": b"1"})
    assert result.status == "ok", result.stderr


@pytest.mark.parametrize(
    ("code", "status", "rule"),
    [
        ("import urllib.request as u; u.urlopen('http://example.com')", "denied", "no network"),
        ("import socket; socket.socket()", "denied", "no network"),
        ("import socket; socket.gethostbyname('localhost')", "denied", "no network"),
        ("import os; os.system('ls')", "denied", "starts no processes"),
        ("import subprocess; subprocess.run(['ls'])", "denied", "starts no processes"),
        ("import multiprocessing; multiprocessing.Pool(2)", "denied", "starts no processes"),
        ("open('/etc/passwd')", None, "reads Python's library"),
        ("open('/usr/new', 'w')", None, "writes in the work folder alone"),
        ("import os; os.setuid(1)", "denied", "does not allow this system call"),
        ("open('x', 'wb').write(bytes(9 * 2**20))", "disk", "at its limit of bytes"),
    ],
)
def test_refusals_name_the_rule(both: Sandbox, code: str, status: str | None, rule: str) -> None:
    result = both.run(code)
    assert rule in result.detail
    assert rule in result.stderr
    assert status is None or result.status == status


def test_a_library_may_still_catch_a_refusal(box: Sandbox) -> None:
    code = "import socket\ntry: socket.socket()\nexcept OSError as e: print(e.errno)\n"
    assert box.run(code + "a, b = socket.socketpair(); a.send(b'1'); print(b.recv(1))").stdout == (
        "1\nb'1'\n"
    )


def test_output_is_told_as_it_comes(both: Sandbox) -> None:
    heard: list[tuple[str, str, float]] = []
    code = """
import os, sys, time
print("a", flush=True); time.sleep(.3)
os.write(2, b"\\xc3"); time.sleep(.1); os.write(2, b"\\xa9\\xff")
"""
    result = both.run(code, on_output=lambda s, t: heard.append((s, t, time.monotonic())))
    assert [h[:2] for h in heard] == [("stdout", "a\n"), ("stderr", "é"), ("stderr", "\\xff")] or (
        [h[:2] for h in heard] == [("stdout", "a\n"), ("stderr", "é\\xff")]
    )
    assert heard[1][2] - heard[0][2] > 0.2
    assert (result.stdout, result.stderr) == ("a\n", "é\\xff")
    told: list[str] = []
    flood = both.run("while True: print('x' * 99)", on_output=lambda s, t: told.append(t))
    assert flood.status == "output"
    assert "".join(told) == flood.stdout


def test_a_listener_that_fails_ends_the_run(both: Sandbox) -> None:
    def hear(stream: str, text: str) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        both.run("print(1, flush=True)\nwhile True: pass", on_output=hear)
    with both.session() as session:
        with pytest.raises(RuntimeError, match="no more"):
            session.run("print(1, flush=True)\nwhile True: pass", on_output=hear)
        assert session.run("2").value == "2"


def later(seconds: float, act: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, act)
    timer.start()
    return timer


def test_a_run_is_cancelled_from_another_thread(both: Sandbox) -> None:
    for code in ("import time; time.sleep(60)", "while True: pass"):
        cancel = Cancel()
        later(0.1, cancel.cancel)
        start = time.monotonic()
        assert both.run(code, cancel=cancel).status == "cancelled"
        assert time.monotonic() - start < 2.9
    assert both.run("1", cancel=cancel).status == "cancelled"  # it stays so


def test_a_snippet_is_cancelled_and_the_session_goes_on(both: Sandbox) -> None:
    with both.session() as session:
        session.run("x = 1")
        session.cancel()  # nothing runs
        later(0.1, session.cancel)
        result = session.run("x = 2\nwhile True: pass")
        assert (result.status, session.alive) == ("cancelled", True)
        assert "KeyboardInterrupt" in result.stderr
        assert session.run("x").value == "2"
        later(0.1, session.cancel)
        stubborn = "import time\nwhile True:\n try: time.sleep(9)\n except BaseException: pass"
        assert session.run(stubborn).status == "cancelled"
        assert not session.alive


def test_a_snippet_may_be_cancelled_at_any_moment(both: Sandbox) -> None:
    """Before it has begun, too: the session goes on."""
    cancelled = Cancel()
    cancelled.cancel()
    with both.session() as session:
        assert session.run("x = 1", cancel=cancelled).status == "cancelled"
        assert session.run("'x' in globals()").value == "False"
        for i in range(20):
            cancel = Cancel()
            later(0.001 * i, cancel.cancel)
            assert session.run("import time\ntime.sleep(60)", cancel=cancel).status == "cancelled"
            assert session.run(f"{i}").value == f"{i}"


def test_a_limit_interrupts_first(both: Sandbox) -> None:
    with both.session() as session:
        quick = replace(LIMITS, wall=0.3)
        result = session.run("import time\ntry: time.sleep(60)\nfinally: x = 3", limits=quick)
        assert (result.status, session.alive) == ("timeout", True)
        assert "interrupted, the session goes on" in result.detail
        assert session.run("x").value == "3"
        with both.session() as mute:
            result = mute.run("import os, time\nos.close(3)\ntime.sleep(60)", limits=quick)
            assert (result.status, mute.alive) == ("timeout", False)
        lean = replace(LIMITS, cpu=0.2)
        result = session.run("while True: pass", limits=lean)
        assert (result.status, session.alive) == ("timeout", True)
        assert "0.2 s of CPU" in result.detail
        result = session.run("while True: print('x' * 99)", limits=replace(LIMITS, output=1000))
        assert (result.status, len(result.stdout), session.alive) == ("output", 1000, True)
        assert session.run("print(4)").stdout == "4\n"
        for other in (replace(LIMITS, memory=2**30), replace(LIMITS, files=3)):
            with pytest.raises(UsageError, match="no more"):
                session.run("1", limits=other)


def test_limits_of_a_run(both: Sandbox) -> None:
    few = replace(LIMITS, files=2)
    assert both.run("for i in range(3): open(str(i), 'w')", limits=few).status == "disk"
    assert both.run("for i in range(3): open(str(i), 'w')").status == "ok"
    assert both.run("while True: pass", limits=replace(LIMITS, wall=0.2)).status == "timeout"


def test_closing_from_another_thread(both: Sandbox) -> None:
    before = open_descriptors()
    for _ in range(5):
        session = both.session()
        start = time.monotonic()
        timer = later(0.1, session.close)
        result = session.run("while True:\n try: __import__('time').sleep(60)\n except: pass")
        assert result.status == "cancelled"
        assert time.monotonic() - start < 2.9
        timer.join()
        with pytest.raises(SandboxError):
            session.run("1")
    assert open_descriptors() == before
    folder = both._processes.jail.folder
    assert {p.name for p in folder.iterdir()} <= {"work", "fonts"}


def test_an_interrupted_host_ends_the_session(both: Sandbox) -> None:
    def interrupt(stream: str, text: str) -> None:
        raise KeyboardInterrupt

    with both.session() as session:
        with pytest.raises(KeyboardInterrupt):
            session.run("print(1, flush=True)\nwhile True: pass", on_output=interrupt)
        assert not session.alive
    with pytest.raises(KeyboardInterrupt):
        both.run("print(1, flush=True)\nwhile True: pass", on_output=interrupt)


def test_a_fork_of_the_host_leaves_sessions_alone(both: Sandbox) -> None:
    with both.session() as session:
        code = "x = 5"
        session.run(code)
        pid = os.fork()
        if pid == 0:
            session._session._release()  # type: ignore[attr-defined]
            os._exit(0)
        os.waitpid(pid, 0)
        assert session.run("x").value == "5"


def test_a_session_keeps_its_sandbox() -> None:
    session = Sandbox(LIMITS).session()
    gc.collect()
    assert session.run("1").value == "1"
    folder = session._sandbox._processes.jail.folder
    session.close()
    del session
    gc.collect()
    assert not folder.exists()


def test_closing_while_others_start() -> None:
    for _ in range(5):
        box = Sandbox(LIMITS)
        box.run("")

        def run(box: Sandbox = box) -> str:
            try:
                return box.run("while True: pass").status
            except SandboxError as error:
                return str(error)

        with ThreadPoolExecutor(6) as pool:
            ends = [pool.submit(run) for _ in range(6)]
            time.sleep(0.02)
            box.close()
            found = {end.result() for end in ends}
        assert all(f in ("killed", "cancelled") or "closed" in f or "no jail" in f for f in found)
        assert not box._processes.jail.folder.exists()


def test_the_async_api() -> None:
    async def main() -> None:
        heard: list[str] = []
        with Sandbox(LIMITS) as box, box.session() as session:
            results = await asyncio.gather(*(box.run_async(f"{i} ** 2") for i in range(20)))
            assert [r.value for r in results] == [str(i**2) for i in range(20)]
            await session.run_async("print('s')", on_output=lambda _, text: heard.append(text))
            assert heard == ["s\n"]
            start = time.monotonic()
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(session.run_async("while True: pass"), 0.2)
            assert session.alive
            assert (await session.run_async("5")).value == "5"
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(box.run_async("while True: pass"), 0.2)
            assert time.monotonic() - start < 5
            with pytest.raises(UsageError):
                await box.run_async("", {"../x": b""})

            def fail(stream: str, text: str) -> None:
                raise RuntimeError("no more")

            with pytest.raises(RuntimeError, match="no more"):
                await box.run_async("print(1, flush=True)\nwhile True: pass", on_output=fail)

    asyncio.run(main())


@pytest.fixture(scope="module")
def numbers() -> Iterator[Sandbox]:
    with Sandbox(Limits(wall=20, memory=512 * 2**20), packages=("numpy",)) as sandbox:
        yield sandbox


def test_packages(numbers: Sandbox) -> None:
    code = "import numpy as np\nint((np.arange(10) @ np.arange(10)))"
    assert numbers.run(code).value == "285"
    with numbers.session() as session:
        assert session.run(code).value == "285"
    assert numbers.run("import pytest").detail.startswith("ModuleNotFoundError")
    write = "import numpy, os\nopen(os.path.join(os.path.dirname(numpy.__file__), 'x'), 'w')"
    assert numbers.run(write).status == "denied"
    for path in ("numpy.__path__[0]", "numpy.__file__"):
        assert numbers.run(f"import numpy, os\nos.chmod({path}, 0o777)").status == "denied"
    assert numbers.run("import numpy, os\nos.path.realpath(numpy.__file__)").status == "ok"


def test_a_folder_of_packages(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("x = 4")
    with Sandbox(LIMITS, packages=tmp_path) as box:
        assert box.run("import mine\nmine.x").value == "4"
        assert box.run(f"open({str(tmp_path / 'new')!r}, 'w')").status == "denied"


@pytest.mark.parametrize(
    ("packages", "message"),
    [
        (("no-such-package",), "'no-such-package' is not installed here; pip install no-such"),
        ("numpy", "give a tuple of names"),
        (Path("/nothing/here"), "is not a folder"),
        (Path("/"), "holds temporary files"),
    ],
)
def test_packages_that_are_not_there(packages: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sandbox(packages=packages)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="has no packages"):
        Sandbox(level="interpreter", packages=("numpy",))


def test_pictures() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plot = "import matplotlib.pyplot as plt\nplt.plot([1, 3, 2])\nplt.show()\nplt.figure()\n"
    limits = Limits(wall=30, cpu=30, memory=512 * 2**20)
    with Sandbox(limits, packages=("matplotlib",)) as box, box.session() as session:
        result = session.run(plot)
        assert (result.status, result.stderr) == ("ok", "")
        assert set(result.files) == {"figure-1.png", "figure-2.png"}
        assert all(data.startswith(b"\x89PNG") for data in result.files.values())
        assert set(session.run("plt.plot([1]); None").files) == {"figure-3.png"}
        assert session.run("1").files == {}


def test_the_examples_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "sandbox.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "sandbox.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == (
        "ok hello\n {'b.txt': b'x'}\n42\nTrue passed \nstdout 10.0\n\n"
        "{'data.csv': 8, 'x.bin': 32} 32\n"
    )


def test_many_sessions_at_once() -> None:
    """More descriptors than `select` takes: 1,024."""
    before, count = open_descriptors(), 160
    with Sandbox(LIMITS) as box, ThreadPoolExecutor(8) as pool:
        sessions = list(pool.map(lambda _: box.session(), range(count)))
        assert open_descriptors() > 1024
        values = pool.map(lambda i: sessions[i].run(f"{i}").value, range(count))
        assert list(values) == [str(i) for i in range(count)]
    assert not any(s.alive for s in sessions)
    assert open_descriptors() <= before
    assert threading.active_count() < 20
