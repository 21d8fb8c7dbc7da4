"""Scores per module and format: the contents of sensitivity.json.

A score is the KL divergence in nats per token that one module in one format causes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from ..base.files import write_json
from ..errors import SensitivityError, UsageError
from ..formats import DENSE, Format
from ..models.roles import Module, Role

Json = dict[str, Any]

SCHEMA = 1
KIND = "optiq.sensitivity"

_MODEL = ("name", "fingerprint", "model_type", "dtype", "itemsize", "fixed_bytes")
_TEXT = ("source", "tokens", "sequences", "tokens_per_domain", "sha256", "seed")
_TOP = (
    "method", "metric", "reference", "rounding", "machine", "versions", "seconds", "modules",
    "model", "calibration",
)  # fmt: skip
_MODULE = ("path", "role", "unit", "block", "shape", "scores")
FIX = "measure again with: optiq sensitivity MODEL -o FILE"


@dataclass(frozen=True)
class ModelInfo:
    """The source that was measured; what another maker's file does not say is None.

    `itemsize` is in bytes, of the model's floating `dtype`; `fixed_bytes` are those of all tensors
    that are never quantized, `header_bytes` a bound on what weight files hold beside tensors.
    `tower_bytes` are those of vision and audio towers that are exported beside the language model.
    `departures` say how mlx-lm's model differs from the original, if it does. `kind` is "hub",
    "folder" or "gguf", and `path` where a local one lay.
    """

    name: str
    fingerprint: str | None
    model_type: str | None
    dtype: str
    itemsize: int
    fixed_bytes: int
    header_bytes: int = 0
    tower_bytes: int = 0
    departures: tuple[str, ...] = ()
    kind: str | None = None
    path: str | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelInfo:
        return cls(
            **{key: data[key] for key in _MODEL},
            header_bytes=data.get("header_bytes") or 0,
            tower_bytes=data.get("tower_bytes") or 0,
            departures=tuple(map(str, data.get("departures") or ())),
            kind=data.get("kind"),
            path=data.get("path"),
        )

    @property
    def beside_bytes(self) -> int:
        """What weight files hold beside the tensors of the language model."""
        return self.header_bytes + self.tower_bytes

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "departures": list(self.departures)}


@dataclass(frozen=True)
class TextInfo:
    """The text that was measured on; None is unknown."""

    source: str | None
    tokens: int | None
    sequences: int | None
    tokens_per_domain: Mapping[str, int] | None
    sha256: str | None
    seed: int | None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TextInfo:
        return cls(**{key: data[key] for key in _TEXT})


@dataclass(frozen=True)
class Score:
    """KL in nats per token and its standard error; None is unknown.

    `mse` is the relative squared error of the weight itself. A `method` of "fisher" estimates,
    anything else is exact. `flips` is the share of its choices of experts that a router changes.
    """

    kl: float
    se: float | None = None
    mse: float | None = None
    method: str | None = None
    flips: float | None = None

    def to_json(self) -> Json:
        data: Json = {"kl": self.kl, "se": self.se}
        if self.mse is not None or self.method is not None:
            data["mse"] = self.mse
        if self.method is not None:
            data["method"] = self.method
        if self.flips is not None:
            data["flips"] = self.flips
        return data


@dataclass(frozen=True)
class Scored:
    """A module and its scores by format. `assumed`: nothing was measured, the file's maker says."""

    module: Module
    scores: Mapping[Format, Score]
    assumed: bool = False

    def loss(self, fmt: Format) -> float:
        """The score of `fmt` in nats per token; SensitivityError when it was not measured."""
        if fmt in self.scores:
            return self.scores[fmt].kl
        if fmt == DENSE:
            return 0.0  # scores are against the same module at full precision
        raise SensitivityError(
            f"{self.module.path} has no score for {fmt}; measure again with it in --formats"
        )

    def to_json(self) -> Json:
        scores = {str(fmt): score.to_json() for fmt, score in self.scores.items()}
        assumed = {"assumed": True} if self.assumed else {}
        return {**describe_module(self.module), "scores": scores, **assumed}


@dataclass(frozen=True)
class Memory:
    """Bytes: `stated` before the work, and the `peak` that MLX counted."""

    stated: int
    peak: int


@dataclass(frozen=True)
class Scores:
    """Scores of all modules of a model, and how they were made."""

    model: ModelInfo
    modules: tuple[Scored, ...]
    method: str
    reference: str
    rounding: str
    calibration: TextInfo
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    seconds: float | None = None
    memory: Memory | None = None

    def to_json(self) -> Json:
        """The contents of sensitivity.json."""
        return {
            "schema": SCHEMA,
            "kind": KIND,
            "model": self.model.to_json(),
            "method": self.method,
            "metric": "nats per token",
            "reference": self.reference,
            "rounding": self.rounding,
            "calibration": asdict(self.calibration),
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "seconds": self.seconds,
            **({"memory": asdict(self.memory)} if self.memory else {}),
            "modules": [scored.to_json() for scored in self.modules],
        }

    @classmethod
    def from_json(cls, data: Any, name: str = "the scores") -> Scores:
        """Check and read parsed JSON, called `name` in errors. Raises SensitivityError."""
        _check(data, name)
        return cls(
            model=ModelInfo.from_json(data["model"]),
            modules=tuple(map(_scored, data["modules"])),
            method=data["method"],
            reference=data["reference"],
            rounding=data["rounding"],
            calibration=TextInfo.from_json(data["calibration"]),
            machine=data["machine"],
            versions=data["versions"],
            seconds=data["seconds"],
            memory=Memory(**data["memory"]) if data.get("memory") else None,
        )

    def save(self, path: Path) -> None:
        """Replace the file `path` in one step; SensitivityError where a score is not finite."""
        data = self.to_json()
        _check(data, "the scores")
        write_json(path, data)


def module_of(row: Json) -> Module:
    """The module of one row of sensitivity.json or plan.json."""
    return Module(
        path=row["path"],
        role=Role(row["role"]),
        unit=row["unit"],
        shape=tuple(row["shape"]),
        block=row["block"],
        tied=bool(row.get("tied")),
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
        "tied": module.tied,
        "stock": str(module.stock) if module.stock else None,
    }


def _scored(row: Json) -> Scored:
    scores = {
        Format.parse(fmt): Score(
            float(score["kl"]),
            score.get("se"),
            score.get("mse"),
            score.get("method"),
            score.get("flips"),
        )
        for fmt, score in row["scores"].items()
    }
    return Scored(module_of(row), scores, bool(row.get("assumed")))


def _check(data: Any, name: str) -> None:
    """Raise SensitivityError, calling the data `name`, unless they are complete and finite."""
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise SensitivityError(f"{name} is not a sensitivity file of optiq; {FIX}")
    if data.get("schema") != SCHEMA:
        raise SensitivityError(
            f"{name} has schema {data.get('schema')!r}, this optiq reads {SCHEMA}; {FIX}"
        )
    missing = [key for key in _TOP if key not in data]
    for part, keys in (("model", _MODEL), ("calibration", _TEXT)):
        inner = data.get(part)
        known = inner if isinstance(inner, dict) else {}
        missing += [f"{part}.{key}" for key in keys if key not in known]
    if missing:
        raise SensitivityError(f"{name} lacks {', '.join(missing)}; {FIX}")
    if not _count(data["model"]["itemsize"], 1) or not _count(data["model"]["fixed_bytes"], 0):
        raise SensitivityError(
            f"{name} has an itemsize or fixed_bytes that is not a number of bytes; {FIX}"
        )
    if not isinstance(data["modules"], list) or not data["modules"]:
        raise SensitivityError(f"{name} has no modules; {FIX}")
    for i, row in enumerate(data["modules"]):
        _check_module(row, f"{name}, module {i}")
    try:
        Memory(**(data.get("memory") or dict.fromkeys(Memory.__dataclass_fields__)))
    except TypeError as error:
        raise SensitivityError(f"{name} has a malformed memory ({error}); {FIX}") from error


def _check_module(row: Any, name: str) -> None:
    lacking = [key for key in _MODULE if not isinstance(row, dict) or key not in row]
    if lacking:
        raise SensitivityError(f"{name} lacks {', '.join(lacking)}; {FIX}")
    name = f"{name} ({row['path']})"
    if row["role"] not in [role.value for role in Role]:
        raise SensitivityError(f"{name} has the unknown role {row['role']!r}; {FIX}")
    shape = row["shape"]
    if not isinstance(shape, list) or len(shape) < 2 or not all(_count(n, 1) for n in shape):
        raise SensitivityError(f"{name} has {shape!r} as the shape of a weight; {FIX}")
    if not isinstance(row["scores"], dict) or not row["scores"]:
        raise SensitivityError(f"{name} has no scores; {FIX}")
    for text, score in row["scores"].items():
        try:
            Format.parse(text)
        except UsageError as error:
            raise SensitivityError(f"{name}: {error}; {FIX}") from error
        kl = score.get("kl") if isinstance(score, dict) else None
        rest = [score.get(key) for key in ("se", "mse")] if isinstance(score, dict) else []
        if not _finite(kl) or not all(value is None or _finite(value) for value in rest):
            raise SensitivityError(f"{name} has no finite score for {text}; {FIX}")
        if score.get("method", "kl") not in ("kl", "fisher"):
            raise SensitivityError(
                f"{name} has a score for {text} by the unknown method {score['method']!r}; {FIX}"
            )


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
