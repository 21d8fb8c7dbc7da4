"""sensitivity.json, written whole or not at all; `scores.read` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...base.files import write_json
from ...planning.scores import check


def save(scores: dict[str, Any], path: Path) -> None:
    """Check `scores` and replace the file `path` by them in one step."""
    check(scores, "the scores")
    write_json(path, scores, indent=1)
