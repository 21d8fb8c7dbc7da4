"""A local Hugging Face or mlx-lm folder: everything that can be checked without reading weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.text import cause
from ..errors import SourceError
from .safetensors import UNREADABLE, TensorInfo, data_start, read_header

INDEX = "model.safetensors.index.json"
WEIGHTS = "model*.safetensors"  # what mlx_lm.load reads
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")
SAMPLE = 4096  # bytes of a tensor in the fingerprint at a time
SAMPLES = 8  # of a tensor, but fewer where there are thousands of tensors


@dataclass(frozen=True)
class Folder:
    """A checked folder: its config and, per weight file name, the tensors in it."""

    path: Path
    config: dict[str, Any]
    files: dict[str, dict[str, TensorInfo]]


def check_folder(path: Path) -> Folder:
    """Check config, architecture, weight headers, shard index and tokenizer files, in that order.

    Raises SourceError for the first thing that mlx-lm could not load.
    """
    config = read_config(path)
    check_architecture(path, config)
    files = {file.name: read_header(file) for file in sorted(path.glob(WEIGHTS))}
    if not files:
        raise SourceError(f"{path} has no {WEIGHTS}; {_other_weights(path)}")
    _check_once(path, files, _check_index(path, files))
    _check_readable(path, files)
    if not any(any(path.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise SourceError(
            f"{path} has no tokenizer (one of {', '.join(TOKENIZER_FILES)}); "
            "copy the tokenizer files of the model into it"
        )
    return Folder(path, config, files)


def read_config(path: Path) -> dict[str, Any]:
    """config.json as a dict, or a SourceError."""
    file = path / "config.json"
    if not file.is_file():
        fix = "give a Hugging Face or mlx-lm model folder"
        if found := sorted(path.glob("*.gguf")):
            fix = f"it has {found[0].name}: give the .gguf file itself"
        raise SourceError(f"{path} has no config.json; {fix}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{file} cannot be read: {cause(error)}") from error
    if not isinstance(config, dict):
        raise SourceError(f"{file} is not a JSON object")
    return config


def check_architecture(path: Path, config: dict[str, Any]) -> None:
    """Raise SourceError unless the installed mlx-lm has a module for the config's model_type."""
    if "model_file" in config:
        raise SourceError(
            f"{path}/config.json asks to run the code in {config['model_file']!r}; "
            "optiq never runs code from a model; use an architecture that mlx-lm has"
        )
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise SourceError(f"{path}/config.json has no model_type")
    from mlx_lm import utils  # here: it imports transformers, about two seconds

    module = utils.MODEL_REMAPPING.get(model_type, model_type)
    by_architecture: dict[tuple[str, str], str] = getattr(utils, "MODEL_ARCHITECTURE_REMAPPING", {})
    known = re.fullmatch(r"[\w-]+", module) and importlib.util.find_spec(f"mlx_lm.models.{module}")
    if not known and not any(name == model_type for name, _ in by_architecture):
        raise SourceError(
            f"{path}: the architecture {model_type!r} is not in mlx-lm {mlx_lm_version()}; "
            "a newer mlx-lm may have it"
        )


def fingerprint(folder: Folder) -> str:
    """sha256 of config.json, all headers, and samples of every tensor's bytes.

    Of a tensor up to SAMPLES pieces of SAMPLE bytes are read, evenly spread; a smaller one is read
    whole. So models that were trained or rounded differently are told apart in a second or two,
    but not a damaged copy from a sound one. Raises SourceError.
    """
    samples = max(1, min(SAMPLES, 4096 // max(1, sum(map(len, folder.files.values())))))
    digest = hashlib.sha256((folder.path / "config.json").read_bytes())
    for name, tensors in folder.files.items():
        path = folder.path / name
        rows = [[n, t.dtype, t.shape, t.begin, t.end] for n, t in tensors.items()]
        try:
            digest.update(json.dumps([name, path.stat().st_size, rows]).encode())
            for piece in _pieces(path, tensors.values(), samples):
                digest.update(piece)
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _pieces(path: Path, tensors: Collection[TensorInfo], samples: int) -> Iterator[bytes]:
    """Up to `samples` pieces of the bytes of each tensor, or all of a small one."""
    base = data_start(path, tensors)
    with path.open("rb") as file:
        for t in tensors:
            for start in range(t.begin, t.end, max(SAMPLE, (t.end - t.begin) // samples)):
                file.seek(base + start)
                yield file.read(min(SAMPLE, t.end - start))


def mlx_lm_version() -> str:
    """The installed mlx-lm's version."""
    return importlib.metadata.version("mlx-lm")


def _check_index(path: Path, files: dict[str, dict[str, TensorInfo]]) -> set[str]:
    """The files that the shard index names; none without an index."""
    index = path / INDEX
    if not index.is_file():
        return set()
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        rows = [(str(name), str(file)) for name, file in weight_map.items()]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{index} cannot be read: {cause(error)}") from error
    indexed = {file for _, file in rows}
    for file in sorted(indexed):
        if file not in files:
            raise SourceError(f"{path} lacks the shard {file} named in {INDEX}; download it again")
    for name, file in rows:
        if name not in files[file]:
            raise SourceError(
                f"{path / file} lacks tensor {name!r} named in {INDEX}; download both again"
            )
    return indexed


def _check_once(path: Path, files: dict[str, dict[str, TensorInfo]], indexed: set[str]) -> None:
    """Raise SourceError for a tensor in two files: which one is loaded would be chance."""
    where: dict[str, str] = {}
    for file, tensors in files.items():
        for name in tensors:
            if other := where.get(name):
                left = [f for f in (other, file) if f not in indexed] if indexed else []
                which = f": {left[0]} is not in {INDEX}" if left else ""
                raise SourceError(
                    f"{path} has the tensor {name!r} in {other} and in {file}; remove the file "
                    f"that is left of another download{which}"
                )
            where[name] = file


def _check_readable(path: Path, files: dict[str, dict[str, TensorInfo]]) -> None:
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            if tensor.dtype in UNREADABLE:
                raise SourceError(
                    f"{path / file}: tensor {name!r} has the dtype {tensor.dtype}, which MLX does "
                    "not read; give the model with float32, float16 or bfloat16 weights"
                )


def _other_weights(path: Path) -> str:
    for pattern, fix in (
        ("*.gguf", "give the .gguf file itself"),
        (
            "consolidated*.safetensors",
            f"these are named as Mistral's own code does; download {WEIGHTS} of the same model",
        ),
        ("*.safetensors", "rename the weights to model.safetensors"),
        ("*.bin", "convert the PyTorch weights to safetensors"),
    ):
        if found := sorted(path.glob(pattern)):
            return f"it has {found[0].name}: {fix}"
    return "download the weights into it"
