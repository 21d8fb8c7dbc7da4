"""Gather the facts of a model's card from its folder: optiq/plan.json and optiq/evals.

Both must be of the weights beside them. What was not measured is a fact as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.text import cause
from ..errors import EvalError, UsageError
from ..evals import capability, comparison, metrics, runs
from ..evals.comparison import Compared, ComparedMetric
from ..evals.runs import Run
from ..formats import DENSE, Format
from ..planning.plan import Plan, uniform_plan
from ..quality.statistics import quantiles
from ..sources.beside import SOURCE_CARD
from ..sources.folder import Folder, check_folder, fingerprint
from ..sources.hub import is_repo_id
from .base_model import describe
from .facts import MEASURED, Distance, Facts, MetricScore, RecordFile, UniformBuild
from .options import CardOptions

Rows = Mapping[metrics.Metric, ComparedMetric]

# How far the bytes of a uniform build may be from the model's for both to count as the same size.
SAME_SIZE = 0.01


def gather(folder: Path, options: CardOptions) -> Facts:
    """Everything that the card of the model in `folder` says.

    Raises an OptiqError when the plan or a record is of other weights than the folder's.
    """
    checked = check_folder(folder)
    plan = _plan(checked)
    mark = fingerprint(checked)
    found = _runs(folder, mark)
    finished = {task: run for task, run in found.items() if run.finished}
    uniform, stock = None, {}
    if options.uniform is not None:
        uniform = _uniform(options.uniform, plan)
        stock = _runs(options.uniform, uniform.fingerprint)
    rows, whole = _against(stock, finished)
    return Facts(
        name=options.name or folder.resolve().name,
        repo=options.name if options.name and is_repo_id(options.name) else None,
        base=describe(plan.model, folder / SOURCE_CARD, options.base_model, options.license),
        fingerprint=mark,
        plan=plan,
        scores=tuple(_score(m, found.get(m.task), rows.get(m)) for m in metrics.METRICS),
        capability=capability.of_records({t: run.records for t, run in finished.items()}),
        against_uniform=whole,
        kl=_distance(finished["kl"], plan) if "kl" in finished else None,
        runs={task: RecordFile(run.header, run.sha256()) for task, run in found.items()},
        uniform=uniform,
    )


def _plan(checked: Folder) -> Plan:
    """The plan of the folder, if it is that of the weights in it."""
    path = checked.path / "optiq" / "plan.json"
    try:
        plan = Plan.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UsageError(
            f"{checked.path} has no optiq/plan.json; a card is made of what optiq convert wrote"
        ) from error
    except (OSError, ValueError, RecursionError, AttributeError, UsageError) as error:
        raise UsageError(f"{path} cannot be read ({cause(error)}); convert again") from error
    planned, stored = plan.quantization(), checked.config.get("quantization") or {}
    nbytes = plan.nbytes + plan.model.tower_bytes
    # Towers in 8 bits have entries of their own.
    if _nbytes(checked) != nbytes or planned != {k: v for k, v in stored.items() if k in planned}:
        raise UsageError(
            f"{path} is not the plan of the weights beside it ({_nbytes(checked):,} bytes, planned "
            f"{nbytes:,}); convert again"
        )
    return plan


def _nbytes(checked: Folder) -> int:
    """Bytes of all tensors."""
    return sum(t.end - t.begin for tensors in checked.files.values() for t in tensors.values())


def _runs(folder: Path, mark: str) -> dict[str, Run]:
    """The model's runs by task: a whole one where there is one, else the largest quick look."""
    top = folder / runs.FOLDER
    quick = [path for path in top.glob("limit-*") if path.is_dir()]
    found: dict[str, Run] = {}
    for place in [*sorted(quick, key=_limit), top]:
        for task, run in runs.load(place).items():
            if run.header.fingerprint != mark:
                raise EvalError(
                    f"{run.path} is of another model ({run.header.fingerprint[:12]}, this one is "
                    f"{mark[:12]}); evaluate this one, or remove the file"
                )
            if run.finished or task not in found:
                found[task] = run
    return {task: found[task] for task in metrics.TASKS if task in found}


def _limit(folder: Path) -> int:
    number = folder.name.removeprefix("limit-")
    return int(number) if number.isdecimal() else 0


def _uniform(folder: Path, plan: Plan) -> UniformBuild:
    """The uniform build in `folder`; UsageError if it is not one of the plan's model and size."""
    checked = check_folder(folder)
    fmt = _uniform_format(checked.config.get("quantization") or {}, plan)
    if fmt is None:
        raise UsageError(
            f"{folder} is not what mlx_lm.convert makes of this model with one width; --uniform "
            "takes such a build"
        )
    nbytes = _nbytes(checked)
    if abs(nbytes / plan.nbytes - 1) > SAME_SIZE:
        raise UsageError(
            f"{folder} has {nbytes:,} bytes of tensors and the model {plan.nbytes:,}; --uniform "
            "takes a build of the same size, within 1 %"
        )
    label = f"uniform {fmt.bits}-bit, groups of {fmt.group_size}"
    return UniformBuild(label, nbytes, fingerprint(checked))


def _uniform_format(quantization: Mapping[str, Any], plan: Plan) -> Format | None:
    """The one format in which config.json says that the plan's modules are stored, if it is one."""
    try:
        fmt = Format("affine", quantization["bits"], quantization["group_size"])
        expected = uniform_plan(plan.model, [m.module for m in plan.modules], fmt)
        same = all(
            m.format == DENSE or _stored(quantization, m.module.path) == m.format.config()
            for m in expected.modules
        )
    except (KeyError, TypeError, UsageError):
        return None
    return fmt if same else None


def _stored(quantization: Mapping[str, Any], path: str) -> Any:
    """How config.json says a module is stored; the mode is missing in older files."""
    defaults = {key: quantization[key] for key in ("group_size", "bits")}
    entry = quantization.get(path, defaults)
    return {"mode": "affine", **entry} if isinstance(entry, dict) else entry


def _against(stock: Mapping[str, Run], own: Mapping[str, Run]) -> tuple[Rows, Compared | None]:
    """Of what both were asked alike: the comparison by metric, and of the whole score."""
    both = [
        task
        for task, run in own.items()
        if task in stock and stock[task].finished and stock[task].header.items == run.header.items
    ]
    if not both:
        return {}, None
    compared = comparison.compare({t: stock[t] for t in both}, {t: own[t] for t in both})
    return {row.metric: row for row in compared.metrics}, compared.capability


def _score(metric: metrics.Metric, run: Run | None, row: ComparedMetric | None) -> MetricScore:
    """One metric: its state, and where it is measured its score and the comparison."""
    if run is None:
        return MetricScore(metric)
    if not run.finished:
        done = f"{len(run.records)} of {run.header.items}"
        return MetricScore(metric, f"unfinished, {done} items")
    estimate = metrics.estimate(metric, run.records)
    return MetricScore(metric, MEASURED, run.header.limit, estimate, row)


def _distance(run: Run, plan: Plan) -> Distance:
    kl, top1 = metrics.of_task("kl")
    return Distance(
        kl=metrics.estimate(kl, run.records),
        tail=quantiles([x for record in run.records for x in metrics.values(kl, record)]),
        top1=metrics.estimate(top1, run.records),
        sequences=len(run.records),
        limit=run.header.limit,
        to_base=f"reference {str(plan.model.fingerprint)[:12]}" in run.header.protocol,
    )
