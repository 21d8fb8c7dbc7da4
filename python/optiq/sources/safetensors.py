"""The header of a safetensors file: read with every promise of the format checked, or written.

A file is an unsigned 64-bit little-endian length N, N bytes of JSON, and the tensor bytes. The JSON
maps each tensor to its dtype, shape and [begin, end) within the tensor bytes. The tensors follow
each other without holes or overlaps and end with the file
(https://huggingface.co/docs/safetensors/index#format).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..errors import SourceError

# The limit of the reference implementation; a larger length is a damaged length field.
MAX_HEADER_BYTES = 100_000_000

# bits per element
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
# of these, what MLX does not load
UNREADABLE = {"F64", "F4", "F6_E2M3", "F6_E3M2", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its safetensors dtype name, shape, and byte range within the tensor bytes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def floating(self) -> bool:
        """Whether it holds plain floating point numbers, and not a packed format."""
        return self.dtype in ("F64", "F32", "F16", "BF16")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of `path` in file order; a SourceError says what is wrong with a damaged file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _damaged(path, f"header of {length} bytes in a file of {size} bytes")
            text = file.read(length)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry) for name, entry in header.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = 0
    for name, info in tensors.items():
        if info.begin != position:
            kind = "a hole" if info.begin > position else "an overlap"
            raise _damaged(path, f"{kind} before tensor {name!r} at byte {position}")
        position = info.end
    if position != size - 8 - length:
        raise _damaged(path, f"its tensors need {position} bytes, it has {size - 8 - length}")
    return tensors


def data_start(path: Path, tensors: Iterable[TensorInfo]) -> int:
    """Where the bytes of `tensors`, all of the file `path`, begin in it."""
    return path.stat().st_size - max((t.end for t in tensors), default=0)


def encode_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> bytes:
    """The bytes before the tensor bytes, for `{name: (dtype, shape)}` stored in that order."""
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the tensor bytes aligned for memory mapping
    return len(text).to_bytes(8, "little") + text


def _tensor(path: Path, name: str, entry: object) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _damaged(path, f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise _damaged(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if dtype not in DTYPE_BITS:
        raise SourceError(
            f"{path}: tensor {name!r} has the unknown dtype {dtype[:40]!r}; give the model with "
            "float32, float16 or bfloat16 weights"
        )
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor {name!r} has a malformed shape or data_offsets")
    begin, end = offsets
    needed = prod(shape) * DTYPE_BITS[dtype] // 8
    if end - begin != needed:
        raise _damaged(
            path, f"tensor {name!r} of {dtype} {shape} needs {needed} bytes, it has {end - begin}"
        )
    return TensorInfo(dtype, tuple(shape), begin, end)


def _sizes(value: object) -> bool:
    # type() and not isinstance(): JSON's true is an int to Python.
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _damaged(path: Path, reason: str) -> SourceError:
    short = " ".join(reason.split())[:200]
    return SourceError(f"{path} is corrupt or truncated: {short}; download it again")
