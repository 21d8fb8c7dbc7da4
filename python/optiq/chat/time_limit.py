"""A limit of time for Python code that nobody can vouch for."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class _Overtime(BaseException):
    """Raised in the code that takes too long, from outside."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError in this thread where the body takes longer; in any thread of CPython.

    A chat template may loop for hours, and Python has no other way to stop a thread. It stops
    between two bytecodes: a single call of C runs to its end.
    """
    lock = threading.Lock()
    ours = ctypes.c_ulong(threading.get_ident())
    running = True
    fired = False

    def fire() -> None:
        nonlocal fired
        with lock:
            if running:
                fired = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ours, ctypes.py_object(_Overtime))

    def settle() -> None:
        nonlocal running
        with lock:
            running = False
        while fired:  # it comes here at the latest, and not in the code that follows
            time.sleep(0.001)

    timer = threading.Timer(seconds, fire)
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        except _Overtime:
            raise
        except BaseException:
            settle()
            raise
        settle()
    except _Overtime:
        raise TimeoutError from None
    finally:
        timer.cancel()
