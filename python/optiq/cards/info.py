"""What a model folder is: where it comes from, its formats and bytes, what was measured of it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..base.text import cause
from ..errors import OptiqError, SourceError, UsageError
from ..evals import runs
from ..kv.config import KVConfig
from ..planning.plan import Plan
from ..sources.folder import Folder, check_folder, fingerprint
from .facts import by_format

Json = dict[str, Any]


@dataclass(frozen=True)
class FormatBytes:
    """The modules of one format; what a folder does not say is None."""

    format: str
    modules: int
    nbytes: int | None


@dataclass(frozen=True)
class EvalRun:
    """A benchmark with records in the folder."""

    task: str
    folder: str  # relative to the model's
    done: int
    items: int
    same_weights: bool  # whether the records are of the weights that the folder has now


@dataclass(frozen=True)
class Info:
    """A model folder. `plan` is there if optiq wrote it and it is readable."""

    path: Path
    fingerprint: str
    model_type: str
    nbytes: int  # of all tensors
    file_bytes: int  # of the weight files
    quantized: str | None  # what config.json says in short
    formats: tuple[FormatBytes, ...]
    plan: Plan | None
    evals: tuple[EvalRun, ...]
    kv_configs: tuple[str, ...]
    adapters: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> Json:
        data = asdict(self) | {"path": str(self.path), "plan": None}
        if self.plan:
            data["plan"] = self.plan.to_json()
            del data["plan"]["modules"]
        return data


def info(folder: str | Path) -> Info:
    """What the model folder `folder` is. No weight is read; works for any mlx-lm folder.

    Raises SourceError for anything else.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise SourceError(f"{folder} is not a folder; optiq doctor MODEL checks any kind of model")
    checked = check_folder(path)
    mark = fingerprint(checked)
    notes: list[str] = []
    plan = _plan(path, notes)
    sizes = [t.end - t.begin for tensors in checked.files.values() for t in tensors.values()]
    return Info(
        path=path.resolve(),
        fingerprint=mark,
        model_type=checked.config["model_type"],
        nbytes=sum(sizes),
        file_bytes=sum((path / name).stat().st_size for name in checked.files),
        quantized=_quantized(checked),
        formats=_formats(checked, plan),
        plan=plan,
        evals=tuple(_evals(path, mark, notes)),
        kv_configs=tuple(_kv_configs(path)),
        adapters=tuple(
            str(file.parent.relative_to(path)) or "."
            for file in sorted(path.rglob("adapter_config.json"))
        ),
        notes=tuple(notes),
    )


def _plan(path: Path, notes: list[str]) -> Plan | None:
    file = path / "optiq" / "plan.json"
    if not file.is_file():
        return None
    try:
        return Plan.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, AttributeError, UsageError) as error:
        notes.append(f"optiq/plan.json cannot be read: {cause(error)}")
        return None


def _quantized(checked: Folder) -> str | None:
    how = checked.config.get("quantization")
    if not isinstance(how, dict):
        return None
    mixed = any(isinstance(value, (dict, bool)) for value in how.values())
    widths = f"{how.get('bits')} bits in groups of {how.get('group_size')}"
    return f"{widths}, others for some modules" if mixed else widths


def _formats(checked: Folder, plan: Plan | None) -> tuple[FormatBytes, ...]:
    """From the plan, else what config.json names module by module."""
    if plan:
        return tuple(FormatBytes(str(f.format), f.modules, f.nbytes) for f in by_format(plan))
    how = checked.config.get("quantization")
    if not isinstance(how, dict):
        return ()
    named = Counter[str]()
    for value in how.values():
        if isinstance(value, dict):
            named[f"{value.get('bits')}g{value.get('group_size')}"] += 1
        elif value is False:
            named["not quantized"] += 1
    return tuple(FormatBytes(name, n, None) for name, n in sorted(named.items()))


def _evals(path: Path, mark: str, notes: list[str]) -> list[EvalRun]:
    top = path / runs.FOLDER
    found = []
    for place in [top, *sorted(p for p in top.glob("limit-*") if p.is_dir())]:
        try:
            for task, run in runs.load(place).items():
                same = run.header.fingerprint == mark
                where = str(place.relative_to(path))
                found.append(EvalRun(task, where, len(run.records), run.header.items, same))
        except OptiqError as error:
            notes.append(str(error))
    return found


def _kv_configs(path: Path) -> list[str]:
    found = []
    for file in sorted(path.glob("*.json")):
        try:
            KVConfig.load(file)
            found.append(file.name)
        except OptiqError:
            continue  # another JSON file
    return found
