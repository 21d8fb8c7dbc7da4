"""A limit of time for Python code that nobody can vouch for."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Seconds that a chat template has for one conversation; real ones take milliseconds.
LIMIT = 10.0


class _Overtime(BaseException):
    """Raised in the code that takes too long, from outside."""


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call`, in this thread; TimeoutError if it takes longer.

    A chat template may loop for hours, and CPython has no other way to stop a thread. It stops
    between two bytecodes: a single call of C runs to its end.
    """
    lock = threading.Lock()
    thread = ctypes.c_ulong(threading.get_ident())
    running = True
    fired = False

    def fire() -> None:
        nonlocal fired
        with lock:
            if running:
                fired = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_Overtime))

    def settle() -> None:
        nonlocal running
        with lock:
            running = False
        while fired:  # it comes here at the latest, and not in the code that follows
            time.sleep(0.001)

    timer = threading.Timer(seconds, fire)
    timer.daemon = True
    try:
        try:
            timer.start()
            result = call()
        except _Overtime:
            raise
        except BaseException:
            settle()
            raise
        settle()
        return result
    except _Overtime:
        raise TimeoutError from None
    finally:
        timer.cancel()
