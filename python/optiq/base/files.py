"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ExportError, UsageError
from .text import cause


def cache_folder() -> Path:
    """Where answers are kept that can be found again: `optiq` in XDG_CACHE_HOME or ~/.cache."""
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path("~/.cache")).expanduser() / "optiq"


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


@contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """A folder beside `out`, not made yet, for what need not be held in memory; it is removed."""
    folder = out.with_name(f".{out.name}.{secrets.token_hex(4)}.scratch")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_json(path: Path, data: Any, *, indent: int | None = 1) -> None:
    """Replace `path` in one step: a reader finds the old content or the new, never a part.

    Its folder is made. Raises ExportError; ValueError for numbers that are not finite.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as (partial,):
            text = json.dumps(data, indent=indent, allow_nan=False)
            partial.write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise ExportError(
            f"{path} cannot be written ({cause(error)}); free space or name another place"
        ) from error


def check_absent(path: Path, overwrite: bool) -> None:
    """Raise UsageError if a result lies at `path` already, unless `overwrite`."""
    if path.exists() and not overwrite:
        raise UsageError(
            f"{path} exists; --overwrite replaces it (overwrite=True in Python), or name another"
        )


def check_writable(path: Path) -> None:
    """Raise ExportError unless a file or folder could be made at the absolute `path`."""
    probe = _existing(path) / f".{path.name}.optiq-probe"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ExportError(
            f"{path} cannot be written: {error.strerror}; choose another place"
        ) from error


def check_space(out: Path, needed: int) -> None:
    """Raise ExportError unless the disk of the absolute path `out` has `needed` bytes free."""
    free = shutil.disk_usage(_existing(out)).free
    if free < needed:
        raise ExportError(
            f"{out} will need {needed:,} bytes but only {free:,} are free on its disk; free some "
            "space or choose another folder"
        )


def _existing(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.exists())
