"""Values of config.json that change the forward pass, and when they do not."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import Any

import mlx.nn as nn

from .config import ALIASES, LOCAL_THETAS, Json, family_of, rope, scaling
from .reading import Read
from .rotation import Rotation, asked_for, matched, rotations

Lost = tuple[str, Any]  # key, value

_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
DEFAULT_EPSILON = 1e-5  # of MLX's norms


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
    config = {key: value for key, value in config.items() if known(config, key)}
    return (
        _rope(config, model, names)
        or _scales(config, names)
        or _epsilon(config, model, names)
        or _activation(config, names)
    )


def _read(key: str, names: Read) -> bool:
    return not names.isdisjoint((key, *ALIASES.get(key, ())))


def _written_out(value: Any, names: Read) -> bool:
    return isinstance(value, (int, float)) and value in names


def known(config: Json, key: str) -> bool:
    """Whether the family's class in transformers, if there is one, has `key`."""
    if key not in (*NEUTRAL, *_ACTIVATION_KEYS, "sliding_window"):
        return True
    family, said = family_of(config), config.get("rope_parameters")
    if family is None or (isinstance(said, dict) and key in said):
        return True
    # This one is taken from what is left over, and moved into the rotary parameters.
    moved = key == "partial_rotary_factor"
    return hasattr(family, key) or (
        moved and key in inspect.getsource(sys.modules[family.__module__])
    )


def _rope(config: Json, model: nn.Module, names: Read) -> Lost | None:
    if not any("rope" in str(name).lower() for name in names):
        return None  # no rotary embedding at all
    found = rotations(model)
    types = config.get("layer_types")
    for where, parameters in asked_for(config, usual_theta(config)):
        _, _, layer = where.rpartition(".")
        if isinstance(types, list) and where != layer and layer not in types:
            continue
        verdict = matched(parameters, config, found)
        if verdict is None:
            if reason := _unread_rope(config, model, names):
                return reason
        elif not verdict and not matched({**parameters, "truncate": True}, config, found):
            return _at_fault(where, parameters, config, found)
    return None


def _at_fault(where: str, parameters: Json, config: Json, found: list[Rotation]) -> Lost:
    """The one value without which the rotation would be that of the model, or all of them."""
    for key, value in parameters.items():
        rest = {k: v for k, v in parameters.items() if k != key}
        if key == "rope_theta":
            rest[key] = 10000.0
        if matched(rest, config, found):
            return key if where == "rope_theta" else f"{where}.{key}", value
    return where, parameters


def usual_theta(config: Json) -> float | None:
    """The base of the rotation where config.json names none, if transformers knows the family."""
    named = next((config[name] for name in ALIASES["rope_theta"] if config.get(name)), None)
    return named or getattr(family_of(config), "default_theta", None)


def _unread_rope(config: Json, model: nn.Module, names: Read) -> Lost | None:
    """What no model file reads of the rotary parameters, by name."""
    theta = config.get("rope_theta")
    usual = theta in (None, 10000) or _written_out(theta, names)
    if not usual and not _read("rope_theta", names):
        return "rope_theta", theta
    scaled = config.get("rope_scaling")
    if isinstance(scaled, dict) and (said := scaling(scaled)):
        held = [a for a in arguments(model) if hasattr(a, "rope_scaling")]
        ignored = "rope_scaling" not in names and "rope_parameters" not in names
        if ignored or (held and all(a.rope_scaling is None for a in held)):
            return "rope_scaling", said
        factor = scaled.get("attention_factor")
        if factor is not None and "attention_factor" not in names:
            return "rope_scaling.attention_factor", factor
    full, sliding = rope(config)
    if sliding and "rope_parameters" not in names:
        apart = sliding.get("rope_theta") not in (None, full.get("rope_theta"))
        if (apart and names.isdisjoint(LOCAL_THETAS)) or scaling(sliding):
            return "rope_parameters.sliding_attention", sliding
    return None


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
            return key, value
    return None


def _epsilon(config: Json, model: nn.Module, names: Read) -> Lost | None:
    found = unread_epsilon(config, model, names)
    return found if found and found[1] > DEFAULT_EPSILON else None


def unread_epsilon(config: Json, model: nn.Module, names: Read) -> tuple[str, float] | None:
    """The epsilon of norms that the model files neither read nor write out, or not for the norms of
    the blocks, if there is one."""
    said = {key: config[key] for key in _EPSILONS if isinstance(config.get(key), float)}
    if not said or DEFAULT_EPSILON in said.values():
        return None
    unread = names.isdisjoint(said) and not any(_written_out(v, names) for v in said.values())
    blocks = [block for block in getattr(model, "layers", ()) if isinstance(block, nn.Module)]
    left = {getattr(norm, "eps", None) for block in blocks for norm in block.children().values()}
    return (
        max(said.items(), key=lambda item: item[1]) if unread or DEFAULT_EPSILON in left else None
    )


def _activation(config: Json, names: Read) -> Lost | None:
    if family_of(config) is None:
        return None  # its configs may name a function that nothing reads
    for key in _ACTIVATION_KEYS:
        value = str(config.get(key)).lower()
        for stem, forms in _ACTIVATIONS.items():
            if value.startswith(stem):
                if key not in names and not any(f in str(n).lower() for f in forms for n in names):
                    return key, config[key]
                return None
    return None


def arguments(model: nn.Module) -> list[Any]:
    """The dataclasses that the modules keep their arguments in."""
    found = {id(v): v for m in model.modules() for v in vars(m).values()
             if dataclasses.is_dataclass(v)}  # fmt: skip
    return list(found.values())
