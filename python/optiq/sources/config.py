"""config.json in the words that mlx-lm's model files read: what transformers spells otherwise.

transformers 5 writes the rotary embedding as one dict `rope_parameters`, or one for each type of
layer. Most model files of mlx-lm read `rope_theta` and `rope_scaling` beside it, and take their own
default where these are missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import SourceError

Json = dict[str, Any]

# Where a multimodal config.json keeps that of its language model.
NESTED = ("text_config", "language_config", "llm_config")
# What model files call the base of the layers that see a window only.
LOCAL_THETAS = ("rope_local_base_freq", "swa_rope_theta", "rope_local_theta")
# Names of single families.
ALIASES = {"rope_theta": ("rotary_emb_base",), "partial_rotary_factor": ("rotary_pct",)}
_LAYERS = ("full_attention", "sliding_attention")
NOT_SCALING = ("rope_theta", "partial_rotary_factor")


def holders(config: Json) -> Iterator[tuple[str, Json]]:
    """The config itself and that of its language model, each with its path of keys."""
    yield "", config
    for key in NESTED:
        if isinstance(config.get(key), dict):
            yield f"{key}.", config[key]


def handed_on(config: Json) -> Json:
    """The keys to add to `config` so that a model file reads what it says.

    Nothing that is written out already is replaced; SourceError where the two spellings differ.
    """
    added = _synonyms(config) | _window(config) | _rope(config)
    for key in NESTED:
        if isinstance(config.get(key), dict) and (inner := handed_on(config[key])):
            added[key] = config[key] | inner
    return added


def rope(config: Json) -> tuple[Json, Json]:
    """The rotary parameters of layers that see everything, and of those with a window."""
    said = config.get("rope_parameters")
    if not isinstance(said, dict):
        return {}, {}
    if not any(isinstance(value, dict) for value in said.values()):
        return said, {}
    kinds = {name: value for name, value in said.items() if isinstance(value, dict)}
    full, sliding = (kinds.get(name, {}) for name in _LAYERS)
    return full or sliding, sliding


def scaling(parameters: Json) -> Json | None:
    """The scaling in rotary parameters of either spelling, or None for the plain embedding."""
    kind = parameters.get("rope_type") or parameters.get("type")
    if kind in (None, "default"):
        return None
    rest = {k: v for k, v in parameters.items() if k not in NOT_SCALING and v is not None}
    return {**rest, "type": kind, "rope_type": kind}  # model files read one or the other


def _rope(config: Json) -> Json:
    full, sliding = rope(config)
    wanted: Json = {key: full[key] for key in NOT_SCALING if full.get(key) is not None}
    for key, names in ALIASES.items():
        wanted |= {name: wanted[key] for name in names if key in wanted}
    if full:
        wanted["rope_scaling"] = scaled = scaling(full)
        if original := (scaled or {}).get("original_max_position_embeddings"):
            wanted["original_max_position_embeddings"] = original
    if sliding.get("rope_theta") is not None:
        wanted |= dict.fromkeys(LOCAL_THETAS, sliding["rope_theta"])
    for key, value in wanted.items():
        written = config.get(key)
        if key == "rope_scaling" and isinstance(written, dict):
            if value is None:
                continue  # as transformers, which takes what somebody added
            written = scaling(written)
        if written is not None and written != value:
            raise SourceError(
                f"config.json says {key} {written!r} and in rope_parameters {value!r}; remove the "
                "one that is wrong"
            )
    added = {
        key: value
        for key, value in wanted.items()
        if config.get(key) is None and not (value is None and key in config)
    }
    usual = getattr(family_of(config), "default_theta", None)
    if "rope_theta" in config and config["rope_theta"] is None and usual is not None:
        added.setdefault("rope_theta", usual)
    written = config.get("rope_scaling")
    if isinstance(written, dict) and None in written.values():  # mlx-lm computes with a null
        added["rope_scaling"] = {k: v for k, v in written.items() if v is not None}
    return added


def _synonyms(config: Json) -> Json:
    """What transformers calls otherwise than the family's own code, under both names."""
    names: dict[str, str] = getattr(family_of(config), "attribute_map", {})
    pairs = [*names.items(), *((b, a) for a, b in names.items())]
    return {a: config[b] for a, b in pairs if config.get(b) is not None and config.get(a) is None}


def family_of(config: Json) -> Any:
    """The class of transformers for `config`, or None."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[config["model_type"]]
    except (KeyError, ImportError, TypeError):
        return None


def _window(config: Json) -> Json:
    """`layer_types` as the period that gemma's model files read, if every Nth layer sees all."""
    types = config.get("layer_types")
    if not isinstance(types, list) or config.get("sliding_window_pattern") is not None:
        return {}
    full = [i for i, kind in enumerate(types, start=1) if kind == "full_attention"]
    period = full[0] if full else 0
    regular = full == list(range(period, len(types) + 1, period)) if period else False
    return {"sliding_window_pattern": period} if regular and period > 1 else {}
