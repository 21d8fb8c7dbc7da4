"""Values of config.json that change the forward pass, and when they do not."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from collections.abc import Callable
from typing import Any

import mlx.nn as nn

from .config import ALIASES, LOCAL_THETAS, Json, rope, scaling
from .reading import Read

Lost = tuple[str, Any, str]  # key, value, fix

_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
DEFAULT_EPSILON = 1e-5  # of MLX's norms
_REMOVE = "take it out of config.json to convert the model without it, or use a newer mlx-lm"


def _off(value: Any) -> bool:
    return value in (None, False, 0)


def _one(value: Any) -> bool:
    return value in (None, 1)


_ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function")
# How names of functions begin, and what a model file that has one calls it.
_ACTIVATIONS = {
    "silu": ("silu", "swiglu", "swish", "switchglu"),
    "swish": ("silu", "swiglu", "swish", "switchglu"),
    "gelu": ("gelu", "geglu"),
    "relu": ("relu",),
}

# Some model files write these values out.
_WRITTEN_OUT = (
    "partial_rotary_factor", "attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap",
)  # fmt: skip
# Values of these keys that change nothing; a key that is not read must have one.
NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "partial_rotary_factor": _one,
    "attn_logit_softcapping": _off,
    "final_logit_softcapping": _off,
    "logits_soft_cap": _off,
    "clip_qkv": _off,
    "alibi": _off,
    "scale_attn_by_inverse_layer_idx": _off,
    **dict.fromkeys(
        ("embedding_multiplier", "residual_multiplier", "lm_head_multiplier", "key_multiplier",
         "attention_in_multiplier", "attention_out_multiplier", "logits_scaling", "logit_scale",
         "scale_emb", "routed_scaling_factor"),
        _one,
    ),
}  # fmt: skip


def lost(config: Json, model: nn.Module, names: Read) -> Lost | None:
    """The first value of `config` that the model files, which read `names`, do not use.

    A key that transformers' own class of the family does not have changes nothing there, either.
    """
    config = {key: value for key, value in config.items() if _known(config, key)}
    return (
        _rope(config, model, names)
        or _scales(config, names)
        or _epsilon(config, names)
        or _activation(config, names)
    )


def unread_window(config: Json, names: Read) -> int | None:
    """The window of attention that the model files, which read `names`, leave out, if any.

    Up to that many tokens the model is the same without it.
    """
    window, types = config.get("sliding_window"), config.get("layer_types")
    length = config.get("max_position_embeddings")
    usual = getattr(_family(config), "use_sliding_window", None)
    if not _known(config, "sliding_window") or not isinstance(window, int) or window <= 0:
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
    elif config.get("model_type") == "mistral":
        return window  # all its layers have one; the model file wants a layer without
    return None if "sliding_window" in names else window


def _read(key: str, names: Read) -> bool:
    return not names.isdisjoint((key, *ALIASES.get(key, ())))


def _written_out(value: Any, names: Read) -> bool:
    return isinstance(value, (int, float)) and value in names


def _known(config: Json, key: str) -> bool:
    """Whether the family's class in transformers, if there is one, has `key`."""
    if key not in (*NEUTRAL, *_ACTIVATION_KEYS, "sliding_window"):
        return True
    family, said = _family(config), config.get("rope_parameters")
    if family is None or (isinstance(said, dict) and key in said):
        return True
    # This one is taken from what is left over, and moved into the rotary parameters.
    moved = key == "partial_rotary_factor"
    return hasattr(family, key) or (
        moved and key in inspect.getsource(sys.modules[family.__module__])
    )


def _family(config: Json) -> Any:
    """The class of transformers for `config`, or None."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[config["model_type"]]
    except (KeyError, ImportError):
        return None


def _rope(config: Json, model: nn.Module, names: Read) -> Lost | None:
    if not any("rope" in str(name).lower() for name in names):
        return None  # no rotary embedding at all
    theta = config.get("rope_theta")
    usual_theta = theta in (None, 10000) or _written_out(theta, names)
    if not usual_theta and not _read("rope_theta", names):
        return "rope_theta", theta, _REMOVE
    scaled = config.get("rope_scaling")
    if isinstance(scaled, dict) and (said := scaling(scaled)):
        factor, usual = scaled.get("attention_factor"), _yarn_factor(said)
        same = (
            isinstance(factor, (int, float))
            and usual is not None
            and math.isclose(factor, usual, rel_tol=1e-3)
        )
        unusual = factor is not None and not same
        if unusual and "attention_factor" not in names:
            return "rope_scaling.attention_factor", factor, _REMOVE
        held = [a for a in arguments(model) if hasattr(a, "rope_scaling")]
        ignored = "rope_scaling" not in names and "rope_parameters" not in names
        if ignored or (held and all(a.rope_scaling is None for a in held)):
            return "rope_scaling", said, _REMOVE
    full, sliding = rope(config)
    if sliding and "rope_parameters" not in names:
        apart = sliding.get("rope_theta") not in (None, full.get("rope_theta"))
        if (apart and names.isdisjoint(LOCAL_THETAS)) or scaling(sliding):
            return "rope_parameters.sliding_attention", sliding, _REMOVE
    return None


def _yarn_factor(scaled: Json) -> float | None:
    """What yarn scales attention by where no attention_factor is given."""
    factor = scaled.get("factor")
    if scaled["rope_type"] != "yarn" or not isinstance(factor, (int, float)) or factor <= 1:
        return None
    return 0.1 * math.log(factor) + 1


def _scales(config: Json, names: Read) -> Lost | None:
    for key, changes_nothing in NEUTRAL.items():
        value = config.get(key)
        if key == "partial_rotary_factor" and not {"qk_rope_head_dim", "rotary_dim"}.isdisjoint(
            config
        ):
            continue  # the width itself is told
        if key in _WRITTEN_OUT and _written_out(value, names):
            continue
        if not changes_nothing(value) and not _read(key, names):
            return key, value, _REMOVE
    return None


def _epsilon(config: Json, names: Read) -> Lost | None:
    said = {key: config[key] for key in _EPSILONS if isinstance(config.get(key), float)}
    used = any(_written_out(value, names) for value in said.values())
    if said and names.isdisjoint(said) and DEFAULT_EPSILON not in said.values() and not used:
        key = next(iter(said))
        return key, said[key], _REMOVE
    return None


def _activation(config: Json, names: Read) -> Lost | None:
    if _family(config) is None:
        return None  # its configs may name a function that nothing reads
    for key in _ACTIVATION_KEYS:
        value = str(config.get(key)).lower()
        for stem, forms in _ACTIVATIONS.items():
            if value.startswith(stem):
                if key not in names and not any(f in str(n).lower() for f in forms for n in names):
                    return key, config[key], "its model file computes another function"
                return None
    return None


def arguments(model: nn.Module) -> list[Any]:
    """The dataclasses that the modules keep their arguments in."""
    found = {id(v): v for m in model.modules() for v in vars(m).values()
             if dataclasses.is_dataclass(v)}  # fmt: skip
    return list(found.values())
