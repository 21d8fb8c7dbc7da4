"""No attack succeeds: as this user and, where that is root, as an ordinary one too.

Everything is tried inside an armed jail only, with harmless payloads, and judged from outside.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.sandbox.levels import missing, process_level

pytestmark = process_level()
ROOT = Path(__file__).parents[2]
NOBODY = 65534
MODES = ("namespace", "kernel", "watched")
# What the kernel alone, without namespaces, does not hide: sizes and times of files, by their name.
WITHOUT_NAMESPACES = {14}


def check(outcome: dict[str, Any], mode: str) -> None:
    """Nothing succeeded; and every attempt reached the kernel."""
    allowed = set() if mode == "namespace" else {str(n) for n in WITHOUT_NAMESPACES}
    assert outcome["broken"] == {}
    assert {n: what for n, what in outcome["succeeded"].items() if n not in allowed} == {}


def start(python: str, folder: Path, mode: str, **user: Any) -> subprocess.Popen[str]:
    command = [python, "-m", "tests.sandbox.campaign", mode]
    environment = {"PATH": os.defpath, "PYTHONPATH": f"{folder}:{folder}/python"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes, **user)


def finish(campaign: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = campaign.communicate(timeout=120)
    assert campaign.returncode == 0, err
    return dict(json.loads(out))


@pytest.fixture(scope="module")
def campaigns() -> Iterator[dict[tuple[str, str], subprocess.Popen[str]]]:
    """All at once, since they mostly wait: {(user, mode): its process}."""
    levels = [mode for mode in MODES if not (mode == "namespace" and missing("namespace"))]
    started = {("this", n): start(sys.executable, ROOT, n) for n in levels}
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        if os.geteuid() == 0 and python is not None:
            folder = Path(name)
            _copy(folder)
            user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
            started |= {("ordinary", n): start(python, folder, n, **user) for n in levels}
        yield started
        for campaign in started.values():
            campaign.kill()
            campaign.wait()


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
def test_no_attack_succeeds(
    campaigns: dict[tuple[str, str], subprocess.Popen[str]], user: str, mode: str
) -> None:
    if (user, mode) not in campaigns:
        reason = missing("namespace") if mode == "namespace" else ""
        pytest.skip(reason or "this is an ordinary user, or there is no Python for one")
    check(finish(campaigns[user, mode]), mode)
