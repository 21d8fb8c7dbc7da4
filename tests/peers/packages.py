"""Other people's packages, each set in a folder of its own that only a subprocess sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest


def pip(*arguments: str) -> None:
    """Skips the test if pip fails, such as for want of a network."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip {' '.join(arguments[-3:])}: {done.stderr.strip()[-200:]}")


def install(folder: Path, *requirements: str) -> None:
    """Without their dependencies: what is compared needs few of them."""
    pip("install", "--quiet", "--no-deps", "--target", str(folder), *requirements)


def ask(script: Path, folder: Path, cases: Iterable[Any], **environment: str) -> list[Any]:
    """The answers of `script`, a line of JSON for each case, with the packages in `folder`."""
    done = subprocess.run(
        [sys.executable, str(script)],
        input="\n".join(map(json.dumps, cases)),
        env=os.environ | {"PYTHONPATH": str(folder)} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
