"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Temporary paths to write to, one for each of `paths` and with its suffix, in its folder.

    When all are written they are moved into place, in order, so a reader finds the old content or
    the new. After an error nothing has changed and nothing is left.
    """
    mark = secrets.token_hex(4)
    partial = tuple(path.with_name(f".{mark}.{path.name}") for path in paths)
    try:
        yield partial
        for path, temporary in zip(paths, partial, strict=True):
            temporary.replace(path)
    finally:
        for temporary in partial:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
