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
import errno
import linecache
import os
import sys
import threading
import traceback
import types
from typing import Any, NoReturn

from . import wire

CHANNEL, PEER = 3, 4  # descriptors: to the host; between a candidate and its test
_NAME = "main.py"


def obey() -> NoReturn:
    """Carry out one order and end the process."""
    code = 1
    try:
        order = wire.receive(CHANNEL)
        code = _MODES[order["mode"]](order)
    except BaseException as error:
        _print_traceback(error)
    finally:
        os._exit(code)


def _run(order: dict[str, Any]) -> int:
    """The exit status of the program; how an uncaught exception ended it goes to the host."""
    code = _execute(order["code"], _main())
    _last_words()
    return code


def _session(order: dict[str, Any]) -> int:
    """After each snippet, its number and how it ended."""
    module = _main()
    cell = code = 0
    while True:
        wire.send(CHANNEL, {"ready": cell, "code": code})
        try:
            source = wire.receive(CHANNEL)["code"]
        except EOFError:
            return 0
        cell += 1
        code = _execute(source, module, f"<cell {cell}>")
        _flush()


def _serve(order: dict[str, Any]) -> int:
    module = _main()
    code = _execute(order["code"], module, quiet=True)
    entry = module.__dict__.get(order["entry"])
    if code or not callable(entry):
        if not code:
            wire.send(CHANNEL, {"status": "error", "detail": f"{order['entry']} is no function"})
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
            answer = wire.encode({"error": type(error).__name__, "detail": _text(error)})
        wire.write(PEER, answer)


def _packed(value: Any) -> Any:
    try:
        return wire.pack(value)
    except TypeError:
        return {"opaque": type(value).__name__}


def _check(order: dict[str, Any]) -> int:
    module = _main()
    candidate = Candidate()
    verdict: dict[str, Any] = {"nonce": order["nonce"], "passed": False}
    try:
        exec(compile(order["check"], "check.py", "exec"), module.__dict__)
        module.__dict__[order["entry"]] = candidate  # some tests call it by its own name
        module.__dict__["check"](candidate)
        verdict["passed"] = not candidate.gone
    except BaseException as error:
        verdict["detail"] = _line(error)
    if candidate.gone:
        verdict |= {"detail": candidate.gone, "gone": True}
    wire.send(CHANNEL, verdict)
    return 0


class Candidate:
    """A function in another process: arguments and results cross as data.

    An exception of the candidate is raised here as the built-in one of the same name. If the
    candidate has ended or sent what is no answer, `gone` says so and the verdict is no pass,
    whatever the test makes of the exception.
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
            self.gone = f"the candidate's answer is none: {error}"
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


def _main() -> types.ModuleType:
    """A fresh `__main__`."""
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    sys.argv = [_NAME]
    return module


def _execute(code: str, module: types.ModuleType, name: str = _NAME, quiet: bool = False) -> int:
    """The exit status; the host is told about an exception, the traceback goes to stderr."""
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    try:
        exec(compile(code, name, "exec"), module.__dict__)
    except SystemExit as stop:
        if quiet:
            raise
        return _exit_status(stop)
    except BaseException as error:
        status = "error"
        if isinstance(error, MemoryError):
            status = "memory"
        elif isinstance(error, OSError) and error.errno in (errno.EPERM, errno.EACCES):
            status = "denied"
        if not quiet:
            _print_traceback(error)
        wire.send(CHANNEL, {"status": status, "detail": _line(error)})
        return 1
    return 0


def _exit_status(stop: SystemExit) -> int:
    """As the interpreter has it: none is 0, a number is itself, anything else is printed."""
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code & 0xFF
    print(stop.code, file=sys.stderr)
    return 1


def _print_traceback(error: BaseException) -> None:
    """Without the frames of this file."""
    trace = error.__traceback__
    try:
        traceback.print_exception(type(error), error, trace.tb_next if trace else None)
    except BaseException:  # its __str__ or __repr__ failed, or stderr is closed
        os.write(2, f"{type(error).__name__}\n".encode())


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {_text(error)}".split())[:500].rstrip(": ")


def _text(error: BaseException) -> str:
    try:
        return f"{error}"
    except BaseException:  # untrusted, like everything about it
        return ""


def _last_words() -> None:
    """What the interpreter does at its end: other threads, atexit, what is still buffered."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException as error:
        _print_traceback(error)
    _flush()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(BaseException):
            stream.flush()  # type: ignore[union-attr]


_MODES = {"run": _run, "session": _session, "serve": _serve, "check": _check}
