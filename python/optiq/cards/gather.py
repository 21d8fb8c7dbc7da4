"""The model card of an exported folder: README.md, of figures that each have a record behind them.

`gather` reads optiq/plan.json and optiq/evals, checks that both are of the weights beside them, and
returns what may be said; report/card.py says it. What was not measured is listed as that.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from ..base.files import whole
from ..base.text import one_line
from ..errors import EvalError, ExportError, UsageError
from ..evals import comparison, metrics, runs
from ..evals.runs import Run
from ..formats import DENSE, Format
from ..planning.plan import Plan, uniform_plan
from ..quality.statistics import CAPABILITY
from ..sources.folder import Folder, check_folder, fingerprint
from . import page as page
from .base_model import describe

Json = dict[str, Any]
Rows = dict[tuple[str, str], Json]

# How far the bytes of a uniform build may be from the model's for both to count as the same size.
SAME_SIZE = 0.01


def write(
    model: str | Path,
    out: str | Path | None = None,
    *,
    name: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    uniform: str | Path | None = None,
    force: bool = False,
) -> tuple[Json, Path]:
    """Write the card of the folder `model` to `out` (default: its README.md), whole or not at all.

    `name`, `base_model`, `license` and `uniform` are those of `gather`. A file that is there is
    replaced only if it is a card as it was written here; `force` replaces any. Returns what the
    card says and where it is.
    """
    folder = Path(model).expanduser()
    path = folder / "README.md" if out is None else Path(out).expanduser()
    if not force:
        _check_replaceable(path)
    facts = gather(folder, name=name, base_model=base_model, license=license, uniform=uniform)
    try:
        text = page.render(facts)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{folder / 'optiq' / 'plan.json'} is incomplete ({error!r}); convert again"
        ) from error
    try:
        with whole(path) as (partial,):
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ExportError(
            f"{path} cannot be written ({error.strerror}); name another file with -o"
        ) from error
    return facts, path


def gather(
    folder: Path,
    *,
    name: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    uniform: str | Path | None = None,
) -> Json:
    """Everything that the card of the model in `folder` says.

    Args:
        name: What the card calls it, such as its hub id (default: the folder's name).
        base_model: The hub id of what it was made from (default: as plan.json has it).
        license: Its licence (default: what the base model's card says, if that can be had).
        uniform: A model folder of stock uniform quantization of the same bytes, with records.

    Raises an OptiqError when the plan or a record is of other weights than the folder's.
    """
    checked = check_folder(folder)
    plan = _plan(checked)
    mark = fingerprint(checked)
    found = _runs(folder, mark)
    base = describe(str(plan.model["name"]), base_model, license)
    stock = None if uniform is None else _uniform(Path(uniform).expanduser(), plan)
    against, whole_score = _against(stock["runs"], found) if stock else ({}, None)
    five = {task: list(found[task].records) for task in CAPABILITY if _measured(found.get(task))}
    complete = len(five) == len(CAPABILITY)
    return {
        "name": name or folder.resolve().name,
        "base": base,
        "fingerprint": mark,
        "plan": _by_format(plan),
        "metrics": [_metric(m, found.get(m.task), against) for m in metrics.METRICS],
        "capability": comparison.capability(five).to_json() if complete else None,
        "against_uniform": whole_score,
        "kl": _kl(found.get("kl"), plan),
        "runs": {task: _provenance(run) for task, run in found.items()},
        "uniform": stock and {key: stock[key] for key in ("label", "nbytes", "fingerprint")},
    }


def _plan(checked: Folder) -> Plan:
    """The plan of the folder, if it is that of the weights in it."""
    path = checked.path / "optiq" / "plan.json"
    try:
        plan = Plan.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UsageError(
            f"{checked.path} has no optiq/plan.json; a card is made of what optiq convert wrote"
        ) from error
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read ({one_line(error)}); convert again") from error
    planned, stored = plan.quantization(), checked.config.get("quantization")
    if _nbytes(checked) != plan.nbytes or planned != stored:
        raise UsageError(
            f"{path} is not the plan of the weights beside it ({_nbytes(checked):,} bytes, planned "
            f"{plan.nbytes:,}); convert again"
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


def _measured(run: Run | None) -> bool:
    return run is not None and run.finished


def _uniform(folder: Path, plan: Plan) -> Json:
    """The label, bytes, fingerprint and runs of a uniform build; UsageError if it is none."""
    checked = check_folder(folder)
    stored: Json = checked.config.get("quantization") or {}
    try:
        fmt = Format("affine", stored["bits"], stored["group_size"])
        expected = uniform_plan([m.module for m in plan.modules], plan.model, fmt)
        same = all(
            m.format == DENSE or _stored(stored, m.module.path) == m.format.config()
            for m in expected.modules
        )
    except (KeyError, TypeError, UsageError):
        same = False
    if not same:
        raise UsageError(
            f"{folder} is not what mlx_lm.convert makes of this model with one width; --uniform "
            "takes such a build"
        )
    nbytes, mark = _nbytes(checked), fingerprint(checked)
    if abs(nbytes / plan.nbytes - 1) > SAME_SIZE:
        raise UsageError(
            f"{folder} has {nbytes:,} bytes of tensors and the model {plan.nbytes:,}; --uniform "
            "takes a build of the same size, within 1 %"
        )
    label = f"uniform {fmt.bits}-bit, groups of {fmt.group_size}"
    return {"label": label, "nbytes": nbytes, "fingerprint": mark, "runs": _runs(folder, mark)}


def _stored(quantization: Json, path: str) -> Any:
    """How config.json says a module is stored; the mode is missing in older files."""
    defaults = {key: quantization[key] for key in ("group_size", "bits")}
    entry = quantization.get(path, defaults)
    return {"mode": "affine", **entry} if isinstance(entry, dict) else entry


def _against(stock: Mapping[str, Run], own: Mapping[str, Run]) -> tuple[Rows, Json | None]:
    """Of what both were asked alike: the comparison by task and metric, and of the whole score."""
    both = [
        task
        for task, run in own.items()
        if _measured(run)
        and _measured(stock.get(task))
        and run.header.items == stock[task].header.items
    ]
    if not both:
        return {}, None
    compared = comparison.compare({t: stock[t] for t in both}, {t: own[t] for t in both})
    rows = {(row["task"], row["metric"]): row for row in compared["metrics"]}
    return rows, compared["capability"]


def _metric(metric: metrics.Metric, run: Run | None, against: Rows) -> Json:
    """One metric: its state, and where it is measured its score and the comparison."""
    row: Json = {"task": metric.task, "metric": metric.name, "label": metric.label}
    row |= {"main": metric.main, "scale": metric.scale, "limit": None, "estimate": None}
    row |= {"state": "not measured", "against_uniform": None}
    if run is not None and not run.finished:
        row["state"] = f"unfinished, {len(run.records)} of {run.header.items} items"
    elif run is not None:
        row["state"], row["limit"] = "measured", run.header.limit
        row["estimate"] = metrics.estimate(metric, run.records).to_json()
        row["against_uniform"] = against.get((metric.task, metric.name))
    return row


def _kl(run: Run | None, plan: Plan) -> Json | None:
    """The distribution of a finished KL run, as plan.json's `measured`, but with an interval."""
    if run is None or not run.finished:
        return None
    kl, top1 = metrics.of_task("kl")
    per_token = [x for record in run.records for x in metrics.values(kl, record)]
    return {
        "kl": metrics.estimate(kl, run.records).to_json() | metrics.quantiles(per_token),
        "top1": metrics.estimate(top1, run.records).to_json(),
        "sequences": len(run.records),
        "limit": run.header.limit,
        "to_base": f"reference {str(plan.model['fingerprint'])[:12]}" in run.header.protocol,
    }


def _provenance(run: Run) -> Json:
    kept = ("protocol", "data_sha256", "items", "limit", "seed", "versions")
    header = asdict(run.header)
    return {key: header[key] for key in kept} | {"file_sha256": run.sha256()}


def _by_format(plan: Plan) -> Json:
    """plan.json without its modules, but what they come to by format."""
    stated = plan.to_json()
    del stated["modules"]
    groups: dict[Format, list[Any]] = defaultdict(list)
    for module in plan.modules:
        groups[module.format].append(module)
    rows = [
        {
            "format": str(fmt),
            "roles": sorted({m.module.role.value for m in groups[fmt]}),
            "modules": len(groups[fmt]),
            "weights": sum(prod(m.module.shape) for m in groups[fmt]),
            "nbytes": sum(m.nbytes for m in groups[fmt]),
        }
        for fmt in sorted(groups, key=lambda fmt: (fmt == DENSE, fmt))
    ]
    return {**stated, "formats": rows}


def _check_replaceable(path: Path) -> None:
    """Raise UsageError unless `path` does not exist or is a card that nobody changed."""
    if not path.exists() and not path.is_symlink():
        return
    try:
        ours = path.is_file() and page.is_unchanged(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours:
        raise UsageError(
            f"{path} exists and was not written, or was changed since, by optiq card; name another "
            "file with -o, or replace it with --force"
        )
