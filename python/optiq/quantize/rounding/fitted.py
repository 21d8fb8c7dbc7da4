"""Fitted weights, in files or not: those of a large model are not held in memory until they are
written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...base.text import one_line
from ...errors import ExportError
from ...formats import Format
from .weights import Rounded

Key = tuple[str, Format]  # a module's path, and the format that it was fitted to

_PARTS = ("codes", "scales", "biases")


class InMemory(dict[Key, Rounded]):
    """Of a small model."""

    def add(self, key: Key, weight: Rounded) -> None:
        self[key] = weight


class InFiles(Mapping[Key, Rounded]):
    """A file in `folder`, which is made, for each weight; it is read each time it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[Key, Path] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(dir=folder))
        except OSError as error:
            raise _cannot_keep(folder, error) from error

    def add(self, key: Key, weight: Rounded) -> None:
        """Raises ExportError where the disk does not take it."""
        file = self._folder / f"{len(self._files)}.safetensors"
        parts = {n: a for n, a in zip(_PARTS, weight, strict=True) if a is not None}
        try:
            mx.save_safetensors(str(file), parts)
        except (OSError, RuntimeError) as error:
            raise _cannot_keep(self._folder, error) from error
        self._files[key] = file

    def __getitem__(self, key: Key) -> Rounded:
        parts: Any = mx.load(str(self._files[key]))
        return parts["codes"], parts["scales"], parts.get("biases")

    def __iter__(self) -> Iterator[Key]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _cannot_keep(folder: Path, error: Exception) -> ExportError:
    return ExportError(
        f"fitted weights cannot be kept in {folder} ({one_line(error)}); free space or choose a "
        "folder you may write to"
    )
