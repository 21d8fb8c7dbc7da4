"""Start a rank again when it was lost, in a process above it that does nothing else.

`mlx.launch` ends all ranks when one ends with an error, and MLX cannot connect ranks again within a
process. So the process that was launched stays and starts this same command below itself. A rank
that was killed, or ended with RESTART, is started again; so are the others, as each of them ends
with RESTART when it loses one. A rank that says nothing for STUCK seconds is killed first.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from .watch import BEAT, LATE

RESTART = 75  # exit code of a rank that should be started again
STUCK = 30.0  # seconds without a sign of life, once there was one; more than ranks wait to join
SOON = 60.0  # seconds; a rank that was lost so soon after its start
TRIES = 3  # of them in a row, after which it is given up

_PIPE = "OPTIQ_RESTARTS"  # of the process above: where signs of life go


def restarted() -> int | None:
    """The exit code, after the command has run below this process; None in that one."""
    if pipe := os.environ.pop(_PIPE, None):
        threading.Thread(target=_live, args=(int(pipe),), daemon=True).start()
        return None
    told = threading.Event()
    tries = 0
    while True:
        started = time.monotonic()
        code = _run(told)
        # Once ranks were lost, one that does not find the others is too early or too late.
        if told.is_set() or code == 0 or (code > 0 and code != RESTART and tries == 0):
            return code if code >= 0 else 128 - code
        tries = tries + 1 if time.monotonic() - started < SOON else 1
        how = f"was killed by signal {-code}" if code < 0 else "does not find the others"
        how = "has lost another" if code == RESTART else how
        if tries > TRIES:
            print(f"optiq: this rank {how}; not started again", file=sys.stderr, flush=True)
            return RESTART
        print(f"optiq: this rank {how}; it is started again", file=sys.stderr, flush=True)


def _run(told: threading.Event) -> int:
    """Run this command once; its exit code, or the number of its signal below 0. `told`: that it
    should end."""
    ours, theirs = os.pipe()
    try:
        child = subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]],
            env={**os.environ, _PIPE: str(theirs)},
            pass_fds=(theirs,),
        )
        os.close(theirs)

        def end(number: int, frame: Any) -> None:
            told.set()
            if number == signal.SIGTERM:  # a terminal sends SIGINT to both of them
                child.terminate()

        before = {n: signal.signal(n, end) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            _watch(child, ours)
            return child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    finally:
        os.close(ours)


def _watch(child: subprocess.Popen[bytes], pipe: int) -> None:
    """Until the child has ended, or was silent and is killed."""
    heard: float | None = None
    while child.poll() is None:
        asked = time.monotonic()
        ready, _, _ = select.select([pipe], [], [], BEAT)
        now = time.monotonic()
        if ready:
            if not os.read(pipe, 4096):
                return
            heard = now
        elif heard is not None and now - asked > LATE:
            heard = now  # this process has slept, too
        elif heard is not None and now - heard > STUCK:
            print("optiq: this rank is stuck and is killed", file=sys.stderr, flush=True)
            child.kill()
            return


def _live(pipe: int) -> None:
    """Say that this process lives, and end with the one above."""
    with suppress(OSError):
        while True:
            os.write(pipe, b".")
            time.sleep(BEAT)
    os._exit(1)
