"""Attacks on the bounds themselves: what once hung the host, hid files from it or outlived a run.

Each program is held with a work folder of its own file system and, where the kernel refuses that,
under the eyes of the watcher; `held` names what must be true of the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from optiq.sandbox import Limits, Sandbox
from tests.sandbox.levels import process_level

pytestmark = process_level()
MB = 2**20
LIMITS = Limits(wall=3, cpu=3, memory=256 * MB, output=MB, disk=8 * MB, files=20, threads=6)
LIBC = "import ctypes, os, time\nlibc = ctypes.CDLL(None, use_errno=True)\n"


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox(LIMITS) as sandbox:
        yield sandbox


REFUSED = {
    "out of band": "libc.send(3, b'!', 1, 1)",
    "peeking out of band": "libc.recv(3, ctypes.create_string_buffer(1), 1, 1)",
    "own descriptors": "libc.close_range(60, 60, 2)",
    "folder of mode 300": "libc.mkdir(b'd', 0o300)",
    "folder of mode 0": "libc.mkdirat(-100, b'd', 0)",
    "whiteout": "(open('a', 'w').close(), libc.renameat2(-100, b'a', -100, b'b', 4))[1]",
    "access mode 3": "libc.open(b'/dev/full', 3)",
    "access mode 3 of a file": "libc.open(b'/etc/passwd', 3)",
    "process group of another": "libc.getpgid(1)",
    "session of another": "libc.getsid(1)",
    "processors of another": "libc.sched_getaffinity(1, 8, ctypes.create_string_buffer(8))",
}


@pytest.mark.parametrize("attempt", REFUSED.values(), ids=REFUSED)
def test_what_the_kernel_refuses(box: Sandbox, attempt: str) -> None:
    result = box.run(f"{LIBC}print({attempt}, ctypes.get_errno())")
    assert result.stdout in ("-1 1\n", "-1 13\n"), result


def test_no_mask_takes_folders_away_from_the_host(box: Sandbox) -> None:
    code = f"{LIBC}libc.umask(0o777)\nos.mkdir('d')\nprint(oct(os.stat('d').st_mode))"
    assert box.run(code).stdout == "0o40700\n"
