"""Which tensors of the files reach the model, followed through mlx-lm's `sanitize`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .config import Json, holders
from .folder import Folder
from .safetensors import TensorInfo, data_start

HEAD = "lm_head.weight"
CHUNK = 1 << 20  # bytes compared at a time
MEDIA = "of other media than text"

# Why a tensor may be dropped: what its name must match.
_KNOWN = {
    "computed by the model itself": r"inv_freq$|rotary_emb\.|\.rope\.freqs$|position_ids$"
    r"|(attn|attention)\.(masked_)?bias$|embed_scale$|(^|\.)rotary|\.(cos|sin)$",
    MEDIA: r"visual|vision|_vl$|audio|speech|image|multi_modal|mm_projector|embed_vision|projector"
    r"|patch_merge_mlp",
    "of the prediction of several tokens": r"(^|[._])mtp|nextn",
    "scales of activations": r"(activation|input|output|k|v)_scale$|weight_shape$",
}


def dropped(model: nn.Module, weights: Mapping[str, mx.array]) -> list[str] | None:
    """The names in `weights` that nothing of the model depends on; None if it cannot be followed.

    Only the graph is made: no weight is read.
    """
    sanitize = getattr(model, "sanitize", None)
    if sanitize is None:
        return []
    names = list(weights)
    events: list[dict[str, Any]] = []

    def outputs(*arrays: mx.array) -> list[mx.array]:
        kept = sanitize(dict(zip(names, arrays, strict=True)))
        return list(kept.values())

    try:
        mx.export_function(events.append, outputs, *weights.values())
    except Exception:  # whatever a model file raises, such as for reading a value
        return None
    needed: set[str] = set()
    graph = {e["type"]: e for e in events if e["type"] != "primitive"}
    needed.update(name for name, *_ in graph["outputs"]["outputs"])
    for step in reversed([e for e in events if e["type"] == "primitive"]):
        if not needed.isdisjoint(name for name, *_ in step["outputs"]):
            needed.update(name for name, *_ in step["inputs"])
    inputs = graph["inputs"]["inputs"]
    return [name for name, (ident, *_) in zip(names, inputs, strict=True) if ident not in needed]


def reasons(names: Iterable[str], config: Json) -> dict[str, str | None]:
    """Why each of the dropped `names` is not a part of the model, or None if no reason is known."""
    return {name: _reason(name, config) for name in names}


def _reason(name: str, config: Json) -> str | None:
    for why, pattern in _KNOWN.items():
        if re.search(pattern, name):
            return why
    if match := re.search(r"(?:^|\.)layers\.(\d+)\.", name):
        layer = int(match[1])
        for _, holder in holders(config):
            blocks = holder.get("num_hidden_layers")
            if isinstance(blocks, int) and blocks <= layer < blocks + _ahead(holder):
                return "of the prediction of several tokens"
            shared = holder.get("num_kv_shared_layers") or 0
            sharing = isinstance(blocks, int) and shared and layer >= blocks - shared
            if sharing and re.search(r"self_attn\.[kv]_(proj|norm)\.", name):
                return "of layers that share keys and values"
    return None


def _ahead(config: Json) -> int:
    """Layers behind the last that predict further tokens: as many as config.json says, or one."""
    said = [v for k, v in config.items() if ("nextn" in k or "mtp" in k) and isinstance(v, int)]
    return max(1, *said) if said else 1


def head_apart(folder: Folder) -> bool:
    """Whether the files have a head that is not the embedding again."""
    tensors = {n: (file, t) for file, found in folder.files.items() for n, t in found.items()}
    head = next((n for n in tensors if n.endswith(HEAD)), None)
    if head is None or not tensors[head][1].floating:
        return False
    shape = tensors[head][1].shape
    return not any(
        tensor.shape == shape and re.search("emb|wte", name) and _same(folder, tensors[head], found)
        for name, found in tensors.items()
        for tensor in (found[1],)
    )


def _same(folder: Folder, a: tuple[str, TensorInfo], b: tuple[str, TensorInfo]) -> bool:
    """Whether two tensors have the same bytes; different ones are told apart at the first chunk."""
    if a[1].dtype != b[1].dtype:
        return False
    first, second = (_bytes(folder, file, info) for file, info in (a, b))
    return all(
        np.array_equal(first[i : i + CHUNK], second[i : i + CHUNK])
        for i in range(0, len(first), CHUNK)
    )


def _bytes(folder: Folder, file: str, info: TensorInfo) -> np.memmap[Any, Any]:
    path = folder.path / file
    base = data_start(path, folder.files[file].values())
    size = info.end - info.begin
    return np.memmap(path, np.uint8, "r", offset=base + info.begin, shape=(size,))
