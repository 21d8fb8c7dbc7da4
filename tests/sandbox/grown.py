"""Runs attacks that were made from a grammar and looks from outside at what they did.

    python -m tests.sandbox.grown MODE SEED COUNT [LANDLOCK]

makes COUNT programs for every surface from SEED on and prints a JSON object {surface and seed: what
was not held}. LANDLOCK cuts the kernel's interface down to an older version. It needs the standard
library and optiq.sandbox alone, so that an ordinary user can run it.
"""

from __future__ import annotations

import faulthandler
import json
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from optiq.sandbox import Limits, Sandbox, cpython
from tests.sandbox.campaign import LATE, Targets, sandbox, targets
from tests.sandbox.holding import holding
from tests.sandbox.surfaces import SURFACES

MB = 2**20
LIMITS = Limits(
    wall=1.5, cpu=1, memory=256 * MB, output=MB, disk=4 * MB, files=40, threads=6, returned=MB
)
AT_ONCE = 4
CHECK = "def check(candidate):\n assert candidate(2) == 4\n assert candidate(5) == 25\n"


def run(box: Sandbox, code: str) -> list[str]:
    result = box.run(code)
    wrong = []
    if len(result.stdout.encode("utf8", "replace")) > 4 * LIMITS.output:
        wrong.append("too much output")
    if sum(map(len, result.files.values())) > LIMITS.returned:
        wrong.append("too many files came out")
    return wrong


def session(box: Sandbox, code: str) -> list[str]:
    """The program as a snippet, and then what an honest caller does."""
    wrong = []
    with box.session() as s:
        s.run(code)
        for number in (1, 2):
            if not s.alive:
                return wrong
            result = s.run(f"print('mark', {number}); {number}")
            if result.value not in (str(number), None):
                wrong.append(f"the value of another snippet: {result}")
            if result.status == "ok" and f"mark {number}\n" not in result.stdout:
                wrong.append(f"its own output is missing: {result}")
        s.list()
    return wrong


def judge(box: Sandbox, code: str) -> list[str]:
    verdict = box.judge(code, CHECK, "f")
    return [str(verdict)] if verdict.passed else []


def attack(box: Sandbox, surface: str, seed: int) -> tuple[str, str]:
    code = SURFACES[surface](seed).program()
    act = {"sessions": session, "verdicts": judge}.get(surface, run)
    start = time.monotonic()
    try:
        wrong = act(box, code)
    except Exception as error:  # whatever the code does is a Result
        wrong = [f"{type(error).__name__}: {error}"]
    took = time.monotonic() - start
    if took > 3 * (LIMITS.wall + 1) + LATE:
        wrong.append(f"took {took:.1f} s")
    return f"{surface} {seed}", "; ".join(wrong)


def everything(mode: str, seeds: range) -> dict[str, str]:
    with sandbox(mode, LIMITS) as box, targets() as aims:
        box.run("")
        before = _state(aims)
        with holding(box) as most, ThreadPoolExecutor(AT_ONCE) as pool:
            jobs = [(surface, seed) for seed in seeds for surface in SURFACES]
            found = dict(pool.map(lambda job: attack(box, *job), jobs))
        if most["files"] > LIMITS.files:
            found["files"] = f"{most['files']} in a folder"
        if most["bytes"] > LIMITS.disk * (8 if most["watched"] else 1):
            found["disk"] = f"{most['bytes']} bytes in a folder"
        after = _state(aims)
        found |= {k: f"{before[k]} -> {after[k]}" for k in before if before[k] != after[k]}
        left = {p.name for p in box._processes.jail.folder.iterdir()} - {"work", "fonts"}
        if left:
            found["left behind"] = str(left)
        if box.run("print(6 * 7)").stdout != "42\n":
            found["afterwards"] = "the sandbox does not work any more"
    return {what: wrong for what, wrong in found.items() if wrong}


def _state(aims: Targets) -> dict[str, object]:
    return {
        **aims.state(),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": threading.active_count(),
    }


def _older(version: int) -> None:
    """The jail's own code, made to believe that the kernel is older."""
    folder = Path(tempfile.mkdtemp(prefix="optiq-older-"))
    shutil.copytree(Path(cpython.HERE) / "jail", folder / "jail")
    with (folder / "jail" / "linux.py").open("a") as file:
        file.write(f"\n\ndef landlock_version():\n    return {version}\n")
    cpython.HERE = str(folder)


if __name__ == "__main__":
    mode, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if sys.argv[4:]:
        _older(int(sys.argv[4]))
    faulthandler.dump_traceback_later(100 + 10 * count, exit=True)  # where it was stuck
    try:
        print(json.dumps(everything(mode, range(seed, seed + count))))
    finally:
        if sys.argv[4:]:
            shutil.rmtree(cpython.HERE)
