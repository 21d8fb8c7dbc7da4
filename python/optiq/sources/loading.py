"""From a resolved source to the stock mlx-lm model, with weights still on disk."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import SourceError
from .folder import mlx_lm_version, one_line


@dataclass(frozen=True)
class Source:
    """Where a model lies; made by `resolve`."""

    name: str  # what the user typed
    kind: str  # "folder", "hub" or "gguf"
    path: Path  # a local Hugging Face or mlx-lm folder
    revision: str | None  # the hub's commit hash
    fingerprint: str  # sha256, see folder.fingerprint


@dataclass(frozen=True)
class LoadedModel:
    """A stock mlx-lm model; `dtype` is the floating dtype that most weight bytes have."""

    model: nn.Module
    tokenizer: Any  # mlx_lm.tokenizer_utils.TokenizerWrapper
    config: dict[str, Any]
    dtype: mx.Dtype


def load(source: Source, *, lazy: bool = True, allow_quantized: bool = False) -> LoadedModel:
    """Load `source` with mlx-lm's own classes; with `lazy` no weight is read before it is used.

    Raises SourceError when mlx-lm cannot load the model or the tokenizer, and for an already
    quantized model unless `allow_quantized`.
    """
    from mlx_lm.utils import load_model, load_tokenizer  # here: two seconds of transformers

    try:
        model, config = load_model(source.path, lazy=lazy)
    except Exception as error:
        raise SourceError(
            f"mlx-lm {mlx_lm_version()} cannot load {source.name}: {one_line(error)}"
        ) from error
    if not allow_quantized and (how := quantization(config)):
        raise SourceError(
            f"{source.name} is already quantized ({how}); give the unquantized original model"
        )
    tokenizer = _load_tokenizer(load_tokenizer, source, config)
    return LoadedModel(model, tokenizer, config, _main_dtype(source, model))


def quantization(config: dict[str, Any]) -> str | None:
    """How the config of a model loaded by mlx-lm says it is quantized, or None."""
    # mlx-lm puts `quantization` in itself for every packed format it keeps (AWQ, MXFP4, ...);
    # an fp8 checkpoint that it dequantizes has only `quantization_config`.
    if params := config.get("quantization"):
        return f"{params.get('mode', 'affine')} {params.get('bits')}-bit"
    method = (config.get("quantization_config") or {}).get("quant_method")
    return "bitnet" if method == "bitnet" else None


def check_finite(name: str, array: mx.array) -> None:
    """Raise SourceError if the weight `name` holds a NaN or an infinity."""
    if mx.issubdtype(array.dtype, mx.floating) and not mx.all(mx.isfinite(array)).item():
        raise SourceError(
            f"the weight {name} holds NaN or infinite values; "
            "the file is damaged or was saved badly: get it again"
        )


def _load_tokenizer(load_tokenizer: Any, source: Source, config: dict[str, Any]) -> Any:
    try:
        # trust_remote_code=False refuses at once where None would ask on the terminal.
        return load_tokenizer(
            source.path,
            {"trust_remote_code": False},
            eos_token_ids=config.get("eos_token_id"),
        )
    except Exception as error:
        raise SourceError(
            f"the tokenizer of {source.name} cannot be loaded: {one_line(error)}; "
            "copy the model's tokenizer files again"
        ) from error


def _main_dtype(source: Source, model: nn.Module) -> mx.Dtype:
    nbytes: Counter[mx.Dtype] = Counter()
    leaves: Any = tree_flatten(model.parameters())
    for _, array in leaves:
        if mx.issubdtype(array.dtype, mx.floating):
            nbytes[array.dtype] += array.nbytes
    if not nbytes:
        raise SourceError(f"{source.name} has no floating point weights")
    return nbytes.most_common(1)[0][0]
