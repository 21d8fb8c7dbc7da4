"""Reading sensitivity.json: scores per module and format, ours or mlx-optiq's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from ..errors import SensitivityError, UsageError
from ..formats import DENSE, Format
from ..models.roles import Module, Role, allowed, block_of, role_of, unit_of

Json = dict[str, Any]

SCHEMA = 1
KIND = "optiq.sensitivity"

_KEYS = {
    "model": ("name", "fingerprint", "model_type", "dtype", "itemsize", "fixed_bytes"),
    "calibration": ("source", "tokens", "sequences", "tokens_per_domain", "sha256", "seed"),
}
_TOP = ("method", "metric", "reference", "rounding", "machine", "versions", "seconds", "modules")
_MODULE = ("path", "role", "unit", "block", "shape", "scores")
_FIX = "measure again with: optiq sensitivity MODEL -o FILE"


@dataclass(frozen=True)
class Scored:
    """A module and its scores: nats per token by format, and standard errors where known."""

    module: Module
    losses: Mapping[Format, float]
    errors: Mapping[Format, float | None] = field(default_factory=dict)

    def loss(self, fmt: Format) -> float:
        """The score of `fmt`; SensitivityError when it was not measured."""
        if fmt in self.losses:
            return self.losses[fmt]
        if fmt == DENSE:
            return 0.0  # scores are against the same module at full precision
        raise SensitivityError(
            f"{self.module.path} has no score for {fmt}; measure again with it in --formats"
        )


@dataclass(frozen=True)
class Scores:
    """A checked sensitivity.json."""

    model: Json  # name, fingerprint, model_type, dtype, itemsize, fixed_bytes
    modules: tuple[Scored, ...]
    calibration: Json
    versions: Json
    machine: Json


def read(path: Path, *, model: Json | None = None, modules: Sequence[Module] | None = None) -> Json:
    """Checked scores from `path`: optiq's own file, or mlx-optiq's of the same name.

    mlx-optiq's file knows neither shapes nor all modules: with the `model` dict and the `modules`
    of the model it is used for, those are taken, else what it lists is taken for the whole model.
    Raises SensitivityError naming the file and the fix.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SensitivityError(f"{path} cannot be read as scores ({error}); {_FIX}") from error
    return _ours(data, str(path), model, modules)


def parse(data: Json) -> Scores:
    """Check and read a parsed sensitivity.json; raises SensitivityError."""
    data = _ours(data, "the scores", None, None)
    modules = tuple(
        Scored(
            module_of(row),
            {Format.parse(fmt): float(score["kl"]) for fmt, score in row["scores"].items()},
            {Format.parse(fmt): score.get("se") for fmt, score in row["scores"].items()},
        )
        for row in data["modules"]
    )
    return Scores(data["model"], modules, data["calibration"], data["versions"], data["machine"])


def check(data: Any, name: str) -> None:
    """Raise SensitivityError, calling the data `name`, unless they are complete and finite."""
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise SensitivityError(f"{name} is not a sensitivity file of optiq; {_FIX}")
    if data.get("schema") != SCHEMA:
        raise SensitivityError(
            f"{name} has schema {data.get('schema')!r}, this optiq reads {SCHEMA}; {_FIX}"
        )
    missing = [key for key in (*_TOP, *_KEYS) if key not in data]
    for part, keys in _KEYS.items():
        inner = data.get(part)
        known = inner if isinstance(inner, dict) else {}
        missing += [f"{part}.{key}" for key in keys if key not in known]
    if missing:
        raise SensitivityError(f"{name} lacks {', '.join(missing)}; {_FIX}")
    if not _count(data["model"]["itemsize"], 1) or not _count(data["model"]["fixed_bytes"], 0):
        raise SensitivityError(
            f"{name} has an itemsize or fixed_bytes that is no number of bytes; {_FIX}"
        )
    if not isinstance(data["modules"], list) or not data["modules"]:
        raise SensitivityError(f"{name} has no modules; {_FIX}")
    for i, row in enumerate(data["modules"]):
        _check_module(row, f"{name}, module {i}")


def module_of(row: Json) -> Module:
    """The module of one row of sensitivity.json or plan.json."""
    return Module(
        path=row["path"],
        role=Role(row["role"]),
        unit=row["unit"],
        shape=tuple(row["shape"]),
        block=row["block"],
        stock=Format.parse(row["stock"]) if row.get("stock") else None,
    )


def describe_module(module: Module) -> Json:
    """The fields of a module's row other than its scores."""
    return {
        "path": module.path,
        "role": module.role.value,
        "unit": module.unit,
        "block": module.block,
        "shape": list(module.shape),
        "stock": str(module.stock) if module.stock else None,
    }


def _check_module(row: Any, name: str) -> None:
    lacking = [key for key in _MODULE if not isinstance(row, dict) or key not in row]
    if lacking:
        raise SensitivityError(f"{name} lacks {', '.join(lacking)}; {_FIX}")
    name = f"{name} ({row['path']})"
    if row["role"] not in [role.value for role in Role]:
        raise SensitivityError(f"{name} has the unknown role {row['role']!r}; {_FIX}")
    shape = row["shape"]
    if not isinstance(shape, list) or len(shape) < 2 or not all(_count(n, 1) for n in shape):
        raise SensitivityError(f"{name} has {shape!r} as the shape of a weight; {_FIX}")
    if not isinstance(row["scores"], dict) or not row["scores"]:
        raise SensitivityError(f"{name} has no scores; {_FIX}")
    for text, score in row["scores"].items():
        try:
            Format.parse(text)
        except UsageError as error:
            raise SensitivityError(f"{name}: {error}; {_FIX}") from error
        kl = score.get("kl") if isinstance(score, dict) else None
        rest = [score.get(key) for key in ("se", "mse")] if isinstance(score, dict) else []
        if not _finite(kl) or not all(value is None or _finite(value) for value in rest):
            raise SensitivityError(f"{name} has no finite score for {text}; {_FIX}")
        if score.get("method", "kl") not in ("kl", "fisher"):
            raise SensitivityError(
                f"{name} has a score for {text} by the unknown method {score['method']!r}; {_FIX}"
            )


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _ours(data: Any, name: str, model: Json | None, modules: Sequence[Module] | None) -> Json:
    """`data` checked, and in our structure if it is mlx-optiq's."""
    if isinstance(data, dict) and "layers" in data and "kind" not in data:
        try:
            data = _from_peer(data, name, model, modules)
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
            raise SensitivityError(
                f"{name} is not understood as mlx-optiq's file ({error!r}); {_FIX}"
            ) from error
    check(data, name)
    return dict(data)


def _from_peer(data: Json, name: str, model: Json | None, modules: Sequence[Module] | None) -> Json:
    """Our structure from mlx-optiq's sensitivity.json.

    As there, a module without scores (it never measures embeddings, nor experts against bf16)
    gets the widest measured format, at no cost; such a row says "assumed": true.
    """
    group = int(data.get("group_size", 64))
    widths = sorted({int(bits) for bits in data["candidate_bits"]})
    formats = {bits: DENSE if bits == 16 else Format("affine", bits, group) for bits in widths}
    layers = {str(layer["layer_name"]): layer for layer in data["layers"]}
    if modules is None:
        modules = [_listed(path, int(row["param_count"]), group) for path, row in layers.items()]
    if model is None:
        model = dict.fromkeys(_KEYS["model"])
        model |= {"name": data["base_model"], "dtype": "bfloat16", "itemsize": 2, "fixed_bytes": 0}
    rows = [
        _peer_row(m, layers[m.path]["sensitivities"] if m.path in layers else None, formats)
        for m in modules
    ]
    if all("assumed" in row for row in rows):
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
        "modules": rows,
    }


def _listed(path: str, parameters: int, group: int) -> Module:
    """A module of which only the size is known.

    An affine weight's bytes depend on size and group alone: (size / group, group) gives them.
    """
    shape = (parameters // group, group) if parameters % group == 0 else (1, parameters)
    return Module(path, role_of(path), unit_of(path), shape, block_of(path))


def _peer_row(
    module: Module, sensitivities: dict[str, float] | None, formats: dict[int, Format]
) -> Json:
    fits = allowed(module, list(formats.values()))
    if sensitivities is None:
        widest = max((f for f in fits if f != DENSE), key=lambda f: f.bits, default=DENSE)
        scores = {str(widest): {"kl": 0.0, "se": None}}
        return {**describe_module(module), "scores": scores, "assumed": True}
    kl = {formats[int(bits)]: float(value) for bits, value in sensitivities.items()}
    measured = sorted(fmt for fmt in kl if fmt != DENSE)
    if measured and kl[measured[-1]] > kl[measured[0]]:
        # Its other mode compares with a 4-bit model, so what more bits repair is what it scores.
        kl |= {fmt: max(0.0, kl[measured[-1]] - kl[fmt]) for fmt in measured}
    scores = {str(fmt): {"kl": kl[fmt], "se": None} for fmt in sorted(kl) if fmt in fits}
    return {**describe_module(module), "scores": scores or {str(DENSE): {"kl": 0.0, "se": None}}}
