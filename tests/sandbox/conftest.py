"""Sandboxes that most tests share: one as it comes, one under the eyes of the watcher."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from optiq.sandbox import Limits, Sandbox
from optiq.sandbox.kernel_jail import KernelJail
from optiq.sandbox.processes import Processes

MB = 2**20
BOUNDS = Limits(wall=3, cpu=3, memory=256 * MB, output=MB, disk=8 * MB, files=20, threads=6)


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox(BOUNDS) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def watched() -> Iterator[Sandbox]:
    """As where the kernel allows no namespaces: the host looks at the work folder."""
    with Sandbox(BOUNDS) as sandbox:
        sandbox._processes = Processes(KernelJail(False, mounts=False), BOUNDS)
        yield sandbox
        sandbox._processes.close()


@pytest.fixture(params=["box", "watched"])
def both(request: pytest.FixtureRequest) -> Sandbox:
    sandbox: Sandbox = request.getfixturevalue(request.param)
    return sandbox


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
