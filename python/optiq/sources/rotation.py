"""Rotary embeddings in numbers: what config.json asks for, and what a module of mlx-lm does.

The formulas are those of transformers' modeling_rope_utils, computed in Python's floats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from .config import LOCAL_THETAS, NESTED, NOT_SCALING, Json, rope, scaling

_LISTED = (
    "Llama3RoPE", "SuScaledRoPE", "YarnRoPE", "ProportionalRoPE", "DeepseekV2YarnRotaryEmbedding",
)  # fmt: skip
_CLOSE = 1e-4  # mlx-lm computes in float32


@dataclass(frozen=True)
class Rotation:
    """Rotation of the first `dims` values of each head, `frequencies[i]` radians per position.

    `magnitude` multiplies the rotated values; `traditional` pairs neighbours.
    """

    dims: int
    traditional: bool
    frequencies: tuple[float, ...]
    magnitude: float = 1.0

    def like(self, other: Rotation) -> bool:
        """Whether both turn and scale alike."""
        mine, its = (
            (*r.frequencies, *(0.0,) * (r.dims // 2 - len(r.frequencies)), r.magnitude)
            for r in (self, other)
        )
        return self.dims == other.dims and all(
            math.isclose(a, b, rel_tol=_CLOSE) for a, b in zip(mine, its, strict=True)
        )


def of_module(module: Any) -> Rotation | None:
    """What a rotation of mlx-lm does; None for those that change with the length of the text."""
    kind = type(module).__name__
    if kind == "RoPE":
        half = module.dims // 2
        steps = (module.scale * float(module.base) ** (-i / half) for i in range(half))
        return Rotation(module.dims, module.traditional, tuple(steps))
    if kind not in _LISTED:
        return None
    frequencies = tuple(1.0 / w if w else 0.0 for w in module._freqs.tolist())
    return Rotation(
        dims=2 * len(frequencies),
        traditional=getattr(module, "traditional", False),
        frequencies=frequencies,
        magnitude=float(getattr(module, "mscale", getattr(module, "_scale", 1.0))),
    )


def _stretched(module: Any) -> Rotation | None:
    """A rotation that changes with the length, for a text of twice the context."""
    if type(module).__name__ != "DynamicNTKScalingRoPE" or not module.max_position_embeddings:
        return None
    plain = [float(module.base) ** (-2 * i / module.dims) for i in range(module.dims // 2)]
    return Rotation(module.dims, module.traditional, tuple(_ntk(plain, module.factor)))


def rotations(model: nn.Module) -> list[Rotation]:
    """The different rotations of the model's layers, as far as they are known."""
    ropes = [module for name, module in model.named_modules() if name.endswith("rope")]
    try:
        found = {of_module(module) or _stretched(module) for module in ropes}
    except (TypeError, ValueError, ArithmeticError):
        return []  # made of values that no rotation can have
    return [rotation for rotation in found if rotation is not None]


def asked_for(config: Json, theta: float | None) -> Iterator[tuple[str, Json]]:
    """The rotary parameters of `config` with where they stand, in either spelling.

    `theta` is the base where it is not named.
    """
    keys = ("rope_theta", "rope_scaling", "rope_parameters")
    if not any(key in config for key in keys) and any(key in config for key in NESTED):
        return  # they are those of the language model inside
    full, sliding = rope(config)
    said, added = config.get("rope_parameters"), config.get("rope_scaling")
    scaled = scaling(added) if isinstance(added, dict) else None
    named = {"rope_theta": config.get("rope_theta") or theta}
    where = "rope_scaling" if scaled else "rope_theta"
    if full and isinstance(said, dict):
        nested = any(isinstance(value, dict) for value in said.values())
        where = "rope_parameters.full_attention" if nested else "rope_parameters"
    kept = {key: value for key, value in full.items() if value is not None}
    asked = {**named, **kept, **(scaled or {})}
    if where.endswith("full_attention"):
        asked.pop("truncate", None)  # transformers looks for it beside the types of layers
    yield where, asked
    local = next((config[key] for key in LOCAL_THETAS if config.get(key) is not None), None)
    if sliding:
        yield "rope_parameters.sliding_attention", {**named, **sliding}
    elif local is not None:
        yield next(k for k in LOCAL_THETAS if k in config), {"rope_theta": local}


def matched(parameters: Json, config: Json, found: list[Rotation]) -> bool | None:
    """Whether one of the rotations `found` is what `parameters` ask for; None where that cannot be
    told."""
    wanted = [(r, rotation(parameters, config, r.dims)) for r in found]
    told = [w.like(r) for r, w in wanted if w is not None]
    return any(told) if told else None


def rotation(parameters: Json, config: Json, dims: int) -> Rotation | None:
    """What transformers makes of rotary parameters; None for a kind that it has no formula for."""
    base = parameters.get("rope_theta")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    make = _KINDS.get(kind) if isinstance(kind, str) else None
    if make is None or not isinstance(base, (int, float)) or base <= 0 or dims < 2:
        return None
    plain = [float(base) ** (-2 * i / dims) for i in range(dims // 2)]
    try:
        frequencies, magnitude = make(parameters, config, plain, float(base))
        return Rotation(dims, False, tuple(map(float, frequencies)), magnitude)
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return None  # what it asks for is not there


def respelled(config: Json, found: list[Rotation]) -> Json:
    """A yarn that mlx-lm computes otherwise, as longrope: that names a factor for each frequency.

    Returns the keys of config.json; none where mlx-lm computes it as transformers does, or where
    nothing else says the same.
    """
    parameters = next((p for _, p in asked_for(config, None)), {})
    kind, length = parameters.get("rope_type"), config.get("max_position_embeddings")
    # The square of mscale_all_dim also scales attention in some model files.
    if kind != "yarn" or parameters.get("mscale_all_dim") or len({r.dims for r in found}) != 1:
        return {}
    if any(r.traditional for r in found):
        return {}  # mlx-lm's longrope is not
    wanted = rotation(parameters, config, found[0].dims)
    if wanted is None or matched(parameters, config, found) or not isinstance(length, int):
        return {}
    if wanted.magnitude < 1:
        return {}
    steps = (float(parameters["rope_theta"]) ** (-2 * i / wanted.dims) for i in range(wanted.dims))
    factors = [s / f for s, f in zip(steps, wanted.frequencies, strict=False)]
    scaled = {
        "type": "longrope",
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        # From which mlx-lm computes the magnitude.
        "original_max_position_embeddings": length ** (wanted.magnitude**-2),
        "attention_factor": wanted.magnitude,
    }
    added: Json = {"rope_scaling": scaled}
    if (said := config.get("rope_parameters")) is not None:
        added["rope_parameters"] = scaled | {k: said[k] for k in NOT_SCALING if k in said}
    return added


Turns = tuple[list[float], float]


def _default(parameters: Json, config: Json, plain: list[float], base: float) -> Turns:
    return plain, 1.0


def _linear(parameters: Json, config: Json, plain: list[float], base: float) -> Turns:
    return [f / parameters["factor"] for f in plain], 1.0


def _dynamic(parameters: Json, config: Json, plain: list[float], base: float) -> Turns:
    return _ntk(plain, parameters["factor"]), 1.0


def _ntk(plain: list[float], factor: float) -> list[float]:
    """Of a text of twice the context."""
    half = len(plain)
    return [f * (factor + 1) ** (-i / (half - 1)) for i, f in enumerate(plain)]


def _llama3(parameters: Json, config: Json, plain: list[float], base: float) -> Turns:
    factor, length = parameters["factor"], _original(parameters, config)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    found = []
    for f in plain:
        turns = length * f / (2 * math.pi)  # within the original context
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append((1 - smooth) * f / factor + smooth * f)
    return found, 1.0


def _yarn(parameters: Json, config: Json, plain: list[float], base: float) -> Turns:
    length, dims = _original(parameters, config), 2 * len(plain)
    factor = parameters.get("factor") or config["max_position_embeddings"] / length

    def dimension(turns: float) -> float:
        return dims * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = dimension(parameters.get("beta_fast") or 32)
    high = dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    high = high + 0.001 if low == high else high
    found = []
    for i, f in enumerate(plain):
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        found.append(f * (1 - ramp) + f / factor * ramp)
    magnitude = parameters.get("attention_factor")
    if magnitude is None:
        own, common = parameters.get("mscale"), parameters.get("mscale_all_dim")
        magnitude = _mscale(factor)
        if own and common:
            magnitude = _mscale(factor, own) / _mscale(factor, common)
    return found, float(magnitude)


def _mscale(factor: float, weight: float = 1) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(parameters: Json, config: Json, plain: list[float], base: float) -> Turns:
    """As for texts beyond the original context; see `short_texts_differ`."""
    length = _original(parameters, config)
    factor = parameters.get("factor") or config["max_position_embeddings"] / length
    magnitude = parameters.get("attention_factor") or parameters.get("long_mscale")
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    longer = parameters["long_factor"]
    return [f / x for f, x in zip(plain, longer, strict=True)], float(magnitude)


def _proportional(parameters: Json, config: Json, plain: list[float], base: float) -> Turns:
    turned = int(parameters.get("partial_rotary_factor", 1.0) * len(plain))
    factor = parameters.get("factor") or 1.0
    return [f / factor if i < turned else 0.0 for i, f in enumerate(plain)], 1.0


def _original(parameters: Json, config: Json) -> float:
    """The context of pretraining: transformers takes the whole one where it is not named."""
    key = "original_max_position_embeddings"
    return float(parameters.get(key) or config.get(key) or config["max_position_embeddings"])


_KINDS = {
    "default": _default,
    "mrope": _default,  # of text
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,
    "proportional": _proportional,
}
