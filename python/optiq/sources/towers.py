"""Vision and audio towers, which mlx-lm leaves out when it loads and an export keeps.

A kept tensor has the bytes and the layout of the source. Its name is the one that mlx-vlm gives it
and that mlx-lm leaves out, so both load the same folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import UsageError
from ..formats import Format
from .building import build_anew
from .config import Json
from .folder import Folder
from .safetensors import DTYPE_BITS, TensorInfo
from .shards import Spec
from .tensors import dropped

EIGHT_BITS = Format("affine", 8, 64)

# Its model file in mlx-lm knows the towers inside "model" only.
_INSIDE = ("gemma3n",)
# mlx-vlm has one more module around these.
_PIXTRAL = ("mistral3", "pixtral", "llava")
# Families whose towers in 8 bits were loaded by mlx-vlm (tests/peers/test_mlx_vlm.py).
_EIGHT_BITS = ("gemma4", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "mistral3")
# Looked up, or read without the layer: only mlx-vlm's linear layers are quantized.
_NOT_LINEAR = re.compile(r"(embed|embedding|embeddings|emb|norm\d*|ln_\w+)\.weight$")


@dataclass(frozen=True)
class Tensor:
    """`name` in the exported folder, `source` in `file`, and what it holds there."""

    name: str
    source: str
    file: Path
    spec: Spec


@dataclass(frozen=True)
class Towers:
    """All tensors of media other than text, with the format of those that are to be rounded.

    There are none where the source has some that cannot be kept.
    """

    model_type: str
    tensors: tuple[Tensor, ...]
    formats: Mapping[str, Format]

    @property
    def nbytes(self) -> int:
        return sum(
            self.formats[t.name].nbytes(t.spec.shape, DTYPE_BITS[t.spec.dtype] // 8)
            if t.name in self.formats
            else t.spec.nbytes
            for t in self.tensors
        )

    def rounded(self) -> Towers:
        """The same with the matrices of linear layers in 8 bits. UsageError where mlx-vlm was not
        seen to load that."""
        if self.model_type not in _EIGHT_BITS:
            raise UsageError(
                f"--towers 8bit is not known to load in mlx-vlm for {self.model_type}; use "
                f"--towers keep (it is known for {', '.join(_EIGHT_BITS)})"
            )
        linear = (
            t.name
            for t in self.tensors
            if t.name.endswith(".weight")
            and len(t.spec.shape) == 2
            and EIGHT_BITS.fits(t.spec.shape)
            and not _NOT_LINEAR.search(t.name)
        )
        return replace(self, formats=dict.fromkeys(linear, EIGHT_BITS))

    def quantization(self) -> dict[str, Any]:
        """What config.json says of them, by module path as in mlx-vlm."""
        return {n.removesuffix(".weight"): f.config() for n, f in self.formats.items()}

    def arrays(self) -> Iterator[tuple[str, mx.array]]:
        """Each tensor, not yet read."""
        files: dict[Path, dict[str, mx.array]] = {}
        for tensor in self.tensors:
            if tensor.file not in files:
                files[tensor.file] = mx.load(str(tensor.file))  # type: ignore[assignment]
            yield tensor.name, files[tensor.file].pop(tensor.source)


def towers(
    folder: Folder, config: Json, weights: Mapping[str, mx.array], media: Iterable[str]
) -> Towers:
    """The tensors `media` of `folder` as they can be kept beside mlx-lm's model of `config`.

    They cannot where mlx-lm would no longer load the folder, or MLX does not write such tensors.
    """
    model_type = str(folder.config["model_type"])
    where: dict[str, tuple[str, TensorInfo]] = {
        name: (file, info) for file, found in folder.files.items() for name, info in found.items()
    }
    tensors: list[Tensor] = []
    for source in media:
        file, info = where[source]
        spec = Spec(info.dtype, info.shape)
        if spec != Spec.of(weights[source].dtype, weights[source].shape):
            return Towers(model_type, (), {})  # MLX reads fp8 as integers
        tensors.append(Tensor(_name(source, model_type), source, folder.path / file, spec))
    kept = tuple(tensors) if _left_out(config, weights, tensors) else ()
    return Towers(model_type, kept, {})


def _name(source: str, model_type: str) -> str:
    name = re.sub(r"^(model\.)?visual\.", r"\1vision_tower.", source)
    if model_type not in _INSIDE:
        name = name.removeprefix("model.")
    if model_type in _PIXTRAL:
        name = re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)
    return name


def _left_out(config: Json, weights: Mapping[str, mx.array], tensors: Iterable[Tensor]) -> bool:
    """Whether mlx-lm leaves all of `tensors` out of a folder that it has written itself.

    Some `sanitize` change the model, so each call has one of its own.
    """
    own = {t.name: weights[t.source] for t in tensors}
    first: Any = build_anew(config)
    second = build_anew(config)
    if first is None or second is None:
        return False
    try:
        unused = dropped(second, {**first.sanitize(dict(weights)), **own})
    except Exception:  # whatever a model file raises
        return False
    return unused is not None and own.keys() <= set(unused)
