"""The facts of a model card, each with a record behind it. No files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from ..evals.comparison import Compared, ComparedMetric
from ..evals.metrics import Metric
from ..evals.records import Header
from ..formats import DENSE, Format
from ..planning.plan import Plan, Planned
from ..quality.statistics import Estimate, Quantiles
from .base_model import BaseModel

Json = dict[str, Any]

FEW = 20  # items of a benchmark

MEASURED = "measured"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class MetricScore:
    """A metric of a benchmark. Only where the state is `MEASURED` there is an estimate.

    `limit` is that of a quick look, `against` the comparison with the uniform build.
    """

    metric: Metric
    state: str = NOT_MEASURED
    limit: int | None = None
    estimate: Estimate | None = None
    against: ComparedMetric | None = None

    @property
    def too_few(self) -> bool:
        """Whether a share of so few items says nothing: its interval spans 40 points and more."""
        if self.estimate is None or self.metric.task == "kl":
            return False
        return self.estimate.n < FEW

    def to_json(self) -> Json:
        metric = self.metric
        return {
            "task": metric.task,
            "metric": metric.name,
            "label": metric.label,
            "main": metric.main,
            "scale": metric.scale,
            "limit": self.limit,
            "estimate": self.estimate and self.estimate.to_json(),
            "state": self.state,
            "against_uniform": self.against and self.against.to_json(),
        }


@dataclass(frozen=True)
class Distance:
    """KL in nats per token and the share of equal top tokens, as evaluated.

    `to_base` says that the reference was the model that the plan names.
    """

    kl: Estimate
    tail: Quantiles
    top1: Estimate
    sequences: int
    limit: int | None
    to_base: bool

    def to_json(self) -> Json:
        return {
            "kl": self.kl.to_json() | self.tail._asdict(),
            "top1": self.top1.to_json(),
            "sequences": self.sequences,
            "limit": self.limit,
            "to_base": self.to_base,
        }


@dataclass(frozen=True)
class RecordFile:
    """Where the figures of a benchmark come from."""

    header: Header
    sha256: str

    def to_json(self) -> Json:
        kept = ("protocol", "data_sha256", "items", "limit", "seed", "versions")
        header = asdict(self.header)
        return {key: header[key] for key in kept} | {"file_sha256": self.sha256}


@dataclass(frozen=True)
class UniformBuild:
    """A stock uniform quantization of the same bytes."""

    label: str
    nbytes: int
    fingerprint: str


@dataclass(frozen=True)
class FormatTotal:
    """All modules of one format in a plan; `weights` are logical."""

    format: Format
    roles: tuple[str, ...]
    modules: int
    weights: int
    nbytes: int

    def to_json(self) -> Json:
        return {**asdict(self), "format": str(self.format), "roles": list(self.roles)}


@dataclass(frozen=True)
class Facts:
    """Everything that the card of a model says. `repo` is its id on the hub, if it has one."""

    name: str
    repo: str | None
    base: BaseModel
    fingerprint: str
    plan: Plan
    scores: tuple[MetricScore, ...]
    capability: Estimate | None
    against_uniform: Compared | None  # of the Capability Score
    kl: Distance | None
    runs: Mapping[str, RecordFile]  # by benchmark
    uniform: UniformBuild | None

    def to_json(self) -> Json:
        """What `optiq card --json` prints: the plan without its modules, but their totals."""
        plan = self.plan.to_json()
        del plan["modules"]
        return {
            "name": self.name,
            "base": asdict(self.base),
            "fingerprint": self.fingerprint,
            "plan": {**plan, "formats": [total.to_json() for total in by_format(self.plan)]},
            "metrics": [score.to_json() for score in self.scores],
            "capability": self.capability and self.capability.to_json(),
            "against_uniform": self.against_uniform and self.against_uniform.to_json(),
            "kl": self.kl and self.kl.to_json(),
            "runs": {task: run.to_json() for task, run in self.runs.items()},
            "uniform": self.uniform and asdict(self.uniform),
        }


def by_format(plan: Plan) -> list[FormatTotal]:
    """What the plan's modules come to, by format from narrow to wide."""
    groups: dict[Format, list[Planned]] = defaultdict(list)
    for module in plan.modules:
        groups[module.format].append(module)
    return [
        FormatTotal(
            format=fmt,
            roles=tuple(sorted({m.module.role.value for m in groups[fmt]})),
            modules=len(groups[fmt]),
            weights=sum(prod(m.module.shape) for m in groups[fmt]),
            nbytes=sum(m.nbytes for m in groups[fmt]),
        )
        for fmt in sorted(groups, key=lambda fmt: (fmt == DENSE, fmt))
    ]
