"""What the files say against what mlx-lm's model holds, before anything is measured.

Two promises: each value of config.json that changes the forward pass is read by the model file, and
each tensor of the files is part of the model, or dropped for a reason that is named. Nothing is
read of the weights but a head that a tied model would drop.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..errors import SourceError
from . import rotation
from .building import build
from .config import NESTED, Json, handed_on, holders
from .departures import departures
from .folder import Folder, mlx_lm_version
from .packed import packing, unpacked
from .reading import Read, names_read
from .tensors import HEAD, MEDIA, dropped, head_apart, reasons
from .towers import Towers, towers
from .values import arguments, lost

_CANNOT = "it cannot run this model as it is: use a newer mlx-lm that does, or another model"


@dataclass(frozen=True)
class Checked:
    """`settings` is what optiq adds to config.json, `dropped` the tensors without use, by reason.

    `traced` is False for a model file that cannot be followed without its weights. `departures` say
    where mlx-lm's model is not the original, see departures.py, `towers` is what of it has other
    media than text, and can be kept beside the model.
    """

    settings: Json = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    tensors: int = 0
    traced: bool = False
    departures: tuple[str, ...] = ()
    towers: Towers | None = None


def check(folder: Folder) -> Checked:
    """Compare `folder` with the model that mlx-lm makes of it; SourceError where they differ.

    What mlx-lm refuses itself is left to loading, which says why.
    """
    try:
        settings = handed_on(folder.config)
    except SourceError as error:
        raise SourceError(f"{folder.path}: {error}") from error
    apart = head_apart(folder)
    if apart and all(h.get("tie_word_embeddings") is not False for _, h in holders(folder.config)):
        settings = _untied(folder.config, settings)
    model = build(folder.config | settings)
    if model is None:
        return Checked(settings)
    respelled = rotation.respelled(folder.config | settings, rotation.rotations(model))
    if respelled and (other := _exact(folder.config | settings | respelled)) is not None:
        model = other
    else:
        respelled = {}
    names = names_read(model)
    config = folder.config | settings | respelled
    said: list[str] = []
    for path, holder in holders(config):
        if reason := lost(holder, model, names):
            key, value = reason
            raise SourceError(
                f"{folder.path}/config.json: {path}{key} {value!r} changes the model, and mlx-lm "
                f"{mlx_lm_version()} does not read it for {config['model_type']}; {_CANNOT}"
            )
        said.extend(departures(holder, model, names))
    settings = _only(settings, folder.config, _taken(model, names)) | respelled
    weights = _lazy(folder)
    unused = dropped(model, weights) if weights else None
    named = _named(folder.path, unused or [], config, apart)
    return Checked(
        settings,
        {why: len(tensors) for why, tensors in named.items()},
        sum(map(len, folder.files.values())),
        unused is not None,
        tuple(said),
        towers(folder, config, weights, named[MEDIA]) if MEDIA in named else None,
    )


def _named(path: Path, unused: Sequence[str], config: Json, apart: bool) -> dict[str, list[str]]:
    """The tensors that are dropped for each reason; SourceError for one without any."""
    found: dict[str, list[str]] = {}
    for name, why in reasons(unused, config).items():
        if why is None and name.endswith(HEAD) and not apart:
            why = "a head equal to the embedding"
        if why is None:
            raise SourceError(
                f"{path}: the tensor {name} is in the files, but mlx-lm {mlx_lm_version()} drops "
                f"it from {config['model_type']}, which gives another model; {_CANNOT}"
            )
        found.setdefault(why, []).append(name)
    return found


def _exact(config: Json) -> nn.Module | None:
    """The model of `config`, if its rotation is what that says."""
    model = build(config)
    if model is None:
        return None
    found = rotation.rotations(model)
    told = [rotation.matched(asked, config, found) for _, asked in rotation.asked_for(config, None)]
    return model if told and all(told) else None


def _untied(config: Json, settings: Json) -> Json:
    """`settings` with a head of its own, wherever the config of the language model lies."""
    for key in [path.removesuffix(".") for path, _ in holders(config) if path]:
        settings = {**settings, key: {**config[key], **settings.get(key, {})}}
        settings[key]["tie_word_embeddings"] = False
    return {**settings, "tie_word_embeddings": False}


def _taken(model: nn.Module, names: Read) -> dict[str, bool]:
    """The arguments of the model that its files read, or insist on, and whether they do."""
    insisted = {
        f.name: f.default is f.default_factory is dataclasses.MISSING
        for held in arguments(model)
        for f in dataclasses.fields(held)
    }
    return {name: must for name, must in insisted.items() if must or name in names}


def _only(settings: Json, config: Json, taken: dict[str, bool]) -> Json:
    """What of `settings` the model takes, a null only where it must; a nested config is whole."""
    kept: Json = {}
    for key, value in settings.items():
        if key in NESTED:
            inner = {k: v for k, v in value.items() if k not in config[key] or config[key][k] != v}
            if inner := _only(inner, config[key], taken):
                kept[key] = config[key] | inner
        elif key in taken and (value is not None or taken[key]):
            kept[key] = value
    return kept


def _lazy(folder: Folder) -> dict[str, mx.array]:
    weights: dict[str, mx.array] = {}
    for file in folder.files:
        weights.update(mx.load(str(folder.path / file)))  # type: ignore[arg-type]
    if how := packing(folder.config):
        with contextlib.suppress(SourceError):  # loading says it, where it is asked for plain ones
            return unpacked(weights, how)
    return weights
