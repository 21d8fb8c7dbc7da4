"""Long use: nothing is left behind, and nothing gets slower."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from optiq.sandbox import Cancel, Limits, Sandbox
from optiq.sandbox.kernel_jail import KernelJail
from optiq.sandbox.processes import Processes
from tests.sandbox.conftest import MB, open_descriptors
from tests.sandbox.levels import process_level

pytestmark = process_level()
LIMITS = Limits(wall=5, cpu=5, memory=256 * MB, disk=8 * MB, files=50)
PROGRAMS = [
    "1 + 1",
    "open('x', 'w').write('a' * 9999)",
    "import os; os.mkdir('d'); os.chmod('d', 0o700); os.chdir('d'); open('y', 'w')",
    "import time; time.sleep(.01)",
    "import threading as t\nfor i in range(3): t.Thread(target=open, args=(str(i), 'w')).start()",
    "raise SystemExit(3)",
    "import os; os.abort()",
]


def some_use(box: Sandbox, seed: int) -> str:
    """A run or a session, of which half are cancelled or closed at a random moment."""
    chance = random.Random(seed)
    cancel = Cancel()
    code, in_session = chance.choice(PROGRAMS), chance.random() < 0.3
    stopping = chance.random() < 0.5
    act: Callable[[], None] = cancel.cancel
    session = box.session() if in_session else None
    if session is not None and chance.random() < 0.5:
        act = session.close
    timer = threading.Timer(chance.uniform(0, 0.02), act)
    if stopping:
        timer.start()
        code += "\nwhile True: pass"
    try:
        if session is None:
            return box.run(code, cancel=cancel).status
        return session.run(code, cancel=cancel).status
    except Exception as error:
        return type(error).__name__  # the session may have been closed before it began
    finally:
        if stopping:
            timer.join()
        if session is not None:
            session.close()


def left_by(box: Sandbox) -> dict[str, object]:
    jail = box._processes.jail
    assert isinstance(jail, KernelJail)
    assert jail._process is not None
    group = f"{jail._process.pid}"
    return {
        "folders": [p.name for p in jail.folder.iterdir()],
        "threads": threading.active_count(),
        "descriptors": open_descriptors(),
        "processes": len(_below(group)),
    }


def _below(pid: str) -> list[str]:
    """Processes that descend from this one."""
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = path.read_bytes().rpartition(b")")[2].split()[1].decode()
        except OSError:
            continue
        if parent == pid:
            found += [path.parent.name, *_below(path.parent.name)]
    return found


def use(box: Sandbox, times: int) -> dict[str, int]:
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda seed: some_use(box, seed), range(times)))
    return {status: statuses.count(status) for status in set(statuses)}


@pytest.mark.parametrize("mounts", [True, False])
def test_nothing_is_left_behind(mounts: bool) -> None:
    before = open_descriptors()
    with Sandbox(LIMITS) as box:
        if not mounts:
            box._processes = Processes(KernelJail(False, mounts=False), LIMITS)
        box.run("")
        fresh = left_by(box)
        ends = use(box, 120)
        assert {"ok", "cancelled"} <= set(ends)
        assert set(ends) <= {"ok", "cancelled", "error", "killed", "SandboxError"}
        assert left_by(box) == fresh
        folder = box._processes.jail.folder
        box._processes.close()
    assert not folder.exists()
    assert open_descriptors() == before


@pytest.mark.attacks
def test_five_thousand_uses() -> None:
    def median(box: Sandbox) -> float:
        def once() -> float:
            start = time.perf_counter()
            box.run("1")
            return time.perf_counter() - start

        return statistics.median(once() for _ in range(200))

    with Sandbox(LIMITS) as box, Sandbox(LIMITS) as idle:
        for each in (box, idle):
            each.run("")
        fresh = left_by(box)
        use(box, 5000)
        assert left_by(box) == fresh
        # Against a sandbox that was not used meanwhile, since the machine may be busy; the best of
        # some rounds, since one of them may be disturbed.
        ratio = min(median(box) / median(idle) for _ in range(5))
    assert ratio < 1.05


@pytest.mark.attacks
def test_three_hundred_sessions_at_once() -> None:
    count = 300
    with Sandbox(LIMITS) as box, ThreadPoolExecutor(32) as pool:
        sessions = list(pool.map(lambda _: box.session(), range(count)))
        for number in range(3):
            results = pool.map(
                lambda i, n=number: sessions[i].run(f"x = globals().get('x', 0) + {i}; x"),
                range(count),
            )
            assert [r.value for r in results] == [str(i * (number + 1)) for i in range(count)]
        jail = box._processes.jail
        assert isinstance(jail, KernelJail)
        assert jail._process is not None
        zygote = str(jail._process.pid)
        assert len(_below(zygote)) >= count
        for session in sessions[::2]:
            session.close()
        assert [s.run("1").value for s in sessions[1::2]] == ["1"] * (count // 2)
    assert not any(session.alive for session in sessions)
