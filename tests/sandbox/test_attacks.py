"""No attack succeeds: as this user and, where that is root, as an ordinary one too.

Everything is tried inside an armed jail only, with harmless payloads, and judged from outside.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.sandbox.levels import missing, process_level
from tests.sandbox.surfaces import SURFACES

pytestmark = process_level()
ROOT = Path(__file__).parents[2]
NOBODY = 65534
MODES = ("namespace", "kernel", "watched")
LANDLOCKS = (1, 3)
# What the kernel alone, without namespaces, does not hide: sizes and times of files, by their name.
WITHOUT_NAMESPACES = {14}


def check(outcome: dict[str, Any], mode: str) -> None:
    """Nothing succeeded; and every attempt reached the kernel."""
    allowed = set() if mode == "namespace" else {str(n) for n in WITHOUT_NAMESPACES}
    assert outcome["broken"] == {}
    assert {n: what for n, what in outcome["succeeded"].items() if n not in allowed} == {}


def start(
    python: str, folder: Path, arguments: Sequence[str], **user: Any
) -> subprocess.Popen[str]:
    command = [python, "-m", *arguments]
    environment = {"PATH": os.defpath, "PYTHONPATH": f"{folder}:{folder}/python"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes, **user)


def finish(campaign: subprocess.Popen[str], within: float = 180) -> dict[str, Any]:
    out, err = campaign.communicate(timeout=within)
    assert campaign.returncode == 0, err
    return dict(json.loads(out))


Running = dict[tuple[str, str], "subprocess.Popen[str]"]


@contextlib.contextmanager
def running(jobs: Mapping[str, Sequence[str]]) -> Iterator[Running]:
    """Modules with arguments, by name and user, all at once, since they mostly wait."""
    started = {("this", name): start(sys.executable, ROOT, job) for name, job in jobs.items()}
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        if os.geteuid() == 0 and python is not None:
            folder = Path(name)
            _copy(folder)
            user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
            for job in jobs:
                started["ordinary", job] = start(python, folder, jobs[job], **user)
        yield started
        for campaign in started.values():
            campaign.kill()
            campaign.wait()


def take(started: Running, user: str, job: str, mode: str) -> subprocess.Popen[str]:
    if (user, job) not in started:
        reason = missing("namespace") if mode == "namespace" else ""
        pytest.skip(reason or "this is an ordinary user, or there is no Python for one")
    return started[user, job]


def possible(mode: str) -> bool:
    return mode != "namespace" or not missing("namespace")


@pytest.fixture(scope="module")
def campaigns() -> Iterator[Running]:
    with running({m: ["tests.sandbox.campaign", m] for m in MODES if possible(m)}) as started:
        yield started


def _copy(folder: Path) -> None:
    """What a campaign needs, where any user may read it."""
    for part in ("sandbox", "errors.py"):
        source, target = ROOT / "python" / "optiq" / part, folder / "python" / "optiq" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    (folder / "python" / "optiq" / "__init__.py").touch()
    shutil.copytree(ROOT / "tests" / "sandbox", folder / "tests" / "sandbox")
    subprocess.run(["chmod", "-R", "a+rX", folder], check=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("user", ["this", "ordinary"])
def test_no_attack_succeeds(campaigns: Running, user: str, mode: str) -> None:
    check(finish(take(campaigns, user, mode, mode)), mode)


def _grown(seed: int, count: int) -> dict[str, list[str]]:
    """Every mode, and the kernel alone with Landlock as it was."""
    modes = [m for m in MODES if possible(m)]
    jobs = {m: ["tests.sandbox.grown", m, str(seed), str(count)] for m in modes}
    cut = {f"kernel, Landlock {v}": [*jobs["kernel"], str(v)] for v in LANDLOCKS}
    return jobs | cut


GROWN = [*MODES, *(f"kernel, Landlock {v}" for v in LANDLOCKS)]


@pytest.fixture(scope="module")
def grown() -> Iterator[Running]:
    with running(_grown(seed=0, count=4)) as started:
        yield started


@pytest.mark.parametrize("job", GROWN)
@pytest.mark.parametrize("user", ["this", "ordinary"])
def test_attacks_from_a_grammar(grown: Running, user: str, job: str) -> None:
    """The same few programs for each surface every time; `make attacks` tries others."""
    assert finish(take(grown, user, job, job)) == {}


@pytest.mark.attacks
@pytest.mark.parametrize("job", GROWN)
def test_many_attacks_from_a_grammar(job: str) -> None:
    seed = int(os.environ.get("OPTIQ_ATTACK_SEED", "1000"))
    jobs = _grown(seed, count=60)
    if job not in jobs:
        pytest.skip(missing("namespace"))
    with running({job: jobs[job]}) as started:
        assert {user: finish(p, within=900) for (user, _), p in started.items()} == {
            user: {} for user, _ in started
        }


def test_every_program_of_the_grammar_is_one() -> None:
    for name, surface in SURFACES.items():
        for seed in range(100):
            compile(surface(seed).program(), f"{name} {seed}", "exec")
