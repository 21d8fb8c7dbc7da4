"""Writing tensors as safetensors shards one at a time, so that only one is in memory."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from .folder import INDEX
from .safetensors import DTYPE_BITS, encode_header

SHARD_BYTES = 5_000_000_000  # the limit that the Hugging Face hub and mlx-lm use

_NAMES = {
    mx.bool_: "BOOL", mx.uint8: "U8", mx.int8: "I8", mx.uint16: "U16", mx.int16: "I16",
    mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.int32: "I32",
    mx.float32: "F32", mx.uint64: "U64", mx.int64: "I64", mx.complex64: "C64",
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """What a tensor will be before it exists: its safetensors dtype and shape."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, dtype: mx.Dtype, shape: Iterable[int]) -> Spec:
        return cls(_NAMES[dtype], tuple(shape))

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def write_shards(
    folder: Path,
    layout: Mapping[str, Spec],
    tensors: Iterable[tuple[str, mx.array]],
    *,
    parameters: int,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, int]:
    """Write `tensors`, which come in the order of `layout`, and the index; one shard is
    model.safetensors. Returns the checksum of every tensor. Raises OSError when the disk fails,
    ValueError when a tensor is not what `layout` says.
    """
    shards = _split(layout, shard_bytes)
    source = iter(tensors)
    checksums: dict[str, int] = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        header = {name: (layout[name].dtype, layout[name].shape) for name in names}
        with (folder / file_name).open("wb") as file:
            file.write(encode_header(header, {"format": "mlx"}))
            for expected in names:
                name, array = next(source)
                if name != expected or Spec.of(array.dtype, array.shape) != layout[name]:
                    raise ValueError(f"{name} is not the planned {expected}: {layout[expected]}")
                checksums[name] = write_tensor(file, array)
                weight_map[name] = file_name
            file.flush()
            os.fsync(file.fileno())
    total = sum(spec.nbytes for spec in layout.values())
    index = {
        "metadata": {"total_size": total, "total_parameters": parameters},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=4), encoding="utf-8")
    return checksums


def write_tensor(file: BinaryIO, array: mx.array) -> int:
    """Append the bytes of `array`, row-major and little-endian; returns their checksum."""
    data = tensor_bytes(array)
    file.write(data)
    return zlib.crc32(data)


def checksum(array: mx.array) -> int:
    """CRC-32 of the bytes that `write_tensor` would write."""
    return zlib.crc32(tensor_bytes(array))


def tensor_bytes(array: mx.array) -> memoryview:
    """The bytes of `array` without a copy where it is contiguous already."""
    if array.size == 0:
        return memoryview(b"")
    return np.asarray(array.reshape(-1).view(mx.uint8)).data


def header_bound(tensors: Mapping[str, Iterable[int]], rounded: Container[str]) -> int:
    """At least the bytes of all shards' headers, if the weights in `rounded` are stored quantized.

    `tensors` are the shapes of a model's parameters by name.
    """
    entries: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in tensors.items():
        entries[name] = ("F32", tuple(shape))
        if name in rounded:
            base = name.removesuffix("weight")
            entries |= {f"{base}{part}": entries[name] for part in ("scales", "biases")}
    nbytes = sum(4 * prod(shape) for _, shape in entries.values())
    return len(encode_header(entries, {"format": "mlx"})) + 64 * (1 + nbytes // SHARD_BYTES)


def _split(layout: Mapping[str, Spec], shard_bytes: int) -> list[list[str]]:
    """Names per shard: each as full as the limit allows, a larger tensor alone."""
    shards: list[list[str]] = []
    room = 0
    for name, spec in layout.items():
        if not shards or spec.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= spec.nbytes
    return shards
