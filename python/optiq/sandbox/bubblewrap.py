"""The command that puts a zygote into namespaces of its own, where bubblewrap works.

A second wall around the first: the jail then lies in a file system that holds the runtime and the
work folders only, sees no process but its own, and has no network device, no host name and no
System V memory of the machine. Some systems forbid it (Ubuntu 24.04 by AppArmor, most containers).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")


def command(readable: Sequence[str], writable: str, program: Sequence[str]) -> list[str] | None:
    """`program` in namespaces of its own; None where there is no bubblewrap."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return None
    line = [bwrap, "--unshare-user", "--unshare-all", "--hostname", "sandbox", "--new-session"]
    # Of the new user namespace, never of the machine; with it the zygote mounts work folders.
    line += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    for path in dict.fromkeys([*_LIBRARIES, *readable, program[0]]):
        place = Path(path)
        if place.is_symlink():
            line += ["--symlink", str(place.readlink()), path]
        elif place.exists():
            line += ["--ro-bind", path, path]
    for device in ("/dev/null", "/dev/urandom"):
        line += ["--dev-bind", device, device]
    return [*line, "--bind", writable, writable, "--", *program]
