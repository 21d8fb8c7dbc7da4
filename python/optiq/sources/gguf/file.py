"""Reads the directory of a GGUF file: its metadata, and where each tensor lies.

Layout: github.com/ggml-org/ggml/blob/master/docs/gguf.md. Unlike the reader in the `gguf` package
this one bounds every length by the file and keeps a vocabulary of 262,144 strings out of
memory-mapped views, so it is quick, small, and a damaged file is a SourceError.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from ...errors import SourceError

# struct codes of the metadata value types 0 to 12; 8 is a string, 9 an array
STRING, ARRAY = 8, 9
SCALARS = {kind: code for kind, code in enumerate("BbHhIif?..Qqd") if code != "."}


class _DamagedError(Exception):
    """What is wrong with the file; becomes a SourceError that names it."""


@dataclass(frozen=True)
class GgufTensor:
    """`shape` is row-major (the last axis is contiguous); `offset` counts from the file's start."""

    path: Path
    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """The directory of a file, or of all `parts` of one that was split.

    `digest` is a sha256 over it, without the tensor bytes.
    """

    path: Path
    parts: tuple[Path, ...]
    metadata: dict[str, Any]  # arrays of numbers are NumPy arrays, of strings lists
    tensors: dict[str, GgufTensor]
    digest: str


def read_gguf(path: Path) -> GgufFile:
    """Parse and bound-check the directory of `path`, and of the parts beside it if it was split.

    Raises SourceError for anything damaged or missing.
    """
    gguf = _read(path)
    count = gguf.metadata.get("split.count", 1)
    return _joined(gguf, count) if isinstance(count, int) and count > 1 else gguf


def _joined(gguf: GgufFile, count: int) -> GgufFile:
    """All parts of a split file: the first one has the metadata, each its own tensors."""
    match = re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})", gguf.path.stem)
    if not match or int(match[3]) != count:
        raise SourceError(
            f"{gguf.path} is one of {count} parts; give them the names that llama-gguf-split "
            f"writes, such as NAME-00001-of-{count:05}.gguf"
        )
    names = [f"{match[1]}{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    paths = [gguf.path.with_name(name) for name in names]
    for path in paths:
        if not path.is_file():
            raise SourceError(
                f"{gguf.path} is one of {count} parts and {path.name} is not beside it; download it"
            )
    parts = [_read(path) for path in paths]
    tensors: dict[str, GgufTensor] = {}
    for number, part in enumerate(parts):
        said = part.metadata.get("split.no"), part.metadata.get("split.count")
        if said != (number, count):
            raise SourceError(
                f"{part.path} says that it is part {said[0]} of {said[1]}; download all parts again"
            )
        if twice := tensors.keys() & part.tensors.keys():
            raise SourceError(
                f"{part.path} has the tensor {min(twice)!r} of another part; download all parts "
                "again"
            )
        tensors |= part.tensors
    total = parts[0].metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise SourceError(
            f"the {count} parts of {gguf.path} have {len(tensors)} tensors, not {total}; download "
            "them again"
        )
    digest = hashlib.sha256("".join(part.digest for part in parts).encode()).hexdigest()
    return GgufFile(gguf.path, tuple(paths), parts[0].metadata, tensors, digest)


def _read(path: Path) -> GgufFile:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise _DamagedError(f"it has only {size} bytes")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data, size)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    except _DamagedError as error:
        raise SourceError(
            f"{path} is not a complete GGUF file: {error}; download it again"
        ) from error


def read_rows(tensor: GgufTensor, start: int, stop: int) -> npt.NDArray[np.uint8]:
    """The packed bytes of rows [start, stop), [stop - start, bytes per row].

    A vector is one row. Raises SourceError if the file has become shorter since it was parsed.
    """
    row_bytes = tensor.nbytes // prod(tensor.shape[:-1])
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset + start * row_bytes)
        data = file.read((stop - start) * row_bytes)
    if len(data) != (stop - start) * row_bytes:
        raise SourceError(f"{tensor.path} ended within tensor {tensor.name!r}; download it again")
    return np.frombuffer(data, dtype=np.uint8).reshape(stop - start, row_bytes)


class _Cursor:
    """Reads little-endian values one after the other, never past the end."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self.data, self.size, self.position = data, size, 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise _DamagedError(f"it ends within its directory, at byte {self.size}")
        chunk = self.data[self.position : self.position + count]
        self.position += count
        return chunk

    def unpack(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        try:
            return self.take(self.unpack("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _DamagedError(f"a string before byte {self.position} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, count = self.unpack("I"), self.unpack("Q")
            if inner == STRING:
                return [self.string() for _ in range(count)]
            if inner in SCALARS:
                dtype = np.dtype("<" + SCALARS[inner])
                return np.frombuffer(self.take(count * dtype.itemsize), dtype=dtype)
            raise _DamagedError(f"an array holds values of type {inner}")
        if kind in SCALARS:
            return self.unpack(SCALARS[kind])
        raise _DamagedError(f"a metadata value has the unknown type {kind}")


def _parse(path: Path, data: mmap.mmap, size: int) -> GgufFile:
    cursor = _Cursor(data, size)
    if cursor.take(4) != b"GGUF":
        raise _DamagedError("it does not start with GGUF")
    version = cursor.unpack("I")
    if version not in (2, 3):
        raise SourceError(
            f"{path} is GGUF version {version} or big-endian; optiq reads 2 and 3, little-endian"
        )
    tensor_count, field_count = cursor.unpack("Q"), cursor.unpack("Q")
    metadata: dict[str, Any] = {}
    for _ in range(field_count):
        name = cursor.string()
        if name in metadata:
            raise _DamagedError(f"the metadata key {name!r} occurs twice")
        metadata[name] = cursor.value(cursor.unpack("I"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise _DamagedError(f"general.alignment is {alignment!r}")
    infos = [_tensor_info(path, cursor) for _ in range(tensor_count)]
    digest = hashlib.sha256(data[: cursor.position]).hexdigest()
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset, nbytes in infos:
        if name in tensors:
            raise _DamagedError(f"tensor {name!r} occurs twice")
        if start + offset + nbytes > size:
            raise _DamagedError(
                f"tensor {name!r} ends at byte {start + offset + nbytes}, the file at {size}"
            )
        tensors[name] = GgufTensor(path, name, kind, shape, start + offset, nbytes)
    return GgufFile(path, (path,), metadata, tensors, digest)


def _tensor_info(
    path: Path, cursor: _Cursor
) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int, int]:
    name, rank = cursor.string(), cursor.unpack("I")
    if not 1 <= rank <= 4:
        raise _DamagedError(f"tensor {name!r} has {rank} axes")
    # GGUF names the contiguous axis first.
    shape = tuple(cursor.unpack("Q") for _ in range(rank))[::-1]
    type_id, offset = cursor.unpack("I"), cursor.unpack("Q")
    try:
        kind = GGMLQuantizationType(type_id)
    except ValueError as error:
        raise SourceError(
            f"{path}: tensor {name!r} has the type number {type_id}, which the installed gguf "
            "package does not know; `pip install -U gguf` may help"
        ) from error
    if 0 in shape:
        raise _DamagedError(f"tensor {name!r} is empty")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise _DamagedError(f"tensor {name!r} of {kind.name} has rows of {shape[-1]} elements")
    return name, kind, shape, offset, prod(shape) // block * block_bytes
