"""Other people's packages, each set in a folder of its own that only a subprocess sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest


def pip(*arguments: str) -> None:
    """Skips the test if pip fails because the package index cannot be reached.

    Anything else, such as a version that does not exist, is a failure; so is all of it in CI.
    """
    done = _pip(*arguments)
    if done.returncode:
        said = f"pip {' '.join(arguments[-3:])}: {done.stderr.strip()[-200:]}"
        if os.environ.get("CI") == "true" or index_answers():
            pytest.fail(said)
        pytest.skip(f"the package index cannot be reached; {said}")


@cache
def index_answers() -> bool:
    """Whether the package index, and not a folder on this machine, gives the versions of pip."""
    with TemporaryDirectory() as empty:
        local = {"PIP_FIND_LINKS": empty, "PIP_EXTRA_INDEX_URL": Path(empty).as_uri()}
        return _pip("index", "versions", "pip", "--retries", "0", **local).returncode == 0


def _pip(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


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
