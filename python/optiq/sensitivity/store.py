"""sensitivity.json: written whole or not at all, and read with every promise checked."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from ..errors import SensitivityError, UsageError
from ..formats import DENSE, Format
from ..roles import Module, Role, allowed
from .checkpoint import read_json, write_json

SCHEMA = 1
KIND = "optiq.sensitivity"

_KEYS = {
    "model": ("name", "fingerprint", "model_type", "dtype", "itemsize", "fixed_bytes"),
    "calibration": ("source", "tokens", "sequences", "tokens_per_domain", "sha256", "seed"),
}
_TOP = ("method", "metric", "reference", "rounding", "machine", "versions", "seconds", "modules")
_MODULE = ("path", "role", "unit", "block", "shape", "scores")


def save(scores: dict[str, Any], path: Path) -> None:
    """Check `scores` and replace the file `path` by them in one step."""
    check(scores, "the scores")
    write_json(path, scores, indent=1)


def load(
    path: Path, *, model: dict[str, Any] | None = None, modules: Sequence[Module] | None = None
) -> dict[str, Any]:
    """Scores from `path`: optiq's own file, or mlx-optiq's of the same name.

    mlx-optiq's file knows neither shapes nor bytes, so it needs the `model` dict and the
    `modules` of the model it is used for. Raises SensitivityError naming the file and the fix.
    """
    data = read_json(path)
    if isinstance(data, dict) and "layers" in data and "kind" not in data:
        if model is None or modules is None:
            raise SensitivityError(
                f"{path} is mlx-optiq's file, which holds no shapes; give the model it was made for"
            )
        data = _from_peer(data, str(path), model, modules)
    check(data, str(path))
    return dict(data)


def check(data: Any, name: str) -> None:
    """Raise SensitivityError, calling the data `name`, unless they are complete and finite."""
    fix = "measure again with: optiq sensitivity MODEL -o FILE"
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise SensitivityError(f"{name} is not a sensitivity file of optiq; {fix}")
    if data.get("schema") != SCHEMA:
        raise SensitivityError(
            f"{name} has schema {data.get('schema')!r}, this optiq reads {SCHEMA}; {fix}"
        )
    missing = [key for key in (*_TOP, *_KEYS) if key not in data]
    for part, keys in _KEYS.items():
        inner = data.get(part)
        known = inner if isinstance(inner, dict) else {}
        missing += [f"{part}.{key}" for key in keys if key not in known]
    if missing:
        raise SensitivityError(f"{name} lacks {', '.join(missing)}; {fix}")
    if not isinstance(data["modules"], list) or not data["modules"]:
        raise SensitivityError(f"{name} has no modules; {fix}")
    for i, module in enumerate(data["modules"]):
        _check_module(module, f"{name}, module {i}", fix)


def _check_module(module: Any, name: str, fix: str) -> None:
    lacking = [key for key in _MODULE if not isinstance(module, dict) or key not in module]
    if lacking:
        raise SensitivityError(f"{name} lacks {', '.join(lacking)}; {fix}")
    name = f"{name} ({module['path']})"
    if module["role"] not in {role.value for role in Role}:
        raise SensitivityError(f"{name} has the unknown role {module['role']!r}; {fix}")
    if not isinstance(module["scores"], dict) or not module["scores"]:
        raise SensitivityError(f"{name} has no scores; {fix}")
    for text, score in module["scores"].items():
        try:
            Format.parse(text)
        except UsageError as error:
            raise SensitivityError(f"{name}: {error}; {fix}") from error
        kl = score.get("kl") if isinstance(score, dict) else None
        se = score.get("se") if isinstance(score, dict) else None
        if not _finite(kl) or (se is not None and not _finite(se)):
            raise SensitivityError(f"{name} has no finite score for {text}; {fix}")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _from_peer(
    data: dict[str, Any], name: str, model: dict[str, Any], modules: Sequence[Module]
) -> dict[str, Any]:
    """mlx-optiq's scores in optiq's structure.

    As there, a module without scores (it never measures embeddings, nor experts against bf16)
    gets the widest measured format, at no cost; such an entry says "assumed": true.
    """
    try:
        group = int(data.get("group_size", 64))
        widths = sorted({int(bits) for bits in data["candidate_bits"]})
        theirs = {layer["layer_name"]: layer["sensitivities"] for layer in data["layers"]}
        formats = {bits: DENSE if bits == 16 else Format("affine", bits, group) for bits in widths}
        entries = [_peer_entry(m, theirs.get(m.path), formats) for m in modules]
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise SensitivityError(
            f"{name} is not understood as mlx-optiq's file ({error!r}); measure again"
        ) from error
    if all("assumed" in entry for entry in entries):
        raise SensitivityError(
            f"{name} names no layer of {model['name']}; give the model it was made for"
        )
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "model": model,
        "method": "kl",
        "metric": "nats per token",
        "reference": "unknown",
        "rounding": "minmax",
        "calibration": dict.fromkeys(_KEYS["calibration"]) | {"source": name},
        "machine": {},
        "versions": {},
        "seconds": None,
        "modules": entries,
    }


def _peer_entry(
    module: Module, sensitivities: dict[str, float] | None, formats: dict[int, Format]
) -> dict[str, Any]:
    fits = allowed(module, list(formats.values()))
    if sensitivities is None:
        widest = max((f for f in fits if f != DENSE), key=lambda f: f.bits, default=DENSE)
        scores = {str(widest): {"kl": 0.0, "se": None}}
        return {**describe_module(module), "scores": scores, "assumed": True}
    scores = {
        str(formats[int(bits)]): {"kl": float(kl), "se": None}
        for bits, kl in sensitivities.items()
        if formats[int(bits)] in fits
    }
    return {**describe_module(module), "scores": scores or {str(DENSE): {"kl": 0.0, "se": None}}}


def describe_module(module: Module) -> dict[str, Any]:
    """The fields of a module's entry other than its scores."""
    return {
        "path": module.path,
        "role": module.role.value,
        "unit": module.unit,
        "block": module.block,
        "shape": list(module.shape),
    }
