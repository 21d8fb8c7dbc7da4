"""Slices of stacked tensors, such as single experts, read from a folder when they are needed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import SourceError
from .folder import Folder
from .safetensors import TensorInfo, data_start


class OpenFile:
    """A weight file that stays open, and is read only while it is as it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
            self._was = self._state()
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error

    def read_into(self, room: memoryview, offset: int) -> None:
        """Fill `room` with what lies at `offset`. Raises SourceError."""
        try:
            if self._state() != self._was:
                raise SourceError(
                    f"{self.path} was changed while its weights were in use; load the model again"
                )
            while room:
                found = os.preadv(self._file.fileno(), [room], offset)
                if not found:
                    raise SourceError(
                        f"{self.path} ends before byte {offset + len(room):,}; get it again"
                    )
                room, offset = room[found:], offset + found
        except OSError as error:
            raise SourceError(
                f"{self.path} cannot be read any more: {error.strerror or error}; bring the file "
                "back and load the model again"
            ) from error

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class Slices:
    """A tensor of a file, of which each `[i]` along the first axis is read by itself."""

    file: OpenFile
    start: int  # of the tensor in the file
    info: TensorInfo

    @property
    def nbytes(self) -> int:
        """Bytes of one slice."""
        return (self.info.end - self.info.begin) // self.info.shape[0]

    def read_into(self, room: memoryview, i: int) -> None:
        """Fill `room`, the bytes of one slice, with slice `i`. Raises SourceError."""
        self.file.read_into(room, self.start + i * self.nbytes)


def slices(folder: Folder) -> Mapping[str, Slices]:
    """Every tensor of a checked folder that has a first axis, by name. Raises SourceError."""
    found: dict[str, Slices] = {}
    for name, tensors in folder.files.items():
        file = OpenFile(folder.path / name)
        base = data_start(file.path, tensors.values())
        found |= {n: Slices(file, base + t.begin, t) for n, t in tensors.items() if t.shape}
    return found
