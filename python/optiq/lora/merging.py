"""Adapters merged: several into one adapter, or into the weights of their base."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..base.files import check_writable
from ..base.text import one_line
from ..errors import AdapterError, ExportError, UsageError
from ..models.adaptable import changeable
from ..models.kinds import is_embedding
from ..models.places import place_at
from ..sources import Source, load, resolve
from .adapter import Adapter, Base, check_fits
from .layers import LowRank, dense

Weighted = tuple[Adapter, float]


def combined(adapters: Sequence[Weighted]) -> Adapter:
    """One adapter for the weighted sum of several; ranks add up. Raises AdapterError."""
    if not adapters:
        raise UsageError("there are no adapters to combine; name at least one")
    bases = {a.base.fingerprint: a.base for a, _ in adapters if a.base}
    if len(bases) > 1:
        names = ", ".join(base.name for base in bases.values())
        raise AdapterError(f"the adapters were made for different models ({names})")
    first, weight = adapters[0]
    if len(adapters) == 1 and weight == 1:
        return first
    for adapter, _ in adapters:
        adapter.check_everywhere("a sum of adapters")
        adapter.check_added("a sum of adapters")
    scale = first.scale
    parts: dict[str, list[LowRank]] = {}  # by path, of each adapter
    for adapter, weight in adapters:
        for path, (a, b) in adapter.terms.items():
            parts.setdefault(path, []).append(LowRank(a, b * (weight * adapter.scale / scale)))
    for path, of in parts.items():
        if len({(t.a.shape[0], t.b.shape[1]) for t in of}) > 1:
            raise AdapterError(f"the adapters have different shapes for {path}")
    terms = {
        path: LowRank(
            mx.concatenate([t.a for t in of], axis=1), mx.concatenate([t.b for t in of], axis=0)
        )
        for path, of in parts.items()
    }
    made = {"combined": [{"sha256": a.digest, "weight": w} for a, w in adapters]}
    base = next(iter(bases.values()), None)
    made_of_all = Adapter(terms, scale, base, max(a.blocks for a, _ in adapters), made)
    made_of_all.check_finite()
    return made_of_all


def merge(
    model: str | Path, adapters: Sequence[Weighted], out: str | Path, *, dense: bool = False
) -> int:
    """Write `model` with `adapters` in its weights to the new folder `out`; returns its bytes.

    Each changed layer is rounded to its own format again, so the folder has the size of the base;
    what is smaller than a step of the grid is lost. With `dense` all weights become floating point
    numbers, and nothing is.

    Raises AdapterError for adapters of another model, UsageError, SourceError and ExportError.
    """
    folder = Path(out).expanduser().resolve()
    if folder.exists():
        raise UsageError(f"{folder} exists; name another folder, or delete it")
    check_writable(folder)
    source = resolve(str(model))
    loaded = load(source, allow_quantized=True)
    adapter = combined(adapters)
    adapter.check_everywhere("merging")
    check_fits(adapter, changeable(loaded.model), Base(source.name, source.fingerprint))
    changed = loaded.model
    config = copy.deepcopy(loaded.config)
    if dense:
        from mlx_lm.utils import dequantize_model

        changed = dequantize_model(changed)
        for key in ("quantization", "quantization_config"):
            config.pop(key, None)
    for path, term in adapter.terms.items():
        _add(place_at(changed, path).get(), term, adapter.scale, adapter.magnitudes.get(path))
    _save(source, changed, loaded.tokenizer, config, folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _add(layer: Any, term: LowRank, scale: float, magnitude: mx.array | None) -> None:
    """Add a term to the layer's weight, in the layer's own format, in place."""
    change = scale * term.a @ term.b
    weight = dense(layer) + (change if is_embedding(layer) else change.T)
    if magnitude is not None:
        weight = weight * (magnitude / mx.linalg.norm(weight, axis=1))[:, None]
    if "scales" not in layer:
        layer.weight = weight.astype(layer.weight.dtype)
        mx.eval(layer.weight)
        return
    how = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    dtype = layer.scales.dtype if layer.mode == "affine" else mx.float32
    rounded = mx.quantize(weight.astype(dtype), **how)
    for name, array in zip(("weight", "scales", "biases"), rounded, strict=False):
        layer[name] = array
    mx.eval(layer.parameters())


def _save(
    source: Source, model: nn.Module, tokenizer: Any, config: dict[str, Any], folder: Path
) -> None:
    from mlx_lm.utils import save

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save(partial, source.path, model, tokenizer, config, donate_model=False)
        (partial / "README.md").unlink(missing_ok=True)  # mlx-lm's card, of another model
        partial.rename(folder)
    except (OSError, RuntimeError) as error:
        raise ExportError(
            f"{folder} cannot be written ({one_line(error)}); free space or name another place"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
