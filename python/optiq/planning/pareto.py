"""Sizes and KLs of many models set against each other. Tables in, tables out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from math import exp, log
from typing import Any

from ..errors import UsageError
from ..quality.results import Measured
from .scores import ModelInfo, TextInfo

Json = dict[str, Any]

KIND = "optiq.frontier"


@dataclass(frozen=True)
class AgainstUniform:
    """The KL of uniform widths at the bytes of a point, and the point's KL over it.

    `between` names the points that it was interpolated between, or the smallest one.
    """

    kl: float
    ratio: float
    between: tuple[str, ...]

    def to_json(self) -> Json:
        return {**asdict(self), "between": list(self.between)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AgainstUniform:
        return cls(data["kl"], data["ratio"], tuple(data["between"]))


@dataclass(frozen=True)
class Point:
    """A model that was measured; `formats` counts its quantized modules by format.

    `family` is "ours", "uniform" (stock widths) or "recipe" (mlx-lm's mixed ones). Of ours, `asked`
    is the size and `chosen` the proposed plan that was taken. `compare` finds out the rest.
    """

    name: str
    family: str
    measured: Measured
    asked: str | None
    chosen: str | None
    rounding: str | None
    formats: Mapping[str, int]
    dominated: bool = False
    uniform: AgainstUniform | None = None

    @property
    def nbytes(self) -> int:
        return self.measured.nbytes

    @property
    def kl(self) -> float:
        return self.measured.kl.mean

    def to_json(self) -> Json:
        measured = self.measured.to_json()
        return {
            "name": self.name,
            "family": self.family,
            **{key: measured.pop(key) for key in ("nbytes", "bpw")},
            "asked": self.asked,
            "chosen": self.chosen,
            "rounding": self.rounding,
            "formats": dict(self.formats),
            **measured,
            "dominated": self.dominated,
            "uniform": self.uniform and self.uniform.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Point:
        """What `to_json` wrote. Raises KeyError or TypeError for anything else."""
        return cls(
            name=data["name"],
            family=data["family"],
            measured=Measured.from_json(data),
            asked=data["asked"],
            chosen=data["chosen"],
            rounding=data["rounding"],
            formats=data["formats"],
            dominated=data["dominated"],
            uniform=AgainstUniform.from_json(of) if (of := data["uniform"]) else None,
        )


@dataclass(frozen=True)
class ScoresInfo:
    """How the scores were made that ours were planned from."""

    method: str
    reference: str
    rounding: str


@dataclass(frozen=True)
class SelectionInfo:
    """The text that plans were chosen on; its sha256 is None where there was none."""

    tokens: int
    text_sha256: str | None


@dataclass(frozen=True)
class Frontier:
    """Models of many sizes, measured on one text, and how that was done: frontier.json.

    `sizes` were measured, `notes` say what was left out and why. `rounding` is that of ours,
    `calibration` the text of the scores.
    """

    model: ModelInfo
    sizes: tuple[str, ...]
    notes: tuple[str, ...]
    scores: ScoresInfo
    rounding: str
    calibration: TextInfo
    selection: SelectionInfo
    points: tuple[Point, ...]
    seed: int = 0
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> Json:
        """The contents of frontier.json."""
        return {
            "schema": 1,
            "kind": KIND,
            "model": self.model.to_json(),
            "sizes": list(self.sizes),
            "notes": list(self.notes),
            "metric": "nats per token",
            "scores": asdict(self.scores),
            "rounding": self.rounding,
            "calibration": asdict(self.calibration),
            "selection": asdict(self.selection),
            "seed": self.seed,
            "command": self.command,
            "versions": dict(self.versions),
            "machine": dict(self.machine),
            "points": [point.to_json() for point in self.points],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Frontier:
        """Read what `to_json` wrote; UsageError when it is another file or incomplete."""
        if data.get("kind") != KIND or data.get("schema") != 1:
            raise UsageError("this is not a frontier of this version of optiq; measure it again")
        try:
            return cls(
                model=ModelInfo.from_json(data["model"]),
                sizes=tuple(data["sizes"]),
                notes=tuple(data["notes"]),
                scores=ScoresInfo(**data["scores"]),
                rounding=data["rounding"],
                calibration=TextInfo.from_json(data["calibration"]),
                selection=SelectionInfo(**data["selection"]),
                points=tuple(map(Point.from_json, data["points"])),
                seed=data["seed"],
                command=data["command"],
                versions=data["versions"],
                machine=data["machine"],
            )
        except (KeyError, TypeError) as error:
            raise UsageError(f"the frontier is incomplete ({error!r}); measure it again") from error


def compare(points: Sequence[Point]) -> tuple[Point, ...]:
    """`points` by rising bytes, each with `dominated` and `uniform` (see `against_uniform`).

    A point is dominated where another one is at most as large and at least as good, and better in
    one of the two.
    """
    ordered = sorted(points, key=lambda p: (p.nbytes, p.kl))
    curve = [p for p in ordered if p.family == "uniform"]
    return tuple(
        replace(
            p,
            dominated=any(_dominates(other, p) for other in ordered),
            uniform=None if p.family == "uniform" else against_uniform(p, curve),
        )
        for p in ordered
    )


def against_uniform(point: Point, curve: Sequence[Point]) -> AgainstUniform | None:
    """The KL of uniform widths at the bytes of `point`, and the point's KL over it.

    Between two neighbours of `curve`, which rises in bytes, log KL is linear in bytes. A point
    smaller than all is held against the smallest: uniform at the point's own bytes would be worse
    still, so that the ratio is an upper bound. None where uniform is not known: above the largest,
    or where a KL has no logarithm.
    """
    if curve and point.nbytes <= curve[0].nbytes:
        return _against(curve[0].kl, point, curve[:1])
    for low, high in pairwise(curve):
        if low.nbytes < point.nbytes <= high.nbytes and min(low.kl, high.kl) > 0:
            share = (point.nbytes - low.nbytes) / (high.nbytes - low.nbytes)
            expected = exp((1 - share) * log(low.kl) + share * log(high.kl))
            return _against(expected, point, (low, high))
    return None


def _against(expected: float, point: Point, between: Sequence[Point]) -> AgainstUniform | None:
    if expected <= 0:
        return None
    return AgainstUniform(expected, point.kl / expected, tuple(p.name for p in between))


def _dominates(one: Point, other: Point) -> bool:
    a, b = ((p.nbytes, p.kl) for p in (one, other))
    return a != b and a[0] <= b[0] and a[1] <= b[1]
