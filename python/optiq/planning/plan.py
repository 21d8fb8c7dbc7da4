"""From scores and a size to a plan: a format for every module, its bytes and its predicted loss.

Tables in, tables out: no MLX and no files, so that a new size needs seconds and no model. Bytes
count every tensor of the exported folder: codes, scales, biases and all that is never quantized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import fsum, prod
from typing import Any

from ..errors import UsageError
from ..formats import DENSE, UNIFORM4, Format
from ..models.roles import Module, allowed
from .allocation import Choice, Item, allocate
from .scores import Scores, describe_module, module_of, parse
from .size import parse_size

Json = dict[str, Any]

_PROVENANCE = (
    "measured", "selection", "calibration", "seed", "command", "versions", "machine", "uniform4",
)  # fmt: skip


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
class Plan:
    """A format for every quantizable module, and where it comes from (see `to_json`).

    `model` holds name, fingerprint, model_type, dtype, itemsize and fixed_bytes, the bytes of all
    tensors that are never quantized. `asked` is the size as the user wrote it, `budget` its bytes.
    """

    model: Json
    asked: str
    budget: int
    modules: tuple[Planned, ...]
    bound: float | None = None  # proven: no plan within the budget has a smaller predicted KL
    gap: float | None = None
    measured: Json | None = None
    selection: Json | None = None  # what it was chosen from (see selection.py)
    calibration: Json = field(default_factory=dict)
    seed: int = 0
    command: str = ""
    versions: Json = field(default_factory=dict)
    machine: Json = field(default_factory=dict)
    uniform4: Json = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return int(self.model["fixed_bytes"]) + sum(m.nbytes for m in self.modules)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the modules' weights in the source."""
        return sum(prod(m.module.shape) for m in self.modules) * int(self.model["itemsize"])

    @property
    def bpw(self) -> float:
        """Bits of all tensors per logical parameter."""
        return 8 * self.nbytes / _params(self.model, [m.module for m in self.modules])

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
            "model": self.model,
            "budget": {"asked": self.asked, "bytes": self.budget},
            "nbytes": self.nbytes,
            "bpw": self.bpw,
            "objective": {
                "predicted_kl": self.predicted_kl,
                "bound": self.bound,
                "gap": self.gap,
            },
            "modules": [m.to_json() for m in self.modules],
            **{key: getattr(self, key) for key in _PROVENANCE},
        }

    @classmethod
    def from_json(cls, data: Json) -> Plan:
        """Read what `to_json` wrote; UsageError when it is another file or does not add up."""
        if data.get("kind") != "optiq.plan" or data.get("schema") != 1:
            raise UsageError("this is not a plan of this version of optiq; make it with optiq plan")
        try:
            plan = cls(
                model=data["model"],
                asked=data["budget"]["asked"],
                budget=data["budget"]["bytes"],
                modules=tuple(
                    Planned(module_of(m), Format.parse(m["format"]), m["nbytes"], m["kl"])
                    for m in data["modules"]
                ),
                bound=data["objective"]["bound"],
                gap=data["objective"]["gap"],
                **{key: data[key] for key in _PROVENANCE if key in data},
            )
            itemsize = plan.model["itemsize"]
            exact = all(m.nbytes == m.format.nbytes(m.module.shape, itemsize) for m in plan.modules)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"the plan is incomplete ({error!r}); make it again") from error
        if not exact or plan.nbytes != data["nbytes"]:
            raise UsageError("the plan's bytes do not add up; make it again with optiq plan")
        return plan


def build(
    scores: Json,
    size: str = "uniform4",
    menu: Sequence[Format] | None = None,
    *,
    seed: int = 0,
    command: str = "",
    versions: Json | None = None,
    machine: Json | None = None,
) -> Plan:
    """The plan of least predicted KL within `size`, from a parsed sensitivity.json.

    `menu` limits the formats; None stands for all that a module has scores for. Floors are
    constraints. Raises SensitivityError for malformed or missing scores, UsageError for a size
    that cannot be read, BudgetError for one that is too small.
    """
    read = parse(scores)
    model, modules = read.model, [scored.module for scored in read.modules]
    itemsize = int(model["itemsize"])
    uniform4 = uniform_plan(modules, model).nbytes
    items, budget = problem(read, size, menu)
    found = allocate(items, budget)
    planned = []
    for scored in read.modules:
        fmt = found.formats[scored.module.path]
        nbytes = fmt.nbytes(scored.module.shape, itemsize)
        planned.append(Planned(scored.module, fmt, nbytes, scored.loss(fmt)))
    return Plan(
        model=model,
        asked=size,
        budget=budget,
        modules=tuple(planned),
        bound=found.bound,
        gap=found.gap,
        calibration=read.calibration,
        seed=seed,
        command=command,
        versions=versions or read.versions,
        machine=machine or read.machine,
        uniform4={"nbytes": uniform4, "measured": None},
    )


def problem(
    read: Scores, size: str, menu: Sequence[Format] | None = None
) -> tuple[list[Item], int]:
    """The knapsack that `build` solves: an item for each module and one for the rest; its bytes."""
    model, modules = read.model, [scored.module for scored in read.modules]
    itemsize, fixed = int(model["itemsize"]), int(model["fixed_bytes"])
    budget = parse_size(
        size,
        params=_params(model, modules),
        uniform4=uniform_plan(modules, model).nbytes,
        header=int(model.get("header_bytes") or 0),
    )
    items = [Item("the tensors that are never quantized", (Choice(DENSE, fixed, 0.0),))]
    for scored in read.modules:
        shape = scored.module.shape
        choices = (
            Choice(fmt, fmt.nbytes(shape, itemsize), scored.loss(fmt))
            for fmt in allowed(scored.module, sorted(scored.losses) if menu is None else menu)
        )
        items.append(Item(scored.module.path, tuple(choices)))
    return items, budget


def uniform_plan(modules: Sequence[Module], model: Json, fmt: Format = UNIFORM4) -> Plan:
    """What stock `mlx_lm.convert` does: `fmt` for every module it fits, the rest left dense.

    A model file may insist on another format for some modules (`Module.stock`).
    """
    itemsize = int(model["itemsize"])
    planned = []
    for module in modules:
        wanted = module.stock or fmt
        used = wanted if wanted.fits(module.shape) else DENSE
        planned.append(Planned(module, used, used.nbytes(module.shape, itemsize), None))
    plan = Plan(model=model, asked=f"uniform {fmt}", budget=0, modules=tuple(planned))
    return replace(plan, budget=plan.nbytes)


def _params(model: Json, modules: Sequence[Module]) -> int:
    """Logical parameters; those that are never quantized have the model's item size."""
    fixed = int(model["fixed_bytes"]) // int(model["itemsize"])
    return fixed + sum(prod(module.shape) for module in modules)
