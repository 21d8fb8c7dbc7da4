"""What files say of the model that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from ..base.text import dtype_name
from ..models.roles import Module, fixed_bytes
from ..planning.scores import ModelInfo
from ..sources import LoadedModel
from ..sources.shards import header_bound


def describe_model(loaded: LoadedModel, modules: Sequence[Module]) -> ModelInfo:
    """The source of `loaded`, which must be as it came from there."""
    source = loaded.source
    parameters: dict[str, mx.array] = dict(tree_flatten(loaded.model.parameters()))
    shapes = {name: array.shape for name, array in parameters.items()}
    rounded = {f"{m.path}.weight" for m in modules}
    if source.towers:
        shapes |= {t.name: t.spec.shape for t in source.towers.tensors}
        rounded |= source.towers.formats.keys()
    return ModelInfo(
        name=source.label,
        fingerprint=source.fingerprint,
        model_type=loaded.config["model_type"],
        dtype=dtype_name(loaded.dtype),
        itemsize=loaded.dtype.size,
        fixed_bytes=fixed_bytes(loaded.model, modules),
        header_bytes=header_bound(shapes, rounded),
        tower_bytes=source.towers.nbytes if source.towers else 0,
        departures=source.departures,
        kind=source.kind,
        path=None if source.kind == "hub" else str(Path(source.name).expanduser().resolve()),
    )
