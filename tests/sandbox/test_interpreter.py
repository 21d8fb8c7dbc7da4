"""The interpreter level: pydantic-monty behind the same face."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from optiq.errors import SandboxError, SandboxUnavailable, UsageError
from optiq.sandbox import Limits, Sandbox


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    pytest.importorskip("pydantic_monty", reason="pydantic-monty is not installed")
    limits = Limits(wall=2, cpu=1, memory=64 * 2**20, output=1000)
    with Sandbox(limits, level="interpreter") as sandbox:
        yield sandbox


@pytest.mark.parametrize(
    ("code", "status", "stdout"),
    [
        ("print(6 * 7)", "ok", "42\n"),
        ("1 / 0", "error", ""),
        ("def f(:", "error", ""),
        ("print(open('/etc/passwd').read())", "denied", ""),
        ("import os\nos._exit(0)", "error", ""),
        ("import socket", "error", ""),
        ("import subprocess", "error", ""),
        ("[0] * 10**10", "memory", ""),
        ("while True: pass", "timeout", ""),
        ("import time\ntime.sleep(60)", "timeout", ""),
        ("(10**5000) ** 5000", "timeout", ""),
    ],
)
def test_programs(box: Sandbox, code: str, status: str, stdout: str) -> None:
    result = box.run(code)
    assert (result.status, result.stdout) == (status, stdout), result
    assert bool(result.stderr) == (status != "ok") or status == "timeout"
    assert result.mechanisms[0].startswith("pydantic-monty 1.")
    assert result.usage.wall < 10
    assert result.usage.memory is None


def test_output_is_bounded(box: Sandbox) -> None:
    result = box.run("for i in range(100000): print('x' * 100)")
    assert (result.status, result.truncated, len(result.stdout)) == ("output", True, 1000)


def test_files_are_read_and_what_is_written_stays_inside(box: Sandbox) -> None:
    code = "open('new', 'w').write('y')\nprint(open('a').read(), open('new').read())"
    assert box.run(code, {"a": b"1"}).stdout == "1 y\n"
    assert box.run("print(open('../../etc/passwd').read())", {"a": b"1"}).status != "ok"


def test_a_session(box: Sandbox) -> None:
    with box.session() as session:
        session.run("x = 40")
        assert session.run("1 / 0").status == "error"
        assert session.run("print(x + 2)").stdout == "42\n"
        assert session.run("while True: pass").status == "timeout"
        assert not session.alive
        with pytest.raises(SandboxError, match="start another"):
            session.run("1")


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydantic_monty", None)
    with (
        Sandbox(level="interpreter") as sandbox,
        pytest.raises(SandboxUnavailable, match=r"pip install 'optiq-mlx\[sandbox\]'"),
    ):
        sandbox.run("1")


def test_a_long_error_is_bounded(box: Sandbox) -> None:
    result = box.run("raise ValueError('x' * 10**5)")
    assert (result.truncated, len(result.stderr)) == (True, 1000)
    flood = "while True:\n try: print('x' * 999)\n except BaseException: pass"
    result = box.run(flood)
    assert (result.status, len(result.stdout)) == ("output", 1000)


def test_values_streams_and_cancelling(box: Sandbox) -> None:
    heard: list[tuple[str, str]] = []
    result = box.run("print('a')\n[1, 2]", on_output=lambda s, t: heard.append((s, t)))
    assert (result.value, "".join(t for _, t in heard)) == ("[1, 2]", "a\n")
    with box.session() as session:
        loop = "while True: print(1)"
        result = session.run(loop, on_output=lambda s, t: session.cancel())
        assert result.status == "cancelled"

    def fail(stream: str, text: str) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        box.run("print(1)", on_output=fail)


def test_what_it_does_not_have(box: Sandbox) -> None:
    for options in ({"args": ("x",)}, {"stdin": b"x"}):
        with pytest.raises(UsageError, match="take 'process'"):
            box.run("", **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="of the limit disk"):
        box.run("", {"x": bytes(2**20)}, limits=Limits(disk=1000))
    with box.session() as session:
        for act in (session.list, lambda: session.read("x"), lambda: session.write({})):
            with pytest.raises(UsageError, match="level 'interpreter'"):
                act()
        with pytest.raises(UsageError, match="its own output limit alone"):
            session.run("1", limits=Limits(wall=9))
