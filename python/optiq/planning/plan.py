"""From scores and a size to a plan: a format for every module, its bytes and its predicted loss.

Tables in, tables out: no MLX and no files, so that a new size needs seconds and no model. Bytes
count every tensor of the exported folder: codes, scales, biases and all that is never quantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import fsum, prod
from typing import Any

from ..errors import UsageError
from ..formats import DENSE, UNIFORM4, Format
from ..models.roles import Module, allowed
from ..quality.results import Mean, Measured
from .allocation import Choice, Item, allocate
from .scores import ModelInfo, Scored, Scores, TextInfo, describe_module, module_of
from .size import Size

# Of the choices of experts that a format of a router may change.
MOST_FLIPS = 0.05

Json = dict[str, Any]


@dataclass(frozen=True)
class Planned:
    """One module of a plan; `kl` is the score of its format in nats, None when not measured."""

    module: Module
    format: Format
    nbytes: int
    kl: float | None

    def to_json(self) -> Json:
        return {
            **describe_module(self.module),
            "format": str(self.format),
            "nbytes": self.nbytes,
            "kl": self.kl,
        }


@dataclass(frozen=True)
class Candidate:
    """A plan that was measured, with its weights rounded in one way."""

    name: str
    rounding: str
    nbytes: int
    predicted: float | None  # KL, the sum of scores
    kl: Mean

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Candidate:
        return cls(**{**data, "kl": Mean(**data["kl"])})


@dataclass(frozen=True)
class Selection:
    """What a plan was chosen from: `candidates` on text of their own, none where none was measured.

    `ratio` is the measured over the predicted KL of the chosen plan as scored, `rank_correlation`
    that of both over all plans. `rounding_*` is the text that weights were fitted to.
    """

    chosen: str
    rounding: str
    candidates: tuple[Candidate, ...] = ()
    tokens: int = 0
    sequences: int = 0
    text_sha256: str | None = None
    ratio: float | None = None
    rank_correlation: float | None = None
    rounding_tokens: int | None = None
    rounding_sha256: str | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Selection:
        candidates = tuple(map(Candidate.from_json, data["candidates"]))
        return cls(**{**data, "candidates": candidates})


@dataclass(frozen=True)
class Baseline:
    """Stock uniform 4-bit of the same model: bytes of all tensors, and what was measured."""

    nbytes: int
    measured: Measured | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Baseline:
        return cls(data["nbytes"], _measured(data["measured"]))


@dataclass(frozen=True)
class Plan:
    """A format for every quantizable module, and where it comes from (see `to_json`).

    `asked` is the size as the user wrote it, `budget` its bytes.
    """

    model: ModelInfo
    asked: str
    budget: int
    modules: tuple[Planned, ...]
    bound: float | None = None  # proven: no plan within the budget has a smaller predicted KL
    gap: float | None = None
    measured: Measured | None = None
    selection: Selection | None = None
    calibration: TextInfo | None = None  # that scores were measured on
    seed: int = 0
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    uniform4: Baseline | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.model.fixed_bytes + sum(m.nbytes for m in self.modules)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the modules' weights in the source."""
        return sum(prod(m.module.shape) for m in self.modules) * self.model.itemsize

    @property
    def bpw(self) -> float:
        """Bits of all tensors per logical parameter."""
        return 8 * self.nbytes / parameters(self.model, [m.module for m in self.modules])

    @property
    def predicted_kl(self) -> float | None:
        """Sum of the scores, in nats per token."""
        scores = [m.kl for m in self.modules if m.kl is not None]
        return fsum(scores) if len(scores) == len(self.modules) else None

    def quantization(self) -> Json:
        """The `quantization` dict of config.json: stock defaults and an entry per module."""
        defaults = UNIFORM4.config()
        assert isinstance(defaults, dict)
        return {**defaults, **{m.module.path: m.format.config() for m in self.modules}}

    def to_json(self) -> Json:
        """The contents of plan.json."""
        return {
            "schema": 1,
            "kind": "optiq.plan",
            "model": self.model.to_json(),
            "budget": {"asked": self.asked, "bytes": self.budget},
            "nbytes": self.nbytes,
            "bpw": self.bpw,
            "objective": {
                "predicted_kl": self.predicted_kl,
                "bound": self.bound,
                "gap": self.gap,
            },
            "modules": [m.to_json() for m in self.modules],
            "measured": self.measured and self.measured.to_json(),
            "selection": self.selection and asdict(self.selection),
            "calibration": self.calibration and asdict(self.calibration),
            "seed": self.seed,
            "command": self.command,
            "versions": dict(self.versions),
            "machine": dict(self.machine),
            "uniform4": self.uniform4 and asdict(self.uniform4),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Read what `to_json` wrote; UsageError when it is another file or does not add up."""
        if data.get("kind") != "optiq.plan" or data.get("schema") != 1:
            raise UsageError("this is not a plan of this version of optiq; make it with optiq plan")
        try:
            objective = data["objective"]
            plan = cls(
                model=ModelInfo.from_json(data["model"]),
                asked=data["budget"]["asked"],
                budget=data["budget"]["bytes"],
                modules=tuple(
                    Planned(module_of(m), Format.parse(m["format"]), m["nbytes"], m["kl"])
                    for m in data["modules"]
                ),
                bound=objective["bound"],
                gap=objective["gap"],
                measured=_measured(data.get("measured")),
                selection=Selection.from_json(of) if (of := data.get("selection")) else None,
                calibration=TextInfo.from_json(of) if (of := data.get("calibration")) else None,
                seed=data.get("seed", 0),
                command=data.get("command", ""),
                versions=data.get("versions", {}),
                machine=data.get("machine", {}),
                uniform4=Baseline.from_json(of) if (of := data.get("uniform4")) else None,
            )
            itemsize = plan.model.itemsize
            exact = all(m.nbytes == m.format.nbytes(m.module.shape, itemsize) for m in plan.modules)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"the plan is incomplete ({error!r}); make it again") from error
        if not exact or plan.nbytes != data["nbytes"]:
            raise UsageError("the plan's bytes do not add up; make it again with optiq plan")
        return plan


def build(
    scores: Scores,
    size: Size,
    menu: Sequence[Format] | None = None,
    *,
    seed: int = 0,
    command: str = "",
) -> Plan:
    """The plan of least predicted KL within `size`.

    `menu` limits the formats; None stands for all that a module has scores for. Floors are
    constraints. Raises SensitivityError for missing scores, BudgetError for a size that is too
    small.
    """
    items, budget = problem(scores, size, menu)
    found = allocate(items, budget)
    return Plan(
        model=scores.model,
        asked=size.text,
        budget=budget,
        modules=planned_modules(scores, found.formats),
        bound=found.bound,
        gap=found.gap,
        calibration=scores.calibration,
        seed=seed,
        command=command,
        versions=scores.versions,
        machine=scores.machine,
        uniform4=Baseline(uniform_plan(scores.model, [s.module for s in scores.modules]).nbytes),
    )


def problem(
    scores: Scores, size: Size, menu: Sequence[Format] | None = None
) -> tuple[list[Item], int]:
    """The knapsack that `build` solves: an item for each module and one for the rest; its bytes."""
    model, modules = scores.model, [scored.module for scored in scores.modules]
    budget = size.budget(
        params=parameters(model, modules),
        uniform4=uniform_plan(model, modules).nbytes,
        beside=model.beside_bytes,
    )
    rest = Item("the tensors that are never quantized", (Choice(DENSE, model.fixed_bytes, 0.0),))
    return [rest, *(_item(scored, model.itemsize, menu) for scored in scores.modules)], budget


def choices(scored: Scored, menu: Sequence[Format] | None) -> tuple[Format, ...]:
    """The formats that a module may take, of `menu` or of all that have scores.

    A router takes none that changes more than MOST_FLIPS of its choices, if there is another.
    """
    formats = allowed(scored.module, sorted(scored.scores) if menu is None else menu)
    known = scored.scores
    steady = tuple(f for f in formats if f not in known or (known[f].flips or 0.0) <= MOST_FLIPS)
    return steady or formats


def _item(scored: Scored, itemsize: int, menu: Sequence[Format] | None) -> Item:
    formats = choices(scored, menu)
    shape = scored.module.shape
    of = (Choice(f, f.nbytes(shape, itemsize), scored.loss(f)) for f in formats)
    return Item(scored.module.path, tuple(of))


def planned_modules(scores: Scores, formats: Mapping[str, Format]) -> tuple[Planned, ...]:
    """The modules of `scores` in these formats, by path."""
    itemsize = scores.model.itemsize
    return tuple(
        Planned(s.module, fmt, fmt.nbytes(s.module.shape, itemsize), s.loss(fmt))
        for s in scores.modules
        for fmt in [formats[s.module.path]]
    )


def uniform_plan(model: ModelInfo, modules: Sequence[Module], fmt: Format = UNIFORM4) -> Plan:
    """What stock `mlx_lm.convert` does: `fmt` for every module it fits, the rest left dense.

    A model file may insist on another format for some modules (`Module.stock`).
    """
    planned = []
    for module in modules:
        wanted = module.stock or fmt
        used = wanted if wanted.fits(module.shape) else DENSE
        planned.append(Planned(module, used, used.nbytes(module.shape, model.itemsize), None))
    plan = Plan(model=model, asked=f"uniform {fmt}", budget=0, modules=tuple(planned))
    return replace(plan, budget=plan.nbytes)


def parameters(model: ModelInfo, modules: Sequence[Module]) -> int:
    """Logical parameters; those that are never quantized have the model's item size."""
    fixed = model.fixed_bytes // model.itemsize
    return fixed + sum(prod(module.shape) for module in modules)


def _measured(data: Mapping[str, Any] | None) -> Measured | None:
    return Measured.from_json(data) if data else None
