"""The process that runs untrusted code, once it is locked in.

It takes one order over the channel and carries it out:

    run      a program, to its end
    session  snippets in one namespace, until the host closes the channel
    serve    a candidate: import it, then answer calls to its functions over `PEER`
    check    a test of a candidate that a second process serves: its calls go over `PEER`

A candidate and its test live in two processes. So the candidate can neither see the test, nor
reach its frames, builtins or descriptors, nor end it; all it can give is data.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import functools
import os
import sys
import threading
from typing import Any, NoReturn

from . import policy, program, wire

CHANNEL, PEER = 3, 4  # descriptors: to the host; between a candidate and its test


def obey() -> NoReturn:
    """Carry out one order and end the process."""
    code = 1
    try:
        order = wire.receive(CHANNEL)
        policy.install()
        code = _MODES[order["mode"]](order)
    except BaseException as error:
        program.print_traceback(error)
    finally:
        os._exit(code)


def _run(order: dict[str, Any]) -> int:
    """The exit status of the program; how it ended goes to the host."""
    if "stdin" in order:
        _read_from(bytes.fromhex(order["stdin"]))
    ended = program.execute(order["code"], program.main_module(order["args"]))
    wire.send(CHANNEL, ended)
    _last_words()
    return int(ended["code"])


def _read_from(data: bytes) -> None:
    """Make it the standard input: a file without a name, under the limits of the work folder."""
    name = ".stdin"
    file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.unlink(name)
    wire.write(file, data)
    os.lseek(file, 0, os.SEEK_SET)
    os.dup2(file, 0)
    os.close(file)


def _session(order: dict[str, Any]) -> int:
    """After each snippet the nonce that came with it, and how it ended."""
    module = program.main_module([])
    cell, ended = 0, {"code": 0}
    while True:
        wire.send(CHANNEL, {"ready": order["nonce"], **ended})
        try:
            order = wire.receive(CHANNEL)
        except EOFError:
            return 0
        cell += 1
        program.allow_interrupts()
        begun = functools.partial(wire.send, CHANNEL, {"begun": order["nonce"]})
        ended = program.execute(order["code"], module, f"<cell {cell}>", begun)
        _flush()


def _serve(order: dict[str, Any]) -> int:
    module = program.main_module([])
    try:
        program.show(order["code"], program.NAME)
        exec(compile(order["code"], program.NAME, "exec", dont_inherit=True), module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        wire.send(CHANNEL, program.failure(error, quiet=True))
        return 1
    entry = module.__dict__.get(order["entry"])
    if not callable(entry):
        detail = f"{order['entry']} is not a function"
        wire.send(CHANNEL, {"code": 1, "status": "error", "detail": detail})
        return 1
    wire.send(CHANNEL, {"ready": 0})
    while True:
        try:
            call = wire.receive(PEER)
        except EOFError:
            return 0
        try:
            args, kwargs = wire.unpack(call["args"]), wire.unpack(call["kwargs"])
            answer = wire.encode({"value": _packed(entry(*args, **kwargs))})
        except (KeyboardInterrupt, SystemExit):
            return 1
        except BaseException as error:
            answer = wire.encode({"error": type(error).__name__, "detail": program.text(error)})
        wire.write(PEER, answer)


def _packed(value: Any) -> Any:
    try:
        return wire.pack(value)
    except TypeError:
        return {"opaque": type(value).__name__}


def _check(order: dict[str, Any]) -> int:
    module = program.main_module([])
    candidate = Candidate()
    verdict: dict[str, Any] = {"nonce": order["nonce"], "passed": False}
    try:
        exec(compile(order["check"], "check.py", "exec", dont_inherit=True), module.__dict__)
        module.__dict__[order["entry"]] = candidate  # some tests call it by its own name
        module.__dict__["check"](candidate)
        verdict["passed"] = not candidate.gone
    except BaseException as error:
        verdict["detail"] = program.line(error)
    if candidate.gone:
        verdict |= {"detail": candidate.gone, "gone": True}
    wire.send(CHANNEL, verdict)
    return 0


class Candidate:
    """A function in another process: arguments and results cross as data.

    An exception of the candidate is raised here as the built-in one of the same name. If the
    candidate has ended or sent something that is not an answer, `gone` says so and the verdict is
    not a pass, whatever the test makes of the exception.
    """

    def __init__(self) -> None:
        self.gone = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.gone:
            raise RuntimeError(self.gone)
        call = wire.encode({"args": wire.pack(list(args)), "kwargs": wire.pack(kwargs)})
        try:
            wire.write(PEER, call)
            answer = wire.receive(PEER)
            if "value" in answer:
                return wire.unpack(answer["value"])
            kind, detail = str(answer["error"]), str(answer["detail"])
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.gone = "the candidate ended during the test"
            raise RuntimeError(self.gone) from None
        except (wire.WireError, TypeError, KeyError) as error:
            self.gone = f"what the candidate sent is not an answer: {error}"
            raise RuntimeError(self.gone) from None
        known = getattr(builtins, kind, None)
        if isinstance(known, type) and issubclass(known, Exception):
            raise _made(known, detail)
        raise RuntimeError(detail)


def _made(kind: type[Exception], detail: str) -> Exception:
    try:
        return kind(detail)
    except TypeError:  # as UnicodeDecodeError, which is made from five arguments
        return RuntimeError(detail)


def _last_words() -> None:
    """What the interpreter does at its end: other threads, atexit, what is still buffered."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException as error:
        program.print_traceback(error)
    _flush()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(BaseException):
            stream.flush()  # type: ignore[union-attr]


_MODES = {"run": _run, "session": _session, "serve": _serve, "check": _check}
