"""Safetensors files of our own, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from ..errors import ExportError
from .files import whole
from .text import cause


def write_tensors(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
    """Replace the file in one step; its folder is made. Raises ExportError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as (partial,):
            mx.save_safetensors(str(partial), arrays, metadata)
    except (OSError, RuntimeError) as error:
        raise ExportError(
            f"{path} cannot be written ({cause(error)}); free space or name another place"
        ) from error
