"""Reading sensitivity.json: scores per module and format, ours or mlx-optiq's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import SensitivityError
from .formats import DENSE, Format
from .roles import Module, Role, block_of, role_of, unit_of

Json = dict[str, Any]


@dataclass(frozen=True)
class Scored:
    """A module and its scores: nats per token by format."""

    module: Module
    losses: Mapping[Format, float]
    reference: str

    def loss(self, fmt: Format) -> float:
        """The score of `fmt`; SensitivityError when it was not measured."""
        if fmt in self.losses:
            return self.losses[fmt]
        if fmt == DENSE and self.reference == "bf16":
            return 0.0  # the reference itself
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


def parse(data: Json) -> Scores:
    """Check and read a parsed sensitivity.json; raises SensitivityError."""
    if "layers" in data and "kind" not in data:
        data = _from_peer(data)
    if data.get("kind") != "optiq.sensitivity" or data.get("schema") != 1:
        raise SensitivityError(
            "these are not scores of this version of optiq; make them with optiq sensitivity"
        )
    try:
        model = dict(data["model"])
        sizes = int(model["itemsize"]), int(model["fixed_bytes"])
        modules = tuple(
            Scored(
                module_of(row),
                {Format.parse(fmt): float(score["kl"]) for fmt, score in row["scores"].items()},
                str(data["reference"]),
            )
            for row in data["modules"]
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SensitivityError(
            f"the scores are malformed ({error!r}); make them again with optiq sensitivity"
        ) from error
    if not modules or sizes[0] < 1 or sizes[1] < 0:
        raise SensitivityError("the scores are empty; make them again with optiq sensitivity")
    return Scores(
        model,
        modules,
        calibration=data.get("calibration", {}),
        versions=data.get("versions", {}),
        machine=data.get("machine", {}),
    )


def module_of(row: Json) -> Module:
    """The module of one row of sensitivity.json or plan.json."""
    return Module(
        path=row["path"],
        role=Role(row["role"]),
        unit=row["unit"],
        shape=tuple(row["shape"]),
        block=row["block"],
    )


def _from_peer(data: Json) -> Json:
    """Our structure from mlx-optiq's sensitivity.json.

    It names layers and counts their parameters but has no shapes, and lists neither embeddings nor
    what is never quantized, so the plan is one of the listed layers only. An affine weight's bytes
    depend on count and group alone: a shape of (count / group, group) gives them exactly.
    """
    try:
        group = int(data["group_size"])
        rows = [_peer_row(layer, group) for layer in data["layers"]]
        name = data["base_model"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SensitivityError(f"the scores are malformed ({error!r})") from error
    return {
        "schema": 1,
        "kind": "optiq.sensitivity",
        "model": {
            "name": name,
            "fingerprint": None,
            "model_type": None,
            "dtype": "bfloat16",
            "itemsize": 2,
            "fixed_bytes": 0,
        },
        "reference": "bf16",
        "modules": rows,
    }


def _peer_row(layer: Json, group: int) -> Json:
    path, n = str(layer["layer_name"]), int(layer["param_count"])
    scores = layer["sensitivities"]
    return {
        "path": path,
        "role": role_of(path).value,
        "unit": unit_of(path),
        "block": block_of(path),
        "shape": [n // group, group] if n % group == 0 else [1, n],
        "scores": {f"{bits}g{group}": {"kl": kl} for bits, kl in scores.items()},
    }
