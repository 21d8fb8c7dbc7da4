"""A GGUF file becomes a Hugging Face folder in a cache, once, one piece of a tensor at a time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from ...base.progress import Progress
from ...errors import SourceError
from ..folder import check_folder
from ..loading import Source, load
from ..safetensors import encode_header
from .config import Mapped, build_config, map_tensors
from .file import GgufFile, read_gguf, read_rows
from .tokenizer import write_tokenizer

CONVERTER = 2  # part of the cache key: raise it when the same GGUF gives another folder
# float32 values in memory at once; dequantizing them takes about six times as much
CHUNK_ELEMENTS = 1 << 20
SAME_MATRIX_COSINE = 0.9
F32 = GGMLQuantizationType.F32


def convert(path: Path, cache_dir: Path | None = None) -> Path:
    """The Hugging Face folder of the GGUF file `path`, from the cache or converted into it.

    Quantized, f16 and bf16 weights are written as bfloat16; a file of float32 only stays float32.
    Of a file that was split any part stands for all. The folder appears whole or not at all. Raises
    SourceError for a file that is damaged or not understood, and when the cache cannot be written.
    """
    gguf = read_gguf(path)
    files = [f"{status.st_size} {status.st_mtime_ns}" for status in map(Path.stat, gguf.parts)]
    identity = f"{CONVERTER} {gguf.digest} {' '.join(files)}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    root = (cache_dir or default_cache()) / "gguf"
    target = root / f"{path.stem}-{key}"
    if _usable(target):
        return target
    config = build_config(gguf)
    if not config["tie_word_embeddings"]:
        config["tie_word_embeddings"] = _same_matrix(gguf)
    tensors = map_tensors(gguf, config)
    _check_types(gguf, tensors)
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=root))
        try:
            _write_folder(gguf, config, tensors, temporary)
            # Proves that mlx-lm takes names, shapes and tokenizer; reads no weight.
            load(Source(str(path), "gguf", temporary, None, ""))
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise SourceError(
            f"{path} cannot be converted into {root}: {error.strerror or error}; "
            "set OPTIQ_CACHE to a folder with more room"
        ) from error
    return target


def default_cache() -> Path:
    """OPTIQ_CACHE, else ~/.cache/optiq."""
    return Path(os.environ.get("OPTIQ_CACHE") or "~/.cache/optiq").expanduser()


def _usable(target: Path) -> bool:
    try:
        check_folder(target)
    except SourceError:
        return False
    return True


def _check_types(gguf: GgufFile, tensors: list[Mapped]) -> None:
    for kind in {t.source.type for t in tensors}:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            name = next(t.source.name for t in tensors if t.source.type is kind)
            raise SourceError(
                f"{gguf.path}: tensor {name!r} has the type {kind.name}, which the gguf package "
                "cannot dequantize; give a GGUF of another type"
            ) from error


def _write_folder(
    gguf: GgufFile, config: dict[str, object], tensors: list[Mapped], folder: Path
) -> None:
    narrow = any(t.source.type is not F32 for t in tensors)
    specs = {t.name: ("BF16" if narrow else "F32", t.source.shape) for t in tensors}
    header = encode_header(specs, {"format": "pt"})
    elements = sum(prod(shape) for _, shape in specs.values())
    needed = len(header) + elements * (2 if narrow else 4)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SourceError(
            f"{gguf.path} needs {needed / 1e9:.1f} GB in {folder.parent}, {free / 1e9:.1f} GB are "
            "free; set OPTIQ_CACHE to a folder with more room"
        )
    ids = write_tokenizer(gguf, folder)
    config |= {"torch_dtype": "bfloat16" if narrow else "float32", **ids}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", ids)
    with (
        (folder / "model.safetensors").open("wb") as out,
        Progress(elements / 1e6, "reading") as progress,
    ):
        out.write(header)
        for tensor in tensors:
            for values in _chunks(tensor):
                if not np.isfinite(values).all():
                    raise SourceError(
                        f"{gguf.path}: tensor {tensor.source.name!r} holds NaN or infinite values; "
                        "download it again"
                    )
                out.write((to_bfloat16(values) if narrow else values).tobytes())
                progress.step(values.size / 1e6, tensor.name)


def _chunks(tensor: Mapped) -> Iterator[npt.NDArray[np.float32]]:
    """The tensor's values in order, as float32 [rows, columns] (a vector is one row)."""
    *leading, columns = tensor.source.shape
    rows = prod(leading)
    step = max(CHUNK_ELEMENTS // columns, 1)
    if tensor.head_rows:
        step = max(step // tensor.head_rows, 1) * tensor.head_rows
    for start in range(0, rows, step):
        packed = read_rows(tensor.source, start, min(start + step, rows))
        # One wide row: dequantize() works through rows in Python, 16 at a time.
        with np.errstate(all="ignore"):  # what is not finite is found by the caller
            values = dequantize(packed.reshape(1, -1), tensor.source.type)
        values = values.reshape(len(packed), -1)
        if tensor.head_rows:
            values = deinterleave(values.reshape(-1, columns if leading else 1), tensor.head_rows)
        yield values + np.float32(tensor.shift) if tensor.shift else values


def deinterleave(values: npt.NDArray[np.float32], head_rows: int) -> npt.NDArray[np.float32]:
    """Undo llama.cpp's row order for its rotary embedding: within each head of `head_rows` rows,
    [a0 b0 a1 b1 ...] becomes [a0 a1 ... b0 b1 ...]. Values and result: [heads * head_rows, n]."""
    pairs = values.reshape(-1, head_rows // 2, 2, values.shape[-1])
    result: npt.NDArray[np.float32] = pairs.swapaxes(1, 2).reshape(values.shape)
    return result


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of finite float32 values rounded to bfloat16, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded: npt.NDArray[np.uint32] = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    return rounded.astype(np.uint16)


def _same_matrix(gguf: GgufFile) -> bool:
    """Whether the stored head is the embedding again, perhaps quantized differently.

    Compares up to 256 rows; unrelated matrices have a cosine near 0, two roundings of one near 1.
    """
    embedding, head = gguf.tensors["token_embd.weight"], gguf.tensors["output.weight"]
    if embedding.shape != head.shape:
        return False
    rows = embedding.shape[0]
    samples = []
    for tensor in (embedding, head):
        packed = [read_rows(tensor, r, r + 1) for r in range(0, rows, -(-rows // 256))]
        values = dequantize(np.concatenate(packed, axis=1), tensor.type)
        samples.append(values.astype(np.float64).ravel())
    a, b = samples
    return bool(a @ b > SAME_MATRIX_COSINE * np.sqrt((a @ a) * (b @ b)))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
