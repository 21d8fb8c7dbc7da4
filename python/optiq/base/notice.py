"""What a user should know of a run that goes on."""

from __future__ import annotations

import sys
from functools import cache


@cache
def notice(text: str) -> None:
    """Say one line on stderr, the first time only."""
    print(f"optiq: {text}", file=sys.stderr)
