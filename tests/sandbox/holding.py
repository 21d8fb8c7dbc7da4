"""Counts from outside what the work folders of a sandbox hold."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

from optiq.sandbox import Sandbox
from optiq.sandbox.folder import ENDLESS, used


@contextlib.contextmanager
def holding(box: Sandbox) -> Iterator[dict[str, int]]:
    """The most that one work folder holds meanwhile: `bytes` and `files`.

    Of a file system of its own the kernel's count, which knows files that no folder shows; of
    another folder (`watched` is 1) the blocks of what is in it.
    """
    most = {"files": 0, "bytes": 0, "watched": 0}
    stop, folders = threading.Event(), list[int]()
    jail: Any = box._processes.jail
    spawn = jail.spawn

    def noted(*arguments: Any) -> Any:
        child = spawn(*arguments)
        most["watched"] = int(not child.exact)
        # Opened anew: a duplicate would share its place in the folder with the host's own look.
        folders.append(os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=child.folder))
        return child

    def look() -> None:
        while not stop.wait(0.01):
            for folder in list(folders):
                if most["watched"]:
                    size, entries = used(folder)
                else:
                    s = os.fstatvfs(folder)
                    size, entries = (s.f_blocks - s.f_bfree) * s.f_frsize, s.f_files - s.f_ffree - 1
                if size < ENDLESS:
                    most["files"] = max(most["files"], entries)
                    most["bytes"] = max(most["bytes"], size)

    jail.spawn = noted
    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()
        del jail.spawn
        for folder in folders:
            os.close(folder)
