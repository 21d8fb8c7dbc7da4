"""Verdicts: what passes, what fails and why, and what crosses between candidate and test."""

from __future__ import annotations

from collections.abc import Iterator
from math import copysign
from typing import Any

import pytest

from optiq.errors import UsageError
from optiq.sandbox import Limits, Sandbox
from optiq.sandbox.jail import wire
from tests.sandbox.levels import process_level

PROCESS = process_level()
SQUARE = "def check(candidate):\n    assert candidate(3) == 9"


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox(Limits(wall=3, cpu=1, memory=256 * 2**20, output=10_000)) as sandbox:
        yield sandbox


@PROCESS
@pytest.mark.parametrize(
    ("code", "status", "detail"),
    [
        ("def f(x): return x * x", "passed", ""),
        ("f = lambda x: x * x", "passed", ""),
        ("def f(x): return 8", "failed", "AssertionError"),
        ("def f(x): raise KeyError('k')", "failed", "KeyError: \"'k'\""),
        ("def f(x): return object()", "failed", "AssertionError"),
        ("def f(x): return 1 / 0", "failed", "ZeroDivisionError: division by zero"),
        ("def f(", "error", "SyntaxError: '(' was never closed (main.py, line 1)"),
        ("def g(x): return 9", "error", "f is not a function"),
        ("f = 9", "error", "f is not a function"),
        ("raise ValueError('at import')", "error", "ValueError: at import"),
        ("raise SystemExit", "error", "exit status 1"),
        ("import os; os._exit(0)", "error", "the code ended the process instead of defining"),
        ("import os\ndef f(x): os._exit(0)", "failed", "the candidate ended during the test"),
        ("import os\ndef f(x): os.close(4)", "failed", "the candidate ended during the test"),
        ("import sys\ndef f(x): sys.exit(0)", "failed", "the candidate ended during the test"),
        ("def f(x):\n while True: pass", "timeout", "more than "),
        ("x = bytearray(10**9)\ndef f(x): pass", "memory", "MemoryError"),
        ("def f(x):\n while True: print('x' * 100)", "output", "more than 10000 bytes of output"),
        ("import os\ndef f(x): os.kill(os.getpid(), 11)", "killed", "ended by SIGSEGV"),
    ],
)
def test_verdicts(box: Sandbox, code: str, status: str, detail: str) -> None:
    verdict = box.judge(code, SQUARE, "f")
    assert verdict.detail.startswith(detail)
    assert (verdict.status, verdict.passed) == (status, status == "passed")


@PROCESS
@pytest.mark.parametrize(
    ("check", "detail"),
    [
        ("def check(", "SyntaxError"),
        ("x = 1", "KeyError: 'check'"),
        ("import os\ndef check(candidate): os._exit(0)", "the test gave no verdict"),
        ("def check(candidate): candidate(print)", "TypeError: a value of type builtin_function"),
    ],
)
def test_a_test_that_is_none_passes_nobody(box: Sandbox, check: str, detail: str) -> None:
    verdict = box.judge("def f(x): return x * x", check, "f")
    assert (verdict.status, verdict.detail.startswith(detail)) == ("failed", True), verdict.detail


@PROCESS
def test_a_test_may_swallow_exceptions_but_not_the_end_of_the_candidate(box: Sandbox) -> None:
    check = "def check(candidate):\n try: candidate(1)\n except BaseException: pass"
    assert box.judge("def f(x): raise ValueError", check, "f").passed
    assert not box.judge("import os\ndef f(x): os._exit(0)", check, "f").passed
    assert not box.judge("import os\ndef f(x): os.write(4, b'\\0\\0\\0\\2{}')", check, "f").passed


@PROCESS
def test_a_broken_protocol_is_not_a_timeout(box: Sandbox) -> None:
    code = "import os, time\ndef f(x):\n os.write(4, b'junk' * 9)\n time.sleep(9)"
    verdict = box.judge(code, SQUARE, "f")
    assert (verdict.status, "not an answer" in verdict.detail) == ("failed", True), verdict


@PROCESS
def test_exceptions_keep_their_kind(box: Sandbox) -> None:
    check = """
def check(candidate):
    for kind in (ValueError, KeyError, ZeroDivisionError, RuntimeError):
        try: candidate(kind.__name__)
        except kind as error: assert type(error) is kind
        else: assert False
"""
    code = """
class Mine(Exception): pass
def f(name):
    if name == "RuntimeError": raise Mine("unknown outside")
    raise getattr(__builtins__, name, None)("x")
"""
    assert box.judge(code, check, "f").passed


@PROCESS
def test_the_candidate_keeps_state_and_takes_keywords(box: Sandbox) -> None:
    code = "calls = []\ndef f(*a, k=0): calls.append(a); return len(calls), a, k"
    check = """
def check(candidate):
    assert candidate() == (1, (), 0)
    assert candidate([1], {2: (3,)}, k=None) == (2, ([1], {2: (3,)}), None)
    assert f is candidate
"""
    verdict = box.judge(code, check, "f")
    assert verdict.passed, verdict.detail


VALUES: list[Any] = [
    None, True, 0, -1, 2**53, -(2**53) - 1, 10**5000, 0.1, -0.0, float("inf"), "", "é\0\ud800",
    b"\xff", bytearray(b"x"), 1j, [], [[1], []], (), (1, (2,)), {}, {1: {"a": (None,)}, (1, 2): []},
    {1, "a"},
    frozenset({1}), range(3, 10, 2), {"dict": 1}, {"tuple": []}, ["int"],
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_values_cross_whole(value: Any) -> None:
    back = wire.unpack(wire.decode(wire.encode(wire.pack(value))[4:]))
    assert back == value
    assert copysign(1, back) == copysign(1, value) if isinstance(value, float) else True
    assert type(back) is type(value)


def test_subclasses_leave_their_class_behind() -> None:
    class Same(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    class List(list[int]):
        pass

    for value, base in ((Same(3), 3), (List([1]), [1])):
        back = wire.unpack(wire.pack(value))
        assert type(back) is type(base)
        assert back == base
    assert wire.unpack(wire.pack(Same(3))) != 4
    assert list(wire.unpack(wire.pack(iter([1, 2])))) == [1, 2]
    with pytest.raises(TypeError, match="function"):
        wire.pack([len, lambda: 0])
    opaque = wire.unpack({"opaque": "X"})
    assert opaque != wire.unpack({"opaque": "X"})
    assert repr(opaque) == "<X>"


@pytest.mark.parametrize(
    "tree",
    [
        {}, {"a": 1}, {"int": 3}, {"int": "zz"}, {"tuple": 3}, {"dict": [[1]]}, {"set": [[]]},
        {"dict": [[[], 1]]}, {"range": [0, 1, 0]}, {"bytes": "f"}, {"complex": ["a"]},
        {"a": 1, "b": 2},
        {"__class__": []},
    ],
)  # fmt: skip
def test_what_is_no_value_is_refused(tree: Any) -> None:
    with pytest.raises(wire.WireError, match="no value"):
        wire.unpack(tree)


def test_messages_come_apart_at_any_byte_and_have_a_limit() -> None:
    messages = [{"a": "é" * 50}, [], 7]
    data = b"".join(map(wire.encode, messages))
    inbox = wire.Inbox()
    assert [m for i in range(len(data)) for m in inbox.feed(data[i : i + 1])] == messages
    with pytest.raises(wire.WireError, match="too much"):
        wire.Inbox(99).feed(bytes(100))
    with pytest.raises(wire.WireError, match="no JSON"):
        wire.Inbox().feed(b"\0\0\0\1{")
    with pytest.raises(wire.WireError, match="no JSON"):
        wire.Inbox().feed((10**6).to_bytes(4, "big") + b"[" * 10**6)
    with pytest.raises(wire.WireError, match="above"):
        wire.encode("x" * wire.MOST)


def test_the_interpreter_level_judges_nothing() -> None:
    with Sandbox(level="interpreter") as sandbox, pytest.raises(UsageError, match="process"):
        sandbox.judge("", "", "f")
