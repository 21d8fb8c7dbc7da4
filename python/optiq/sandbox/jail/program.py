"""Runs untrusted source in a module: the value of its last expression, its pictures, its end."""

from __future__ import annotations

import ast
import builtins
import contextlib
import inspect
import linecache
import os
import signal
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import policy

NAME = "main.py"
_HERE = str(Path(__file__).parent)
_SHOWN = 8000  # characters of a value
_running = False


def main_module(arguments: list[str]) -> types.ModuleType:
    """A fresh `__main__`."""
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    sys.argv = [NAME, *arguments]
    return module


def execute(
    code: str,
    module: types.ModuleType,
    name: str = NAME,
    begun: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """How it ended: exit status, and a status and a line for an exception, or the last value.

    `begun` is called once it can be interrupted.
    """
    global _running
    show(code, name)
    _running = True
    try:
        begun()
        value = evaluate(code, module, name)
        shown = None if value is None else _shown(value)
        _save_figures()
        _running = False
    except SystemExit as stop:
        _running = False
        return {"code": _exit_status(stop)}
    except BaseException as error:
        _running = False
        return failure(error)
    return {"code": 0} if shown is None else {"code": 0, "value": shown}


def failure(error: BaseException, quiet: bool = False) -> dict[str, Any]:
    """What to tell the host of an exception; the traceback goes to stderr."""
    status, rule = policy.explain(error)
    if not quiet:
        print_traceback(error)
        if rule:
            with contextlib.suppress(BaseException):
                print(f"({rule})", file=sys.stderr)
    return {"code": 1, "status": status, "detail": line(error) + (f" ({rule})" if rule else "")}


def show(code: str, name: str) -> None:
    """So that tracebacks have the source's lines."""
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)


def evaluate(code: str, module: types.ModuleType, name: str) -> Any:
    """The value of the last expression; None where the last statement is another."""
    try:
        parts = _parts(code, name)
    except (RecursionError, MemoryError):  # nested deeper than a tree of objects may be
        parts = [compile(code, name, "exec", dont_inherit=True)]
    value = None
    for part in parts:
        value = _finish(part, module)
    return value


def _parts(code: str, name: str) -> list[types.CodeType]:
    """All statements, and apart from them the expression that may be the last one."""
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    tree = compile(code, name, "exec", ast.PyCF_ONLY_AST | flags, dont_inherit=True)
    last = None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
    parts = [compile(tree, name, "exec", flags, dont_inherit=True)]
    return parts + ([compile(last, name, "eval", flags, dont_inherit=True)] if last else [])


def _finish(code: types.CodeType, module: types.ModuleType) -> Any:
    value = eval(code, module.__dict__)
    if code.co_flags & inspect.CO_COROUTINE:  # there is an `await` outside of functions
        import asyncio

        return asyncio.run(value)
    return value


def _shown(value: Any) -> str:
    text = str.__str__(repr(value))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _save_figures() -> None:
    """Open figures of matplotlib become figure-1.png and so on in the work folder."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return
    for number in pyplot.get_fignums():
        taken = [int(n[7:-4]) for n in os.listdir() if n[:7] == "figure-" and n[7:-4].isdigit()]
        pyplot.figure(number).savefig(f"figure-{max(taken, default=0) + 1}.png")
        pyplot.close(number)


def allow_interrupts() -> None:
    """The host ends a snippet by SIGINT; between snippets there is nothing to end."""
    signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    if _running:
        raise KeyboardInterrupt


def _exit_status(stop: SystemExit) -> int:
    """As the interpreter has it: none is 0, a number is itself, anything else is printed."""
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code & 0xFF
    with contextlib.suppress(BaseException):
        print(stop.code, file=sys.stderr)
    return 1


def print_traceback(error: BaseException) -> None:
    """Without the frames of the sandbox's own files."""
    try:
        shown = traceback.TracebackException(type(error), error, error.__traceback__)
        shown.stack[:] = [f for f in shown.stack if not f.filename.startswith(_HERE)]
        print("".join(shown.format()), end="", file=sys.stderr)
    except BaseException:  # its __str__ or __repr__ failed, or stderr is closed
        with contextlib.suppress(OSError):
            os.write(2, f"{type(error).__name__}\n".encode())


def line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {text(error)}".split())[:400].rstrip(": ")


def text(error: BaseException) -> str:
    try:
        return f"{error}"
    except BaseException:  # untrusted, like everything about it
        return ""
