"""Asks other programs what they make of a wheel: pip, abi3audit, check-wheel-contents."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


class Refused(Exception):
    """What the program said."""


def _run(*command: str) -> str:
    """What it printed; if it failed, Refused with the first line that speaks of an error."""
    result = subprocess.run(command, capture_output=True, text=True)
    said = (result.stdout + result.stderr).strip()
    if result.returncode != 0:
        lines = said.splitlines() or [f"status {result.returncode}"]
        raise Refused(next((line for line in lines if "error" in line.lower()), lines[-1]))
    return said


def _pip(wheel: Path, platform: str, python: str) -> None:
    """Would pip on that machine install it? Without its requirements, whose markers ask here."""
    with tempfile.TemporaryDirectory() as folder:
        _run(
            *(sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps"),
            *("--no-index", "--only-binary=:all:", "--platform", platform),
            *("--python-version", python, "--target", folder, str(wheel)),
        )


def pip(wheel: Path) -> str:
    accepted = [
        (platform, python)
        for platform in ("macosx_14_0_arm64", "macosx_15_0_arm64", "macosx_26_0_arm64")
        for python in ("3.10", "3.14")
    ]
    for platform, python in accepted:
        _pip(wheel, platform, python)
    for platform, python in (
        ("macosx_13_0_arm64", "3.12"),
        ("macosx_14_0_x86_64", "3.12"),
        ("macosx_14_0_arm64", "3.9"),
    ):
        try:
            _pip(wheel, platform, python)
        except Refused as refusal:
            if "not a supported wheel" not in str(refusal) and "Python" not in str(refusal):
                raise
        else:
            raise Refused(f"taken for {platform} with Python {python}, where it cannot run")
    return "taken for macOS 14, 15, 26 with Python 3.10 and 3.14; not for 13, Intel, Python 3.9"


def abi3audit(wheel: Path) -> str:
    program = str(Path(sys.executable).with_name("abi3audit"))
    said = " ".join(_run(program, "--strict", "--summary", str(wheel)).split())
    if "1 extensions scanned; 0 ABI version mismatches and 0 ABI violations" not in said:
        raise Refused(said)
    return "0 violations of Python 3.10's stable interface"


def check_wheel_contents(wheel: Path) -> str:
    _run(str(Path(sys.executable).with_name("check-wheel-contents")), str(wheel))
    return "nothing to complain of"


COMMANDS: dict[str, Callable[[Path], str]] = {
    "pip": pip,
    "abi3audit": abi3audit,
    "check-wheel-contents": check_wheel_contents,
}
