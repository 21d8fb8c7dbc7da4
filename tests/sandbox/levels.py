"""Which levels this machine has, asked once."""

from __future__ import annotations

import sys
from functools import cache

import pytest

from optiq.sandbox.mechanisms import available


@cache
def missing(level: str) -> str:
    """Why a level cannot be had here, or ""."""
    return next(a.reason for a in available() if a.level == level)


def process_level() -> pytest.MarkDecorator:
    """For tests of the process level as it is on Linux."""
    reason = missing("process") if sys.platform == "linux" else "the kernel jail is Linux's"
    return pytest.mark.skipif(bool(reason), reason=reason or "it can be had")
