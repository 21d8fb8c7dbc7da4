"""Where mlx-lm knowingly runs another model than the original, in sentences.

What is here is the same model for many texts, or nearly so, and is what everybody runs in mlx-lm.
So it is taken, and said: on stderr, in plan.json and on the card. All else is refused (values.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.nn as nn

from .config import Json, family_of
from .reading import Read
from .rotation import asked_for, matched, rotations
from .values import DEFAULT_EPSILON, known, unread_epsilon, usual_theta


def departures(config: Json, model: nn.Module, names: Read) -> Iterator[str]:
    """How the model differs from what `config` says; `names` are what its files read."""
    if window := _unread_window(config, model, names):
        yield (
            f"without its attention window of {window} tokens; for longer texts it is not the "
            "original model"
        )
    for where, parameters in asked_for(config, usual_theta(config)):
        yield from _rotation(where, parameters, config, model)
    if (found := unread_epsilon(config, model, names)) and found[1] < DEFAULT_EPSILON:
        key, value = found
        yield f"with an epsilon of {DEFAULT_EPSILON:g} in its norms, where {key} is {value:g}"
    if config.get("model_type") == "jamba" and (config.get("num_experts") or 1) > 1:
        yield "with weights of a token's experts that sum to 1, where those of the original do not"


def _rotation(where: str, parameters: Json, config: Json, model: nn.Module) -> Iterator[str]:
    short = [parameters.get(key) for key in ("short_factor", "short_mscale")]
    longer = [parameters.get(key) for key in ("long_factor", "long_mscale")]
    if longer[0] is not None and short != longer:
        length = parameters.get("original_max_position_embeddings") or config.get(
            "original_max_position_embeddings"
        )
        yield (
            f"with the long factors of {where} for every text; up to {length} tokens, where the "
            "original has the short ones, it is not the original model"
        )
    found = rotations(model)
    rounded = {**parameters, "truncate": True}
    if not matched(parameters, config, found) and matched(rounded, config, found):
        yield f"with the range of {where} in whole dimensions, where truncate is false"


def _unread_window(config: Json, model: nn.Module, names: Read) -> int | None:
    """The window of attention that the model leaves out, if any.

    Up to that many tokens the model is the same without it.
    """
    window, types = config.get("sliding_window"), config.get("layer_types")
    length = config.get("max_position_embeddings")
    usual = getattr(family_of(config), "use_sliding_window", None)
    if not known(config, "sliding_window") or not isinstance(window, int) or window <= 0:
        return None
    if config.get("use_sliding_window", usual) is False:
        return None
    if isinstance(types, list):
        if "sliding_attention" not in types:
            return None
        periodic = config.get("sliding_window_pattern") and "sliding_window_pattern" in names
        if "layer_types" not in names and not periodic:
            return window
    elif isinstance(length, int) and window >= length:
        return None
    if "sliding_window" not in names:
        return window
    # Files that know windows make a cache for each: without one, no layer of this config has any.
    return window if "RotatingKVCache" in names and not _turning(model) else None


def _turning(model: nn.Module) -> bool:
    from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

    try:
        return any(isinstance(cache, RotatingKVCache) for cache in make_prompt_cache(model))
    except Exception:  # whatever a model file raises
        return True
