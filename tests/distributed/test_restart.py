"""A rank that was lost is started again, and one that cannot start is not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from optiq.distributed.restart import RESTART, TRIES

# Ends in turn as it is told: with an exit code, or below 0 by a signal.
CODE = """
import os, sys, time
from optiq.distributed.restart import restarted
if (code := restarted()) is not None:
    sys.exit(code)
with open(sys.argv[1], "a+") as file:
    file.write("x")
    file.seek(0)
    ends = sys.argv[2:]
    end = int(ends[min(len(file.read()), len(ends)) - 1])
if end == 99:
    time.sleep(60)
if end < 0:
    os.kill(os.getpid(), -end)
sys.exit(end)
"""


def command(file: Path, ends: Sequence[int]) -> list[str]:
    return [sys.executable, "-c", CODE, str(file), *map(str, ends)]


@pytest.mark.parametrize(
    ("ends", "code", "runs"),
    [
        ([-signal.SIGKILL, RESTART, 0], 0, 3),
        ([2], 2, 1),  # wrong usage: it would be wrong again
        ([RESTART, 1, 0], 0, 3),  # the others were not there yet
        ([RESTART], RESTART, TRIES + 1),
    ],
)
def test_what_is_started_again(tmp_path: Path, ends: list[int], code: int, runs: int) -> None:
    file = tmp_path / "runs"
    done = subprocess.run(command(file, ends), stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, len(file.read_text())) == (code, runs)
    assert done.stderr.count("it is started again") == min(runs - 1, TRIES)


def test_it_ends_with_the_process_above(tmp_path: Path) -> None:
    file = tmp_path / "runs"
    with subprocess.Popen(command(file, [99]), stderr=subprocess.PIPE) as above:
        while not file.exists():
            time.sleep(0.02)
        above.terminate()
        assert above.wait(60) == 128 + signal.SIGTERM
