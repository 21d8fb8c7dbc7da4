"""Which levels of the sandbox work on this machine, found by trying."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import SandboxUnavailable
from .sandbox import Level, Sandbox

LEVELS: tuple[Level, ...] = ("interpreter", "process", "namespace")


@dataclass(frozen=True)
class Available:
    """What holds the code at a level; no mechanisms, but a reason, where it cannot be had."""

    level: Level
    mechanisms: tuple[str, ...]
    reason: str = ""


def available() -> list[Available]:
    """Start each level and run an empty program."""
    return [_try(level) for level in LEVELS]


def _try(level: Level) -> Available:
    try:
        with Sandbox(level=level) as sandbox:
            return Available(level, sandbox.run("").mechanisms)
    except SandboxUnavailable as error:
        return Available(level, (), str(error))
