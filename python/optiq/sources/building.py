"""mlx-lm's model of a configuration, without its weights: what can be told before any are read."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from functools import lru_cache

import mlx.nn as nn

from .config import Json


def build(config: Json) -> nn.Module | None:
    """The model of `config`, to look at; None where its file refuses that, which loading says.

    A conversion asks for the same one when it resolves, exports and reads back.
    """
    return _built(json.dumps(config))


def build_anew(config: Json) -> nn.Module | None:
    """The same, but one that nobody else has."""
    return _built.__wrapped__(json.dumps(config))


@lru_cache(maxsize=4)
def _built(config: str) -> nn.Module | None:
    from mlx_lm.utils import _decode_tagged_floats, _get_classes

    decoded = _decode_tagged_floats(json.loads(config))  # infinities, as transformers 5 writes them
    try:
        with redirect_stdout(io.StringIO()):  # one that lacks a package prints so and exits
            model_class, args_class = _get_classes(decoded)
            model: nn.Module = model_class(args_class.from_dict(decoded))
    except (Exception, SystemExit):  # whatever a model file raises
        return None
    return model
